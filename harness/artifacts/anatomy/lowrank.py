"""The best approximations of rank k of what a run added to its matrices, and LoRA adapters of them.

    [dW]_k = U_k (U_k^T dW)      U_k (m, k): the first k left singular vectors of dW (m, n)

is the nearest matrix of rank k (Eckart and Young 1936), and a LoRA of rank k with alpha = k:
B = U_k diag(s)^(1/2), A = diag(s)^(-1/2) U_k^T dW. Matrices are those of the published base, where
q, k and v may be one: then a LoRA has one rank for the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.artifacts.anatomy import spectra, updates
from harness.artifacts.anatomy.updates import BESIDE, Pair, kind_of, parameter
from harness.config.errors import ConfigError


@dataclass(frozen=True)
class Direction:
    """dW of one matrix: `basis` U (m, p) and `rows` U^T dW (p, n), float32; s (p,) float64."""

    module: str
    basis: torch.Tensor
    rows: torch.Tensor
    s: torch.Tensor
    stored_in_out: bool
    rank: int  # above rounding

    @property
    def full_rank(self) -> int:
        """Return min(m, n), the largest rank that dW can have."""
        return len(self.s)

    def delta(self, k: int) -> torch.Tensor:
        """Return [dW]_k, the nearest matrix of rank k, as the base stores the weight."""
        product = self.basis[:, :k] @ self.rows[:k]
        return product.t() if self.stored_in_out else product

    def num_parameters(self, k: int) -> int:
        """Return the number of elements of a LoRA of rank k, k (m + n)."""
        return k * (self.basis.shape[0] + self.rows.shape[1])


def decompose(pair: Pair) -> tuple[dict[str, Direction], list[str]]:
    """Every matrix in the layers that changed, by parameter, and the other weights that did.

    The second are embeddings, positions, norms, biases and the head, which no rank is chosen for.
    """
    directions: dict[str, Direction] = {}
    beside: list[str] = []
    model = pair.adapted
    for name, after in model.named_parameters():
        before = parameter(pair.base, name)
        assert before is not None  # as `updates.changed` has seen
        if torch.equal(before, after):
            continue
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if kind_of(name, module, model) in BESIDE or after.ndim != 2:
            beside.append(name)
            continue
        flipped = isinstance(module, Conv1D | nn.Embedding)
        old, new = (t.detach().t() if flipped else t.detach() for t in (before, after))
        update = updates.Update(name, "", None, old, new, flipped, torch.float32)
        u, s, _ = spectra.factors(update.delta)
        m, n = old.shape
        directions[name] = Direction(
            path,
            u.float(),
            (u.t() @ update.delta).float(),
            s,
            flipped,
            spectra.rank_above(s, (m, n), update.error),
        )
    return directions, beside


def by_rank(directions: Mapping[str, Direction], rank: int | str) -> dict[str, int]:
    """Rank by parameter: k of every matrix, or with "full" all of dW.

    Raises:
        ConfigError: k is above min(m, n) of a matrix.
    """
    for name, direction in directions.items():
        if rank != "full" and int(rank) > direction.full_rank:
            raise ConfigError(
                f"rank={rank} is above min(m, n) = {direction.full_rank} of {name}; the largest "
                f"usable rank is {min(d.full_rank for d in directions.values())}, or take 'full'"
            )
    return {
        name: direction.full_rank if rank == "full" else int(rank)
        for name, direction in directions.items()
    }


def by_energy(directions: Mapping[str, Direction], share: float) -> dict[str, int]:
    """The smallest rank of each matrix whose singular values have `share` of ||dW||_F^2."""
    ranks = {}
    for name, direction in directions.items():
        energy = direction.s.square()
        reached = energy.cumsum(0) >= share * energy.sum() * (1 - 1e-12)
        ranks[name] = min(
            int(reached.nonzero()[0, 0]) + 1, direction.rank if share == 1 else len(energy)
        )
    return ranks


@torch.no_grad()
def write_into(
    model: PreTrainedModel,
    pair: Pair,
    directions: Mapping[str, Direction],
    ranks: Mapping[str, int],
    kept: Mapping[str, torch.Tensor],
) -> None:
    """Make `model`, a copy of the adapted one, W + [dW]_k, with `kept` in place of other weights.

    `kept` holds the run's values of weights beside the matrices; those that it leaves out are the
    base's.
    """
    for name, weight in model.named_parameters():
        before = parameter(pair.base, name)
        assert before is not None
        if name in directions:
            delta = directions[name].delta(ranks[name])
            weight.copy_(before.to(weight.device) + delta.to(weight.device))
        else:
            weight.copy_(kept.get(name, before))


def save(
    base: PreTrainedModel,
    directions: Mapping[str, Direction],
    ranks: Mapping[str, int],
    folder: Path,
    source: str,
    revision: str | None,
) -> None:
    """Write the matrices' part as a PEFT LoRA for the published base; `base` is a copy of it.

    Scales are 1 (alpha = rank); where matrices have ranks of their own they stand in rank_pattern.
    """
    modules = {direction.module: ranks[name] for name, direction in directions.items()}
    largest = max(modules.values())
    own = {} if len(set(modules.values())) == 1 else modules
    fan_in_fan_out = any(isinstance(base.get_submodule(path), Conv1D) for path in modules)
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(own),
        alpha_pattern=dict(own),
        target_modules=list(modules),
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, direction in directions.items():
            k = ranks[name]
            layer: Any = model.get_submodule(f"base_model.model.{direction.module}")
            scale = direction.s[:k].sqrt().clamp(min=1e-12).float()
            layer.lora_A["default"].weight.copy_(direction.rows[:k] / scale[:, None])
            layer.lora_B["default"].weight.copy_(direction.basis[:, :k] * scale)
    model.peft_config["default"].base_model_name_or_path = source
    model.peft_config["default"].revision = revision
    model.save_pretrained(str(folder))
