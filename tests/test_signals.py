"""Orders to stop and kills at awkward moments: before a run begins, to a whole group, of ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.config.paths import REPOSITORY
from harness.results import run_record

SHORT = [
    "train.steps=8", "evaluate.interval=4", "data.validation_share=0.003", "data.test_share=0.003",
    "data.context_length=64", "train.batch_tokens=512", "train.micro_batch=2", "train.threads=1",
]  # fmt: skip
RANKS = ["launch.num_processes=2"]


def start(tmp_path, *arguments, extra=""):
    """The program in a session of its own, as a terminal would start it.

    A shell starts what is in its background with SIGINT ignored, which children inherit.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [extra, str(REPOSITORY)]))},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def processes_in(folder):
    """Process ids of all that work in a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{pid}/cwd").readlink() == folder:
                found.append(int(pid))
        except OSError:
            continue
    return found


def none_left(folder, seconds=20):
    end = time.monotonic() + seconds
    while processes_in(folder) and time.monotonic() < end:
        time.sleep(0.1)
    return not processes_in(folder)


def listens(pid):
    """Whether a process of the program has handlers of its own for both orders by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\t(\w+)$", status, re.M)[1], 16)
    return all(caught >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))


def wait_for_steps(controller, run_dir, steps):
    while run_record.last_metrics(run_dir).get("step", 0) < steps:
        assert controller.poll() is None, controller.communicate()
        time.sleep(0.02)


def commands(word):
    """Process ids of the commands with `word` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# Seconds after the start: composing, the server's imports, set-up, training.
MOMENTS = [2.0, 5.5, 0.7, 1.3, 3.0, 4.0, 6.5, 7.5]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(n, m, marks=pytest.mark.faults if n != signal.SIGINT or i > 1 else ())
        for i, m in enumerate(MOMENTS)
        for n in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_an_order_to_the_whole_group_is_one_line_at_any_moment(harness, tmp_path, number, moment):
    long = [*SHORT, "train.steps=100000", "run_name=long"]
    controller = start(tmp_path, *long)
    time.sleep(moment)
    listened = listens(controller.pid)
    os.killpg(controller.pid, number)
    _, errors = controller.communicate(timeout=60)
    assert none_left(tmp_path)
    if controller.returncode < 0:  # Python itself was still starting
        assert not listened
        return
    assert controller.returncode == 130 and "Traceback" not in errors, errors
    found = dict(run_record.collect(tmp_path / "outputs" / "scratch"))
    assert all(result["status"] == "interrupted" for result in found.values())


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_imports_is_started_again(tmp_path):
    controller = start(tmp_path, *SHORT)
    children = Path(f"/proc/{controller.pid}/task/{controller.pid}/children")
    server = None
    while server is None:
        assert controller.poll() is None
        for pid in children.read_text().split():
            if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                server = int(pid)
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(server, signal.SIGKILL)
    out, errors = controller.communicate(timeout=120)
    assert controller.returncode == 0 and "finished in" in out, errors


def test_the_server_has_imported_all_and_its_collector_is_on_again():
    code = (
        "import gc, sys\nfrom harness.runs.forkserver import MODULES\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 10**5, set(MODULES) <= set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True"] * 3, done.stderr


@pytest.mark.faults
def test_a_run_outlives_its_server(tmp_path):
    controller = start(tmp_path, *SHORT, "train.steps=60", "run_name=mine")
    wait_for_steps(controller, tmp_path / "outputs" / "scratch" / "mine", 3)
    for pid in set(commands("forkserver")) & set(processes_in(tmp_path)):
        if f"\nPPid:\t{controller.pid}\n" in Path(f"/proc/{pid}/status").read_text():
            os.kill(pid, signal.SIGKILL)
    out, errors = controller.communicate(timeout=120)
    assert controller.returncode == 0 and "finished in" in out, errors


@pytest.mark.faults
def test_ranks_do_not_outlive_their_launcher_and_are_tried_again(harness, tmp_path):
    run = [*SHORT, *RANKS, "train.steps=40", "evaluate.interval=10"]
    whole = harness(*run, "run_name=whole")
    assert whole.returncode == 0, whole.stderr
    controller = start(tmp_path, *run, "run_name=cut", "retry=1")
    run_dir = tmp_path / "outputs" / "scratch" / "cut"
    wait_for_steps(controller, run_dir, 12)
    (launcher,) = set(commands("accelerate.commands.launch")) & set(processes_in(tmp_path))
    os.kill(launcher, signal.SIGKILL)
    _, errors = controller.communicate(timeout=120)
    assert controller.returncode == 0, errors
    assert none_left(tmp_path)
    cut, expected = (run_record.read(run_dir.parent / name) for name in ("cut", "whole"))
    assert cut["run"]["resumed_at"] == [10] and cut["quality"] == expected["quality"]


@pytest.mark.faults
def test_a_second_ctrl_c_leaves_no_rank_behind(tmp_path):
    endless = ["train.batch_tokens=1048576", "run_name=mine", *RANKS]  # a step takes minutes
    controller = start(tmp_path, *SHORT, *endless)
    run_dir = tmp_path / "outputs" / "scratch" / "mine"
    while not run_record.last_metrics(run_dir):  # validation, after which the step begins
        assert controller.poll() is None, controller.communicate()
        time.sleep(0.05)
    os.killpg(controller.pid, signal.SIGINT)
    time.sleep(0.5)
    assert controller.poll() is None  # the first one lets the step come to its end
    os.killpg(controller.pid, signal.SIGINT)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 130 and "Traceback" not in errors, errors
    assert none_left(tmp_path)
    assert run_record.read(run_dir)["status"] == "interrupted" and not run_record.can_resume(
        run_dir
    )


@pytest.mark.faults
def test_a_group_ctrl_c_has_ranks_write_a_checkpoint(tmp_path):
    run = [*SHORT, *RANKS, "train.steps=100000", "evaluate.interval=100000", "run_name=long"]
    controller = start(tmp_path, *run)
    run_dir = tmp_path / "outputs" / "scratch" / "long"
    wait_for_steps(controller, run_dir, 3)
    os.killpg(controller.pid, signal.SIGINT)
    _, errors = controller.communicate(timeout=60)
    assert controller.returncode == 130 and "Traceback" not in errors, errors
    assert run_record.can_resume(run_dir) and run_record.read(run_dir)["status"] == "interrupted"
    assert none_left(tmp_path)
    other = subprocess.run(
        [sys.executable, "-m", "harness", *run, "launch.num_processes=1", "method.dropout=0.1"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert other.returncode == 2 and "method.dropout: 0.0 there, 0.1 now" in other.stderr


BREAKS = """
import os, sys
if os.environ.get("RANK") == "1" and "-m" in sys.orig_argv and not os.path.exists("broken"):
    import harness.training.loop as train
    accumulate, calls = train.accumulate, 0

    def breaks(*arguments):
        global calls
        calls += 1
        if calls == 3:
            open("broken", "w").close()
            raise {error}
        return accumulate(*arguments)

    train.accumulate = breaks
