"""NEFTune: uniform noise on the embeddings of training (Jain et al. 2023, arXiv 2310.05914).

    e + n,   n uniform in (-a, a),   a = train.neftune_alpha / sqrt(T d)

for embeddings e (B, T, d). The noise of an optimizer step depends on the seed and the step alone
(of several ranks, also on the rank), whatever was drawn before it. Evaluation has none.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

from harness.config.errors import ConfigError


class Noise:
    """Adds noise to the embeddings of a model that trains; `begin` comes before every step."""

    def __init__(self, model: nn.Module, alpha: float, seed: int, rank: int = 0) -> None:
        find: Any = getattr(model, "get_input_embeddings", None)
        embeddings = find() if find else None
        if not isinstance(embeddings, nn.Module):
            raise ConfigError(
                f"train.neftune_alpha={alpha:g}: {type(model).__name__} names no embeddings to add "
                "noise to; set it to null"
            )
        self._alpha, self._seed, self._rank = alpha, seed, rank
        self._generator: torch.Generator | None = None
        self._step = 0
        embeddings.register_forward_hook(self._add)

    def begin(self, step: int) -> None:
        """Draw the noise of optimizer step `step` (from 0) from here on."""
        self._step, self._generator = step, None

    def _add(self, module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        if self._generator is None:
            text = f"neftune {self._seed} {self._step} {self._rank}"
            drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
            self._generator = torch.Generator(output.device).manual_seed(drawn)
        bound = self._alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        noise = torch.empty_like(output, requires_grad=False)
        return output + noise.uniform_(-bound, bound, generator=self._generator)
