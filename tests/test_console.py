"""A command whose reader has gone, as `head` does."""

import os
import shlex
import subprocess
import sys

import pytest

from harness.config.paths import REPOSITORY
from harness.system.console import busy, reason, tracked

COMMAND = """
import sys
from harness.system.console import ended
def main():
    sys.stdin.read()
    print("more")
    {end}
sys.exit(ended(main))
"""


@pytest.mark.parametrize("end", ["return 0", "sys.exit(0)"])  # as argparse does after --help
@pytest.mark.parametrize("unbuffered", ["", "1"])  # it is known at the end, or when it prints
def test_a_reader_that_leaves_early_gets_no_traceback(unbuffered, end):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(end=end)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()  # now it prints
    assert process.stderr.read() == b"" and process.wait(60) == 1


@pytest.mark.parametrize(("end", "status"), [("return 3", 3), ("sys.exit(2)", 2)])
def test_a_status_is_the_commands_own_with_nobody_to_read(end, status):
    """With its output closed from the start Python has no sys.stdout."""
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(COMMAND.format(end=end))} >&-"
    done = subprocess.run(
        command, shell=True, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY
    )
    assert (done.returncode, done.stderr) == (status, b"")


def test_an_error_of_a_library_is_told_by_its_message():
    """multiprocessing raises OSError with a message alone: neither errno nor strerror."""
    assert reason(OSError("AF_UNIX path too long")) == "AF_UNIX path too long"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == (
        "No such file or directory"
    )
    assert reason(OSError()) == "OSError"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_being_done_is_told_on_a_terminal_alone(monkeypatch, capsys, terminal):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on CI, whose logs are no terminals
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with busy("loading"):
        pass
    assert list(tracked([1, 2], "planning")) == [1, 2]
    told = capsys.readouterr()
    assert told.out == "" and ("loading" in told.err, "planning" in told.err) == (terminal,) * 2
