"""The optimizer of a run, by its name in conf/optimizer: each is its library's own class.

What trains is divided into groups by what the optimizer, `train.weight_decay` and `train.groups`
ask for. A group has `lr_scale`: its rate is that multiple of the step's (`loop.learning_rate`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import optimizers as of_peft
from peft.tuners.lora import Embedding as LoraEmbedding
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.config import optimizers as schemas
from harness.config.errors import ConfigError, nearest
from harness.config.optimizers import ADAMW, OptimizerConfig
from harness.config.schema import ParameterGroup, TrainConfig

# Vectors, and diagonals that scale, which PEFT holds in two dimensions: IA3's and BOFT's scales,
# BEFT's biases, AdaLoRA's singular values, RandLoRA's diagonals (a row each), GLoRA's vectors.
VECTORS = frozenset(
    {"ia3_l", "boft_s", "beft_bias", "lora_E", "randlora_lambda", "randlora_gamma", "X"}
)
# The rates of a state space's channels: Mamba's own code keeps them from weight decay.
RATES = frozenset({"A_log"})
AT_EVALUATION = "y"  # state of schedule-free's weights that train, while their average is evaluated

Groups = list[dict[str, Any]]


def make_optimizer(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig = ADAMW
) -> torch.optim.Optimizer:
    """The optimizer of what trains in `model`; weight decay on matrices only (`is_matrix`).

    Raises:
        ConfigError: nothing that trains is what the optimizer is for.
    """
    return MAKERS[optimizer.name](model, train, optimizer)


def _adamw(model: nn.Module, train: TrainConfig, _: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(model, train), fused=True, **_adam(train))


def _adam(train: TrainConfig) -> dict[str, Any]:
    return {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps}


def _sgd(model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    assert isinstance(optimizer, schemas.SgdOptimizer)
    return torch.optim.SGD(
        _groups(model, train),
        lr=train.lr,
        momentum=optimizer.momentum,
        dampening=optimizer.dampening,
        nesterov=optimizer.nesterov,
    )


def _lora_plus(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW; which parameter has which rate is what PEFT says of a rate of 1."""
    assert isinstance(optimizer, schemas.LoraPlusOptimizer)
    of_unit_rate = of_peft.create_loraplus_optimizer(
        cast(Any, model),
        torch.optim.AdamW,
        lr=1.0,
        loraplus_lr_ratio=optimizer.ratio,
        loraplus_lr_embedding=optimizer.embedding_ratio,
    )
    scales = {p: float(g["lr"]) for g in of_unit_rate.param_groups for p in g["params"]}
    groups = _groups(model, train, scale=lambda _, p: scales[p])
    return torch.optim.AdamW(groups, fused=True, **_adam(train))


