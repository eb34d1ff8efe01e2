"""Claims and counts hold between processes, and end with them however they end."""

import subprocess
import sys

import pytest

from harness import config, lock, start

OTHER = """
import sys
from pathlib import Path
from harness import lock
{body}
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Start a process that does `body` and then waits; its folder for temporary files is ours."""
    monkeypatch.setattr(lock.tempfile, "tempdir", str(tmp_path))
    started = []

    def begin(body):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER.format(body=body)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=config.REPOSITORY,
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
    first = lock.Beside()
    second = other("beside = lock.Beside()")
    third = other("beside = lock.Beside()")
    third.kill()
    third.wait()
    late = other("beside = lock.Beside(); assert beside.most() == 2")  # the third one is gone
    assert first.most() == 2
    first.end()
    assert first.most() == 2
    for process in (second, late):
        process.kill()
        process.wait()
    assert lock.Beside().most() == 0


def test_every_process_of_a_machine_has_its_own_gpu(other, monkeypatch):
    other("assert lock.slot(2) == 0")
    monkeypatch.setattr(lock, "_slots", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert start._device(divided=True) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert start._device(divided=True) == {"CUDA_VISIBLE_DEVICES": "7"}  # it keeps its own
    assert start._device(divided=False) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert start._device(divided=True) == {}
    for _, stream in lock._slots:
        stream.close()
