"""Sweeps by other launchers give the basic one's numbers, bit for bit (make test-launchers)."""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from harness.config.paths import REPOSITORY
from harness.results import run_record

pytestmark = pytest.mark.launchers
SWEEP = [
    "-m", "method=lora", "method.r=1,2", "seed=0,1", "train.steps=6", "evaluate.interval=3",
    "data.validation_share=0.003", "data.test_share=0.003", "data.context_length=64",
    "train.batch_tokens=512", "train.micro_batch=2", "train.threads=1",
]  # fmt: skip
LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.remote.num_cpus=1"],
    "submitit_local": ["hydra.launcher.cpus_per_task=1"],
}


def outcomes(folder):
    return {
        run_dir.name: (
            result["quality"],
            (run_dir / "adapter" / "adapter_model.safetensors").read_bytes(),
        )
        for run_dir, result in run_record.collect(folder)
        if result["status"] == "finished"
    }


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_changes_where_runs_run_and_nothing_else(harness, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    plain = harness(*SWEEP, "experiment_name=basic")
    assert plain.returncode == 0, plain.stderr
    chosen = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    done = harness(*SWEEP, *chosen, f"experiment_name={launcher}")
    assert done.returncode == 0, done.stderr
    expected = outcomes(tmp_path / "outputs" / "basic")
    assert len(expected) == 4 and outcomes(tmp_path / "outputs" / launcher) == expected
    beside = [
        result["environment"]["runs_beside"]
        for _, result in run_record.collect(tmp_path / "outputs" / launcher)
    ]
    assert max(beside) >= 1 and "measured while other runs used the machine" in done.stdout
    again = harness(*SWEEP, *chosen, f"experiment_name={launcher}")
    assert again.returncode == 0 and again.stdout.count("already finished") == 4


SEARCH = [
    "search", "search=halving", "search=grid", "method=lora", "method.r=1,2",
    "train.lr=1e-3,1e-2,3e-2", "train.steps=9", "evaluate.interval=3", *SWEEP[6:],
]  # fmt: skip


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_a_search_of_two_workers_is_the_search_of_one(harness, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    assert harness(*SEARCH, "experiment_name=basic").returncode == 0
    chosen = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    done = harness(*SEARCH, *chosen, f"experiment_name={launcher}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {}
    for name in ("basic", launcher):
        with (tmp_path / "outputs" / name / "search/trials.csv").open() as stream:
            rows[name] = [row | {"study": ""} for row in csv.DictReader(stream)]
    assert rows[launcher] == rows["basic"] and len(rows["basic"]) == 6
    assert sorted(int(row["steps"]) for row in rows["basic"]) == [3] * 4 + [9] * 2
    assert outcomes(tmp_path / "outputs" / launcher) == outcomes(tmp_path / "outputs" / "basic")
    beside = [
        result["environment"]["runs_beside"]
        for _, result in run_record.collect(tmp_path / "outputs" / launcher)
    ]
    assert max(beside) >= 1


def test_a_failure_under_joblib_is_local(harness, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    bad = ["-m", "method=full", "train.lr=1e-3,1e18", *SWEEP[5:]]
    done = harness(*bad, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 1 and "1 of 2 runs failed" in done.stderr
    statuses = [r["status"] for _, r in run_record.collect(tmp_path / "outputs" / "scratch")]
    assert sorted(statuses) == ["failed", "finished"]


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_order_under_joblib_leaves_checkpoints_to_go_on_from(harness, tmp_path, whole_group):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = [*SWEEP, "train.steps=40", "evaluate.interval=40"]
    chosen = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    controller = subprocess.Popen(
        [sys.executable, "-m", "harness", *sweep, *chosen], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    folder = tmp_path / "outputs" / "scratch"
    while len(list(folder.glob("*/metrics.jsonl"))) < 2 or not all(
        run_record.last_metrics(path.parent).get("step", 0) > 2
        for path in folder.glob("*/metrics.jsonl")
    ):
        assert controller.poll() is None, controller.communicate()
        time.sleep(0.05)
    if whole_group:  # a Ctrl-C
        os.killpg(controller.pid, signal.SIGINT)
    else:
        controller.send_signal(signal.SIGTERM)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 130, errors
    cut = [run_dir for run_dir, _ in run_record.collect(folder) if run_record.can_resume(run_dir)]
    assert len(cut) >= 2
    assert all(run_record.read(run_dir)["status"] == "interrupted" for run_dir in cut)
    again = harness(*sweep)
    assert again.returncode == 0, again.stderr
    whole = harness(*sweep, "experiment_name=basic")
    assert whole.returncode == 0, whole.stderr
    assert outcomes(folder) == outcomes(tmp_path / "outputs" / "basic")
    assert all(run_record.read(run_dir)["run"]["resumed_at"] for run_dir in cut)


def test_a_ray_cluster_that_is_there_is_used_by_its_address(harness, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    ray = Path(sys.executable).parent / "ray"
    started = subprocess.run(
        [ray, "start", "--head", "--num-cpus=2", "--port=0", f"--temp-dir={tempfile.mkdtemp()}",
         "--include-dashboard=false", "--disable-usage-stats"],  # its sockets need a short path
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    try:
        cluster = [
            "hydra/launcher=ray", "+hydra.launcher.ray.remote.num_cpus=1",
            "++hydra.launcher.ray.init.address=auto",
            "++hydra.launcher.ray.init.object_store_memory=null",
        ]  # fmt: skip
        done = harness(*SWEEP, "method.r=1", *cluster, "experiment_name=ray")
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run([ray, "stop", "--force"], capture_output=True, timeout=60)
    assert harness(*SWEEP, "method.r=1", "experiment_name=basic").returncode == 0
    expected = outcomes(tmp_path / "outputs" / "basic")
    assert len(expected) == 2 and outcomes(tmp_path / "outputs" / "ray") == expected
