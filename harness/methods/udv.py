"""`udv`: a PEFT tuner that trains parts of a weight's own singular value decomposition.

    W ~= U diag(D) V^T      W (m, n), U (m, k), D (k,), V (n, k)      y = U (D * (V^T x)) + b

Legend: m outputs, n inputs, k triplets kept, T tokens in a batch. `train` says which of U, D, V
train, `residual` what becomes of W - U D0 V^T, the part that the k triplets leave out (a 0 marks
the value at the start). `residual: keep` with `train: d` is singular-value fine-tuning (SVDiff,
arXiv 2303.11305; SVF, arXiv 2206.06122; "SVFT plain", arXiv 2405.19597).

    from harness.methods.udv import UDVConfig      # registers the tuner with PEFT
    model = peft.get_peft_model(base, UDVConfig(rank=64, train="d", target_modules="all-linear"))

What a layer stores beside the base weight, which always stays, so that `disable_adapter` and
`unmerge` give back the original bits:

| residual | train | trained | frozen, in buffers | output |
| --- | --- | --- | --- | --- |
| drop | any | what `train` says | the other factors | U D V^T x + b |
| keep | d | D (k) | U, V, D0: k (m + n + 1) | base(x) + U ((D - D0) * V^T x) |
| keep | u | U (m k) | U0, D, V: k (m + n + 1) | base(x) + (U - U0) D V^T x |
| keep | v | V (n k) | U, D, V0: k (m + n + 1) | base(x) + U D (V - V0)^T x |
| keep | udv | k (m + n + 1) | U0, D0, V0: k (m + n + 1) | base(x) + U D V^T x - U0 D0 V0^T x |

No second copy of W is kept, and `keep` equals the base bit for bit at the start in every row: the
added term is exactly zero. A merged layer holds its new weight and the original one, m n elements
more, until `unmerge` puts it back or `merge_and_unload` lets it go.

`truncate`, a rank-k W with nothing trained, is `train="none"`.

Frozen U and V keep the base weight's dtype; D, whatever trains and its start values are at least
float32, as PEFT does for its own adapters (`autocast_adapter_dtype=False` casts them too). One
matrix takes `udv` or another method, not both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from harness.methods.svd import (
    WHICH,
    check_choice,
    check_rank,
    check_rank_or_energy,
    resolve_rank,
)
from harness.methods.udv_layer import TRAINED, UDVEmbedding, UDVLayer, UDVLinear, layout


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


class UDVModel(BaseTuner):
    """Puts `udv` layers into a model; see the module docstring."""

    prefix = "udv_"
    tuner_layer_cls = UDVLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target's type and rank before the first SVD and the first replaced layer."""
        config: Any = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        inside: tuple[str, ...] = ()
        for key, module in model.named_modules():
            if key.startswith(inside) or not key:
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{key}.",)
            if not check_target_module_exists(config, key):
                continue
            base = module._base() if isinstance(module, UDVLayer) else module
            stored_in_out, _ = layout(base, key)
            rank, energy = config.rank_and_energy(key)
            if energy is None:
                resolve_rank(rank, min(base.weight.shape), key)
            if config.fan_in_fan_out not in (None, stored_in_out):
                warnings.warn(
                    f"fan_in_fan_out={config.fan_in_fan_out} is wrong for {key}, a "
                    f"{type(base).__name__}; using {stored_in_out}, which the module's type says",
                    stacklevel=2,
                )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, UDVLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = UDVEmbedding if isinstance(target, nn.Embedding) else UDVLinear
        module = layer(target, adapter_name, peft_config, current_key)
        self._replace_module(parent, target_name, module, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave float32 masters as they are, or cast them to the base's dtype when asked to.

        PEFT's own would widen the frozen factors of a bfloat16 model too, for nothing.
        """
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, UDVLayer):
                dtype = module._base().weight.dtype
                for name in module.adapter_layer_names + module.other_param_names:
                    factors = getattr(module, name)
                    if adapter_name in factors:
                        factors[adapter_name] = factors[adapter_name].to(dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Expect every factor that the file holds, also one that the weight would determine.

        PEFT (0.21) finds the names of a file among those that the model would save itself.
        """
        for name, module in model.named_modules():
            for part in module.other_param_names if isinstance(module, UDVLayer) else ():
                if {f"{name}.{part}", f"base_model.model.{name}.{part}"} & state_dict.keys():
                    getattr(module, part).expect_saved(adapter_name)
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse PEFT's mixed batches, in which every row names an adapter of its own.

        PEFT calls this around every forward pass, and drops `adapter_names` after it.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"udv cannot take adapter_names={kwargs['adapter_names']}: all rows of a batch use "
                "the same adapters; expected set_adapter(NAME), and a batch for each adapter"
            )
        yield

    def orthogonality_penalty(self) -> torch.Tensor:
        """See the function of the same name."""
        return orthogonality_penalty(self.model)


def orthogonality_penalty(model: nn.Module) -> torch.Tensor:
    """Return sum of c (||U^T U - I||_F^2 + ||V^T V - I||_F^2) over active adapters, for the loss.

    c is the adapter's `orthogonality`, and only factors that train count (AdaLoRA, arXiv
    2303.10512, equation 4). A model without any gives a zero that needs no gradient.
    """
    total = torch.zeros(())
    for module in model.modules():
        if not isinstance(module, UDVLayer) or module.disable_adapters:
            continue
        for name in module._names():
            spec = module.udv_specs[name]
            for letter in sorted(set(spec.train) & {"u", "v"}) if spec.orthogonality else ():
                factor = module._factor(letter, name)
                gram = factor.t() @ factor  # (k, k)
                identity = torch.eye(spec.rank, dtype=gram.dtype, device=gram.device)
                penalty = spec.orthogonality * (gram - identity).square().sum()
                total = total.to(penalty.device) + penalty
    return total


def register() -> None:
    """Enter `udv` in PEFT's tables of methods; calling it again changes nothing.

    PEFT's own `register_peft_method` insists on a member of its enumeration, which cannot grow, but
    everything that reads the tables takes a string. The table of methods that can be mixed with
    others on one matrix is left alone: `udv` cannot be.
    """
    entries: tuple[tuple[Any, Any], ...] = (
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, UDVConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, UDVModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, UDVModel.prefix),
    )
    for table, entry in entries:
        table[PEFT_TYPE] = entry


register()
