"""`python -m harness.compress` is `harness compress` now."""

import sys

from harness.commands.cli import program_formerly

if __name__ == "__main__":
    sys.exit(program_formerly("compress", "compress"))
