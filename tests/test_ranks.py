"""Two ranks over gloo do what one process does with twice the accumulation."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.config.paths import CONF_DIR, REPOSITORY
from harness.results import run_record

SAME = [
    "train.steps=4", "evaluate.every=2", "data.validation_share=0.003", "data.test_share=0.003",
    "data.context=64", "train.batch_tokens=512", "train.micro_batch=2", "train.threads=1",
]  # fmt: skip
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch",
    "--config_file", str(CONF_DIR / "accelerate" / "cpu.yaml"), "--main_process_port", "0",
]  # fmt: skip


def metrics(tmp_path, name):
    rows = run_record.read_metrics(tmp_path / "outputs" / "scratch" / name)
    return [{k: v for k, v in row.items() if k != "train/step_seconds"} for row in rows]


UDV = ["method=udv", "method.train=udv", "method.rank=16", "method.orthogonality=0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [["method=lora"], pytest.param(UDV, marks=pytest.mark.faults)])
def test_two_ranks_take_the_steps_of_one(harness, tmp_path, method):
    one = harness(*method, *SAME, "run_name=one")
    two = harness(*method, *SAME, "run_name=two", "launch.num_processes=2")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    mine, theirs = metrics(tmp_path, "one"), metrics(tmp_path, "two")
    assert len(mine) == len(theirs) == 7  # one writer
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-5), key
    runs = dict(run_record.collect(tmp_path / "outputs" / "scratch"))
    processes = {p.name: result["environment"]["processes"] for p, result in runs.items()}
    assert processes == {"one": 1, "two": 2}
    nlls = [result["quality"]["test"]["nll_nats"] for result in runs.values()]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-5)


def start(tmp_path, *command):
    return subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.faults
def test_accelerate_launch_by_hand_is_one_run_and_no_sweep(tmp_path):
    run = [*ACCELERATE, "-m", "harness", *SAME, "run_name=hand"]
    by_hand = start(tmp_path, *run)
    out, errors = by_hand.communicate(timeout=300)
    assert by_hand.returncode == 0, errors
    assert out.count("finished in") == 1  # said once
    _, result = next(run_record.collect(tmp_path / "outputs" / "scratch"))
    assert result["status"] == "finished" and result["environment"]["processes"] == 2
    again = start(tmp_path, *run)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and out.count("already finished") == 1
    sweep = start(tmp_path, *ACCELERATE, "-m", "harness", "-m", *SAME, "seed=0,1")
    _, errors = sweep.communicate(timeout=300)
    assert sweep.returncode != 0
    assert "harness sweep launch.num_processes=2" in errors and "seed=" in errors


def ranks_of(folder):
    """Process ids of the ranks that work in a run's folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                words = stream.read().split(b"\0")
        except OSError:
            continue
        if b"harness.runs.worker" in words and str(folder).encode() in words:
            found.append(int(pid))
    return sorted(found)


def started(tmp_path, run_dir, steps, *arguments):
    """The program as a process of its own, whose run has taken so many steps."""
    controller = start(tmp_path, sys.executable, "-m", "harness", *arguments)
    while run_record.last_metrics(run_dir).get("step", 0) < steps:
        assert controller.poll() is None, controller.communicate()
        time.sleep(0.01)
    return controller


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_leaves_none_behind(tmp_path):
    long = [*SAME, "train.steps=100000", "run_name=long", "launch.num_processes=2"]
    long.append(f"outputs_dir={tmp_path}/outputs")
    run_dir = tmp_path / "outputs" / "scratch" / "long"
    controller = started(tmp_path, run_dir, 3, *long)
    os.kill(ranks_of(run_dir)[-1], signal.SIGKILL)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 1 and "failed (killed)" in errors
    assert not ranks_of(run_dir)
    assert run_record.read(run_dir)["failure"]["class"] == "killed"


@pytest.mark.faults
def test_ranks_that_are_told_to_stop_write_a_checkpoint_and_go_on(harness, tmp_path):
    run = [*SAME, "train.steps=40", "evaluate.every=40", "launch.num_processes=2"]
    run += [f"outputs_dir={tmp_path}/outputs"]
    assert harness(*run, "run_name=whole").returncode == 0
    run_dir = tmp_path / "outputs" / "scratch" / "cut"
    controller = started(tmp_path, run_dir, 3, *run, "run_name=cut")
    controller.send_signal(signal.SIGTERM)
    controller.communicate(timeout=60)
    assert controller.returncode == 130 and run_record.can_resume(run_dir)
    assert not ranks_of(run_dir)
    done = harness(*run, "run_name=cut")
    assert done.returncode == 0, done.stderr
    assert run_record.read(run_dir)["run"]["resumed_at"]
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")
