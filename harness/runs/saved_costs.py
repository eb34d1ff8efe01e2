"""What a run's result costs those who use it: bytes to ship, seconds to load, speed.

Bytes are counted for every run. Seconds and speed are measured where `evaluate.latency` asks for
it, on models that are loaded from what the run has saved: `base` as it is published, `attached`
as PEFT loads adapter/ onto it, `fused` with the layers that the harness trains LoRA by
(`harness.methods.lora_layer`), and `merged`, the whole model.
"""

from __future__ import annotations

import copy
import gc
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from harness.evaluation import latency
from harness.evaluation.latency import BASE
from harness.methods import lora_layer, merging, weight_tying
from harness.models import weights
from harness.models.split_qkv import fuse_qkv, is_unfused
from harness.results import environment
from harness.runs.finished_run import ADAPTER, MODEL, Saved

ATTACHED, FUSED, MERGED = "attached", "fused", "merged"
OWN_SUFFIXES, OWN_FILES = (  # of model/, what is the model's: its weights, index, code, configs
    (".safetensors", ".py"),
    ("model.safetensors.index.json", "config.json", "generation_config.json"),
)
LOADS = 3  # of which the median counts
UNMEASURED = "the process has ended while it was measured"
log = logging.getLogger("harness")


def bytes_to_ship(run_dir: Path, saved: list[str]) -> int:
    """Bytes of what must be shipped beside the base: adapter/, or else model/; 0 where neither is.

    Of model/ these are the model's own files; the tokenizer's come with the base.
    """
    name = next((name for name in (ADAPTER, MODEL) if name in saved), None)
    if name is None:
        return 0
    files = [path for path in (run_dir / name).rglob("*") if path.is_file()]
    if name == MODEL:
        files = [path for path in files if path.suffix in OWN_SUFFIXES or path.name in OWN_FILES]
    return sum(path.stat().st_size for path in files)


def measure(run: Saved) -> dict[str, Any]:
    """The seconds and speeds of `costs` in result.json; a failure is noted, not raised."""
    cfg = run.run.evaluate.latency
    assert cfg is not None
    gc.collect()  # the model that trained
    try:
        load_seconds, models, not_merged = _models(run)
        precision = environment.precision_of(run.run)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        models = {name: model.to(device) for name, model in models.items()}
        speeds = latency.measure(models, cfg, precision == "bf16")
    except Exception as error:  # whatever it is, the test result stands
        log.warning("evaluate.latency failed", exc_info=True)
        return {"failure": " ".join(f"{type(error).__name__}: {error}".split())}
    return {
        "load_seconds": load_seconds,
        "latency": {
            "prompt_tokens": cfg.prompt_tokens,
            "new_tokens": cfg.new_tokens,
            "repeats": cfg.repeats,
            "precision": precision,
            "threads": torch.get_num_threads(),
            "not_merged": not_merged,
            **speeds,
        },
    }


def _models(run: Saved) -> tuple[float | None, dict[str, nn.Module], str | None]:
    """Median seconds to load what was saved, the models by name, and why none is merged."""
    base = run.base().requires_grad_(False)  # as PEFT leaves it, whose weights are compared with it
    models: dict[str, nn.Module] = {}
    seconds: float | None = None
    not_merged = None
    if run.run.method.trains and not run.has_adapter:  # a whole model in place of the base
        seconds, models[MERGED] = _loaded(lambda: weights.load(run.folder(MODEL))[0])
    elif run.run.method.name != "none":
        seconds, attached = _attached(run, base)
        models[ATTACHED] = attached
        if (fused := _fused(run, base)) is not None:
            models[FUSED] = fused
        not_merged = merging.reason_unsupported(attached)
        if not_merged is None and isinstance(attached, PeftModel):
            models[MERGED] = _published(weight_tying.merged(copy.deepcopy(attached)))
    for model in models.values():
        _share(model, base)
    return seconds, {BASE: _published(base)} | models, not_merged


def _attached(run: Saved, base: nn.Module) -> tuple[float | None, nn.Module]:
    """The adapted model as the run evaluated it, and seconds to put adapter/ on a base in memory.

    None where nothing trained: what is cut off an SVD is made of the base itself.
    """
    if not run.has_adapter:
        return None, run.model()
    folder = run.folder(ADAPTER)
    bases = [copy.deepcopy(base) for _ in range(LOADS)]  # which some adapters change
    seconds, _ = _loaded(lambda: PeftModel.from_pretrained(bases.pop(), str(folder)))
    return seconds, weights.load_adapter(copy.deepcopy(base), folder)


def _loaded(load: Callable[[], nn.Module]) -> tuple[float, nn.Module]:
    """Median seconds of LOADS calls, and what the last one gave."""
    taken = []
    for _ in range(LOADS):
        start = time.perf_counter()
        model = load()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), model.eval()


def _fused(run: Saved, base: nn.Module) -> nn.Module | None:
    """LoRA in the layers that trained it; None where there are none, or they are PEFT's own."""
    config: Any = PeftConfig.from_pretrained(str(run.folder(ADAPTER))) if run.has_adapter else None
    if type(config) is not LoraConfig:
        return None
    lora_layer.fuse(config)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(run.folder(ADAPTER)), config=config)
    layers = [m for m in model.modules() if isinstance(m, lora_layer.FusedLinear)]
    return model.eval() if any(layer.fuses for layer in layers) else None


def _published(model: nn.Module) -> nn.Module:
    """A GPT-2 with q, k and v in one matrix again, as it is published and saved."""
    return fuse_qkv(model) if is_unfused(model) else model


def _share(model: nn.Module, base: nn.Module) -> None:
    """Let `model` hold the base's own weights wherever its own have the same name and values.

    Three copies of a model then take the memory of little more than one, and none reads its
    weights from a colder cache than the others.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base_parameters = dict(base.named_parameters(remove_duplicate=False))
    for prefix, module in bare.named_modules():
        for name, parameter in module._parameters.items():
            key = f"{prefix}.{name}".replace("base_layer.", "").removeprefix(".")
            same = base_parameters.get(key)
            if parameter is None or same is None or type(same.data) is not torch.Tensor:
                continue
            if same.shape == parameter.shape and torch.equal(same, parameter):
                module._parameters[name] = same
