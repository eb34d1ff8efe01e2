"""Claims and counts hold between processes, and end with them however they end."""

import os
import socket
import subprocess
import sys

import pytest

from harness.config import paths
from harness.config.errors import ConfigError
from harness.runs import worker_process
from harness.system import lock, scratch

OTHER = """
import sys
from pathlib import Path
from harness.system import lock
{body}
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Start a process that does `body` and then waits; its folder for temporary files is ours."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    started = []

    def begin(body):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER.format(body=body)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=paths.REPOSITORY,
            env={"TMPDIR": str(tmp_path), "PATH": ""},
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_claim_is_exclusive_until_its_holder_is_gone(other, tmp_path):
    mine = lock.claim(tmp_path)
    assert mine is not None
    mine.release()
    process = other(f"assert lock.claim(Path({str(tmp_path)!r}))")
    assert lock.claim(tmp_path) is None
    assert f"process {process.pid} on " in lock.holder(tmp_path)
    process.kill()
    process.wait()
    again = lock.claim(tmp_path)
    assert again is not None
    again.release()


def test_runs_beside_one_another_are_counted_at_their_most(other):
    first = lock.ConcurrentRuns()
    second = other("beside = lock.ConcurrentRuns()")
    third = other("beside = lock.ConcurrentRuns()")
    third.kill()
    third.wait()
    late = other(
        "beside = lock.ConcurrentRuns(); assert beside.most() == 2"
    )  # the third one is gone
    assert first.most() == 2
    first.end()
    assert first.most() == 2
    for process in (second, late):
        process.kill()
        process.wait()
    assert lock.ConcurrentRuns().most() == 0


def test_every_process_of_a_machine_has_its_own_gpu(other, monkeypatch):
    other("assert lock.slot(2) == 0")
    monkeypatch.setattr(lock, "_slots", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert worker_process._device(divided=True) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert worker_process._device(divided=True) == {"CUDA_VISIBLE_DEVICES": "7"}  # it keeps its own
    assert worker_process._device(divided=False) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert worker_process._device(divided=True) == {}
    for _, stream in lock._slots:
        stream.close()


# ------------------------------------------------------------------------- whose the folder is


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files, with the name that the runs' folder will have in it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path, tmp_path / f"peft-harness-{os.getuid()}"


def linked(folder):
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def dangling(folder):
    folder.symlink_to(folder.parent / "nowhere")


def open_to_others(folder):
    folder.mkdir()
    folder.chmod(0o777)


def of_another(folder):
    if os.getuid():
        pytest.skip("only root can make a folder of another user")
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (linked, "a link"),
        (dangling, "a link"),
        (open_to_others, "mode 0777"),
        (of_another, "another user (uid 12345)"),
        (lambda folder: folder.write_text(""), "no folder"),
    ],
)
def test_a_folder_that_another_user_may_have_made_is_refused(
    temporary, monkeypatch, capsys, made, wrong
):
    _, folder = temporary
    made(folder)
    with pytest.raises(PermissionError) as told:
        scratch.machine_folder()
    assert wrong in str(told.value) and str(folder) in str(told.value)
    assert lock.concurrent_runs() is None  # the run goes on, and its result does not say 0
    assert "not counted" in capsys.readouterr().err
    monkeypatch.setattr(lock, "_slots", [])
    with pytest.raises(ConfigError, match="GPUs cannot be divided"):  # two on one would be silent
        lock.slot(2)
    assert not list((folder.parent / "elsewhere").glob("*"))


def test_the_runtime_folder_comes_first_if_it_is_ours(temporary, monkeypatch, tmp_path):
    before, _ = temporary
    runtime = tmp_path / "runtime"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert scratch.machine_folder().parent == before  # there is none
    runtime.mkdir(mode=0o755)
    assert scratch.machine_folder().parent == before  # it is open to others
    runtime.chmod(0o700)
    assert scratch.machine_folder().parent == runtime
    assert scratch.machine_folder().stat().st_mode & 0o777 == 0o700


def test_a_socket_has_a_short_path(temporary, monkeypatch):
    """Where TMPDIR is longer than a socket's path may be, it is elsewhere, in a folder of ours."""
    before, _ = temporary
    long = before / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    path = scratch.socket_path()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert not path.parent.is_relative_to(long) and not list(long.iterdir())
    assert scratch.not_ours(path.parent) is None
    monkeypatch.setattr(scratch, "SOCKET_BYTES", 5)
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter path"):
        scratch.socket_path()
