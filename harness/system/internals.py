"""Private names of other libraries that the harness depends on: all of them, and what for.

A release may rename or remove them without notice. Whatever needs one takes it from here, and gets
a sentence where it is gone. `tests/test_internals.py` tries each against the installed releases
(`make test-newest` against the newest), and that no other module reaches into a library by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class MissingInternalError(ImportError):
    """A library's private name, which the harness needs, is not there in the installed release."""


@dataclass(frozen=True)
class Internal:
    """A private name: the distribution, the module, the dotted name in it, and what it is for."""

    package: str
    module: str
    name: str
    purpose: str

    def find(self) -> Any:
        """Return the object.

        Raises:
            MissingInternalError: the installed release does not have it.
        """
        try:
            value = importlib.import_module(self.module)
            for part in self.name.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError) as error:
            raise MissingInternalError(self.sentence()) from error
        return value

    def sentence(self) -> str:
        """Return the sentence that is said where the private name is gone."""
        try:
            release = f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            release = f"{self.package}, which is not installed,"
        return (
            f"{release} has no {self.module}.{self.name}, used for {self.purpose}; install the "
            "release that constraints.txt names"
        )


FAKE, DISPATCH = "torch._subclasses.fake_tensor", "torch.utils._python_dispatch"
TUNERS = "peft.tuners.tuners_utils"
HYDRA = "hydra._internal"
INTERNALS = (
    Internal("torch", FAKE, "FakeTensor", "memory that is predicted"),
    Internal("torch", FAKE, "FakeTensorMode", "predicting memory and FLOPs without weights"),
    Internal("torch", DISPATCH, "TorchDispatchMode", "counting live tensors and FLOPs"),
    Internal("torch", DISPATCH, "is_traceable_wrapper_subclass", "bytes of quantised weights"),
    Internal("torch", "torch.utils._pytree", "tree_leaves", "tensors in an optimizer's state"),
    Internal("torch", "torch.nn.modules.module", "_has_any_global_hook", "the fused LoRA layer"),
    Internal("peft", "peft.tuners._buffer_dict", "BufferDict", "frozen factors of adapters"),
    Internal(
        "peft", TUNERS, "_maybe_include_all_linear_layers", "target_modules=all-linear"
    ),
    Internal("peft", TUNERS, "_ExcludedModule", "fields that name modules"),
    Internal("peft", "peft", "LoraConfig._register_custom_module", "the fused LoRA layer"),
    Internal("peft", TUNERS, "BaseTuner._replace_module", "the udv tuner"),
    Internal("peft", TUNERS, "BaseTunerLayer._get_embed_scale", "udv on scaled embeddings"),
    Internal("accelerate", "accelerate.state", "AcceleratorState._reset_state", "predictions"),
    Internal(
        "accelerate", "accelerate.state", "AcceleratorState._shared_state", "predictions"
    ),
    Internal("accelerate", "accelerate.state", "PartialState._shared_state", "predictions"),
    Internal(
        "transformers", "transformers", "GPT2LMHeadModel._no_split_modules",
        "the layers that FSDP divides",
    ),
    Internal(
        "hydra-core", f"{HYDRA}.core_plugins.basic_sweeper", "BasicSweeper.split_arguments",
        "the combinations of a sweep",
    ),
    Internal(
        "hydra-core", f"{HYDRA}.config_loader_impl", "ConfigLoaderImpl", "composing from Python"
    ),
    Internal(
        "hydra-core", f"{HYDRA}.utils", "create_config_search_path", "composing from Python"
    ),
    Internal("hydra-core", f"{HYDRA}.utils", "get_args_parser", "the flags of harness run"),
)  # fmt: skip
_BY_NAME = {entry.name: entry for entry in INTERNALS}


def internal(name: str) -> Any:
    """Return a private object by its name in INTERNALS.

    Raises:
        MissingInternalError: the installed release does not have it.
    """
    return _BY_NAME[name].find()


@contextmanager
def accelerate_states_kept() -> Iterator[None]:
    """Put Accelerate's process-wide state back as it was, whatever happens within."""
    names = ("PartialState._shared_state", "AcceleratorState._shared_state")
    states = [internal(name) for name in names]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)


@contextmanager
def prepared_models_kept(accelerator: Any) -> Iterator[None]:
    """Let an `accelerate.Accelerator` forget the models that are prepared within."""
    models = getattr(accelerator, "_models", None)
    if models is None:
        gone = Internal("accelerate", "accelerate", "Accelerator._models", "evaluating the base")
        raise MissingInternalError(gone.sentence())
    count = len(models)
    try:
        yield
    finally:
        del models[count:]


@contextmanager
def attention_implementation(config: Any, name: str) -> Iterator[None]:
    """Let a transformers configuration name another attention function for a while."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
