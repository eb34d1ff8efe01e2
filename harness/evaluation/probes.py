"""What a model's numbers depend on, found by a few short forward passes before training.

causal    A prefix is given twice, with other tokens after it each time. Its nats must not change:
          a model whose attention looks ahead sees what it is to predict. Of at most CAUSAL_LENGTH
          tokens: what looks ahead only in longer texts, or only beyond so many, is not found.
batching  A short row is given alone, padded beside a row as wide as evaluation's windows, beside
          two different rows of its own width, and alone again. Its nats must be the same. Where
          they change with the width or with the neighbours, batches are made of rows of one width,
          or of one row; where they change with what was evaluated before, the run is refused.
blocks    Two sequences are given packed into one block, and alone (`check_blocks`).
start     The same tokens are given before a method is put on the base and after. Where their nats
          differ, training does not start from the base (`harness.evaluation.base_model`).

Every change is measured as a share of the change that other tokens *before* a position make, which
the model must react to. So one limit serves trained and random weights, large and small models.
Passes have the same shape wherever they can, and then what must not change does not change at all.

Legend: B batch, T time.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.data.token_tables import IGNORE
from harness.models import quantized as packed
from harness.models.next_token import NextToken

log = logging.getLogger(__name__)

PADDED, ONE_WIDTH, ONE_ROW = "padded", "one_width", "one_row"  # how rows may share a batch
LENGTH = 24  # tokens of a probe
CAUSAL_LENGTH = 64  # of the causal one, half of them the prefix: a second for GPT-2 on a CPU core
# Shares of the reaction to context up to which two results are the same: of any two passes, and of
# two of one shape, which round alike.
LIMIT, LIMIT_OF_SHAPE = 1e-3, 1e-5
# Roundings of a nat, as multiples of its last place, that are the same result too.
ROUNDINGS = 4
# Where roundings come to more than this share of the reaction to context, a change that is not
# exactly nothing tells nothing.
TOO_COARSE, TOO_COARSE_OF_SHAPE = 0.1, 0.01
COPIED = 10**8  # parameters up to which a model that cannot be told is asked again in float64


@dataclass(frozen=True)
class Reaction:
    """How much of a change is more than rounding: by the model's reaction to context."""

    rms: float  # nats that other tokens before a position change
    rounding: float  # nats that rounding may change

    @classmethod
    def of_logits(cls, model: nn.Module, logits: torch.Tensor, others: torch.Tensor) -> Reaction:
        """That of logits after a prompt, to the logits after another prompt."""
        return cls(_rms(logits - others), _rounding(model) * _rms(logits))

    def differs(self, a: torch.Tensor, b: torch.Tensor, *, one_shape: bool = False) -> bool | None:
        """Whether two results differ by more than rounding; None where that cannot be told.

        `one_shape`: they are of passes of one shape.
        """
        limit = LIMIT_OF_SHAPE if one_shape else LIMIT
        coarse = TOO_COARSE_OF_SHAPE if one_shape else TOO_COARSE
        change = _rms(a - b)
        if change == 0:
            return False if self.rms else None
        if change != change:  # NaN
            return None
        if change > limit * self.rms + ROUNDINGS * self.rounding:
            return True
        return None if self.rounding > coarse * self.rms else False


def check_causal(
    predicts: NextToken, name: str, config: PretrainedConfig, positions: int | None
) -> bool:
    """Whether the nats of a prefix are known not to depend on what follows it.

    Tried with CAUSAL_LENGTH tokens, or as many as there is room for; longer texts are not tried.
    `positions` is how many the model has for tokens, if it has a limit. False where it cannot be
    told: the model reacts to no context (weights of zero), or less than its precision shows.

    Raises:
        ConfigError: they depend on it.
    """
    length = min(CAUSAL_LENGTH, positions or CAUSAL_LENGTH)
    leaks = _leaks(predicts, length) if length >= 3 else None
    parameters = sum(p.numel() for p in predicts.parameters())
    if leaks is None and length >= 3 and parameters <= COPIED:
        leaks = _leaks(NextToken(copy.deepcopy(predicts.model).double()), length)
    if leaks is None:
        return _not_told(name)
    if leaks:
        what = "take a causal language model"
        if getattr(config, "is_decoder", None) is False:
            what = (
                'its configuration says is_decoder=false: set "is_decoder": true in config.json '
                "(model.architecture.is_decoder=true for random weights), or " + what
            )
        if packed.mixes_tokens(config):
            what = (
                "LLM.int8() decides by all tokens of a batch which columns it multiplies in 16 "
                'bits: set "llm_int8_threshold": 0.0 under quantization_config in config.json, '
                "or take a base of 4 bits"
            )
        raise ConfigError(
            f"model={name}: a {config.model_type} model that sees what it is to predict: the nats "
            f"of a prefix change with what follows it, so they are no perplexity; {what}"
        )
    return True


