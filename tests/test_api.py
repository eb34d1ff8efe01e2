"""`from harness import compose, plan, run, collect`: README's block, and what goes wrong."""

import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import harness
from harness import collect, compose, plan, results, run
from harness.api import RunFailedError
from harness.composition import load
from harness.config import REPOSITORY, ConfigError


def test_importing_the_package_loads_neither_torch_nor_pandas():
    heavy = ("torch", "pandas", "hydra")
    code = f"import sys, harness; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        harness.colect  # noqa: B018 - the attribute is what is tested


def test_the_block_of_the_readme_does_what_it_says(tmp_path):
    text = (REPOSITORY / "README.md").read_text("utf-8")
    (block,) = re.findall(r"### From Python\n.*?```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "notebook.py"  # a process of its own: workers start from any main module
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = collect(tmp_path / "outputs" / "scratch")
    assert sorted(found["method.rank"]) == [1, 8]
    for name in found["name"]:
        assert name in done.stdout


def test_a_sweep_and_an_experiment_are_lists_of_runs():
    assert [run.method.r for run in compose("method=lora", "method.r=1,8")] == [1, 8]
    assert len(compose("experiment=main_seeds")) == 3 + 3 * 12
    (one,) = compose()
    found = plan(one)
    assert found is not None and found.parameters.trainable == 131_072
    assert plan(compose("method=udv", "method.energy=0.9")[0]) is None


def test_options_of_ones_own_are_found_in_another_folder(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [lora, _self_]\nr: 3\nlabel: mine\n")
    own = f"hydra.searchpath=[file://{tmp_path}]"
    assert [(one.method.label, one.method.r) for one in compose(own, "method=mine")] == [
        ("mine", 3)
    ]
    assert [one.method.r for one in compose(own, "method=mine", "method.r=1,2")] == [1, 2]
    with pytest.raises(ConfigError, match="method=mine"):
        compose("method=mine")


def test_a_plan_leaves_a_notebooks_own_settings():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, threads = Accelerator(cpu=True, mixed_precision="bf16"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert plan(compose("train.threads=2", "train.precision=fp32")[0])
        assert torch.get_num_threads() == 1
        assert accelerator.mixed_precision == "bf16" and accelerator.num_processes == 1
        assert accelerator.device.type == "cpu"
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_name=mine", "seed=0,1"], "two different runs of this sweep are named"),
        (["method=lroa"], "did you mean 'lora'"),
        (["method=lora", "method.r=1,0"], r"method\.r=0"),
        (["sede=1"], "did you mean 'seed'"),
    ],
)
def test_mistakes_are_config_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(*overrides)


def test_a_finished_run_is_not_done_again(finished_run):
    run_dir = finished_run("method=lora")
    before = (run_dir / results.FILE_NAME).stat().st_mtime_ns
    record = run(load(run_dir / "config.yaml"))
    assert record["status"] == "finished" and record == results.read(run_dir)
    assert (run_dir / results.FILE_NAME).stat().st_mtime_ns == before


def test_a_run_that_fails_is_an_exception_that_names_the_log(tmp_path):
    (wrong,) = compose(
        "train.lr=1e30", "train.clip=null", "train.steps=3", "train.threads=1", "data.context=64",
        "train.batch_tokens=512", "data.validation_share=0.003", "data.document_chars=500",
        f"outputs_dir={tmp_path}",
    )  # fmt: skip
    with pytest.raises(RunFailedError, match=r"failed \(nan\).*log\.txt"):
        run(wrong)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no finished run"):
        collect(tmp_path)
