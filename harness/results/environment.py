"""Where a result was made: commit, versions and hardware."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness.config.errors import ConfigError
from harness.config.paths import REPOSITORY
from harness.config.run_config import RunConfig
from harness.system.machine import usable_cores

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "tokenizers",
    "hydra-core", "numpy", "peft-harness", "schedulefree", "bitsandbytes",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Return environment.{commit, versions, hardware} of result.json."""
    return {"commit": commit(), "versions": versions(), "hardware": hardware()}


def commit() -> str | None:
    """Commit of the harness's own sources, `-dirty` if a tracked file differs; None outside git.

    A package that was installed within somebody else's repository is not of that one's commit.
    """
    try:
        _git("ls-files", "--error-unmatch", "harness/__init__.py")
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a number."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def precision(requested: str) -> str:
    """fp32 or bf16; `auto` is bf16 on a GPU that has it, and fp32 on a CPU.

    There bf16 pays for wide models only: at width 256 fp32 is as fast.
    """
    if requested != "auto":
        return requested
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def precision_of(run: RunConfig) -> str:
    """fp32 or bf16, what `run` comes to here.

    Raises:
        ConfigError: bf16 weights with fp32 products.
    """
    resolved = precision(run.train.precision)
    if run.model.frozen_dtype == "bf16" and resolved == "fp32":
        raise ConfigError(
            f"model.frozen_dtype=bf16: train.precision={run.train.precision} is fp32 here, whose "
            "products need fp32 weights; set train.precision=bf16"
        )
    return resolved


def mixed_precision(chosen: str) -> str:
    """Return what Accelerate calls fp32 ("no") or bf16 in its configuration."""
    return {"fp32": "no", "bf16": "bf16"}[chosen]


def precision_warning(chosen: str) -> str | None:
    """What to say of bf16 on a CPU that has no instructions for it."""
    if chosen != "bf16" or torch.cuda.is_available() or cpu_has_bf16():
        return None
    return (
        "train.precision=bf16: this CPU has no bf16 instructions (avx512_bf16, amx_bf16 or Arm's "
        "bf16), and without them bf16 is tens of times slower than fp32"
    )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 by itself; unknown systems count as having it."""
    cpu_info = Path("/proc/cpuinfo")
    if not cpu_info.is_file():
        return True
    return bool(re.search(r"^(flags|Features)\s*:.*bf16", cpu_info.read_text(), re.MULTILINE))


def hardware() -> dict[str, Any]:
    """Return the processor, its cores, the memory and accelerators of this machine."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.is_file() else None
    machine: dict[str, Any] = {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine
