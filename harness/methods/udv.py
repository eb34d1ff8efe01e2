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
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import mapping
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.methods.svd import (
    WHICH,
    check_choice,
    check_rank,
    check_rank_or_energy,
    resolve_rank,
    truncated_factors,
)

PEFT_TYPE = "UDV"
TRAINED = {"d": "d", "u": "u", "v": "v", "udv": "udv", "none": ""}  # train -> factors that train


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
        self.peft_type = PEFT_TYPE  # a plain string: PeftType cannot be extended
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


class FactorDict(BufferDict):
    """Buffers by adapter name, of which each one stays saved or unsaved when it is replaced."""

    def store(self, key: str, buffer: torch.Tensor, persistent: bool) -> None:
        """Put a buffer in, saved with the model (`persistent`) or not."""
        self.register_buffer(key, buffer, persistent=persistent)

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.store(key, buffer, key in self and key not in self._non_persistent_buffers_set)


class Spec(NamedTuple):
    """What one adapter does in one layer."""

    rank: int
    train: str  # letters of the factors that train
    keep: bool
    orthogonality: float


Term = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U (m, k), D (k,), V (n, k)


class UDVLayer(nn.Module, BaseTunerLayer):
    """State and merging that the linear and the embedding layer share.

    `udv_u`, `udv_d` and `udv_v` hold the factors that train; `udv_frozen_*` hold those that do
    not and, where the residual is kept, the start values of those that do.
    """

    adapter_layer_names = ("udv_u", "udv_d", "udv_v")
    other_param_names = ("udv_frozen_u", "udv_frozen_d", "udv_frozen_v")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: UDVConfig, key: str):
        super().__init__()
        self.stored_in_out, (self.out_features, self.in_features) = _layout(base_layer, key)
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, FactorDict())
        self.udv_specs: dict[str, Spec] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # In a list, so that the module does not register a second parameter.
        self._unmerged_weight: list[nn.Parameter] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key)

    def update_layer(self, adapter_name: str, config: UDVConfig, key: str) -> None:
        """Give this layer the adapter `adapter_name`: decompose, select, store."""
        weight = self._original_weight().detach()
        rank, energy = config.rank_and_energy(key)
        factors = truncated_factors(
            weight if config.init_weights else weight.to("meta"),
            stored_in_out=self.stored_in_out,
            rank=rank,
            energy=energy,
            which=config.which,
            seed=config.seed,
            key=key,
        )
        if not config.init_weights:
            u, d, v = (torch.zeros_like(f, device=weight.device) for f in factors)
            factors = (u, d, v)
        spec = Spec(
            factors[1].numel(),
            TRAINED[config.train],
            config.residual == "keep",
            config.orthogonality,
        )
        wide = torch.promote_types(weight.dtype, torch.float32)
        for name, factor in zip("udv", factors, strict=True):
            trained = name in spec.train
            dtype = wide if trained or name == "d" else weight.dtype
            factor = factor.to(device=weight.device, dtype=dtype)
            if trained:
                getattr(self, f"udv_{name}")[adapter_name] = nn.Parameter(factor.clone())
            if not trained or spec.keep:
                frozen: FactorDict = getattr(self, f"udv_frozen_{name}")
                frozen.store(adapter_name, factor, persistent=config.store_factors)
        self.udv_specs[adapter_name] = spec
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and everything stored for it."""
        self.udv_specs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to the base layer's device; unlike PEFT's own, leave its dtypes."""
        device = device if device is not None else self._base().weight.device
        for name in self.adapter_layer_names + self.other_param_names:
            factors = getattr(self, name)
            if adapter_name in factors and not factors[adapter_name].is_meta:
                factors[adapter_name] = factors[adapter_name].to(device)

    def _base(self) -> Any:
        """The innermost base layer, untyped: PEFT promises a Module, without a weight."""
        return self.get_base_layer()

    def _original_weight(self) -> nn.Parameter:
        """The base weight, or the one that a merge has put aside."""
        return (self._unmerged_weight or [self._base().weight])[0]

    def _names(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.udv_specs]

    def _factor(self, letter: str, adapter_name: str) -> torch.Tensor:
        trained = getattr(self, f"udv_{letter}")
        if adapter_name in trained:
            return trained[adapter_name]
        return getattr(self, f"udv_frozen_{letter}")[adapter_name]

    def factors(self, adapter_name: str) -> Term:
        """Return the current U (m, k), D (k,) and V (n, k) of an adapter."""
        u, d, v = (self._factor(letter, adapter_name) for letter in "udv")
        return u, d, v

    def _terms(self, adapter_name: str) -> list[Term]:
        """The products U diag(D) V^T whose sum the adapter adds (module docstring, last column)."""
        spec = self.udv_specs[adapter_name]
        u, d, v = self.factors(adapter_name)
        if not spec.keep:
            return [(u, d, v)]
        u0, d0, v0 = (getattr(self, f"udv_frozen_{letter}")[adapter_name] for letter in "udv")
        if spec.train == "d":
            return [(u, d - d0, v)]
        if spec.train == "u":
            return [(u - u0, d, v)]
        if spec.train == "v":
            return [(u, d, v - v0)]
        return [(u, d, v), (u0, -d0, v0)]

    def _all_terms(self, names: list[str]) -> list[Term]:
        return [term for name in names for term in self._terms(name)]

    def _base_share(self, names: list[str]) -> int:
        """How often W itself enters the sum W + sum_i delta_i: each `drop` takes it away once."""
        return 1 - sum(not self.udv_specs[name].keep for name in names)

    def _dense(self, names: list[str], weight: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """Return the weight, stored like the base's, that `names` together stand for."""
        products = []
        for u, d, v in self._all_terms(names):
            dtype = torch.promote_types(u.dtype, v.dtype)
            if wide:
                dtype = torch.promote_types(dtype, torch.float32)
            scaled, v = (u * d).to(dtype), v.to(dtype)
            products.append(v @ scaled.t() if self.stored_in_out else scaled @ v.t())
        total = reduce(torch.add, products)
        share = self._base_share(names)
        if share:
            kept = weight if share == 1 else share * weight
            # Summed before the cast, so that a change below a bfloat16 step still counts once.
            total = total.to(torch.promote_types(kept.dtype, total.dtype)) + kept
        return total.to(weight.dtype)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return U D V^T - W (drop) or U D V^T - U0 D0 V0^T (keep), stored like the base weight."""
        weight = self._original_weight().detach()
        return self._dense([adapter_name], weight, wide=True) - weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' weight in the base layer's place, and keep the original for `unmerge`.

        The parameter is exchanged, not written to, so that a weight tied to another module leaves
        that module alone, and `unmerge` ties it again.

        Raises:
            ValueError: `safe_merge` and the merged weight is not finite; nothing has changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.udv_specs]
        if not names:
            return
        base = self._base()
        original = self._original_weight()
        merged = self._dense([*self.merged_adapters, *names], original.detach(), wide=True)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"merging {', '.join(names)} would write NaN or infinity into the weight; expected "
                "finite factors: the adapter is damaged"
            )
        base.weight = nn.Parameter(merged.contiguous(), requires_grad=original.requires_grad)
        self._unmerged_weight = [original]
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self._base()
        original = self._unmerged_weight.pop()
        # The model may have been moved or cast while it was merged.
        original.data = original.data.to(device=base.weight.device, dtype=base.weight.dtype)
        base.weight = original
        self.merged_adapters.clear()

    def _bypass(self) -> bool:
        """True when the base layer's own forward is the answer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return True
        return self.merged or not self._names()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say yes: what an adapter does is W + `get_delta_weight`, which PEFT can factorise."""
        return True


class UDVLinear(UDVLayer):
    """`udv` on `nn.Linear` (weight (m, n)) or `Conv1D` (weight (n, m))."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x (..., n) to (..., m), by the factors or the full weight, the cheaper one."""
        if self._bypass():
            return self.base_layer(x, *args, **kwargs)
        names = self._names()
        base, share = self._base(), self._base_share(names)
        if not self._factored_is_cheaper(x.numel() // self.in_features, names):
            weight = self._dense(names, base.weight)
            if not self.stored_in_out:
                return F.linear(x, weight, base.bias)
            flat = torch.addmm(base.bias, x.reshape(-1, self.in_features), weight)
            return flat.view(*x.shape[:-1], self.out_features)

        bias = None if base.bias is None or share == 1 else (1 - share) * base.bias
        products = []
        for u, d, v in self._all_terms(names):
            h = torch.matmul(x.to(v.dtype), v) * d  # (..., k)
            products.append(F.linear(h.to(u.dtype), u, None if bias is None else bias.to(u.dtype)))
            bias = None  # once
        delta = reduce(torch.add, products)
        if share == 0:
            # Under autocast the base would answer in the autocast dtype, which delta has.
            autocast = torch.is_autocast_enabled(x.device.type)
            return delta if autocast else delta.to(base.weight.dtype)
        result = self.base_layer(x, *args, **kwargs)
        scaled = result if share == 1 else share * result
        return scaled + delta.to(result.dtype)

    def _factored_is_cheaper(self, tokens: int, names: list[str]) -> bool:
        """Compare the multiplications of both forms for T tokens, with the backward pass if any.

        Forward:   factored  T k (m + n) a product, T m n for a kept W    dense  T m n + k m n
        Backward:  factored  the same again for the input's gradient, T k m if U trains, T k n if V
                   dense     2 T m n for the input's and the weight's, k m n if U or D, if V trains
        """
        m, n = self.out_features, self.in_features
        backward = torch.is_grad_enabled()
        dense = tokens * m * n * (3 if backward else 1)
        factored = tokens * m * n * (2 if backward else 1) if self._base_share(names) else 0
        for spec in (self.udv_specs[name] for name in names):
            products = 2 if spec.keep and spec.train == "udv" else 1
            factored += products * tokens * spec.rank * (m + n) * (2 if backward else 1)
            dense += products * spec.rank * m * n
            if backward:
                factored += tokens * spec.rank * (m * ("u" in spec.train) + n * ("v" in spec.train))
                dense += m * n * spec.rank * (("v" in spec.train) + (spec.train not in ("", "v")))
        return factored <= dense


class UDVEmbedding(UDVLayer):
    """`udv` on `nn.Embedding`: a row of the table (n, m) is U (D * V[id]), V (n, k) looked up."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map ids (...) to (..., m), always by the factors: they cost k m a token."""
        if self._bypass():
            return self.base_layer(ids, *args, **kwargs)
        names = self._names()
        base, share = self._base(), self._base_share(names)
        products = []
        for u, d, v in self._all_terms(names):
            h = F.embedding(ids, v, base.padding_idx) * d  # (..., k)
            products.append(F.linear(h.to(u.dtype), u))
        delta = reduce(torch.add, products).to(base.weight.dtype)
        scale = self._get_embed_scale()
        if scale is not None:
            delta = delta * scale.to(delta.dtype)
        if share == 0:
            return delta
        result = self.base_layer(ids, *args, **kwargs)
        return (result if share == 1 else share * result) + delta


def _layout(base: nn.Module, key: str) -> tuple[bool, tuple[int, int]]:
    """Return (stored as (in, out)?, (m, n)) of a supported layer, or raise TypeError."""
    if isinstance(base, BaseTunerLayer):
        raise TypeError(
            f"{key} already carries {type(base).__module__.split('.')[-2]}'s adapter; one matrix "
            "takes udv or another method, not both"
        )
    if not isinstance(base, (nn.Linear, Conv1D, nn.Embedding)):
        raise TypeError(
            f"target module {key} is a {type(base).__name__}; udv takes nn.Linear, Conv1D and "
            "nn.Embedding"
        )
    if not base.weight.is_floating_point():
        raise TypeError(
            f"{key} is quantized ({base.weight.dtype}); udv needs floating-point weights"
        )
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        raise TypeError(f"{key} rescales its rows (max_norm={base.max_norm}); udv cannot follow")
    rows, columns = base.weight.shape
    if isinstance(base, nn.Linear):
        return False, (rows, columns)
    return True, (columns, rows)


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
            stored_in_out, _ = _layout(base, key)
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
    """Enter `udv` in PEFT's four tables; calling it again changes nothing.

    PEFT's own `register_peft_method` insists on a member of its enumeration, which cannot grow, but
    everything that reads the tables takes a plain string.
    """
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = UDVConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = UDVModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = UDVModel.prefix  # type: ignore[index]
    mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PEFT_TYPE] = UDVModel  # type: ignore[index]


register()
