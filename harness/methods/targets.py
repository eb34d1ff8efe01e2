"""Target names to weight matrices, checked before PEFT sees them.

A target is a role (`harness.config.matrix_roles`) or a module-name suffix, as PEFT matches them. On
a model whose q, k and v are three matrices `attn.c_attn` stands for all three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.config import matrix_roles
from harness.config.errors import ConfigError
from harness.config.schema import TargetsConfig
from harness.models.model_size import matrices
from harness.models.split_qkv import UNFUSED_TARGETS, is_unfused


@dataclass(frozen=True)
class Targets:
    """Holds the matrices that a target set names in one model, with their shapes."""

    suffixes: list[str]  # for PEFT's target_modules
    shapes: dict[str, tuple[int, int]]  # module name -> (in, out)
    conv1d: bool  # GPT-2 stores its weights (in, out), which PEFT calls fan_in_fan_out

    def smallest(self) -> tuple[str, int]:
        """The module with the smallest side, and that side: no rank can be larger."""
        name = min(self.shapes, key=lambda name: min(self.shapes[name]))
        return name, min(self.shapes[name])


def resolve(model: nn.Module, targets: TargetsConfig, *, all_layers: bool = True) -> Targets:
    """The matrices that `targets` names in `model`.

    Raises:
        ConfigError: a suffix matches nothing, not every layer, or several matrices of one layer.
    """
    all_matrices = matrices(model)
    layers = {match[1] for name in all_matrices if (match := re.search(r"\.(\d+)\.", name))}
    kinds = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in all_matrices})
    architecture = getattr(getattr(model, "config", None), "model_type", "")
    named = matrix_roles.modules_of(targets, architecture)
    if named is None:
        raise ConfigError(
            f"targets={targets.name}: which modules are {', '.join(targets.roles)} in a model of "
            f"type {architecture!r} is not known; name modules, targets.modules=[…], of: "
            f"{', '.join(kinds)}"
        )
    if not named:
        raise ConfigError(f"targets={targets.name} names no modules; there are: {', '.join(kinds)}")
    suffixes: list[str] = []
    for suffix in named:
        split = suffix == "attn.c_attn" and is_unfused(model)
        suffixes += UNFUSED_TARGETS.values() if split else [suffix]
    shapes: dict[str, tuple[int, int]] = {}
    for suffix in dict.fromkeys(suffixes):
        matches = [name for name in all_matrices if name == suffix or name.endswith(f".{suffix}")]
        if not matches:
            hint = " (q, k and v apart need model.unfuse_qkv=true)" if "c_attn." in suffix else ""
            hint += " (try targets=lstm)" if architecture == "lstm" else ""
            raise ConfigError(
                f"targets={targets.name}: '{suffix}' matches no matrix of this model{hint}; "
                f"there are: {', '.join(kinds)}"
            )
        in_layers = [match[1] for name in matches if (match := re.search(r"\.(\d+)\.", name))]
        if len(set(in_layers)) < len(in_layers):
            same = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in matches})
            if len(same) == 1:  # the same name in two stacks of layers
                stacks = sorted({re.sub(r"\.\d+\..*$", "", name) for name in matches})
                raise ConfigError(
                    f"targets={targets.name}: '{suffix}' is in several stacks of layers "
                    f"({', '.join(stacks)}), which a module's name in a layer cannot tell apart"
                )
            raise ConfigError(
                f"targets={targets.name}: '{suffix}' matches several matrices of a layer; "
                f"write one of: {', '.join(same)}"
            )
        if all_layers and in_layers and set(in_layers) != layers:
            missing = ", ".join(sorted(layers - set(in_layers), key=int))
            raise ConfigError(
                f"targets={targets.name}: '{suffix}' is in {len(in_layers)} of {len(layers)} "
                f"layers (not in {missing}); there are: {', '.join(kinds)}"
            )
        shapes |= {name: all_matrices[name] for name in matches}
    conv1d = any(isinstance(model.get_submodule(name), Conv1D) for name in shapes)
    return Targets(list(dict.fromkeys(suffixes)), shapes, conv1d)
