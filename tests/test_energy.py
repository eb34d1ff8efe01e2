"""Joules from a tree like Linux's /sys/class/powercap, and from a stand-in for NVML's module."""

import sys
import types

import pytest

from harness.system import energy

ZONES = {  # folder -> name, as a machine with two packages has them
    "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
    "intel-rapl:1": "package-1", "intel-rapl:1:0": "dram", "intel-rapl:2": "psys",
    "intel-rapl-mmio:0": "package-0",
}  # fmt: skip


def tree(folder, start=1_000_000, most=262_143_328_850):
    for zone, name in ZONES.items():
        (folder / zone).mkdir(parents=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "max_energy_range_uj").write_text(f"{most}\n")
        put(folder, zone, start)
    return folder


def put(folder, zone, microjoules):
    (folder / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_their_memory_count_once_and_nothing_within_them(tmp_path):
    meter = energy.meter(powercap=tree(tmp_path))
    assert meter.of == ["package-0", "dram-0", "package-1", "dram-1"] and not meter.left_out
    assert meter.read() == 0
    for zone in ZONES:  # 2, 3, 5 and 7 joules that count; cores, psys and the copy do not
        put(tmp_path, zone, 1_000_000 + 100_000_000)
    for zone, joules in {
        "intel-rapl:0": 2, "intel-rapl:0:1": 3, "intel-rapl:1": 5, "intel-rapl:1:0": 7
    }.items():  # fmt: skip
        put(tmp_path, zone, 1_000_000 + joules * 1_000_000)
    assert meter.read() == pytest.approx(17)
    assert meter.read() == pytest.approx(17)


def test_a_counter_starts_again_at_its_range(tmp_path):
    meter = energy.meter(powercap=tree(tmp_path, start=9_000_000, most=10_000_000))
    put(tmp_path, "intel-rapl:0", 500_000)  # 1 joule to the range, half a joule since
    assert meter.read() == pytest.approx(1.5)
    put(tmp_path, "intel-rapl:0", 4_500_000)
    assert meter.read() == pytest.approx(5.5)


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    meter = energy.meter(powercap=tmp_path / "none")
    assert meter.read() is None and "none is not there" in meter.left_out["RAPL"]
    (tmp_path / "empty").mkdir()
    assert "no CPU package" in energy.meter(powercap=tmp_path / "empty").left_out["RAPL"]
    folder = tree(tmp_path / "half")
    (folder / "intel-rapl:1" / "energy_uj").unlink()
    half = energy.meter(powercap=folder)  # one package alone would be another quantity
    assert half.of == [] and "FileNotFoundError" in half.left_out["RAPL"]
    folder = tree(tmp_path / "later")
    meter = energy.meter(powercap=folder)
    (folder / "intel-rapl:0" / "energy_uj").write_text("no number")
    assert meter.read() is None and meter.read() is None
    assert "ValueError" in meter.left_out["reading"] and meter.of == []


def test_a_gpu_counts_beside_the_packages_or_nothing_does(tmp_path, monkeypatch):
    """No GPU here: this holds the units and the calls against NVML's documentation alone."""
    folder, counted = tree(tmp_path), {"GPU-a": 5000}
    fake = types.ModuleType("pynvml")
    vars(fake).update(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid if uuid in counted else 1 / 0,
        nvmlDeviceGetTotalEnergyConsumption=counted.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = energy.meter(["GPU-a"], folder)
    before = meter.read()
    counted["GPU-a"] += 3000  # millijoules
    put(folder, "intel-rapl:0", 3_000_000)
    assert meter.of[-1] == "gpu-0" and meter.read() - before == pytest.approx(3 + 2)
    without = energy.meter(["GPU-b"], folder)
    assert without.read() is None and "ZeroDivisionError" in without.left_out["NVML"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.meter(["GPU-a"], folder).left_out["NVML"] == "pip install nvidia-ml-py"
