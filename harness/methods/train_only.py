"""What `method=full method.train_only=[…]` trains of a model; all other weights are frozen.

    method.train_only=[matrices]               the weights that LoRA with targets=all adapts
    method.train_only=[embeddings,positions]   roles and kinds together
    method.train_only=[mlp.c_fc.weight,h.0]    names of parameters or modules, from their end

An entry is a role of `harness.config.matrix_roles` (the weight of each such matrix, without its
bias), a kind of `KINDS`, or the name of a parameter or of a module (then all that is in it). A name
may leave out its beginning, at a dot, and `*` stands for anything but a dot.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict

from torch import nn
from transformers import PreTrainedModel

from harness.config import matrix_roles
from harness.config.errors import ConfigError, nearest
from harness.config.schema import TargetsConfig
from harness.methods import targets

KINDS = {
    "matrices": "weights of the matrices in the layers, as targets=all names them",
    "positions": "learned position embeddings",
    "norms": "weights and biases of the normalisation layers",
    "biases": "every bias, those of the normalisation layers among them",
}
MATRICES = ["qkv", "o", "mlp_in", "gate", "mlp_out"]  # conf/targets/all.yaml


def select(model: PreTrainedModel, entries: list[str]) -> dict[str, nn.Parameter]:
    """The parameters that `entries` name, by their names; a tied one is there once.

    Raises:
        ConfigError: an entry that matches nothing, with the nearest name.
    """
    parameter_names = names(model)
    wanted = {id(parameter) for entry in entries for parameter in _matches(model, entry)}
    return {
        keys[0]: parameter for parameter, keys in parameter_names.items() if id(parameter) in wanted
    }


def names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all of its names: a tied one has several."""
    by_parameter: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter[parameter].append(name)
    return dict(by_parameter)


def tied(model: nn.Module) -> list[str]:
    """A sentence for every parameter that trains under more names than one."""
    return [
        f"{' and '.join(keys)} are one weight: it trains, and counts once"
        for parameter, keys in names(model).items()
        if parameter.requires_grad and len(keys) > 1
    ]


def _matches(model: PreTrainedModel, entry: str) -> list[nn.Parameter]:
    """The parameters of one entry, at least one."""
    if entry in ("embeddings", "head"):
        module = getattr(model, f"get_{'in' if entry == 'embeddings' else 'out'}put_embeddings")()
        weights = [] if module is None else [module.weight]
    elif entry in matrix_roles.ROLES or entry == "matrices":
        named = TargetsConfig(entry, roles=MATRICES if entry == "matrices" else [entry])
        try:
            modules = targets.resolve(model, named).shapes
        except ConfigError as error:
            reason = str(error).removeprefix(f"targets={entry}: ")
            raise ConfigError(f"method.train_only: {entry}: {reason}") from error
        weights = [model.get_parameter(f"{name}.weight") for name in modules]
    elif entry == "positions":
        weights = [
            parameter
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and re.search(r"wpe$|position", name)
            for parameter in module.parameters()
        ]
    elif entry == "norms":
        weights = [
            parameter
            for module in model.modules()
            if "Norm" in type(module).__name__
            for parameter in module.parameters()
        ]
    elif entry == "biases":
        weights = [p for name, p in _all(model) if name.rpartition(".")[2].startswith("bias")]
    else:
        pattern = re.escape(entry.strip(".")).replace(r"\*", "[^.]*")
        weights = [p for name, p in _all(model) if re.fullmatch(rf"(.*\.)?{pattern}(\..*)?", name)]
    if not weights:
        raise ConfigError(f"method.train_only: '{entry}' matches no weight; {_hint(model, entry)}")
    return weights


def _all(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _hint(model: nn.Module, entry: str) -> str:
    """The nearest role, kind or name; or else the roles and kinds there are."""
    words = [*KINDS, *matrix_roles.ROLES]
    ends = set()
    for name, _ in _all(model):
        pieces = re.sub(r"\.\d+(?=\.)", ".*", name).split(".")
        ends |= {".".join(pieces[i:j]) for j in (len(pieces) - 1, len(pieces)) for i in range(j)}
    if difflib.get_close_matches(entry, ends | set(words), n=1, cutoff=0.6):
        return nearest(entry, ends | set(words))
    return f"{nearest(entry, words, limit=len(words))}, or name parameters or modules of the model"
