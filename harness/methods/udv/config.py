"""The configuration of a `udv` adapter, and its name among PEFT's methods."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from harness.methods.svd import WHICH, check_choice, check_rank, check_rank_or_energy
from harness.methods.udv.layer import TRAINED


class PeftTypeName(str):
    """The name of a PEFT method outside PEFT's enumeration, which cannot be extended.

    It has the `value` that PEFT and transformers read off a member of the enumeration.
    """

    @property
    def value(self) -> str:
        """Return the name as a plain string."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as a member's: PEFT's status cuts the name off it


PEFT_TYPE = PeftTypeName("UDV")


@dataclass
class UDVConfig(PeftConfig):
    """Configuration of a `udv` adapter; every bad value is a ValueError before any long work."""

    rank: float | str | None = None  # k: a number, a fraction (0.25) of min(m, n), "full" (default)
    energy: float | None = None  # instead of rank: share in (0, 1] of the squared singular values
    train: str = "d"  # what trains: d, u, v, udv (all three), none (truncation)
    residual: str = "drop"  # W - U D0 V^T: drop it, or keep it frozen beside U D V^T
    which: str = "top"  # triplets kept: top, bottom, random
    seed: int = 0  # of which="random"
    rank_pattern: dict[str, float | str] = field(default_factory=dict)  # rank by module name
    orthogonality: float = 0.0  # weight of `orthogonality_penalty` on trained U and V
    store_factors: bool = False  # save frozen factors too: k (m + n + 1) elements a matrix
    init_weights: bool = True  # False skips the SVD: zeros, for a file that holds every factor
    target_modules: list[str] | set[str] | str | None = None  # names, a pattern, "all-linear"
    exclude_modules: list[str] | set[str] | str | None = None  # names or a pattern
    modules_to_save: list[str] | None = None  # trained and saved whole, beside the adapter
    layers_to_transform: list[int] | int | None = None  # layer indices
    layers_pattern: list[str] | str | None = None  # the layer list's name, if an unusual one
    fan_in_fan_out: bool | None = None  # weight stored (in, out)? None: read off the module

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.rank is None and self.energy is None:
            self.rank = "full"
        check_choice("train", self.train, tuple(TRAINED))
        check_choice("residual", self.residual, ("drop", "keep"))
        check_choice("which", self.which, WHICH)
        check_rank_or_energy(self.rank, self.energy)
        for name, rank in self.rank_pattern.items():
            check_rank(rank, f"rank_pattern[{name!r}]")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.train == "none" and self.residual == "keep":
            raise ValueError(
                "train='none' with residual='keep' is the base model; expected residual='drop' "
                "(truncation) or a train of d, u, v or udv"
            )
        if not self.orthogonality >= 0.0:
            raise ValueError(f"orthogonality={self.orthogonality}; expected 0 or more; try 0")
        if self.orthogonality and self.train in ("d", "none"):
            raise ValueError(
                f"orthogonality={self.orthogonality} with train={self.train!r} penalises nothing: "
                "neither U nor V trains; expected train of u, v or udv, or orthogonality=0"
            )
        if not self.init_weights and not (self.store_factors and self.energy is None):
            raise ValueError(
                "init_weights=False skips the SVD, so that the adapter file must hold every factor "
                "and the rank must be known; expected store_factors=True and a rank, not an energy"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs target_modules as a list of names, got "
                    f"the pattern {self.target_modules!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, which is None"
            )

    def rank_and_energy(self, key: str) -> tuple[float | str | None, float | None]:
        """Return (rank, None) or (None, energy) for the module called `key`."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key))
        return (self.rank, self.energy) if rank is None else (rank, None)
