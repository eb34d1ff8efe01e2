"""Lower bounds are what `make test-oldest` installs."""

import re
from importlib.metadata import requires

import yaml
from oldest import bounds

from harness.config.paths import REPOSITORY


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


def test_the_workflow_tries_every_python_that_the_package_names_and_every_target_exists():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text("utf-8"))
    versions = workflow["jobs"]["checks"]["strategy"]["matrix"]["python"]
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project) == versions
    assert f'requires-python = ">={versions[0]}"' in project
    assert f'python_version = "{versions[0]}"' in project  # mypy's
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    for target in workflow["jobs"]["versions"]["strategy"]["matrix"]["target"]:
        assert f"\n{target}: " in makefile
