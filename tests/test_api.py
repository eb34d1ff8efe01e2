"""`from harness import compose, plan, run, collect`: README's block, and what goes wrong."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from synthetic_runs import put

import harness
from harness import collect, compose, plan, run, sweep
from harness.api import RunFailedError
from harness.config.errors import ConfigError
from harness.config.paths import REPOSITORY
from harness.results import run_record
from harness.runs import worker_process
from harness.runs.composition import load


def test_importing_the_package_loads_neither_torch_nor_pandas():
    heavy = ("torch", "pandas", "hydra")
    code = f"import sys, harness; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        harness.colect  # noqa: B018 - the attribute is what is tested


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_sweep_and_an_experiment_are_lists_of_runs():
    assert [run.method.r for run in compose("method=lora", "method.r=1,8")] == [1, 8]
    assert len(compose("experiment=main_seeds")) == 3 + 3 * 13
    (one,) = compose()
    found = plan(one)
    assert found is not None and found.parameters.trainable == 131_072
    assert plan(compose("method=udv", "method.energy=0.9")[0]) is None


@pytest.mark.parametrize("function", [compose, sweep])
def test_a_list_in_place_of_texts_is_refused_by_name(function):
    with pytest.raises(TypeError, match=r"overrides are texts.*not \['method=lora'\]"):
        function(["method=lora"])


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
    before = (run_dir / run_record.FILE_NAME).stat().st_mtime_ns
    record = run(load(run_dir / "config.yaml"))
    assert record["status"] == "finished" and record == run_record.read(run_dir)
    assert (run_dir / run_record.FILE_NAME).stat().st_mtime_ns == before


def test_a_run_that_fails_is_an_exception_that_names_the_log(tmp_path):
    (wrong,) = compose(
        "train.lr=1e30", "train.max_grad_norm=null", "train.steps=3", "train.threads=1",
        "data.context_length=64",
        "train.batch_tokens=512", "data.validation_share=0.003", "data.document_chars=500",
        f"outputs_dir={tmp_path}",
    )  # fmt: skip
    with pytest.raises(RunFailedError, match=r"failed \(nan\).*log\.txt"):
        run(wrong)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no finished run"):
        collect(tmp_path)


AS_BEFORE = """
import json, logging, logging.config, os, signal, sys, threading
import matplotlib, multiprocessing, torch
from multiprocessing import connection, forkserver
from accelerate.state import AcceleratorState, PartialState
from torch.utils.flop_counter import flop_registry

def other_library(*args, **kwargs):
    return 7

flop_registry[torch.ops.aten.addmm_] = other_library  # before harness is imported
torch.set_num_threads(1)
forkserver.set_forkserver_preload(["json"])

def standing():
    return {
        "start method": multiprocessing.get_start_method(allow_none=True),
        "server": [forkserver._forkserver._preload_modules, forkserver._forkserver._forkserver_pid],
        "functions": [forkserver.connect_to_new_process, connection.arbitrary_address],
        "logging": [logging.root.level, list(logging.root.handlers), logging.root.manager.disable],
        "matplotlib": [matplotlib.get_backend(auto_select=False), dict(matplotlib.rcParams)],
        "accelerate": [dict(PartialState._shared_state), dict(AcceleratorState._shared_state)],
        "environment": dict(os.environ),
        "signals": [signal.getsignal(n) for n in signal.valid_signals()],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "generator": torch.get_rng_state().tolist(),
        "formulas": dict(flop_registry),
        "main": sys.modules["__main__"],
        "streams": [sys.stdout, sys.stderr, sys.excepthook, sys.path[:]],
    }

before = standing()
def same(after_what):
    now = standing()
    assert [key for key in before if before[key] != now[key]] == [], after_what

import harness
same("import")
short = ["train.steps=1", "data.document_chars=300", "data.validation_share=0.002",
         "data.test_share=0.002", "data.context_length=32", "train.batch_tokens=64",
         "train.micro_batch=2", "run_name=r", "train.threads=1"]
