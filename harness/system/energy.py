"""Joules that the machine has taken, where it counts them: CPU packages by RAPL, GPUs by NVML.

RAPL (running average power limit) is Linux's /sys/class/powercap: a counter in microjoules for
every CPU package and for its memory, which starts again at `max_energy_range_uj`. NVML counts
millijoules of a whole GPU. Both count whatever else runs on the machine, too, and nothing of the
power supply, disks and fans.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
COUNTED = re.compile(
    r"package-\d+(-die-\d+)?|dram"
)  # of RAPL's zones; core and uncore are within a package
MICRO, MILLI = 1e-6, 1e-3


@dataclass
class Counter:
    """A zone of RAPL, and what it has counted since it was first read."""

    name: str
    folder: Path
    range_uj: int  # after which it starts again
    last_uj: int
    joules: float = 0.0

    def read(self) -> float:
        """Joules since the first reading; right if read at least once between two new starts."""
        now = int((self.folder / "energy_uj").read_text("ascii"))
        passed = now - self.last_uj
        self.joules += (passed if passed >= 0 else passed + self.range_uj) * MICRO
        self.last_uj = now
        return self.joules


@dataclass
class Meter:
    """The counters of a machine that can be read, and why others cannot."""

    zones: list[Counter]
    gpus: list[Any]  # handles of NVML
    nvml: Any
    left_out: dict[str, str]  # RAPL or NVML -> why

    @property
    def of(self) -> list[str]:
        """Name what is counted: zones of RAPL, and GPUs."""
        return [zone.name for zone in self.zones] + [f"gpu-{i}" for i in range(len(self.gpus))]

    def read(self) -> float | None:
        """Joules of all counters together, to be compared with another reading; None without any.

        A counter that fails ends all counting, since a sum without it would be another quantity.
        """
        if not self.of:
            return None
        try:
            total = sum(zone.read() for zone in self.zones)
            for gpu in self.gpus:
                total += self.nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) * MILLI
            return total
        except Exception as error:  # whatever it is, a run does not fail of it
            self.left_out["reading"] = " ".join(f"{type(error).__name__}: {error}".split())
            self.zones, self.gpus = [], []
            return None


def meter(gpu_uuids: Sequence[str] = (), powercap: Path = POWERCAP) -> Meter:
    """The counters of this machine's CPU packages, and of the GPUs that are named."""
    left_out: dict[str, str] = {}
    zones = _zones(powercap, left_out)
    nvml, gpus = _gpus(gpu_uuids, left_out) if gpu_uuids else (None, [])
    if gpu_uuids and not gpus and zones:
        zones = []
        left_out["RAPL"] = "the CPU's joules without those of the GPU are not the run's"
    return Meter(zones, gpus, nvml, left_out)


def none(why: str) -> Meter:
    """A meter of nothing, and why."""
    return Meter([], [], None, {"all": why})


def _zones(powercap: Path, left_out: dict[str, str]) -> list[Counter]:
    """RAPL's packages and their memory; none where one of them cannot be read."""
    counters = []
    try:
        # Packages lie beside their zones; intel-rapl-mmio:0 counts a package a second time.
        folders = sorted(powercap.glob("intel-rapl:*"))
        for folder in folders:
            name = (folder / "name").read_text("ascii").strip()
            if COUNTED.fullmatch(name):
                package = folder.name.split(":")[1]
                label = name if name.startswith("package") else f"{name}-{package}"
                limit = int((folder / "max_energy_range_uj").read_text("ascii"))
                now = int((folder / "energy_uj").read_text("ascii"))
                counters.append(Counter(label, folder, limit, now))
    except (OSError, ValueError) as error:
        left_out["RAPL"] = f"{type(error).__name__}: {error}"
        return []
    if not counters:
        reason = "has no CPU package" if powercap.is_dir() else "is not there"
        left_out["RAPL"] = f"{powercap} {reason}"
    return counters


def _gpus(uuids: Sequence[str], left_out: dict[str, str]) -> tuple[Any, list[Any]]:
    """NVML and its handles of the GPUs; no handles where one of them does not count."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        left_out["NVML"] = "pip install nvidia-ml-py"
        return None, []
    except Exception as error:  # NVML's own classes, which are not there without it
        left_out["NVML"] = " ".join(f"{type(error).__name__}: {error}".split())
        return None, []
    return nvml, handles
