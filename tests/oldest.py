"""Print the lower bounds of pyproject.toml as pip's constraints: what `make test-oldest` installs.

    python tests/oldest.py > oldest.txt

torch and what the package index has but the default tests do without (launchers, lm_eval, linters)
are left out: torch stays the pinned one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def bounds(pyproject: Path = PYPROJECT) -> Iterator[tuple[str, str]]:
    """(package, lowest version) of every requirement that names one, each once."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in dict.fromkeys(text for requirements in asked for text in requirements):
        if match := re.match(r"([\w.-]+)>=([\d.]+)", text):
            yield match[1], match[2]


if __name__ == "__main__":
    for package, version in bounds():
        if package != "torch":
            print(f"{package}=={version}")
