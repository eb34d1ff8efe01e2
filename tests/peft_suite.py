"""PEFT's own common tests over `udv` and over the fused LoRA layer (make test-peft).

The tests come with the source distribution of the installed PEFT release, which pip downloads once.
They run with configurations of ours: those of its common mixin on a tiny GPT-2 and a tiny Llama,
those of CLASSES on small models of plain layers and Conv1D. Of the latter, what PEFT runs over a
list of configurations or of methods runs over `udv` and the fused layer, and what it has for LoRA
alone over the fused layer. CANNOT_APPLY names those that do not apply to a configuration, LEFT_OUT
those that run over none, each with the reason. A test that PEFT gains and that is neither run nor
named fails `test_every_test_of_peft_is_run_or_named`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import re
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
_OF_OTHERS = "it is of {}, which is neither"
HUB = "it loads weights from the hub, which this suite does without"
NAME = "it compares the name of PEFT's layer, and ours has one of its own"
LEFT_OUT = {  # CLASS.test -> reason
    f"TestRequiresGrad.test_requires_grad_{name}_{how}_targets": _OF_OTHERS.format(name)
    for name in (
        "adalora", "boft", "fourierft", "hra", "ia3", "lntuning", "loha", "lokr", "miss", "oft",
        "pvera", "randlora", "vblora", "vera",
    )
    for how in ("different", "same")
} | {
    f"TestRequiresGrad.test_requires_grad_ia3_{kind}": _OF_OTHERS.format("ia3")
    for kind in ("conv1d", "conv2d")
} | {
    f"TestPeftCustomModel.test_{name}": _OF_OTHERS.format(of)
    for name, of in {
        "glora_safe_merge_does_not_corrupt_base_layer_on_non_finite_adapter": "glora",
        "gralora_and_hybrid_gralora_parameter_count": "gralora",
        "ia3_grouped_conv_feedforward_merge": "ia3",
        "ia3_safe_merge_does_not_mutate_base_layer_on_non_finite_bias": "ia3",
        "pvera_generator_is_per_adapter": "pvera",
        "pvera_no_generator_seed_means_no_generator": "pvera",
        "pvera_reproducible": "pvera",
        "set_requires_grad_trainable_tokens": "trainable tokens",
        "trainable_tokens_random_init_unmerge_restores_base_weights": "trainable tokens",
    }.items()
} | {
    f"TestPeftCustomModel.test_{name}": HUB
    for name in (
        "delete_adapter_multiple_adapters_with_trainable_token_indices",
        "dora_save_and_load_remapping", "gpt2_dora_merge_and_unload",
        "gpt2_dora_merge_and_unload_safe_merge", "multiple_adapters_automatic_modules_to_save",
        "multiple_adapters_no_needless_copy_modules_to_save",
        "multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
    )
} | {
    "TestDynamicDispatch.test_override_lora_linear": HUB,
    "TestDynamicDispatch.test_custom_lora_layer_issues_warning":
        "its message has the name of the package that PEFT's tests are in",
    "TestLayerRepr.test_repr_lora_conv1d": NAME,
    "TestLayerRepr.test_repr_lora_linear": NAME,
    "TestDefaultTargetModules.test_default_target_modules_osf": _OF_OTHERS.format("osf"),
    "PeftCommonTester.training_prompt_learning_tasks": _OF_OTHERS.format("prompts"),
    "PeftCommonTester.weighted_combination_of_adapters_ia3": _OF_OTHERS.format("ia3"),
    "PeftCommonTester.weighted_combination_of_adapters_lora":
        "weighted_combination_of_adapters, which is run, calls it",
}  # fmt: skip
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
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
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
    module.LoraConfig = FusedLoraConfig  # what a test for LoRA alone makes and compares with


@pytest.fixture(autouse=True)
def from_the_start():
    global _away
    _away = False


METHODS = (UDVConfig, FusedLoraConfig)  # in the place of a list of PEFT's classes
CLASSES = [
    theirs.TestPeftCustomModel, theirs.TestMultiRankAdapter, theirs.TestLayerRepr,
    theirs.TestMultipleActiveAdapters, theirs.TestRequiresGrad, theirs.TestMixedAdapterBatches,
    theirs.TestDynamicDispatch, theirs.TestDefaultTargetModules, theirs.TestPeftFsdpStateDict,
]  # fmt: skip


def _fused(value):
    """A parameter of a test with the fused layer in the place of PEFT's LoRA."""
    if value is peft.LoraConfig:
        return FusedLoraConfig
    if type(value) is peft.LoraConfig:
        value = copy.deepcopy(value)
        fuse(value)
        value.__class__ = FusedLoraConfig
        return value
    return type(value)(map(_fused, value)) if isinstance(value, tuple | list) else value


def _methods_of(value) -> set[type]:
    """PEFT's methods in a parameter of a test."""
    if isinstance(value, tuple | list):
        return set().union(*map(_methods_of, value))
    kind = value if isinstance(value, type) else type(value)
    return {kind} if issubclass(kind, peft.PeftConfig) else set()


def _ours(mark):
    """A mark of one of PEFT's tests, with our configurations in the place of PEFT's."""
    if mark.name != "parametrize":
        return mark
    names, values = mark.args
    if names == PARAMETERS:
        return pytest.mark.parametrize(PARAMETERS, CASES).mark
    if names == "config_cls":
        return pytest.mark.parametrize(names, METHODS).mark
    kept = [one for one in values if peft.LoraConfig in _methods_of(one) or not _methods_of(one)]
    return pytest.mark.parametrize(names, list(map(_fused, kept)), **mark.kwargs).mark


