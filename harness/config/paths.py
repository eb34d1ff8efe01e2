"""Where the package, its configuration files (conf/) and its small model lie."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent
ASSETS_DIR = PACKAGE / "assets"
INSTALLED = (PACKAGE / "conf").is_dir()  # from a wheel, which holds conf inside the package
CONF_DIR = (PACKAGE if INSTALLED else REPOSITORY) / "conf"

LAUNCHERS = {  # Hydra's, and the extras of pyproject.toml that they come with
    "joblib": "joblib",
    "ray": "ray",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
}


def options(group: str) -> list[str]:
    """Return the names of the options of a group of conf/, or of Hydra's launchers."""
    if group == "hydra/launcher":
        return ["basic", *LAUNCHERS]
    return [path.stem for path in (CONF_DIR / group).glob("*.yaml")]
