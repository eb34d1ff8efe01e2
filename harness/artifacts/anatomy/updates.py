"""W and W + dW of every weight that a finished run changed, one at a time.

The two are read off whole models: the base as the run loaded it, and the run's own model with its
adapter merged in fp32. So dW is what the run's model adds whatever the method: a product of LoRA's
factors, a scaling by IA3, a truncation, the start of PiSSA taken off the base. Merging rounds
W + dW to fp32, and `error` says how large that makes the noise of dW.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.artifacts import export
from harness.artifacts.anatomy import spectra
from harness.config import matrix_roles
from harness.config.errors import ConfigError
from harness.models import linear, quantized
from harness.runs import saved_check
from harness.runs.finished_run import ADAPTER, Saved

# Kinds of weights beside the matrices in the layers.
BESIDE = ("embeddings", "head", "positions", "norms", "biases")
QKV_IN_ROW = ("gpt2", "mpt", "phi3")  # [q; k; v], one after another
QKV_BY_HEAD = ("gpt_neox", "bloom", "persimmon")  # q, k and v of a head, then of the next


@dataclass(frozen=True)
class Update:
    """A weight before and after: (m, n) float32 as in y = W x, or a vector (m,)."""

    name: str  # of the parameter; .q, .k or .v behind it where it is a part of one
    kind: str  # a role of `harness.config.matrix_roles`, one of BESIDE, or the module's own name
    layer: int | None
    before: torch.Tensor
    after: torch.Tensor
    stored_in_out: bool  # the parameter is W^T
    dtype: torch.dtype  # in which the base holds it
    parameter: str = ""  # of the model, of which this is all or some rows
    rows: slice | torch.Tensor = field(default_factory=lambda: slice(None))

    @property
    def delta(self) -> torch.Tensor:
        """Return dW (m, n), the weight after training less the one before, in float64."""
        return self.after.double() - self.before.double()

    @torch.no_grad()
    def write(self, model: nn.Module, value: torch.Tensor) -> None:
        """Put `value`, of the shape of `before`, in this weight's place in `model`."""
        weight = model.get_parameter(self.parameter)
        place = weight.t() if self.stored_in_out else weight
        place[self.rows] = value.to(weight.device, weight.dtype)

    @property
    def is_matrix(self) -> bool:
        """Whether it has singular values; further dimensions are not looked into."""
        return self.before.ndim == 2

    @property
    def rounding(self) -> float:
        """||dW||_F that rounding to the base's dtype makes on average: less is lost when merged.

        An error is uniform within half a step of the number: its variance is step^2 / 12.
        """
        return (_squared_steps(self.before, self.dtype) / 12) ** 0.5

    @property
    def error(self) -> float:
        """||.||_F of the noise in dW: W + dW was read in fp32, and an adapter's dW made in it."""
        after = _squared_steps(self.after, torch.float32)
        return ((after + _squared_steps(self.delta, torch.float32)) / 12) ** 0.5


@dataclass(frozen=True)
class Pair:
    """The base and the run's model, both plain models in fp32 with q, k and v as published."""

    base: PreTrainedModel
    adapted: PreTrainedModel
    base_dtypes: dict[str, torch.dtype]  # of the base as the run held it, by name


def load(run: Saved) -> Pair:
    """Load the base and the model of a finished run.

    Raises:
        ConfigError: the run changed no weight (untrained, prompts), its change cannot be merged, it
            saved no weights, or what it saved does not give the nats that it measured.
    """
    _refuse(run)
    try:
        adapted, _ = export.merged(run)
    except ConfigError as error:
        reason = str(error).removeprefix("--merge: ").removesuffix("; leave out --merge")
        raise ConfigError(f"{run.name} has no change of weights to look at: {reason}") from error
    saved_check.compare(run, adapted, f"what {run.run_dir} holds")
    base: Any = linear.as_published(run.base())
    dtypes = {name: p.dtype for name, p in base.named_parameters(remove_duplicate=False)}
    return Pair(base.float(), adapted, dtypes)


