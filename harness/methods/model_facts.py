"""What an adapted model says of itself for result.json."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from harness.config.run_config import RunConfig
from harness.methods import adalora, starts, svd, train_only, udv


def rank_facts(model: nn.Module) -> dict[str, Any]:
    """The rank of every matrix where a LoRA has several, and AdaLoRA's budget; {} elsewhere."""
    ranks = starts.ranks(model)
    return {"ranks": ranks} if ranks else adalora.facts(model)


def svd_facts(model: nn.Module) -> dict[str, Any]:
    """What the SVD came to: seconds, decompositions computed and read, and k by kind of matrix."""
    ranks: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, udv.UDVLayer):
            kind = re.sub(r"^.*\.\d+\.", "", name.removeprefix("base_model.model."))
            ranks.setdefault(kind, set()).update(s.rank for s in module.udv_specs.values())
    if not ranks:
        return {}
    return {
        "svd_seconds": svd.svd_seconds(),
        "svd_decompositions": svd.svd_counts(),
        "ranks": {kind: sorted(values) for kind, values in ranks.items()},
    }


def factored_total(model: nn.Module) -> int | None:
    """Elements of a truncated model if W were dropped for its factors; None for other models."""
    layers = [m for m in model.modules() if isinstance(m, udv.UDVLayer)]
    dropped = [m for m in layers if not any(spec.keep for spec in m.udv_specs.values())]
    if not layers or len(dropped) < len(layers):
        return None
    base = sum(p.numel() for n, p in model.named_parameters() if ".udv_" not in n)
    for layer in dropped:
        (spec,) = layer.udv_specs.values()
        m, n = layer.out_features, layer.in_features
        base += spec.rank * (m + n + 1) - m * n
    return base


def trained_alone(model: nn.Module, run: RunConfig) -> dict[str, Any]:
    """Of `method.train_only`: the kinds of weights that train, and which of them are tied."""
    if not getattr(run.method, "train_only", None):
        return {}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in trained)
    return {"trained": list(kinds), "tied": train_only.tied(model)}
