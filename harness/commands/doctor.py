"""`harness doctor`: what this machine has, and what would be slow or missing on it.

    harness doctor

Nothing is downloaded and nothing is run. The lines under "What to know" are those to act on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from harness.config.errors import ConfigError
from harness.system import network
from harness.system.console import command
from harness.system.machine import usable_cores

GIB = 2**30
CACHE_DIR = ".cache"  # data.cache_dir of conf/, below the working directory
# What an extra of pyproject.toml is for.
EXTRAS = {
    "dashboard": "harness dashboard",
    "tensorboard": "tracker=tensorboard",
    "trackio": "tracker=trackio",
    "nlg": "evaluate=generate, harness score",
    "notebook": "the notebook's tests",
    "joblib": "hydra/launcher=joblib",
    "ray": "hydra/launcher=ray",
    "submitit": "hydra/launcher=submitit_slurm",
    "quantised": "model.quantize, optimizer=adamw_8bit",
    "smollm2": "model=smollm2_135m",
}


@command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if arguments:
        raise ConfigError(f"harness doctor {arguments[0]}: it takes no arguments")
    advice: list[str] = []
    for section, lines in (
        ("Machine", machine(advice)),
        ("Packages", packages(advice)),
        ("Data and models", stores(advice)),
    ):
        print(f"{section}\n" + "\n".join(f"  {name:16} {value}" for name, value in lines) + "\n")
    print("What to know")
    print("\n".join(f"  - {line}" for line in advice) or "  - nothing that would be in the way")
    return 0


def machine(advice: list[str]) -> Iterator[tuple[str, str]]:
    """Cores, memory, bf16 and GPUs; appends to `advice` what would be slow."""
    import torch

    from harness.results import environment

    has = environment.hardware()
    yield "CPU", f"{has['cpu']}, {usable_cores()} usable of {os.cpu_count()} cores"
    if "memory_bytes" in has:
        yield "memory", f"{has['memory_bytes'] / GIB:.1f} GiB"
    native = environment.cpu_has_bf16()
    yield "bf16 on the CPU", "yes" if native else "no"
    if not native and not torch.cuda.is_available():
        advice.append(
            "this CPU has no bf16 instructions: train.precision=bf16 would be tens of times slower "
            "than fp32, which train.precision=auto takes"
        )
    if not torch.cuda.is_available():
        yield "GPU", "none"
        advice.append(
            "no GPU: gpt2_mini (4.3 M parameters) takes about a minute a run; for larger models "
            "see harness plan model=gpt2 … before you start one"
        )
        if torch.version.cuda is None and Path("/proc/driver/nvidia").is_dir():
            advice.append("there is an NVIDIA driver, but this torch was built without CUDA")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield f"GPU {index}", f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, {bf16}"
    if torch.cuda.device_count() > 1:
        advice.append(
            "several GPUs: launch.num_processes=N divides a run's batch over N of them; a sweep "
            "gives each of its parallel runs one (hydra/launcher=joblib)"
        )


def packages(advice: list[str]) -> Iterator[tuple[str, str]]:
    """Versions of what moves numbers, and which extras are installed."""
    from harness.results import environment

    yield from environment.versions().items()
    missing = [extra for extra in EXTRAS if not _has_extra(extra)]
    yield "extras", ", ".join(extra for extra in EXTRAS if extra not in missing) or "none"
    if missing:
        uses = "; ".join(f"{extra} ({EXTRAS[extra]})" for extra in missing)
        advice.append(f"extras that are not installed (pip install -e '.[NAME]'): {uses}")
    if importlib.util.find_spec("pycocoevalcap") and not shutil.which("java"):
        advice.append("no Java: METEOR of generated text is left out, and said so in the table")


def _has_extra(extra: str) -> bool:
    """Whether every package of an extra of pyproject.toml is installed."""
    try:
        requirements = [Requirement(text) for text in requires("peft-harness") or []]
    except PackageNotFoundError:  # a checkout that was not installed
        return False
    wanted = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
    for requirement in wanted:
        try:
            version(requirement.name)
        except PackageNotFoundError:
            return False
    return bool(wanted)


def stores(advice: list[str]) -> Iterator[tuple[str, str]]:
    """The hub, its cache, the harness's own cache and the free disk."""
    reachable = network.is_reachable()
    state = "reachable" if reachable else "not reachable; what is in its cache can be used"
    if os.environ.get("HF_HUB_OFFLINE"):
        state = "not asked (HF_HUB_OFFLINE is set)"
    yield "hub", state
    for kind in ("models", "datasets"):
        yield f"{kind} cached", ", ".join(network.cached(kind)) or "none"
    if not reachable:
        advice.append(
            "no hub: model=gpt2_mini and data=kjv need none; other models need model.path, or to "
            "have been downloaded before"
        )
    yield "own cache", f"{size_of(Path(CACHE_DIR)) / GIB:.2f} GiB in {CACHE_DIR} (safe to delete)"
    free = shutil.disk_usage(".").free
    yield "free disk", f"{free / GIB:.1f} GiB here"
    if free < 5 * GIB:
        advice.append("less than 5 GiB of disk are free: checkpoints of large models may not fit")


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; what cannot be read counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            total += path.lstat().st_size if path.exists() else 0
    return total
