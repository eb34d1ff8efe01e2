"""`python -m harness.serve` is `harness serve` now."""

import sys

from harness.commands.cli import program_formerly

if __name__ == "__main__":
    sys.exit(program_formerly("serve", "serve"))
