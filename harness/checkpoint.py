"""What a run keeps on disk of its weights: the best checkpoint, and the adapter to take away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.unfuse import fuse_qkv, is_unfused


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training moves, by name; tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, path: Path) -> None:
    """Write what trains to `path` (safetensors), whole or not at all."""
    tensors = {name: t.cpu().contiguous() for name, t in trained_state(model).items()}
    write_atomically(path, lambda scratch: save_file(tensors, scratch))


def load_trained(model: nn.Module, path: Path) -> None:
    """Put back what `save_trained` wrote; the names must be the same."""
    saved, present = load_file(path), trained_state(model)
    if saved.keys() != present.keys():
        raise ValueError(f"{path} holds other tensors than the model trains")
    for name, tensor in saved.items():
        present[name].copy_(tensor)


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` fill a scratch file beside `path`, flush it to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        write(scratch)
        with open(scratch, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> str | None:
    """Save the adapted model as `transformers` or PEFT loads it; returns the folder's name.

    `adapter/` in PEFT's format, or `model/` for full fine-tuning; nothing for an untouched one.
    """
    if not trained_state(model):
        return None
    if isinstance(model, PeftModel):
        model.save_pretrained(str(run_dir / "adapter"), save_embedding_layers=False)
        return "adapter"
    assert isinstance(model, PreTrainedModel)
    if is_unfused(model):
        fuse_qkv(model)  # a plain GPT-2 again, which `transformers` loads
    model.save_pretrained(run_dir / "model")
    tokenizer.save_pretrained(run_dir / "model")  # so that the folder is a base model by itself
    return "model"
