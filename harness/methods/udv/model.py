"""The model of the `udv` tuner: which modules get factors, and how PEFT comes to know it.

`harness.methods.udv` has the equations.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from harness.methods.svd import (
    resolve_rank,
)
from harness.methods.udv.config import PEFT_TYPE, UDVConfig
from harness.methods.udv.layer import UDVEmbedding, UDVLayer, UDVLinear, layout
from harness.system.internals import internal

include_all_linear_layers = internal("_maybe_include_all_linear_layers")


class UDVModel(BaseTuner):
    """Puts `udv` layers into a model; see the module docstring."""

    prefix = "udv_"
    tuner_layer_cls = UDVLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target's type and rank before the first SVD and the first replaced layer."""
        config: Any = include_all_linear_layers(copy.copy(peft_config), model)
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
