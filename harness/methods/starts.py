"""Starts of LoRA that read training text before step 0: EVA, CorDA and LoRA-GA, all PEFT's own.

| method.init | what it reads | what A and B become |
| --- | --- | --- |
| eva (arXiv 2410.07170) | the inputs of every matrix, until their directions stand still | A: the top directions, more ranks where they explain more; B zero |
| corda (arXiv 2406.05223) | the inputs of every matrix, one sequence at a time | parts of W C, C the inputs' covariance; taken off W |
| lora_ga (arXiv 2407.05000) | the gradient of every matrix | singular vectors of the gradient; taken off W |

The text is that of the run's first steps: `method.start_sequences` sequences of the training split
in the order of the run's seed. What was read off it (`Statistic`) is kept in RUN_DIR, so that a run
that goes on starts from the same bits, and nothing is read twice.
"""  # noqa: E501 - rows of a table

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from harness.config.errors import ConfigError
from harness.data.token_data import Batch
from harness.data.token_tables import IGNORE
from harness.methods.targets import Targets
from harness.models.next_token import document_causal_mask
from harness.system.atomic import write_atomically

FROM_TEXT = ("eva", "corda", "lora_ga")
CONFIGS = tuple(f"{init}_config" for init in FROM_TEXT)  # LoraConfig's fields
# EVA ends when its directions stand still, which text that is too short or too even never lets them
MOST_PASSES = 500
FORWARD_ALONE = 1.0  # FLOPs over those of a forward pass
WITH_BACKWARD = 3.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingText:
    """What a start may read, and where it keeps what it has found."""

    batches: Sequence[Batch]  # of the training split alone, a micro-batch each
    path: Path  # a file of RUN_DIR
    identity: str  # of the run, without which a file is of another one
    autocast: Callable[[], Any] = contextlib.nullcontext


@dataclass(frozen=True)
class Statistic:
    """What was read off the text, by module and part, and what reading it took."""

    tensors: dict[str, torch.Tensor]
    tokens: int  # predicted tokens that went through the model, again and again where EVA did
    passes: int  # forward passes
    seconds: float
    flops_factor: float  # FLOPs of a token over those of its forward pass


def reads_text(init: Any) -> bool:
    """Whether a value of `method.init` is a start that reads training text."""
    return init in FROM_TEXT


def check(init: Any, model: nn.Module, matched: Targets, fields: dict[str, Any]) -> None:
    """Refuse what PEFT does not start this way.

    Raises:
        ConfigError: naming the matrix, the base or the field.
    """
    if not reads_text(init):
        return
    for name in matched.shapes:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ConfigError(
                f"method.init={init}: {name} is of type {type(module).__name__}, and PEFT starts "
                "Linear and Conv1D this way; choose targets without it, or method.init=true"
            )
    if getattr(model.config, "quantization_config", None) and init != "eva":
        raise ConfigError(
            f"method.init={init}: it takes its start off the base's weights, and these are "
            "quantised; use method.init=eva, or a base that is not quantised"
        )
    if fields.get("target_parameters"):
        raise ConfigError(
            f"method.init={init} with method.fields.target_parameters: PEFT starts modules this "
            "way, and no bare parameters; leave one of them out"
        )


def read(config: LoraConfig, model: nn.Module, text: TrainingText | None) -> Statistic:
    """The statistic of `text` under `model`, from the run's file if it has one, or else now.

    `model` is the base; for EVA it is the base with its adapter.

    Raises:
        ConfigError: there is no text, too little of it, or EVA's directions do not stand still.
    """
    init = str(config.init_lora_weights)
    if text is None:
        raise ConfigError(
            f"method.init={init} reads training text before step 0, which only a run has; to load "
            "an adapter that a run has saved, load its adapter/"
        )
    if not text.batches:
        raise ConfigError(f"method.init={init}: this data has no training text to read")
    if (kept := _kept(text)) is not None:
        return kept
    began = time.perf_counter()
    reader = _Reader(init, text)
    devices = [next(model.parameters()).device]
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
        tensors = READERS[init](config, model, reader)
    factor = WITH_BACKWARD if init == "lora_ga" else FORWARD_ALONE
    seconds = time.perf_counter() - began
    statistic = Statistic(tensors, reader.tokens, reader.passes, seconds, factor)
    _keep(statistic, text)
    log.info("init=%s: read %d tokens in %.1f s", init, statistic.tokens, statistic.seconds)
    return statistic


