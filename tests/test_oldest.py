"""Lower bounds are what `make test-oldest` installs."""

import re
from importlib.metadata import requires

from oldest import bounds

from harness.config import REPOSITORY


def test_every_lower_bound_is_among_the_oldest_versions():
    """As the installed package's own metadata have them, where pip has written them down."""
    found = dict(bounds())
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    asked = dict(re.findall(r'"([\w.-]+)>=([\d.]+)', text))
    for key in ("hatchling",):  # build-system, too
        asked[key] = found[key]
    assert found == asked and len(found) > 30
    names = {re.split(r"[^\w.-]", line)[0] for line in requires("peft-harness") or []}
    assert {"transformers", "peft", "accelerate", "datasets"} <= found.keys() & names


def test_pinned_versions_are_within_the_bounds():
    text = (REPOSITORY / "constraints.txt").read_text("utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==([\d.]+)", text, re.MULTILINE))
    for name, lowest in bounds():
        if version := pinned.get(name.lower().replace("_", "-")):
            one, other = ([int(n) for n in v.strip(".").split(".")] for v in (version, lowest))
            assert one >= other, name
