"""PEFT's own common tests over `udv` and over the fused LoRA layer (make test-peft).

The tests come with the source distribution of the installed PEFT release, which pip downloads once.
They run on small models of plain PyTorch layers and Conv1D, with configurations of ours. Those that
cannot apply are named below with the reason; nothing else is left out.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import peft
import pytest

from harness.config import REPOSITORY
from harness.methods.lora_layer import FusedLinear, fuse
from harness.methods.udv import UDVConfig

PARAMETERS = "test_name, model_id, config_cls, config_kwargs"


class FusedLoraConfig(peft.LoraConfig):
    """A LoRA configuration that lets PEFT build the fused layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fuse(self)


CASES = [
    ("udv d", "MLP", UDVConfig, {"target_modules": ["lin0"], "rank": 4}),
    ("udv d, residual kept", "MLP", UDVConfig, {"target_modules": ["lin0"], "residual": "keep"}),
    ("udv udv", "MLP", UDVConfig, {"target_modules": ["lin0"], "rank": 4, "train": "udv"}),
    ("udv u, two layers", "MLP", UDVConfig, {"target_modules": ["lin0", "lin1"], "train": "u"}),
    (
        "udv d, a module saved",
        "MLP",
        UDVConfig,
        {"target_modules": ["lin0"], "rank": 4, "modules_to_save": ["lin1"]},
    ),
    ("udv v, Conv1D", "EmbConv1D", UDVConfig, {"target_modules": ["conv1d", "emb"], "train": "v"}),
    ("udv d, embedding", "EmbConv1D", UDVConfig, {"target_modules": ["emb"], "rank": 3}),
    ("fused LoRA", "MLP", FusedLoraConfig, {"target_modules": ["lin0"]}),
    ("fused LoRA, two layers", "MLP", FusedLoraConfig, {"target_modules": ["lin0", "lin1"]}),
    (
        "fused LoRA, a module saved",
        "MLP",
        FusedLoraConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    ("fused LoRA, Conv1D", "EmbConv1D", FusedLoraConfig, {"target_modules": ["conv1d"]}),
    (
        "fused LoRA, rsLoRA",
        "MLP",
        FusedLoraConfig,
        {"target_modules": ["lin0"], "use_rslora": True},
    ),
]
TRUNCATED = "the adapter truncates the weight, and so is not the base at its start"
CANNOT_APPLY = {  # (case, test) -> reason
    (case, test): TRUNCATED
    for case in ("udv d", "udv udv", "udv d, a module saved", "udv d, embedding")
    for test in ("test_disable_adapters", "test_disable_adapters_with_merging")
}


def sources() -> ModuleType:
    """PEFT's module of tests, downloaded where it is not there yet."""
    folder = REPOSITORY / ".cache" / "peft-suite" / peft.__version__
    tests = folder / "peft_suite_sources"
    if not tests.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = ["--no-deps", "--no-binary", "peft", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *wanted]
        subprocess.run([*command, f"peft=={peft.__version__}"], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            inside = Path(archive.name.removesuffix(".tar.gz")) / "tests"
            members = [m for m in packed.getmembers() if Path(m.name).is_relative_to(inside)]
            packed.extractall(folder, members, filter="data")
        (folder / inside).rename(tests)
    sys.path.insert(0, str(folder))
    if importlib.util.find_spec("diffusers") is None:  # which tests of images use, none of these
        stub = ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore
        sys.modules["diffusers"] = stub
    return importlib.import_module("peft_suite_sources.test_custom_models")


theirs = sources()
_plain_false = theirs.set_init_weights_false


def _away_from_the_start(config_cls: type, kwargs: dict) -> dict:
    """PEFT's tests want adapters that already change something; `udv` does so by truncation."""
    if issubclass(config_cls, UDVConfig):
        return {**kwargs, "residual": "drop", "rank": 0.2}
    return _plain_false(peft.LoraConfig, kwargs)


theirs.set_init_weights_false = _away_from_the_start


def _with_our_cases(name: str, test):
    """One of PEFT's tests, with our configurations in the place of PEFT's."""

    @functools.wraps(test)
    def ours(self, *arguments, **named):
        reason = CANNOT_APPLY.get((named["test_name"], name))
        if reason:
            pytest.skip(reason)
        named["config_kwargs"] = copy.deepcopy(named["config_kwargs"])
        return test(self, *arguments, **named)

    marks = [mark for mark in test.pytestmark if mark.args[:1] != (PARAMETERS,)]
    ours.pytestmark = [*marks, pytest.mark.parametrize(PARAMETERS, CASES).mark]
    return ours


class TestOurs(theirs.TestPeftCustomModel):
    """PEFT's tests over configurations, without those of one method of its own."""


for _name, _test in inspect.getmembers(theirs.TestPeftCustomModel, inspect.isfunction):
    if _name.startswith("test_"):
        _marks = getattr(_test, "pytestmark", [])
        _runs = any(mark.args[:1] == (PARAMETERS,) for mark in _marks)
        setattr(TestOurs, _name, _with_our_cases(_name, _test) if _runs else None)


def test_the_fused_layer_is_what_runs():
    model = theirs.MockTransformerWrapper.from_pretrained("MLP")
    adapted = peft.get_peft_model(model, FusedLoraConfig(target_modules=["lin0"]))
    assert isinstance(adapted.base_model.model.lin0, FusedLinear)
    assert adapted.base_model.model.lin0._fusable() == "default"