def before(config: LoraConfig, base: nn.Module, statistic: Statistic) -> None:
    """Hang on the base's modules what CorDA and LoRA-GA make A and B of, where PEFT looks."""
    from peft.tuners.lora.corda import CordaEigens

    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in statistic.tensors.items():
        name, _, part = key.rpartition("/")
        grouped.setdefault(name, {})[part] = tensor
    for name, parts in grouped.items():
        module: Any = base.get_submodule(name)
        parts = {part: t.to(module.weight.device, copy=True) for part, t in parts.items()}
        if config.init_lora_weights == "corda":
            module.eigens = CordaEigens(S_WC=parts["S"], U_WC=parts["U"], V_WC=parts["V"])
        else:
            module._peft_loraga_grad = parts["gradient"] * _of_outputs(config, module)


def started(
    config: LoraConfig,
    base: nn.Module,
    text: TrainingText | None,
    wrap: Callable[[], nn.Module],
) -> nn.Module:
    """The adapted model that `wrap` makes of `base`, started from `text`."""
    if config.init_lora_weights != "eva":
        before(config, base, read(config, base, text))
        return wrap()
    from peft import initialize_lora_eva_weights

    adapted: Any = wrap()
    statistic = read(config, adapted, text)
    device = next(adapted.parameters()).device
    directions = {name: t.to(device, copy=True) for name, t in statistic.tensors.items()}
    initialize_lora_eva_weights(adapted, eva_state_dict=directions)
    return cast(nn.Module, adapted)


def facts_of(text: TrainingText | None) -> Statistic | None:
    """What a start has read, once it has read it; None where it reads nothing."""
    return _kept(text) if text else None


def flops_of(statistic: Statistic | None, forward: float | None) -> float | None:
    """FLOPs of reading, from those of a token's forward pass; None where these are not known."""
    if statistic is None:
        return 0.0
    return statistic.tokens * statistic.flops_factor * forward if forward else None


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every matrix of a LoRA whose matrices have several; empty for others."""
    config: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA" or not config.rank_pattern:
        return {}
    prefix = "base_model.model."
    module_ranks = ((name, getattr(module, "r", None)) for name, module in model.named_modules())
    return {
        name.removeprefix(prefix): r[model.active_adapter]
        for name, r in module_ranks
        if isinstance(r, dict) and model.active_adapter in r
    }


# --------------------------------------------------------------------------- reading


class _Reader:
    """The text, batch by batch, and how much of it was read."""

    def __init__(self, init: str, text: TrainingText) -> None:
        self.init, self.text = init, text
        self.tokens = self.passes = 0

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run a batch through `model`; (B, T, V)."""
        self.passes += 1
        if self.passes > MOST_PASSES and self.init == "eva":
            raise ConfigError(
                f"method.init=eva: its directions still move after {MOST_PASSES} passes; raise "
                "method.start_sequences or train.micro_batch, or lower "
                "method.fields.eva_config.tau (0.99)"
            )
        self.tokens += int(batch.targets.ne(IGNORE).sum())
        batch = batch.to(next(model.parameters()).device)
        several: dict[str, Any] = {}
        if batch.positions is not None:
            mask = document_causal_mask(batch.positions)
            several = {"attention_mask": mask, "position_ids": batch.positions}
        with self.text.autocast():
            logits: torch.Tensor = model(input_ids=batch.inputs, use_cache=False, **several).logits
        return logits


def _eva(config: LoraConfig, model: nn.Module, reader: _Reader) -> dict[str, torch.Tensor]:
    """The top directions of every matrix's inputs, at the places that predict a token."""
    from peft.tuners.lora.eva import get_eva_state_dict

    eva: Any = config.eva_config
    max_rank = max([config.r, *(config.rank_pattern or {}).values()])
    wanted = round(max_rank * eva.rho)
    fewest = min(int(batch.targets.ne(IGNORE).sum()) for batch in reader.text.batches)
    if fewest < wanted:
        raise ConfigError(
            f"method.init=eva: a micro-batch has {fewest} predicted tokens, and rank {max_rank} "
            f"times rho={eva.rho:g} asks for {wanted} or more: raise train.micro_batch, or lower "
            "method.r or method.fields.eva_config.rho"
        )
    # The mask of places is that of `labels`; what pads has none.
    rows = [
        {"input_ids": b.inputs, "labels": b.targets, "index": torch.tensor(i)}
        for i, b in enumerate(reader.text.batches)
    ]

    def forward(adapted: nn.Module, row: dict[str, torch.Tensor]) -> None:
        reader.logits(adapted, reader.text.batches[int(row["index"])])

    by_matrix = get_eva_state_dict(
        model, rows, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )
    return {name: directions.clone().contiguous() for name, directions in by_matrix.items()}


