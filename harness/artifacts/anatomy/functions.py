"""How far apart two models are as functions: what their layers put out on the same tokens.

    relative change = sqrt(sum ||h' - h||^2 / sum ||h||^2)          over tokens
    linear CKA      = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)     X, Y centred (arXiv 1905.00414)

CKA is 1 for outputs that are the same up to a rotation and a scale, and it is biased upwards where
there are not many times as many tokens as features. Legend: N tokens, d features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Distance:
    """Of the residual stream behind a layer: 0 the embeddings, the last one as the head gets it."""

    layer: int
    relative_change: float
    cka: float


class Sums:
    """Sums over tokens of what a layer puts out in two models; d x d, however many tokens."""

    def __init__(self) -> None:
        self.n, self.change, self.size = 0, 0.0, 0.0
        self.x: Any = 0.0
        self.y: Any = 0.0
        self.xx: Any = 0.0
        self.xy: Any = 0.0
        self.yy: Any = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the outputs (…, d) of both models for the same tokens to the sums."""
        x, y = (h.reshape(-1, h.shape[-1]).double() for h in (x, y))
        self.n += len(x)
        self.change += float((y - x).square().sum())
        self.size += float(x.square().sum())
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy, self.yy = self.xx + x.t() @ x, self.xy + x.t() @ y, self.yy + y.t() @ y

    def distance(self, layer: int) -> Distance:
        """What the sums come to; NaN for the CKA of an output that is constant."""
        xx = self.xx - torch.outer(self.x, self.x) / self.n
        xy = self.xy - torch.outer(self.x, self.y) / self.n
        yy = self.yy - torch.outer(self.y, self.y) / self.n
        cka = xy.square().sum() / (xx.norm() * yy.norm())
        return Distance(layer, (self.change / self.size) ** 0.5, float(cka))


@torch.no_grad()
def distances(
    base: PreTrainedModel, adapted: PreTrainedModel, batches: Iterable[torch.Tensor]
) -> list[Distance]:
    """Compare two models layer by layer on ids (B, T); [] where layers give no outputs."""
    sums: list[Sums] = []
    for ids in batches:
        x, y = (_outputs(model, ids) for model in (base, adapted))
        sums = sums or [Sums() for _ in x]
        for layer_sums, before, after in zip(sums, x, y, strict=True):
            layer_sums.add(before, after)
    return [layer_sums.distance(layer) for layer, layer_sums in enumerate(sums)]


def _outputs(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, T, d) behind the embeddings and every layer."""
    inner: Any = model.base_model  # without the head, whose logits are the most of the work
    ids = ids.to(next(model.parameters()).device)
    hidden_states = inner(input_ids=ids, output_hidden_states=True).hidden_states
    return tuple(hidden_states) if hidden_states is not None else ()
