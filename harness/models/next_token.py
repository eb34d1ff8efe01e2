"""A language model as training and evaluation need it: the nats of targets given inputs.

Legend: B batch, T time, d width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from harness.models.loss import Nll, linear_nll, module_nll
from harness.system.internals import attention_implementation

# Configuration fields by which architectures change the logits after the head.
AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")

# What a model raises whose forward pass does not take a stand-in for its head.
FAILED = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError)

# Packed blocks have no padding and no cache, so that the mask is SDPA's own causal one.
# `transformers` looks for padding and packing in the values first, which makes the host wait for
# the device, and gives up SDPA's causal kernel under tracing. It makes no mask for a name that it
# knows no mask of.
CAUSAL = "sdpa_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


class NextToken(nn.Module):
    """A language model as training and evaluation need it: the nats of targets given inputs.

    The model runs with its output head bypassed, and the head goes into the loss chunk by chunk:
    by `linear_nll` where it is one matrix, through the module itself, run again in the backward
    pass, where an adapter sits on it. Architectures that change the logits after the head (a soft
    cap, a scale) are found out on a few tokens, and their logits are taken whole.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        head = bare.get_output_embeddings()
        where = [
            (module, name)
            for module in bare.modules()
            for name, child in module._modules.items()
            if child is head
        ]
        # In a list, so that the owner of the head is not registered a second time.
        self._owner = where if head is not None and len(where) == 1 else []
        prompts = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        self._config = None if prompts or not _plainly_causal(bare) else bare.config
        tuner = model.base_model if isinstance(model, PeftModel) else None
        self._own = [getattr(tuner, name) for name in own_losses(model)]
        if next(model.parameters()).device.type == "meta":  # no values to find it out by
            changes = (getattr(bare.config, name, None) for name in AFTER_HEAD)
            self._owner = [] if any(v not in (None, 1) for v in changes) else self._owner
        else:
            self._check_mask()
            if self._owner:
                self._check_head()

    def forward(
        self, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None
    ) -> Nll:
        """Shapes: inputs, targets (B, T) int64, targets[b, t] follows inputs[b, t], or IGNORE.

        With `positions` (B, T) a row is several sequences, each from its own 0 on, which do not
        see one another. Returns the sum to minimise, and the nats as (B, T).
        """
        if not self._owner:
            logits = self._logits(inputs, positions)
            nll = module_nll(
                nn.Identity(), logits.flatten(0, 1), targets.flatten(),
                self.label_smoothing,
            )  # fmt: skip
            return Nll(nll.objective, nll.nats.view_as(targets))
        hidden, head = self._hidden(inputs, positions)
        plain = type(head) is nn.Linear and head.bias is None and not head._forward_hooks
        flat = hidden.flatten(0, 1)
        if plain:
            nll = linear_nll(flat, head.weight, targets.flatten(), self.label_smoothing)
        else:
            nll = module_nll(head, flat, targets.flatten(), self.label_smoothing)
        return Nll(nll.objective, nll.nats.view_as(targets))

    def own_loss(self) -> torch.Tensor | None:
        """What PEFT asks training to add to the mean nats of the last forward pass, or None.

        A term of KaSA or MonteCLoRA, with its weight in it: PEFT names such a method of a tuner
        `_get_…_loss`, and leaves it to the caller.
        """
        losses = [loss for loss in (get() for get in self._own) if isinstance(loss, torch.Tensor)]
        return torch.stack(losses).sum() if losses else None

    @torch.no_grad()
    def supports_packing(self) -> bool:
        """Whether sequences of one row stay apart: tried on two short ones, together and alone.

        Only where attention is SDPA's causal one: a mask that keeps sequences apart replaces the
        model's own, and other kernels read it otherwise. States that run on, as an LSTM's, fail.
        """
        if self._config is None:
            return False
        was_training, device = self.model.training, next(self.model.parameters()).device
        ids = torch.arange(12, device=device)[None] % self._config.vocab_size
        positions = torch.tensor([[*range(5), *range(6)]], device=device)
        near = 0.1 if torch.is_autocast_enabled(device.type) else 1e-3
        try:
            self.model.eval()
            both = self(ids[:, :-1], ids[:, 1:], positions).nats
            alone = [self(ids[:, a:b], ids[:, a + 1 : b + 1]).nats for a, b in ((0, 5), (5, 11))]
            return torch.allclose(both, torch.cat(alone, 1), rtol=0, atol=near)
        except (TypeError, ValueError, RuntimeError):
            return False
        finally:
            self.model.train(was_training)

    def _hidden(
        self, inputs: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """What the head would get, (B, T, d), and the head."""
        ((owner, name),) = self._owner
        head = owner._modules[name]
        assert head is not None
        owner._modules[name] = _StandIn(head)
        try:
            return self._logits(inputs, positions), head
        finally:
            owner._modules[name] = head

    def _logits(self, inputs: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        if positions is not None:
            mask = document_causal_mask(positions)
            model = self.model
            return model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        if self._config is None:
            return self.model(input_ids=inputs, use_cache=False).logits[:, -inputs.shape[1] :]
        with attention_implementation(self._config, CAUSAL):
            return self.model(input_ids=inputs, use_cache=False).logits

    @torch.no_grad()
    def _check_mask(self) -> None:
        """Keep the model's own attention if it asks for it by name."""
        if self._config is None:
            return
        was_training = self.model.training
        ids = torch.arange(4, device=next(self.model.parameters()).device)[None]
        try:
            self.model.eval()
            mine = self._logits(ids)
            same = torch.allclose(mine, self.model(input_ids=ids, use_cache=False).logits)
        except (TypeError, ValueError, AttributeError, KeyError):
            same = False
        finally:
            self.model.train(was_training)
        if not same:
            self._config = None

    @torch.no_grad()
    def _check_head(self) -> None:
        """Give up the bypass if the model's own logits are not what the head makes of its input."""
        ((owner, name),) = self._owner
        head, was_training = owner._modules[name], self.model.training
        assert head is not None
        probe = _Probe(head)
        owner._modules[name] = probe
        ids = torch.arange(5, device=next(self.model.parameters()).device)[None]
        try:
            self.model.eval()
            out = self._logits(ids[:, :4])
            owner._modules[name] = head
            if not torch.equal(out.float(), probe.made[:, -4:].float()) or not self._same(ids):
                self._owner = []
        except FAILED:  # the model wants more of its head than that it be called
            self._owner = []
        finally:
            owner._modules[name] = head
            self.model.train(was_training)

    def _same(self, ids: torch.Tensor) -> bool:
        """Whether the nats of ids[:, 1:] by way of the head are those of the model's logits."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        logits = self._logits(inputs)
        whole = F.cross_entropy(logits[0].float(), targets[0], reduction="none")
        narrow = torch.is_autocast_enabled(ids.device.type) or logits.dtype.itemsize < 4
        near = 0.1 if narrow else 1e-3
        return torch.allclose(self(inputs, targets).nats[0].float(), whole, rtol=near, atol=near)


def own_losses(model: nn.Module) -> list[str]:
    """Methods of a PEFT tuner whose result training is to add to the loss: KaSA's, MonteCLoRA's."""
    tuner = type(model.base_model) if isinstance(model, PeftModel) else object
    return [name for name in dir(tuner) if re.fullmatch(r"_get_\w+_loss", name)]


def document_causal_mask(positions: torch.Tensor) -> torch.Tensor:
    """(B, T) positions -> (B, 1, T, T) bool: what came before, back to the last position 0."""
    sequence = positions.eq(0).cumsum(1)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    width = positions.shape[1]
    return same & torch.ones(width, width, dtype=torch.bool, device=positions.device).tril()


class _StandIn(nn.Module):
    """In place of a head: gives back its input, and has the head's own attributes.

    Some models ask for them: Mamba brings what it gives the head to the dtype of its weight.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["head"] = head  # not a child, whose parameters would be this module's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class _Probe(_StandIn):
    """A head whose output no function of logits leaves alone but the identity."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        values = torch.linspace(-100, 100, hidden.numel(), device=hidden.device)
        self.__dict__["made"] = values.view(hidden.shape).to(hidden.dtype)
        return self.__dict__["made"]


def _plainly_causal(model: Any) -> bool:
    """Whether every layer attends to all that came before, by SDPA."""
    layers = getattr(model.config, "layer_types", None) or ["full_attention"]
    window = getattr(model.config, "sliding_window", None)
    return (
        getattr(model.config, "_attn_implementation", None) == "sdpa"
        and set(layers) == {"full_attention"}
        and window is None
    )
