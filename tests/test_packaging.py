"""The sdist and the wheel: what they hold, and the harness from a wheel, far from any sources."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import SHORT

from harness.config.paths import ASSETS_DIR, CONF_DIR, REPOSITORY
from harness.results import run_record

pytestmark = pytest.mark.slow
LEFT = ["outputs/main/x/result.json", ".cache/tokens/x.bin", ".venv/x.py", "harness/__pycache__/x"]


def run(*command, **options):
    """What a command says; its complaint in the message where it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist, and a wheel of that, from the sources beside what runs and tests leave."""
    folder = tmp_path_factory.mktemp("built")
    ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().split()]
    source = folder / "source"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".git", *ignored))
    for name in LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("a run left this")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, sdist)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def files(folder):
    """Relative paths of the files of a source folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in str(path)}


def test_the_sdist_has_the_project_and_nothing_that_runs_leave(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("LICENSE", "README.md", "Makefile", "constraints.txt", "experiments/README.md"):
        assert wanted in names
    for folder in ("conf", "tests", "experiments", "harness", "hydra_plugins"):
        assert {f"{folder}/{name}" for name in files(REPOSITORY / folder)} <= names
    assert not names & set(LEFT)
    assert not [name for name in names if name.startswith(("outputs", ".cache", ".venv"))]


def test_the_wheel_has_the_package_its_configuration_and_the_plugins(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    package, plugins = (files(REPOSITORY / name) for name in ("harness", "hydra_plugins"))
    wanted = {f"harness/{name}" for name in package}
    wanted |= {f"hydra_plugins/{name}" for name in plugins}
    wanted |= {f"harness/conf/{name}" for name in files(CONF_DIR)}
    assert names - about == wanted
    assert {"harness/py.typed", "harness/conf/config.yaml"} <= wanted
    assert f"harness/assets/gpt2_mini/{next(ASSETS_DIR.rglob('*.safetensors')).name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in about)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel and, behind it, what the project depends on.

    It is in somebody else's repository, as a .venv often is.
    """
    project = tmp_path_factory.mktemp("project")
    author = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    run("git", "init", "--quiet", project)
    run("git", "-C", project, *author, "commit", "--quiet", "--allow-empty", "--message", "theirs")
    folder = project / ".venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[1])
    paths = {"base": str(folder), "platbase": str(folder)}
    (packages,) = {Path(sysconfig.get_path(name, vars=paths)) for name in ("purelib", "platlib")}
    # A .pth file that is found by a .pth file is not read: the sources stay out of it.
    behind = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "dependencies.pth").write_text("\n".join(behind))
    return python, packages


def test_the_harness_runs_from_a_wheel_in_an_empty_folder(installed, tmp_path):
    python, packages = installed
    there = {path: path.stat().st_mtime_ns for path in packages.rglob("*") if path.is_file()}
    program = python.with_name("harness")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def do(*command):
        return run(*command, cwd=tmp_path, env=env)

    assert Path(do(python, "-c", "import harness; print(harness.__file__)").strip()) == (
        packages / "harness" / "__init__.py"
    )
    shown = do(program, "method=lora", "method.r=4", "--cfg", "job")
    assert "r: 4" in shown and shown == do(
        python, "-m", "harness", "method=lora", "method.r=4", "--cfg", "job"
    )
    assert "131,072" in do(program, "count", "method=lora", "method.r=8")
    table = do(program, "-m", "method=none,lora", *SHORT)
    assert "131,072" in table
    records = [record for _, record in run_record.collect(tmp_path / "outputs" / "scratch")]
    assert [record["status"] for record in records] == ["finished"] * 2
    for record in records:
        assert record["environment"]["commit"] is None  # not theirs
        assert record["environment"]["versions"]["peft-harness"]
    do(python, "-m", "harness.report", "outputs/scratch")
    assert (tmp_path / "outputs" / "scratch" / "report" / "index.html").is_file()

    # What a user adds, and what a search finds, is in the user's own folder.
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\nexperiment_name: own\ntrain: {lr: 0.5}\n"
    )
    assert "lr: 0.5" in do(program, "--config-dir", "mine", "experiment=own", "--cfg", "job")
    code = (
        "from harness.config import rates as r\nprint(r.own_path('x'), r.path_of('gpt2_mini_kjv'))"
    )
    shipped = packages / "harness" / "conf" / "rates" / "gpt2_mini_kjv.yaml"
    assert do(python, "-c", code).split() == ["conf/rates/x.yaml", str(shipped)]
    (tmp_path / "conf" / "rates").mkdir(parents=True)
    (tmp_path / "conf" / "rates" / "gpt2_mini_kjv.yaml").touch()
    assert do(python, "-c", code).split()[1] == "conf/rates/gpt2_mini_kjv.yaml"

    after = {path: path.stat().st_mtime_ns for path in packages.rglob("*") if path.is_file()}
    new = {path for path in after if there.get(path) != after[path]}
    assert not {path for path in new if path.suffix != ".pyc"}
