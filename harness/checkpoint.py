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


def export(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, run_dir: Path, *, merged: bool
) -> list[str]:
    """Save what was made, as PEFT or `transformers` loads it; returns the folders' names.

    `adapter/` holds what an adapter trained. `model/` holds a whole model with its tokenizer: a
    fully fine-tuned one, or with `merged` the adapted one, merged and with q, k and v fused again.
    An untouched base leaves nothing.
    """
    saved = []
    trained = bool(trained_state(model))
    if isinstance(model, PeftModel):
        if trained:
            model.save_pretrained(str(run_dir / "adapter"), save_embedding_layers=False)
            saved.append("adapter")
        if not merged or not hasattr(model, "merge_and_unload"):  # prompts have nothing to merge
            return saved
        model = model.merge_and_unload()
    elif not trained:
        return saved
    assert isinstance(model, PreTrainedModel)
    if is_unfused(model):
        fuse_qkv(model)  # a plain GPT-2 again, which `transformers` loads
    model.save_pretrained(run_dir / "model")
    tokenizer.save_pretrained(run_dir / "model")  # so that the folder is a base model by itself
    return [*saved, "model"]
