"""`python -m harness.verify` is `harness verify` now."""

import sys

from harness.commands.cli import program_formerly

if __name__ == "__main__":
    sys.exit(program_formerly("verify", "verify"))
