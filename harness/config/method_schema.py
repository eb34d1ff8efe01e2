"""The typed form of conf/method: the fields of every method, and what the program must know of it.

No torch here, as in `harness.config.schema`, which has the other sections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from harness.config.errors import ConfigError


@dataclass(frozen=True)
class MethodConfig:
    """conf/method: how the model is adapted; the methods with fields of their own extend it."""

    trains: ClassVar[bool] = True  # or else the seed and the learning rate move nothing
    takes_targets: ClassVar[bool] = False  # whether conf/targets says what it adapts
    leaves_adapter: ClassVar[bool] = False  # PEFT's, in adapter/; or else what trained is in model/

    name: str  # one of METHODS
    label: str | None = None  # what tables and run names call it; null = name


@dataclass(frozen=True)
class NoMethod(MethodConfig):
    """conf/method/none: the base model, which is evaluated and not trained."""

    trains = False


@dataclass(frozen=True)
class FullMethod(MethodConfig):
    """Every weight of the base, or with `train_only` the weights that it names."""

    train_only: list[str] = field(default_factory=list)  # of harness.methods.train_only; [] = all


@dataclass(frozen=True)
class LoraMethod(MethodConfig):
    """The keys of method=lora, named as in PEFT's LoraConfig without its prefix."""

    takes_targets = leaves_adapter = True

    r: int = 8  # rank
    alpha: Any = "2r"  # number, or a multiple of r: "2r", "0.5r"
    dropout: float = 0.0  # probability, on the adapter's input
    use_rslora: bool = False  # scale alpha/sqrt(r)
    use_dora: bool = False
    bias: str = "none"  # none | all | lora_only
    init: Any = True  # PEFT's init_lora_weights
    start_sequences: int = 64  # of training text, which init=eva | corda | lora_ga reads
    rank_pattern: Any = field(default_factory=dict)  # other r by module-name suffix
    alpha_pattern: Any = field(default_factory=dict)  # other alpha, likewise
    fields: dict[str, Any] = field(default_factory=dict)  # any other LoraConfig field

    def __post_init__(self) -> None:
        """Take null, by which conf/method/lora.yaml lets a mapping be given, for an empty one."""
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, {})
            elif not isinstance(value, dict):
                raise ConfigError(f"method.{name}={value}: expected a mapping, as {{c_attn: 16}}")

    @property
    def lora_alpha(self) -> float:
        """alpha as a number; the effective scale is alpha / r (alpha / sqrt(r) with rsLoRA)."""
        return alpha_of(self.alpha, self.r)


def alpha_of(alpha: Any, r: int) -> float:
    """Return `method.alpha` as a number: as given, or a multiple of a rank such as 2r."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | str):
        raise ConfigError(f"method.alpha={alpha!r}: expected a number or a multiple like 2r")
    if isinstance(alpha, int | float):
        return alpha
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)?\s*(r?)\s*", alpha)
    if match is None or not (match[1] or match[2]):
        raise ConfigError(
            f"method.alpha={alpha!r}: expected a number (16) or a multiple of r (2r, 0.5r)"
        )
    value = float(match[1] or 1) * (r if match[2] else 1)
    return int(value) if value == int(value) else value


@dataclass(frozen=True)
class AdaloraMethod(MethodConfig):
    """AdaLoRA: LoRA whose ranks are cut while it trains; the names are PEFT's."""

    takes_targets = leaves_adapter = True

    target_r: int = 8  # mean rank of a matrix in the end
    init_r: int | None = None  # rank of every matrix at first; null = 1.5 target_r
    alpha: Any = "2r"  # number, or a multiple of the first rank, by which PEFT divides it
    tinit: Any = 0.1  # steps before the first cut; below 1 a share of train.steps
    tfinal: Any = 0.3  # steps after the last cut, or a share
    deltaT: Any = 0.01  # noqa: N815 - PEFT's name; steps between two cuts, or a share
    beta1: float = 0.85  # of the running mean of importance
    beta2: float = 0.85  # of the running mean of its uncertainty
    orth_reg_weight: float = 0.5  # of the penalty that keeps A and B orthogonal
    dropout: float = 0.0  # probability, on the adapter's input
    fields: dict[str, Any] = field(default_factory=dict)  # any other AdaLoraConfig field

    @property
    def r(self) -> int:
        """Return the rank that tables and names show: the mean one in the end."""
        return self.target_r

    @property
    def first_rank(self) -> int:
        """Return the rank of every matrix at first."""
        return -(-3 * self.target_r // 2) if self.init_r is None else self.init_r

    @property
    def lora_alpha(self) -> float:
        """alpha as a number; the effective scale is alpha over the first rank."""
        return alpha_of(self.alpha, self.first_rank)


@dataclass(frozen=True)
class PeftMethod(MethodConfig):
    """conf/method/peft: any other method of PEFT, by its `peft_type` and fields."""

    takes_targets = leaves_adapter = True

    peft_type: str = "???"  # any PeftType by name: IA3, LOHA, VERA, PROMPT_TUNING …
    fields: dict[str, Any] = field(default_factory=dict)  # that method's own config fields


@dataclass(frozen=True)
class SvdMethod(MethodConfig):
    """W ~= U diag(D) V^T of rank k: which triplets of the weight's SVD are kept."""

    trains = False
    takes_targets = True

    rank: Any = None  # k: a number, a fraction of min(m, n) such as 0.25, or "full" (the default)
    energy: float | None = None  # instead: the smallest k with this share of the squared D
    which: str = "top"  # top | bottom | random
    rank_pattern: dict[str, Any] = field(default_factory=dict)  # rank by module-name suffix
    fields: dict[str, Any] = field(default_factory=dict)  # any other UDVConfig field

    @property
    def kept(self) -> str:
        """Return the rank as run names and tables show it: a number, or `full`."""
        return f"{self.rank or 'full'}" if self.energy is None else f"e{self.energy:g}"


@dataclass(frozen=True)
class UdvMethod(SvdMethod):
    """conf/method/udv: the factors of U D V^T, and which of them train."""

    trains = leaves_adapter = True

    train: str = "d"  # d | u | v | udv
    residual: str = "drop"  # drop | keep: W - U D V^T, frozen beside the trained part
    orthogonality: float = 0.0  # weight of the penalty on U and V when they train
    store_factors: bool = False  # save frozen U and V with the adapter


METHODS: dict[str, type[MethodConfig]] = {
    "none": NoMethod,
    "full": FullMethod,
    "lora": LoraMethod,
    "adalora": AdaloraMethod,
    "udv": UdvMethod,
    "truncate": SvdMethod,
    "peft": PeftMethod,
}