def _corda(config: LoraConfig, model: nn.Module, reader: _Reader) -> dict[str, torch.Tensor]:
    """U, S and V of every matrix's W C; PEFT's hook takes one sequence at a time."""
    from peft.tuners.lora.corda import preprocess_corda, target_modules

    def run() -> None:
        for batch in reader.text.batches:
            for row in range(len(batch.inputs)):
                row_slice = slice(row, row + 1)
                length = int(batch.targets[row].ne(IGNORE).nonzero().max()) + 1  # without padding
                positions = None if batch.positions is None else batch.positions[row_slice, :length]
                reader.logits(
                    model,
                    Batch(
                        batch.inputs[row_slice, :length],
                        batch.targets[row_slice, :length],
                        positions,
                    ),
                )

    was_training = model.training
    preprocess_corda(model, config, run_model=run)
    model.train(was_training)
    tensors: dict[str, torch.Tensor] = {}
    targeted: Any = target_modules(model, config)
    for name, module in targeted:
        eigens = module.eigens
        parts = {"S": eigens.S_WC, "U": eigens.U_WC, "V": eigens.V_WC}
        tensors |= {f"{name}/{part}": t.clone().contiguous() for part, t in parts.items()}
        del module.eigens
    return tensors


def _lora_ga(config: LoraConfig, model: nn.Module, reader: _Reader) -> dict[str, torch.Tensor]:
    """The gradient of the mean nll by every matrix, a mean over batches."""
    from peft.tuners.lora.loraga import get_target_modules, preprocess_loraga

    def step() -> None:
        for batch in reader.text.batches:
            logits = reader.logits(model, batch)
            targets = batch.targets.to(logits.device).flatten()
            F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORE).backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # the first layer's
        preprocess_loraga(model, config, step)
    gradients = {}
    for name, module in get_target_modules(model, config):
        gradients[f"{name}/gradient"] = module._peft_loraga_grad.clone().contiguous()
        del module._peft_loraga_grad
    return gradients


READERS: dict[str, Callable[[LoraConfig, Any, _Reader], dict[str, torch.Tensor]]] = {
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}


def _of_outputs(config: LoraConfig, module: nn.Module) -> float:
    """What a gradient is to be scaled by, so that PEFT's scale of B is that of a Linear.

    `scale=stable` multiplies B by the fourth root of the outputs, for which PEFT takes the weight's
    first side: of Conv1D these are the inputs. B grows in proportion to the gradient.
    """
    ga: Any = config.lora_ga_config
    if not isinstance(module, Conv1D) or ga.scale != "stable":
        return 1.0
    inputs, outputs = module.weight.shape
    return float((outputs / inputs) ** 0.25)


# --------------------------------------------------------------------------- the run's file


def _keep(statistic: Statistic, text: TrainingText) -> None:
    facts = {
        "identity": text.identity,
        "tokens": str(statistic.tokens),
        "passes": str(statistic.passes),
        "seconds": repr(statistic.seconds),
        "flops_factor": repr(statistic.flops_factor),
    }
    tensors = {name: tensor.cpu() for name, tensor in statistic.tensors.items()}
    write_atomically(text.path, lambda scratch: save_file(tensors, scratch, metadata=facts))


def _kept(text: TrainingText) -> Statistic | None:
    """What the run's file holds; None without one, or if it is damaged or of another run."""
    if not text.path.is_file():
        return None
    try:
        with safe_open(text.path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("identity") != text.identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Statistic(
            tensors,
            int(facts["tokens"]),
            int(facts["passes"]),
            float(facts["seconds"]),
            float(facts["flops_factor"]),
        )
    except Exception as error:  # whatever damage does to a reader
        log.warning("%s is damaged, and is made again: %s", text.path, error)
        return None
