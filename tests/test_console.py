"""A command whose reader has gone, as `head` does."""

import os
import subprocess
import sys

import pytest

from harness.config import REPOSITORY

COMMAND = """
import sys
from harness.console import ended
def main():
    sys.stdin.read()
    print("more")
    return 0
sys.exit(ended(main))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])  # it is known at the end, or when it prints
def test_a_reader_that_leaves_early_gets_no_traceback(unbuffered):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()  # now it prints
    assert process.stderr.read() == b"" and process.wait(60) == 1