def _adopted(name: str, test):
    """One of PEFT's tests over what is ours; None where it is of other methods alone."""
    theirs_marks = getattr(test, "pytestmark", [])
    marks = [_ours(mark) for mark in theirs_marks]
    lists = any(_methods_of(list(m.args[1])) for m in theirs_marks if m.name == "parametrize")
    if not lists and not re.search(r"\bLoraConfig\b", inspect.getsource(test)):
        return None

    @functools.wraps(test)
    def ours(self, *arguments, **named):
        of = named.get("config_cls")
        case = named.get("test_name") if of is None or "config_kwargs" in named else of.__name__
        if reason := CANNOT_APPLY.get((case, name)):
            pytest.skip(reason)
        for argument in {"config_kwargs", "config0", "config1", "peft_config"} & named.keys():
            named[argument] = copy.deepcopy(named[argument])  # tests change them
        return test(self, *arguments, **named)

    ours.pytestmark = marks
    return ours


class InDoublePrecision(theirs.MockTransformerWrapper):  # type: ignore[name-defined]  # found at run time
    """PEFT's models in float64.

    Under FSDP's hooks the fused layer steps aside for PEFT's own product. The two are equal to
    rounding, which in float32 is above the tolerance for log-probabilities near 0.
    """

    @classmethod
    def from_pretrained(cls, model_id, dtype=torch.float64):
        model = super().from_pretrained(model_id, dtype)
        model.dtype = dtype  # what its inputs are converted to
        return model


NOT_OURS = {}  # CLASS.test -> PEFT's test, which runs over nothing here
for _class in CLASSES:
    _body = {"__doc__": f"PEFT's {_class.__name__} over configurations of ours."}
    if _class is theirs.TestPeftFsdpStateDict:
        _body["transformers_class"] = InDoublePrecision
    for _name, _test in inspect.getmembers(_class, inspect.isfunction):
        if _name.startswith("test_"):
            _key = f"{_class.__name__}.{_name}"
            _body[_name] = None if _key in LEFT_OUT else _adopted(_name, _test)
            if _body[_name] is None:
                NOT_OURS[_key] = _test
    globals()[f"{_class.__name__}OverOurs"] = type(f"{_class.__name__}OverOurs", (_class,), _body)


def test_every_test_of_peft_is_run_or_named():
    """What PEFT's next release adds is run over ours, or is to be looked at."""
    mixin = [
        name.removeprefix("_test_")
        for name, _ in inspect.getmembers(common.PeftCommonTester, inspect.isfunction)
        if name.startswith("_test_")
    ]
    run = {name.strip("*") for name in LANGUAGE_TESTS}
    not_run = set(NOT_OURS) | {f"PeftCommonTester.{name}" for name in mixin if name not in run}
    assert not_run == set(LEFT_OUT) and run <= set(mixin)
    written = [
        kind
        for _, kind in inspect.getmembers(theirs, inspect.isclass)
        if kind.__module__ == theirs.__name__ and kind.__name__.startswith("Test")
    ]
    assert set(written) == set(CLASSES) and len(mixin) > 30


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
    "model_attr", "adapter_name", "prepare_for_training", "load_model_low_cpu_mem_usage",
    "save_pretrained*", "save_pretrained_selected_adapters*",
    "save_pretrained_adapter_name_substring*", "from_pretrained_config_construction",
    "load_multiple_adapters", "add_adapter_no_autocast_adapter_dtype", "merge_layers*",
    "merge_layers_multi*", "merge_layers_nan*", "merge_layers_fp16", "merge_layers_is_idempotent*",
    "safe_merge*", "mixed_adapter_batches*", "generate_with_mixed_adapter_batches_and_beam_search*",
    "generate", "generate_pos_args", "generate_half_prec", "training", "inference_safetensors",
    "training_layer_indexing", "training_gradient_checkpointing", "peft_model_device_map",
    "delete_adapter", "delete_inactive_adapter", "delete_unknown_adapter_raises", "unload_adapter*",
    "weighted_combination_of_adapters*", "disable_adapter*",
    "adding_multiple_adapters_with_bias_raises", "passing_input_embeds_works", "lora_conversion*",
    "get_base_model_state_dict",
]  # fmt: skip
FURTHER = {  # arguments of theirs
    "generate_pos_args": {"raises_err": False},
    "add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
}
LANGUAGE_CASES = {
    "udv d, residual kept": (UDVConfig, {"rank": 8, "residual": "keep"}),
    "udv udv": (UDVConfig, {"rank": 8, "train": "udv"}),
    "fused LoRA": (FusedLoraConfig, {}),
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The folder of a model by its name, and of the same in float64 with a head of its own."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in LANGUAGE_MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        untied = copy.deepcopy(config)
        untied.tie_word_embeddings = False
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(untied)
        model.double().save_pretrained(folder / f"{name} in float64")
    return lambda name: str(folder / name)


class TestLanguageModels(common.PeftCommonTester):  # type: ignore[name-defined]
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
        test = getattr(self, f"_test_{name.strip('*')}")
        # Its tolerance is that of rounding in float64: PEFT's own LoRA misses it in fp32.
        exact = " in float64" * (name == "safe_merge*")
        asked = [language_model(model + exact), config_cls, copy.deepcopy(kwargs)]
        if "test_name" in inspect.signature(test).parameters:
            asked.insert(0, case)
        test(*asked, **FURTHER.get(name, {}))


def test_the_fused_layer_is_what_runs():
    model = theirs.MockTransformerWrapper.from_pretrained("MLP")
    adapted = peft.get_peft_model(model, FusedLoraConfig(target_modules=["lin0"]))
    assert isinstance(adapted.base_model.model.lin0, FusedLinear)
    assert adapted.base_model.model.lin0._fusable() == "default"