"""


def broken_rank(tmp_path, error):
    """A folder that makes the second rank raise `error` in its third step, once."""
    folder = tmp_path / "breaks"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BREAKS.format(error=error))
    return str(folder)


@pytest.mark.faults
def test_what_ended_another_rank_is_told(tmp_path):
    extra = broken_rank(tmp_path, 'ValueError("no such thing on this rank")')
    controller = start(tmp_path, *SHORT, *RANKS, "run_name=mine", extra=extra)
    _, errors = controller.communicate(timeout=120)
    assert controller.returncode == 1, errors
    assert "failed (error): ValueError: no such thing on this rank" in errors
    failure = run_record.read(tmp_path / "outputs" / "scratch" / "mine")["failure"]
    assert failure["class"] == "error" and any("Traceback" in line for line in failure["log_tail"])


@pytest.mark.faults
def test_ranks_that_run_out_of_memory_get_half_the_micro_batch(harness, tmp_path):
    assert harness(*SHORT, *RANKS, "run_name=whole").returncode == 0
    extra = broken_rank(tmp_path, 'MemoryError("out of memory")')
    controller = start(tmp_path, *SHORT, *RANKS, "run_name=mine", extra=extra)
    _, errors = controller.communicate(timeout=120)
    assert controller.returncode == 0, errors
    folder = tmp_path / "outputs" / "scratch"
    train = run_record.read(folder / "mine")["train"]
    assert (train["micro_batch_asked"], train["micro_batch"]) == (2, 1)
    mine, whole = (
        [row["train/nll"] for row in run_record.read_metrics(folder / name) if "train/nll" in row]
        for name in ("mine", "whole")
    )
    assert mine == pytest.approx(whole, rel=1e-5)


@pytest.mark.faults
def test_two_controllers_that_run_again_share_the_work(harness, tmp_path):
    sweep = ["-m", "method=lora,none", "seed=0,1,2", *SHORT, "train.steps=4", "rerun=true"]
    assert harness(*sweep).returncode == 0
    both = [start(tmp_path, *sweep) for _ in range(2)]
    told = [controller.communicate(timeout=300) for controller in both]
    assert [controller.returncode for controller in both] == [0, 0], told
    for run_dir, result in run_record.collect(tmp_path / "outputs" / "scratch"):
        assert result["status"] == "finished"
        assert (run_dir / "log.txt").read_text().count("INFO harness: parameters:") == 1
    ends = [out.count("finished in") for out, _ in told]
    assert ends == [4, 4]  # each view tells of all, whoever did them; `none` has no seeds
    assert not any("already finished" in out for out, _ in told)