def _lora_fa(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    """PEFT's, its one group divided into ours: a pair of A and B stays together."""
    assert isinstance(optimizer, schemas.LoraFaOptimizer)
    config = cast(Any, model).active_peft_config
    built = of_peft.create_lorafa_optimizer(
        cast(Any, model), r=config.r, lora_alpha=config.lora_alpha, lr=train.lr
    )
    (whole,) = built.param_groups
    known = dict(zip(whole["names"], whole["scaling_factors"], strict=True))
    parameters = dict(model.named_parameters())
    built.param_groups.clear()
    for group in _groups(model, train):
        names = []
        for name in group.pop("names"):
            if ".lora_B." in name:
                names.append(name.replace(".lora_B.", ".lora_A."))
            names.append(name)
        own = {
            "params": [parameters[name] for name in names],
            "names": names,
            "scaling_factors": [known[name] for name in names],
            "correct_bias": optimizer.correct_bias,
        }
        built.add_param_group(group | _adam(train) | own)
    return built


def _riemannian(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    assert isinstance(optimizer, schemas.RiemannianOptimizer)
    built = of_peft.create_riemannian_optimizer(
        cast(Any, model), torch.optim.AdamW, reg=optimizer.reg, fused=True, **_adam(train)
    )
    built.param_groups.clear()  # all in one group, without our weight decay
    for group in _groups(model, train):
        built.add_param_group(group)
    return built


def _muon(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    assert isinstance(optimizer, schemas.MuonOptimizer)
    first, second, third = optimizer.ns_coefficients
    orthogonal = _groups(model, train, wanted=lambda name, p: is_hidden(model, name, p))
    rest = _groups(
        model,
        train,
        wanted=lambda name, p: not is_hidden(model, name, p),
        scale=lambda *_: optimizer.rest_ratio,
    )
    if not orthogonal:
        raise ConfigError("optimizer=muon: nothing that trains is a matrix inside the model")
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            orthogonal,
            lr=train.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            ns_coefficients=(first, second, third),
            eps=optimizer.ns_eps,
            ns_steps=optimizer.ns_steps,
            adjust_lr_fn=optimizer.adjust_lr,
        )
    ]
    if rest:
        parts.append(torch.optim.AdamW(rest, fused=True, **_adam(train)))
    return Joined(parts)


def _schedule_free(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    assert isinstance(optimizer, schemas.ScheduleFreeOptimizer)
    return AdamWScheduleFree(
        _groups(model, train),
        r=optimizer.step_power,
        weight_lr_power=optimizer.lr_power,
        foreach=False,  # the same steps; for all parameters at once needs a copy of all gradients
        **_adam(train),
    )


def _adamw_8bit(
    model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig
) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    assert isinstance(optimizer, schemas.Adamw8bitOptimizer)
    return cast(
        torch.optim.Optimizer,
        AdamW8bit(_groups(model, train), min_8bit_size=optimizer.min_8bit_size, **_adam(train)),
    )


MAKERS: dict[str, Callable[[nn.Module, TrainConfig, OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lora_plus": _lora_plus,
    "lora_fa": _lora_fa,
    "riemannian": _riemannian,
    "muon": _muon,
    "schedule_free": _schedule_free,
    "adamw_8bit": _adamw_8bit,
}


# ------------------------------------------------------------------------------------- groups


def _groups(
    model: nn.Module,
    train: TrainConfig,
    *,
    scale: Callable[[str, nn.Parameter], float] = lambda *_: 1.0,
    wanted: Callable[[str, nn.Parameter], bool] = lambda *_: True,
) -> Groups:
    """What trains and is `wanted`, in groups of one weight decay and one multiple of the rate.

    The multiple is what the optimizer's `scale` says times that of `train.groups`. Matrices come
    first, and within a group parameters are in the model's order.
    """
    group_of = matches(model, train.groups)
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not wanted(name, parameter):
            continue
        matrix = is_matrix(model, name, parameter)
        decay = train.weight_decay if matrix else 0.0
        times = scale(name, parameter)
        if own := group_of.get(name):
            decay = decay if own.weight_decay is None else own.weight_decay
            times *= own.lr_scale
        group = groups.setdefault(
            (not matrix, times, decay),
            {
                "params": [],
                "names": [],
                "weight_decay": decay,
                "lr_scale": times,
                "lr": train.lr * times,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def matches(model: nn.Module, groups: Sequence[ParameterGroup]) -> dict[str, ParameterGroup]:
    """The entry of `train.groups` of each parameter that trains and has one, by name.

    Raises:
        ConfigError: an entry that matches nothing that trains, or nothing that is left for it.
    """
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    by_name: dict[str, ParameterGroup] = {}
    for i, group in enumerate(groups):
        pattern = re.escape(group.match.strip(".")).replace(r"\*", "[^.]*")
        own = [name for name in trains if re.fullmatch(rf"(.*\.)?{pattern}(\..*)?", name)]
        left = [name for name in own if name not in by_name]
        if not left:
            why = _nearest_end(group.match, trains)
            if own:
                why = "the entries before it have all that it matches: put it in front of them"
            raise ConfigError(f"train.groups[{i}].match={group.match} matches nothing: {why}")
        by_name |= dict.fromkeys(left, group)
    return by_name


def _nearest_end(match: str, trains: Sequence[str]) -> str:
    """The nearest name of what trains, from its end, with `*` for numbers."""
    ends = set()
    for name in trains:
        pieces = re.sub(r"\.\d+(?=\.)", ".*", name).split(".")
        ends |= {".".join(pieces[i:j]) for j in range(1, len(pieces) + 1) for i in range(j)}
    return f"of what trains {nearest(match, ends, limit=12)}"


def described(optimizer: torch.optim.Optimizer) -> Groups:
    """The groups as result.json has them: class, multiple of the rate, decay, elements."""
    return [
        {
            "optimizer": type(part).__name__,
            "lr_scale": group["lr_scale"],
            "weight_decay": group["weight_decay"],
            "parameters": sum(p.numel() for p in group["params"] if p.requires_grad),
        }
        for part in parts_of(optimizer)
        for group in part.param_groups
    ]


def is_matrix(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix, which weight decay pulls to zero, and not a vector.

    What it is decides, at any rank: LoRA's A (1, n) at r=1 is a factor of a matrix as at r=8, and
    so is every factor that an adapter multiplies out; IA3's (1, n) scales a vector. Matrices are
    weights, embeddings (prompts, too), factors and cores; vectors are biases, norms, UDV's D,
    magnitudes, spectra, scales and rates. A base model's own (1, n) is a matrix if it is the weight
    of a linear layer or an embedding.
    """
    if parameter.ndim < 2 or (VECTORS | RATES) & set(name.split(".")):
        return False
    if sum(size > 1 for size in parameter.shape) > 1:
        return True
    owner = model.get_submodule(name.rpartition(".")[0])
    adapter = type(owner).__module__.startswith("peft.")
    kinds = (nn.Linear, nn.Embedding, Conv1D, nn.ParameterDict, nn.ParameterList)
    return adapter or isinstance(owner, kinds)


def is_hidden(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix inside the model, which Muon is for.

    Not embeddings, nor the head, nor a LoRA on an embedding.
    """
    if parameter.ndim != 2 or not is_matrix(model, name, parameter):
        return False
    owner = model.get_submodule(name.rpartition(".")[0])
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = getattr(get_head(), "weight", None)
    of_embedding = isinstance(owner, nn.Embedding) or parameter is head
    parent = name.rpartition(".lora_embedding_")[0]
    return not of_embedding and not (
        parent and isinstance(model.get_submodule(parent), LoraEmbedding)
    )


# ------------------------------------------------------------------------- several, and averages


class Joined(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, that step as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        # Not torch's own __init__: groups and state are the parts'.
        self.parts = list(parts)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        """Return the parameter groups of all parts, in their order."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of all parts, to be read."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step with the optimizer of every part."""
        if closure is not None:
            raise ValueError("several optimizers cannot evaluate one closure")
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts; Accelerate moves them to the device."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all parts from what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def parts_of(optimizer: torch.optim.Optimizer | None) -> list[torch.optim.Optimizer]:
    """The libraries' optimizers inside of ours and Accelerate's."""
    if optimizer is None:
        return []
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.parts if isinstance(inner, Joined) else [inner]


def start(optimizer: torch.optim.Optimizer | None) -> None:
    """Tell an optimizer with weights of its own for evaluation that training goes on."""
    for part in _averaging(optimizer):
        part.train()


@contextmanager
def evaluation(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Have the weights in the model that are evaluated; those that train are back afterwards.

    Schedule-free's own way back from the average is exact to rounding only: here the weights are
    kept (and count as optimizer state), so that evaluating moves nothing.
    """
    averaging = _averaging(optimizer)
    for part in averaging:
        for group in part.param_groups:
            for parameter in group["params"]:
                part.state[parameter][AT_EVALUATION] = parameter.detach().clone()
        part.eval()
    try:
        yield
    finally:
        for part in averaging:
            part.train()
            for group in part.param_groups:
                for parameter in group["params"]:
                    with torch.no_grad():
                        parameter.copy_(part.state[parameter].pop(AT_EVALUATION))


def _averaging(optimizer: torch.optim.Optimizer | None) -> list[Any]:
    return [p for p in parts_of(optimizer) if hasattr(p, "train") and hasattr(p, "eval")]
