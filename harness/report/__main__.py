"""python -m harness.report OUTPUTS/EXPERIMENT: everything there is to say of its finished runs."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.config import nearest
from harness.report import summary


def main(arguments: list[str]) -> int:
    """The command line; returns its exit status: 2 for no such folder, and runs not to compare."""
    folder = Path(arguments[0]) if len(arguments) == 1 else None
    if folder is None:
        print("usage: python -m harness.report OUTPUTS/EXPERIMENT", file=sys.stderr)
        return 2
    if not folder.is_dir():
        there = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        print(f"error: no folder {folder}; {nearest(folder.name, there)}", file=sys.stderr)
        return 2
    return 0 if summary.show(folder, full=True) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
