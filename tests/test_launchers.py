"""Sweeps by other launchers give the basic one's numbers, bit for bit (make test-launchers)."""

import pytest

from harness import results

pytestmark = pytest.mark.launchers
SWEEP = [
    "-m", "method=lora", "method.r=1,2", "seed=0,1", "train.steps=6", "evaluate.every=3",
    "data.validation_share=0.003", "data.test_share=0.003", "data.context=64",
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
        for run_dir, result in results.collect(folder)
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
        for _, result in results.collect(tmp_path / "outputs" / launcher)
    ]
    assert max(beside) >= 1 and "measured while other runs shared the machine" in done.stdout
    again = harness(*SWEEP, *chosen, f"experiment_name={launcher}")
    assert again.returncode == 0 and again.stdout.count("already finished") == 4


def test_a_failure_under_joblib_is_local(harness, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    bad = ["-m", "method=full", "train.lr=1e-3,1e18", *SWEEP[5:]]
    done = harness(*bad, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 1 and "1 of 2 runs failed" in done.stderr
    statuses = [r["status"] for _, r in results.collect(tmp_path / "outputs" / "scratch")]
    assert sorted(statuses) == ["failed", "finished"]
