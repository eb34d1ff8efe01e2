"""Schemas of conf/optimizer, as `harness.config.method_schema` has those of conf/method.

Which class of which library does the steps is in `harness.training.optimizers`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class OptimizerConfig:
    """conf/optimizer: how gradients become updates; those with fields of their own extend it.

    Its rate is `train.lr`. Betas, eps and weight decay are held by `TrainConfig`, where every run
    has always had them: a file of conf/optimizer has them as second names of these.
    """

    shared: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "eps", "weight_decay")
    package: ClassVar[str | None] = None  # that it needs, and the extra of pyproject.toml with it
    extra: ClassVar[str | None] = None

    name: str  # one of OPTIMIZERS


@dataclass(frozen=True)
class SgdOptimizer(OptimizerConfig):
    """torch.optim.SGD, with momentum; its weight decay is added to the gradient."""

    shared = ("weight_decay",)

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class LoraPlusOptimizer(OptimizerConfig):
    """AdamW with another rate for LoRA's B than for A (arXiv 2402.12354), by PEFT's rule."""

    ratio: float = 16.0  # B's rate over A's, which is train.lr; also of vectors, as in PEFT
    embedding_ratio: float = 1.0  # the rate of a LoRA on an embedding, both factors, over train.lr


@dataclass(frozen=True)
class LoraFaOptimizer(OptimizerConfig):
    """PEFT's LoRA-FA (arXiv 2308.03303): A is frozen, B's gradient projected."""

    correct_bias: bool = True


@dataclass(frozen=True)
class RiemannianOptimizer(OptimizerConfig):
    """AdamW on LoRA gradients that PEFT preconditions (arXiv 2402.02347)."""

    reg: float = 1e-2  # added to the diagonal of A A^T and B^T B


@dataclass(frozen=True)
class MuonOptimizer(OptimizerConfig):
    """torch.optim.Muon for matrices, AdamW for embeddings, the head and vectors."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5  # Newton-Schulz iterations
    ns_coefficients: list[float] = field(default_factory=lambda: [3.4445, -4.775, 2.0315])
    ns_eps: float = 1e-7  # added to the norm of the matrix
    adjust_lr: str = "match_rms_adamw"  # match_rms_adamw | original
    rest_ratio: float = 1.0  # AdamW's rate for the rest over train.lr


@dataclass(frozen=True)
class ScheduleFreeOptimizer(OptimizerConfig):
    """schedulefree's AdamWScheduleFree (arXiv 2405.15682): averaged weights are evaluated."""

    package = extra = "schedulefree"

    step_power: float = 0.0  # r there: weights in the average grow with this power of the step
    lr_power: float = 2.0  # weight_lr_power there: and with this power of the rate


@dataclass(frozen=True)
class Adamw8bitOptimizer(OptimizerConfig):
    """bitsandbytes' AdamW8bit (arXiv 2110.02861): moments in 8 bits, in blocks of 256."""

    package, extra = "bitsandbytes", "quantised"

    min_8bit_size: int = 4096  # elements below which a parameter keeps moments in 32 bits


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": OptimizerConfig,
    "sgd": SgdOptimizer,
    "lora_plus": LoraPlusOptimizer,
    "lora_fa": LoraFaOptimizer,
    "riemannian": RiemannianOptimizer,
    "muon": MuonOptimizer,
    "schedule_free": ScheduleFreeOptimizer,
    "adamw_8bit": Adamw8bitOptimizer,
}
ADAMW = OptimizerConfig("adamw")


def keys_of(schema: type[OptimizerConfig]) -> set[str]:
    """Return the keys that an optimizer's file of conf/optimizer may have."""
    return {field.name for field in dataclasses.fields(schema)} | set(schema.shared)