(one,) = harness.compose(*short, "method.label='1e3'", "experiment_name=x")
same("compose")
assert harness.plan(one).train_flops_per_token > 0
same("plan")
record = harness.run(one)
assert record["status"] == "finished"
same("run")
found = harness.collect("outputs/x")
same("collect")
assert found["method.label"][0] == "1e3" and found["parameters.trainable"][0] == 131_072, found
names = [name for name in sys.modules if name.partition(".")[0] == "plan"]
assert not names
for name in ("plan", "report", "api", "commands.plan", "runs.estimate", "runs.worker"):
    __import__(f"harness.{name}")
    assert all(callable(getattr(harness, f)) for f in harness.__all__)
    names = {getattr(harness, f).__name__.rpartition(".")[2] for f in harness.__all__}
    assert names == set(harness.__all__)
print("as before")
"""


@pytest.mark.slow
def test_a_notebooks_process_is_left_as_it_was(tmp_path):
    """Import, compose, plan, run and collect; another library has a formula of its own, too."""
    script = tmp_path / "notebook.py"
    script.write_text(AS_BEFORE)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "svg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("as before")


IN_THREADS = """
import multiprocessing, os, sys, threading
from multiprocessing import connection, forkserver
from harness import compose, run

def standing():
    return [
        multiprocessing.get_start_method(allow_none=True), sys.modules["__main__"],
        dict(os.environ), forkserver.connect_to_new_process, connection.arbitrary_address,
    ]

short = ["train.steps=1", "data.document_chars=300", "data.validation_share=0.002",
         "data.test_share=0.002", "data.context_length=32", "train.batch_tokens=64",
         "train.micro_batch=2", "train.threads=1", "method=lora"]
runs = [compose(*short, f"run_name=r{i}", f"seed={i}")[0] for i in range(2)]
before, ended = standing(), []
threads = [
    threading.Thread(target=lambda one=one: ended.append(run(one)["status"])) for one in runs
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert ended == ["finished"] * 2, ended
print([one == other for one, other in zip(before, standing())])
"""


@pytest.mark.slow
def test_runs_from_two_threads_leave_the_process_as_it_was(tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(IN_THREADS)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([True] * 5)


def test_two_threads_do_not_start_workers_at_once():
    """The second waits, and does not take the first one's settings for the caller's."""
    inside, first_is_in, first_is_out = [threading.Event() for _ in range(3)]
    before = multiprocessing.get_start_method(allow_none=True), dict(os.environ)

    def second():
        first_is_in.wait(60)
        with worker_process._our_multiprocessing():
            inside.set()
            first_is_out.wait(60)

    thread = threading.Thread(target=second)
    thread.start()
    with worker_process._our_multiprocessing():
        first_is_in.set()
        early = inside.wait(0.5)
    first_is_out.set()
    thread.join(60)
    assert inside.is_set() and not early
    assert (multiprocessing.get_start_method(allow_none=True), dict(os.environ)) == before


def test_plan_is_the_function_whatever_is_imported():
    """Python sets a package's attribute to each submodule that is imported, harness.plan too."""
    for line in (
        "import harness.plan", "from harness import plan", "import harness.commands.plan",
        "import importlib; importlib.import_module('harness.plan')", "import harness.api",
    ):  # fmt: skip
        code = f"{line}\nimport harness\nprint(harness.plan.__module__, harness.plan.__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["harness.api", "plan"], (line, done.stderr)


def test_text_in_a_table_stays_text(tmp_path):
    """Labels that pandas' reader of CSV takes for a number or for nothing, in runs on disk."""
    labels = {1: "NA", 2: "1e3", 4: "007", 8: "nan"}
    for r, label in labels.items():
        run_dir = put(tmp_path, f"r{r}", r=r)
        record = json.loads((run_dir / run_record.FILE_NAME).read_text())
        record["method"] |= {"label": label, "lr": None if r > 1 else 0.01}
        run_record.write(run_dir, record)
    found = collect(tmp_path).sort_values("method.rank")
    assert list(found["method.label"]) == list(labels.values())
    assert list(found["method.rank"]) == list(labels)  # numbers, as every row has one
    assert found["quality.test.perplexity"].dtype == "float64"
    assert found["quality.test.perplexity"].notna().all()
    assert list(found["method.lr"].isna()) == [False, True, True, True]

    record["method"]["rank"] = "full"
    run_record.write(run_dir, record)
    assert sorted(collect(tmp_path)["method.rank"]) == ["1", "2", "4", "full"]
