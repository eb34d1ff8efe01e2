"""`python -m harness.export` is `harness export` now."""

import sys

from harness.commands.cli import program_formerly

if __name__ == "__main__":
    sys.exit(program_formerly("export", "export"))