def _refuse(run: Saved) -> None:
    method = run.run.method
    if method.name == "none":
        raise ConfigError(f"{run.name} trained nothing (method=none): there is no dW")
    if not run.has_adapter:
        return
    config = PeftConfig.from_pretrained(str(run.folder(ADAPTER)))
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(
            f"{run.name}: {kind} trains prompts beside the model and changes no weight: there is "
            "no dW to decompose"
        )


def changed(pair: Pair) -> Iterator[Update]:
    """Every weight in which the two differ, with q, k and v apart; a tied one comes once.

    Where merging has untied the head from the embeddings, each is compared with the weight that
    they shared.

    Raises:
        ConfigError: a weight that the base does not have, or has in another shape.
    """
    model, config = pair.adapted, pair.adapted.config
    if packing := quantized.packing_of(pair.base.config):
        raise ConfigError(f"weights quantised by {packing} have no dW")
    for name, after in model.named_parameters():
        before = parameter(pair.base, name)
        if before is None or before.shape != after.shape:
            raise ConfigError(f"the base has no weight {name} of shape {tuple(after.shape)}")
        if torch.equal(before, after):
            continue
        if not torch.isfinite(after).all():
            raise ConfigError(f"{name} of the run's model is not finite")
        module = model.get_submodule(name.rpartition(".")[0])
        kind = kind_of(name, module, model)
        flipped = isinstance(module, Conv1D | nn.Embedding) and after.ndim == 2
        old, new = (t.detach().t() if flipped else t.detach() for t in (before, after))
        layer = re.search(r"\.(\d+)\.", name)
        for part, rows in parts(kind, old, config):
            if not torch.equal(old[rows], new[rows]):
                yield Update(
                    f"{name}.{part}" if part else name,
                    part or kind,
                    int(layer[1]) if layer else None,
                    old[rows],
                    new[rows],
                    flipped,
                    pair.base_dtypes[name],
                    name,
                    rows,
                )


def kept(pair: Pair) -> Iterator[Update]:
    """`changed`, of a pair whose adapted model is to be written into: the updates are copies."""
    for update in changed(pair):
        yield replace(update, after=update.after.clone())


def parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that name, by any name of a tied one; None where there is none."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def kind_of(name: str, module: nn.Module, model: PreTrainedModel) -> str:
    """What a parameter is: a role, one of BESIDE, or else the name of its module."""
    if "Norm" in type(module).__name__:
        return "norms"
    if name.rpartition(".")[2].startswith("bias"):
        return "biases"
    if module is model.get_input_embeddings():
        return "embeddings"
    if module is model.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Embedding):
        return "positions"
    path = name.rpartition(".")[0]
    for role, suffix in matrix_roles.SUFFIXES.get(model.config.model_type, {}).items():
        if path == suffix or path.endswith(f".{suffix}"):
            return role
    return re.sub(r"^.*\.\d+\.", "", path) or name


def parts(
    kind: str, weight: torch.Tensor, config: PretrainedConfig
) -> list[tuple[str, slice | torch.Tensor]]:
    """("q", rows), … of a fused matrix (m, n) where its layout is known; else ("", all rows)."""
    whole: list[tuple[str, slice | torch.Tensor]] = [("", slice(None))]
    if kind != "qkv" or weight.ndim != 2:
        return whole
    m, model_type = len(weight), config.model_type
    heads = config.num_attention_heads
    if model_type in QKV_IN_ROW:
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = m // (heads + 2 * groups)  # of a head
        q, k = heads * width, (heads + groups) * width
        return [("q", slice(q)), ("k", slice(q, k)), ("v", slice(k, m))]
    if model_type in QKV_BY_HEAD:
        rows = torch.arange(m).view(heads, 3, -1)
        return [(part, rows[:, i].flatten()) for i, part in enumerate("qkv")]
    return whole


def _squared_steps(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """The sum of squares of the distance from each number to the next of its size in `dtype`."""
    info = torch.finfo(dtype)
    total = 0.0
    for part in weight.split(spectra.COLUMNS, -1):  # the last dimension: embeddings are (d, V)
        _, exponent = torch.frexp(part.double().abs().clamp(min=info.tiny))
        steps = torch.ldexp(torch.full_like(part, info.eps, dtype=torch.float64), exponent - 1)
        total += float(steps.square().sum())
    return total
