"""Read the weights of a model or an adapter from files, all of them or none.

`transformers` and PEFT draw at random what a file lacks and pass over what they have no place for,
with a report on standard error. Here both are errors that name the weights.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.constants import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from harness.config.errors import ConfigError
from harness.system.lfs import refuse_pointers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt")
# Causal masks, which older releases of transformers saved as buffers of GPT-2, GPT-Neo and GPT-J.
# The model makes its own.
CAUSAL_MASK = re.compile(r"\.attn(\.attention)?\.(bias|masked_bias|causal_mask)$")
SHOWN = 3  # names of an error message


@dataclass(frozen=True)
class Misfits:
    """What of a model is not in its files, or not as it must be; names are sorted."""

    missing: list[str]  # of the model, in no file: drawn at random
    unexpected: list[str]  # in a file, of no module: left out
    mismatched: list[str]  # of another shape in the file: drawn at random

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    @property
    def random(self) -> list[str]:
        """Weights that are not the file's but drawn at random."""
        return sorted(self.missing + [name.split(" ")[0] for name in self.mismatched])

    def __str__(self) -> str:
        kinds = {
            "missing from the file": self.missing,
            "in the file and not in the model": self.unexpected,
            "of another shape": self.mismatched,
        }
        return "; ".join(
            f"{len(names)} {'is' if len(names) == 1 else 'are'} {kind} ({_some(names)})"
            for kind, names in kinds.items()
            if names
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def load(
    source: str | Path, *, strict: bool = True, **options: Any
) -> tuple[PreTrainedModel, Misfits]:
    """The causal language model of a folder or hub id, and what of it does not come from there.

    `options` are those of `from_pretrained`. Without `strict` what is missing or of another shape
    is drawn at random from torch's generator.

    Raises:
        ConfigError: a file cannot be read, an adapter lies beside the weights, or, with `strict`,
            weights are missing, unexpected or of another shape.
    """
    if "gguf_file" not in options:
        check_files(source)
    refuse_adapter(source, options.get("revision"))
    read: Any = AutoModelForCausalLM.from_pretrained  # typed as if it gave the model alone
    try:
        with _without_report():
            model, info = read(
                str(source), output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except UNREADABLE as error:
        if _is_of_memory(error):
            raise
        raise ConfigError(f"the weights in {source} cannot be read ({_line(error)})") from error
    misfits = Misfits(
        sorted(info["missing_keys"]),
        sorted(k for k in info["unexpected_keys"] if not CAUSAL_MASK.search(k)),
        sorted(
            f"{name} {_shape(stored)}, the model has {_shape(own)}"
            for name, stored, own in info["mismatched_keys"]
        ),
    )
    if strict and misfits:
        raise ConfigError(f"the weights in {source} are not those of its model: {misfits}")
    return model, misfits


# What damaged files make readers raise, beside what `from_pretrained` says of wrong names.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError)


def load_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """`base` with the adapter that PEFT saved in `folder`, in eval mode.

    Raises:
        ConfigError: the adapter cannot be read, or its weights are not those that it must have.
    """
    refuse_pointers(folder.glob("adapter_model.*"))
    try:
        model = PeftModel.from_pretrained(base, str(folder))
        stored = load_peft_weights(str(folder), device="cpu")
    except (*UNREADABLE, ValueError, OSError, KeyError) as error:
        if _is_of_memory(error):
            raise
        raise ConfigError(f"the adapter in {folder} cannot be loaded ({_line(error)})") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    misfits = Misfits(
        sorted(own.keys() - stored.keys()),
        sorted(stored.keys() - own.keys()),
        sorted(
            f"{name} {_shape(stored[name].shape)}, the adapter has {_shape(own[name].shape)}"
            for name in own.keys() & stored.keys()
            if own[name].shape != stored[name].shape
        ),
    )
    if misfits:
        raise ConfigError(f"the weights in {folder} are not those of its adapter: {misfits}")
    return model.eval()


def _is_of_memory(error: BaseException) -> bool:
    """Whether it says that an allocation failed, which is no fault of the file."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


@contextmanager
def _without_report() -> Iterator[None]:
    """Within, transformers' report of what does not fit stays off standard error."""

    def passes(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in ("LOAD REPORT", "seem corrupted"))

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


# --------------------------------------------------------------------------- the files themselves


def check_files(source: str | Path) -> None:
    """Look at the ends of a folder's weight files: they are there, whole and no pointers.

    Takes milliseconds; a source that is no folder passes.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    paths = weight_files(folder)
    refuse_pointers(paths)
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}, which the index of its folder names, is not there")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):  # compares the header with the file's size
                    pass
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{path} is cut short or no safetensors file ({_line(error)}): copy it again"
                ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a folder's weights from, in its order of preference."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            refuse_pointers([index])
            try:
                names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise ConfigError(f"{index} is no index of weights ({_line(error)})") from error
            return [folder / name for name in sorted(names)]
    return []


def refuse_adapter(source: str | Path, revision: str | None = None) -> None:
    """Raise ConfigError where an adapter lies in a base: transformers would put it on unasked."""
    if not str(source):
        return
    try:
        path = find_adapter_config_file(str(source), revision=revision)
    except (OSError, ValueError):
        return  # no such model, which loading says better
    if path is None:
        return
    try:
        base = json.loads(Path(path).read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    raise ConfigError(
        f"{source} holds an adapter ({ADAPTER_CONFIG}), which would be put on the model unasked: "
        f"give its base instead{f' ({base})' if base else ''}, merge the adapter into it "
        f"(harness export RUN OUT --merge, or PEFT's merge_and_unload), or take "
        f"{ADAPTER_CONFIG} and adapter_model.* out of the folder"
    )
