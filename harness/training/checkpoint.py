"""What a run keeps on disk: checkpoints to go on from, the best weights, the adapter to take away.

A checkpoint is a folder of RUN_DIR/checkpoints: state.safetensors (what trains, the optimizer's
moments), facts.json (where the run stands), the random number generators of every rank, the best
weights so far, and manifest.json with the SHA-256 of each. It is written beside its place, flushed
to disk and renamed; what is older than the one before is deleted last. A damaged one is passed
over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.config.errors import ConfigError
from harness.methods import weight_tying
from harness.models import linear
from harness.models.split_qkv import is_unfused
from harness.results.run_record import BEST, CHECKPOINTS, INITIAL
from harness.system.atomic import write_atomically
from harness.training import optimizer_state, sharding
from harness.training.buffers import PREFIXES, BufferState

KEPT = 2
log = logging.getLogger(__name__)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training moves, by name; tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(
    model: nn.Module, path: Path, *, buffers: BufferState | None = None, write: bool = True
) -> None:
    """Write what trains, and the `buffers` that move with it, to `path` (safetensors).

    The file appears whole or not at all. Ranks that divide the model must all call it, and one of
    them with `write`.
    """
    moving = buffers.tensors(factors=False) if buffers else {}
    tensors = _gathered(trained_state(model) | moving, keep=write)
    if write:
        write_atomically(path, lambda scratch: save_file(tensors, scratch))


def _gathered(tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, made whole one by one by all ranks; nothing if not `keep`."""
    gathered = {}
    for name, tensor in tensors.items():
        full = sharding.full_tensor(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


def load_trained(model: nn.Module, path: Path, *, buffers: BufferState | None = None) -> None:
    """Put back what `save_trained` wrote; the names must be the same."""
    saved, present = load_file(path), trained_state(model)
    moving = {name: saved.pop(name) for name in list(saved) if name.startswith(PREFIXES)}
    if saved.keys() != present.keys():
        raise ValueError(f"{path} holds other tensors than the model trains")
    for name, tensor in saved.items():
        present[name].copy_(sharding.distribute_like(tensor, present[name]))
    if buffers:
        buffers.restore(moving, factors=False)


# ------------------------------------------------------------------------------ to go on from


@dataclass(frozen=True)
class Checkpoint:
    """What `latest` found, checked against its checksums."""

    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What trains, and the optimizer's state of it, by the parameter's name."""
    trained = {f"model/{name}": tensor for name, tensor in trained_state(model).items()}
    return trained | optimizer_state.tensors(model, optimizer)


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `state_tensors` gave; the names must be the same."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(sharding.distribute_like(tensors[f"model/{name}"], parameter))
    optimizer_state.restore(model, optimizer, tensors)


def _generators() -> dict[str, torch.Tensor]:
    """The state of every random number generator of this process."""
    _, keys, *rest = np.random.get_state(legacy=True)
    _, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).copy()),
        "numpy_rest": torch.tensor(rest, dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(checkpoint: Checkpoint, rank: int) -> None:
    """Set this process's random number generators as they were at the checkpoint.

    A rank that was not there then keeps its own.
    """
    path = checkpoint.folder / f"generators-{rank}.safetensors"
    if not path.is_file():
        log.warning("rank %d goes on with generators of its own: it is new", rank)
        return
    states = load_file(path)
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy()
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    rest = states["python_rest"].tolist()
    words = tuple(states["python"].tolist())
    random.setstate((random.getstate()[0], words, rest[0] if rest else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save(
    run_dir: Path,
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
    best: Path,
    accelerator: Accelerator,
) -> None:
    """Write a checkpoint, all ranks together; then delete all but the last KEPT."""
    folder = run_dir / CHECKPOINTS
    scratch = folder / ".writing"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    rank = accelerator.process_index
    save_file(_generators(), scratch / f"generators-{rank}.safetensors")
    plain = _gathered(tensors, keep=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    save_file(plain, scratch / "state.safetensors")
    (scratch / "facts.json").write_text(json.dumps(facts), "utf-8")
    _link_or_copy(best, scratch / BEST)  # which is replaced, never written into
    names = sorted(path.name for path in scratch.iterdir())
    manifest = {name: _digest(scratch / name) for name in names}
    (scratch / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    for path in [*scratch.iterdir(), scratch]:
        _sync(path)
    complete = _complete(folder)
    number = int(complete[-1].name) + 1 if complete else 1
    scratch.rename(folder / f"{number:06d}")
    _sync(folder)
    for old in complete[: max(0, len(complete) + 1 - KEPT)]:
        shutil.rmtree(old, ignore_errors=True)


def latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are cleared away with a warning."""
    for folder in reversed(_complete(run_dir / CHECKPOINTS)):
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            for name, digest in manifest.items():
                if _digest(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            facts = json.loads((folder / "facts.json").read_text("utf-8"))
            return Checkpoint(folder, facts, load_file(folder / "state.safetensors"))
        except Exception as error:  # whatever damage does to a reader
            log.warning("the checkpoint %s is damaged, the one before is used: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    return None


def load_best(checkpoint: Checkpoint, path: Path) -> None:
    """Make the best weights of the checkpoint those of the run."""
    path.unlink(missing_ok=True)
    _link_or_copy(checkpoint.folder / BEST, path)


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------ to take away


def keep_initial(model: nn.Module, run_dir: Path) -> None:
    """Write an adapter as it starts to RUN_DIR, where `export` will need it.

    That is an adapter whose start is taken off the base's weights and is drawn at random
    (init=pissa_niter_N) or made of training text (corda, lora_ga): from the trained adapter alone,
    PEFT would draw another start and take that off, or could not make one. With the start beside
    it, PEFT saves the difference, a LoRA on the unchanged base.

    Raises:
        ConfigError: PEFT cannot convert ranks by pattern together with rsLoRA's scale.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, LoraConfig):
        return
    config = model.active_peft_config
    if not str(config.init_lora_weights).startswith(("pissa_niter", "corda", "lora_ga")):
        return
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            f"method.init={config.init_lora_weights} with use_rslora and rank_pattern or "
            "alpha_pattern: PEFT cannot save such an adapter as a plain LoRA; use init=pissa"
        )
    model.save_pretrained(str(run_dir / INITIAL), save_embedding_layers=False)


def export(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, run_dir: Path, *, merged: bool
) -> list[str]:
    """Save what was made, as PEFT or `transformers` loads it; returns the folders' names.

    `adapter/` holds what an adapter trained. `model/` holds a whole model with its tokenizer: a
    fully fine-tuned one, or with `merged` the adapted one, merged; q, k and v are in one `Conv1D`
    again, as GPT-2 is published. An untouched base leaves nothing.
    """
    saved = []
    trained = bool(trained_state(model))
    if isinstance(model, PeftModel):
        if trained:
            initial = run_dir / INITIAL
            model.save_pretrained(
                str(run_dir / "adapter"),
                save_embedding_layers=False,
                path_initial_model_for_weight_conversion=str(initial) if initial.is_dir() else None,
            )
            shutil.rmtree(initial, ignore_errors=True)
            if linear.needs_turned_base(model) and not is_unfused(model):
                with (run_dir / "adapter" / "README.md").open("a", encoding="utf-8") as card:
                    card.write(linear.SECTION)
            saved.append("adapter")
        if not merged or not hasattr(model, "merge_and_unload"):  # prompts have nothing to merge
            return saved
        model = weight_tying.merged(model)
    elif not trained:
        return saved
    assert isinstance(model, PreTrainedModel)
    linear.as_published(model)  # a plain GPT-2 again, which `transformers` loads
    model.save_pretrained(run_dir / "model")
    tokenizer.save_pretrained(run_dir / "model")  # so that the folder is a base model by itself
    return [*saved, "model"]
