"""AdaLoRA (arXiv 2303.10512): W + s/r0 B diag(E) A, and ranks that are cut while it trains.

PEFT's own model and allocator do it (`peft.tuners.adalora`): after every optimizer step it notes
how much each triplet matters, by its weights times their gradients, and cuts the least important
ones of all matrices together down to a budget. What PEFT leaves to the caller is here: the
schedule, the call after each step, the penalty on A and B, and the allocator's state.

Legend: n matrices, r0 the first rank, E (r, 1), A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraModel, PeftModel
from torch import nn

from harness.config import rank_schedule
from harness.config.method_schema import AdaloraMethod
from harness.config.run_config import RunConfig

ADAPTER = "default"
MEANS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator
PATTERN = "rank_pattern"


def tuner_of(model: nn.Module) -> AdaLoraModel | None:
    """PEFT's AdaLoRA inside an adapted model, or None for other methods."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdaLoraModel) else None


def config_fields(method: AdaloraMethod, steps: int) -> dict[str, Any]:
    """What PEFT's AdaLoraConfig is to get from `method` and the run's optimizer steps.

    Raises:
        ConfigError: no step is left for cutting ranks.
    """
    schedule = rank_schedule.schedule_of(method, steps)
    return vars(schedule) | {
        "target_r": method.target_r,
        "init_r": method.first_rank,
        "lora_alpha": method.lora_alpha,
        "lora_dropout": method.dropout,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orth_reg_weight,
    }


def after_step(
    model: nn.Module, run: RunConfig, *, cuts: bool = True
) -> Callable[[int], None] | None:
    """What is to be called after each optimizer step with its number (from 0), before `zero_grad`.

    The schedule is that of `run.train.steps`. Without `cuts` importance is noted alone, which needs
    no values: a prediction follows it on fake tensors. None for other methods than AdaLoRA.
    """
    tuner = tuner_of(model)
    if tuner is None or not isinstance(run.method, AdaloraMethod):
        return None
    config: Any = tuner.peft_config[ADAPTER]
    for name, value in vars(rank_schedule.schedule_of(run.method, run.train.steps)).items():
        setattr(config, name, value)
    if cuts:
        return tuner.update_and_allocate
    return lambda _: tuner.rankallocator.update_ipt(tuner.model)


def last_cut(run: RunConfig) -> int | None:
    """How many optimizer steps are done when ranks are final; None for other methods."""
    if not isinstance(run.method, AdaloraMethod):
        return None
    return rank_schedule.schedule_of(run.method, run.train.steps).last_cut + 1


def orthogonal_penalty(model: nn.Module) -> torch.Tensor:
    """`orth_reg_weight` times the mean over all A and B of |A A^T - I| and |B^T B - I| (Frobenius).

    PEFT adds the same to the loss that its forward pass makes of labels (`AdaLoraModel.forward`).
    """
    tuner = tuner_of(model)
    assert tuner is not None
    config: Any = tuner.peft_config[ADAPTER]
    total: Any = 0
    count = 0
    for name, p in tuner.model.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and ADAPTER in name:
            covariance = p @ p.T if "lora_A" in name else p.T @ p
            identity = torch.eye(len(covariance), dtype=p.dtype, device=p.device)
            total = total + torch.linalg.matrix_norm(covariance - identity)
            count += 1
    penalty: torch.Tensor = config.orth_reg_weight * total / count
    return penalty


# --------------------------------------------------------------------------- state


def state(model: nn.Module, *, means: bool) -> dict[str, torch.Tensor]:
    """The allocator's state by FIELD/PARAMETER: which ranks are kept, and with `means` all of it.

    Empty for other methods.
    """
    tuner = tuner_of(model)
    if tuner is None:
        return {}
    config: Any = tuner.peft_config[ADAPTER]
    kept = config.rank_pattern or {}
    tensors = {f"{PATTERN}/{name}": torch.tensor(mask) for name, mask in kept.items()}
    for field in MEANS if means else ():
        values = getattr(tuner.rankallocator, field)
        tensors |= {f"{field}/{name}": tensor for name, tensor in values.items()}
    return tensors


def restore(model: nn.Module, saved: dict[str, torch.Tensor], *, means: bool) -> None:
    """Put back what `state` gave; what it had not, the allocator has no longer."""
    tuner = tuner_of(model)
    if tuner is None:
        return
    parameters = dict(tuner.model.named_parameters())
    pattern: dict[str, list[bool]] = {}
    values: dict[str, dict[str, torch.Tensor]] = {field: {} for field in MEANS}
    for key, tensor in saved.items():
        field, _, name = key.partition("/")
        if field == PATTERN:
            pattern[name] = tensor.bool().tolist()
        else:
            values[field][name] = tensor.to(parameters[name].device, copy=True)
    config: Any = tuner.peft_config[ADAPTER]
    config.rank_pattern = pattern or None
    for field in MEANS if means else ():
        setattr(tuner.rankallocator, field, values[field])


def facts(model: nn.Module) -> dict[str, Any]:
    """For result.json: the ranks of every matrix, and the budget; {} for other methods.

    The budget counts triplets: those at first, those that were to be kept, and those kept.
    """
    tuner = tuner_of(model)
    if tuner is None:
        return {}
    config: Any = tuner.peft_config[ADAPTER]
    pattern = config.rank_pattern or {}
    ranks: dict[str, int] = {}
    elements = 0
    for name, module in tuner.model.named_modules():
        singular = getattr(module, "lora_E", None)
        if singular is None or ADAPTER not in singular:
            continue
        keys = (f"{name}.lora_E.{ADAPTER}", f"{name}.lora_E")  # PEFT drops the adapter on saving
        mask = next((pattern[key] for key in keys if key in pattern), None)
        ranks[name] = len(singular[ADAPTER]) if mask is None else sum(mask)
        elements += ranks[name] * (module.in_features + module.out_features + 1)
    return {
        "ranks": ranks,
        "budget": {
            "initial": config.init_r * len(ranks),
            "target": config.target_r * len(ranks),
            "reached": sum(ranks.values()),
            "parameters": elements,
        },
    }
