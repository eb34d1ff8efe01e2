"""The layers of the `udv` tuner: factors beside a weight, merging, the forward pass.

`harness.methods.udv` has the equations and the table of what a layer stores.
"""

from __future__ import annotations

import warnings
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.methods.svd import select_triplets
from harness.system.internals import internal

if TYPE_CHECKING:
    from harness.methods.udv.config import UDVConfig

BufferDict: Any = internal("BufferDict")
TRAINED = {"d": "d", "u": "u", "v": "v", "udv": "udv", "none": ""}  # train -> factors that train


class FactorDict(BufferDict):
    """Buffers by adapter name, of which each one stays saved or unsaved when it is replaced."""

    def store(self, key: str, buffer: torch.Tensor, persistent: bool) -> None:
        """Put a buffer in, saved with the model (`persistent`) or not."""
        self.register_buffer(key, buffer, persistent=persistent)

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.store(key, buffer, key in self and key not in self._non_persistent_buffers_set)

    def expect_saved(self, key: str) -> None:
        """Treat a buffer as saved from here on, because a file holds it."""
        self._non_persistent_buffers_set.discard(key)


class Spec(NamedTuple):
    """Holds what one adapter does in one layer: its rank, what trains, the residual."""

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
        self.stored_in_out, (self.out_features, self.in_features) = layout(base_layer, key)
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
        factors, determined = select_triplets(
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
                # Factors that the weight does not determine would come out as others elsewhere.
                saved = config.store_factors or not determined
                frozen.store(adapter_name, factor, persistent=saved)
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
                "NaNs detected in the merged weights. The adapter "  # as PEFT's own layers say it
                f"{', '.join(names)} seems to be broken: its factors are not finite"
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


def layout(base: nn.Module, key: str) -> tuple[bool, tuple[int, int]]:
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
