"""PEFT's own common tests over `udv` and over the fused LoRA layer (make test-peft).

The tests come with the source distribution of the installed PEFT release, which pip downloads once.
They run with configurations of ours: those that PEFT runs over a list of configurations on small
models of plain layers and Conv1D, and those of language models on a tiny GPT-2 and a tiny Llama.
CANNOT_APPLY names those of them that do not apply, with the reason. Left out are tests that PEFT
has for one method of its own (its other tests of these classes).
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
import torch
import transformers

from harness.config.paths import REPOSITORY
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
} | {
    (case, "merge_layers_nan"): "it damages weights by the names that PEFT's own methods have"
    for case in ("udv d, residual kept", "udv udv")
}
CANNOT_APPLY["udv d, residual kept", "merge_layers_multi"] = (
    "its second adapter starts as the base, so that both merged are the first alone"
)


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
common = importlib.import_module("peft_suite_sources.testing_common")
_plain_false = theirs.set_init_weights_false
_away = False  # whether adapters of the test at hand must already change something


def _away_from_the_start(config_cls: type, kwargs: dict) -> dict:
    """PEFT's tests want adapters that are not the identity, which no field of `udv` says."""
    global _away
    if issubclass(config_cls, UDVConfig):
        _away = True
        return kwargs
    return _plain_false(peft.LoraConfig, kwargs)


def _get_peft_model(*arguments, **named):
    """PEFT's, with what `udv` trains moved where the test wants it away from its start."""
    model = peft.get_peft_model(*arguments, **named)
    if _away:
        draw = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and ".udv_" in name:
                noise = torch.rand(parameter.shape, generator=draw).to(parameter)
                parameter.data *= 1 + noise
    return model


for module in (theirs, common):
    module.set_init_weights_false = _away_from_the_start
    module.get_peft_model = _get_peft_model


@pytest.fixture(autouse=True)
def from_the_start():
    global _away
    _away = False


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


# Of a tiny GPT-2 and a tiny Llama: what the adapter does in `generate`, in a batch of several
# adapters, with checkpointing and in half precision. Starred: away from the identity.
LANGUAGE_MODELS = {
    "GPT-2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=100, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    ),
    "Llama": transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
    ),
}  # fmt: skip
LANGUAGE_TESTS = [
    "generate", "generate_pos_args", "generate_half_prec", "prepare_for_training", "training",
    "training_gradient_checkpointing", "training_layer_indexing", "delete_adapter",
    "load_model_low_cpu_mem_usage", "save_pretrained*", "save_pretrained_selected_adapters*",
    "merge_layers*", "merge_layers_multi*", "merge_layers_nan*", "merge_layers_fp16",
    "mixed_adapter_batches*", "generate_with_mixed_adapter_batches_and_beam_search*",
    "unload_adapter*", "disable_adapter*", "weighted_combination_of_adapters*",
    "inference_safetensors", "get_base_model_state_dict",
]  # fmt: skip
LANGUAGE_CASES = {
    "udv d, residual kept": (UDVConfig, {"rank": 8, "residual": "keep"}),
    "udv udv": (UDVConfig, {"rank": 8, "train": "udv"}),
    "fused LoRA": (FusedLoraConfig, {}),
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The folder of a model by its name."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in LANGUAGE_MODELS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return lambda name: str(folder / name)


class TestLanguageModels(common.PeftCommonTester):
    """PEFT's tests over language models."""

    transformers_class = transformers.AutoModelForCausalLM
    torch_device = "cpu"

    def prepare_inputs_for_testing(self):
        ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @pytest.mark.parametrize("name", LANGUAGE_TESTS)
    @pytest.mark.parametrize("case", LANGUAGE_CASES)
    @pytest.mark.parametrize("model", LANGUAGE_MODELS)
    def test_of_peft(self, language_model, model, case, name):
        if reason := CANNOT_APPLY.get((case, name.strip("*"))):
            pytest.skip(reason)
        config_cls, kwargs = LANGUAGE_CASES[case]
        targets = ["c_attn"] if model == "GPT-2" else ["q_proj", "v_proj"]
        kwargs = {"target_modules": targets, "task_type": "CAUSAL_LM"} | kwargs
        if name.endswith("*"):
            kwargs = _away_from_the_start(config_cls, kwargs)
        more = {"raises_err": False} if name == "generate_pos_args" else {}
        test = getattr(self, f"_test_{name.strip('*')}")
        test(language_model(model), config_cls, copy.deepcopy(kwargs), **more)


def test_the_fused_layer_is_what_runs():
    model = theirs.MockTransformerWrapper.from_pretrained("MLP")
    adapted = peft.get_peft_model(model, FusedLoraConfig(target_modules=["lin0"]))
    assert isinstance(adapted.base_model.model.lin0, FusedLinear)
    assert adapted.base_model.model.lin0._fusable() == "default"