def _leaks(predicts: NextToken, length: int) -> bool | None:
    """Whether the nats of a prefix change with what follows it; None where it cannot be told."""
    ids = _tokens(predicts, length)
    half = length // 2
    later = _other(ids, slice(half + 1, None), predicts)
    nats = _nats(predicts, ids)
    # nats[i] is of token i + 1 given tokens 0 to i: below `half` all of these are the same.
    before, after = nats[:, :half], _nats(predicts, later)[:, :half]
    return reaction(predicts, ids, nats).differs(before, after, one_shape=True)


def batching(predicts: NextToken, name: str, config: PretrainedConfig, widest: int) -> str:
    """How rows of at most `widest` tokens may share a batch, so that none changes another's nats.

    PADDED: any rows, the shorter ones padded at their end. ONE_WIDTH: rows of one width, also
    where it cannot be told. ONE_ROW: a row at a time.

    Raises:
        ConfigError: a row's nats depend on what was evaluated before it.
    """
    if widest < 1:
        return ONE_ROW
    short = max(1, min(LENGTH, widest // 2))
    ids = _tokens(predicts, short)
    alone = _nats(predicts, ids)
    reacts = reaction(predicts, ids, alone)
    wide = _tokens(predicts, widest, seed=1)
    inputs = torch.zeros(2, widest, dtype=torch.int64, device=ids.device)
    targets = torch.full_like(inputs, IGNORE)
    inputs[0, :short], targets[0, :short] = ids[0, :-1], ids[0, 1:]
    inputs[1], targets[1] = wide[0, :-1], wide[0, 1:]
    padded = reacts.differs(_run(predicts, inputs, targets)[:1, :short], alone)
    beside = [
        _nats(predicts, torch.cat([ids, _tokens(predicts, short, seed=seed)]))[:1]
        for seed in (2, 3)
    ]
    if reacts.differs(_nats(predicts, ids), alone):
        raise ConfigError(
            f"model={name}: what a {config.model_type} model predicts depends on the texts that it "
            "was given before, so no document has nats of its own"
        )
    neighbours = reacts.differs(beside[0], beside[1])
    if neighbours or reacts.differs(beside[0], alone):
        return ONE_ROW
    apart = padded is False and neighbours is False and widest <= same_up_to(config)
    return PADDED if apart else ONE_WIDTH


def check_blocks(predicts: NextToken, run: RunConfig, config: PretrainedConfig) -> None:
    """Check that a pair's loss in training does not depend on the others of its block or batch.

    Blocks of pairs are packed, or padded to the longest of a micro-batch (`harness.data.pairs`).

    Raises:
        ConfigError: it does, naming the setting to change.
    """
    name, width = run.model.name, run.data.context_length
    if run.data.packing == "packed":
        if (
            not predicts.supports_packing()
            or width > same_up_to(config)
            or _packed_differ(predicts, width)
        ):
            raise ConfigError(
                f"data.packing=packed: {name} with method={run.method.name} cannot keep the "
                "sequences of a block apart; set data.packing=padded"
            )
    elif run.train.micro_batch > 1 and batching(predicts, name, config, width) != PADDED:
        raise ConfigError(
            f"train.micro_batch={run.train.micro_batch} with data.packing=padded: in a batch of "
            f"{name} the loss of a sequence depends on the others of its batch; set "
            "train.micro_batch=1"
        )


@torch.no_grad()
def _packed_differ(predicts: NextToken, width: int) -> bool:
    """Whether a short and a long sequence have other nats in one block of `width` than alone."""
    short = min(LENGTH, width // 2)
    a, b = _tokens(predicts, short), _tokens(predicts, width - short, seed=1)
    alone = _nats(predicts, a)
    apart = torch.cat([alone, _nats(predicts, b)], 1)
    ids = torch.cat([a[:, :-1], b[:, :-1]], 1)
    targets = torch.cat([a[:, 1:], b[:, 1:]], 1)
    positions = torch.tensor([[*range(short), *range(width - short)]], device=ids.device)
    packed = _run(predicts, ids, targets, positions)
    return reaction(predicts, a, alone).differs(packed, apart) is True


def same_up_to(config: PretrainedConfig) -> float:
    """Positions up to which rotary factors do not depend on the longest row of a batch.

    With "longrope" `transformers` takes the long factors for all rows where the largest position
    of a batch is beyond the original ones (modeling_rope_utils.dynamic_rope_update). With "dynamic"
    it does so beyond max_position_embeddings, which no context here may exceed.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or 0
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min(limits, default=float("inf"))


def reaction(predicts: NextToken, ids: torch.Tensor, nats: torch.Tensor) -> Reaction:
    """What other tokens in the first half of `ids` change in the nats of the rest."""
    half = max(1, ids.shape[1] // 2)
    changed = _nats(predicts, _other(ids, slice(0, half), predicts))
    # Of targets that are the same: from the first one whose own inputs are, where there is one.
    rest = slice(min(half, nats.shape[1] - 1), None)
    return Reaction(_rms((nats - changed)[:, rest]), _rounding(predicts) * _rms(nats))


def start_nats(predicts: NextToken, positions: int | None) -> tuple[torch.Tensor, Reaction]:
    """The nats of the probe's tokens, on the CPU, and the model's reaction to context."""
    ids = _tokens(predicts, min(LENGTH, positions or LENGTH))
    nats = _nats(predicts, ids)
    return nats.cpu(), reaction(predicts, ids, nats)


def _not_told(name: str) -> bool:
    message = (
        f"model={name}: whether it sees what it is to predict could not be told, since what it "
        "predicts hardly depends on the tokens before; its perplexity is to be trusted only if "
        "its attention is causal"
    )
    log.warning(message)
    print(f"warning: {message}", file=sys.stderr)
    return False


def _vocabulary(predicts: NextToken) -> int:
    return int(config_of(predicts.model).get_text_config().vocab_size)


def config_of(model: Any) -> PretrainedConfig:
    """The configuration of a model, or of the base that an adapter is on."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config: PretrainedConfig = base.config
    return config


def _tokens(predicts: NextToken, length: int, seed: int = 0) -> torch.Tensor:
    """(1, length + 1) ids, drawn from a generator of their own."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, _vocabulary(predicts), (1, length + 1), generator=draw)
    return _without_padding(ids, predicts).to(next(predicts.parameters()).device)


def _other(ids: torch.Tensor, where: slice, predicts: NextToken) -> torch.Tensor:
    """The same ids with others at `where`, each of them another than it was."""
    changed = ids.clone()
    size = _vocabulary(predicts)
    changed[:, where] = (changed[:, where] + 1 + size // 3) % size
    return _without_padding(changed, predicts)


def _without_padding(ids: torch.Tensor, predicts: NextToken) -> torch.Tensor:
    """The same ids without the one that pads: RoBERTa, for one, counts positions without it."""
    pad = config_of(predicts.model).get_text_config().pad_token_id
    return ids if pad is None else ids.masked_fill(ids == pad, (pad + 1) % _vocabulary(predicts))


def _nats(predicts: NextToken, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) nats of ids (B, T + 1), each given those before it."""
    return _run(predicts, ids[:, :-1], ids[:, 1:])


@torch.no_grad()
def _run(predicts: NextToken, *block: torch.Tensor) -> torch.Tensor:
    """Nats of a block's inputs, targets and, if given, positions."""
    with evaluating(predicts), full_precision(predicts):
        nats: torch.Tensor = predicts(*block).nats
    return nats


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, and blocks as they are without compilation: widths differ."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def full_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Without autocast, where all weights are fp32 or wider: its roundings hide what is asked."""
    if any(p.element_size() < 4 for p in model.parameters()):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def _rounding(model: nn.Module) -> float:
    """The last place of the coarsest type that the model computes in, as a share."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    kind = next(model.parameters()).device.type
    if torch.is_autocast_enabled(kind) and any(p.element_size() < 4 for p in model.parameters()):
        kinds.add(torch.get_autocast_dtype(kind))
    return max((torch.finfo(kind).eps for kind in kinds), default=1.0)


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0
