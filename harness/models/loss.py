"""Head and cross-entropy in one, in chunks of tokens, never holding tokens x vocabulary.

    nll_i = logsumexp_j(z_ij) - z_i,t(i)       z = hidden W^T

With label smoothing e, what is minimised is (1 - e) nll_i + e (logsumexp_j(z_ij) - mean_j z_ij), as
`F.cross_entropy` defines it. Logits cost 12 V bytes a token the usual way, more than all else of a
small model together. Here a chunk's logits live while that chunk is worked on: its gradients,
softmax - onehot times W (and times hidden, where the head trains), are formed in the forward pass.

Legend: B batch, T time, N = B T tokens, C tokens of a chunk, d width, V vocabulary.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from harness.data.token_tables import IGNORE
from harness.system.internals import attention_implementation

CHUNK_BYTES = 8 * 2**20  # of one chunk's logits in fp32, with LEAST_TOKENS at least: fewer make
LEAST_TOKENS = {"cpu": 256, "cuda": 1024}  # slower products; more save a tenth, and cost memory
# Rows of 50,257 logits do not begin at multiples of 16 bytes, as a GPU's fast products ask for:
# there W gets further rows, of zeros, whose logits are -inf (experiments/bench/loss).
ROWS_MULTIPLE = {("cuda", torch.bfloat16): 64, ("cuda", torch.float16): 64}
CPU_ROWS = 512  # of W in one fp32 product on a CPU: a fifth to a half faster than all 50,257
# Configuration fields by which architectures change the logits after the head.
AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class Nll(NamedTuple):
    """Holds what is minimised, and the nats that a model gives each target."""

    objective: torch.Tensor  # scalar to minimise: nats, smoothed if asked for, summed over targets
    nats: torch.Tensor  # of every target, fp32, 0 where ignored; carries no gradient


def linear_nll(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0
) -> Nll:
    """Cross-entropy of `hidden @ weight.T` against `targets`, with the gradients of both.

    Shapes: hidden (N, d), weight (V, d), targets (N,) int64, IGNORE where nothing is predicted.
    Products are in autocast's dtype (the weight's without it), sums in fp32, or in float64 for
    float64 inputs. The result can be differentiated once.
    """
    if not torch.is_grad_enabled():  # a Function is told of requires_grad all the same
        hidden, weight = hidden.detach(), weight.detach()
    return Nll(*_LinearNll.apply(hidden, weight, targets, label_smoothing))


def chunk_tokens(vocab_size: int, device: str) -> int:
    """C, the tokens whose logits are held at once on a device of type `device`."""
    least = LEAST_TOKENS.get(device, LEAST_TOKENS["cpu"])
    return max(least, CHUNK_BYTES // (4 * vocab_size))


def _row_blocks(weight: torch.Tensor) -> list[slice]:
    """Parts of W that are multiplied one by one; all of it but in fp32 on a CPU."""
    rows = len(weight)
    step = CPU_ROWS if weight.device.type == "cpu" and weight.dtype == torch.float32 else rows
    return [slice(start, start + step) for start in range(0, rows, step)]


class _LinearNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(kind, enabled=False):
            vocab_size, head = len(weight), weight.to(dtype)
            mean_row = head.mean(0, dtype=wide) if smoothing else None
            if further := -vocab_size % ROWS_MULTIPLE.get((kind, dtype), 1):
                head = F.pad(head, (0, 0, 0, further))
            nats = torch.empty(targets.shape, dtype=wide, device=hidden.device)
            objective = torch.zeros((), dtype=wide, device=hidden.device)
            grad_weight = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
            size, blocks = chunk_tokens(vocab_size, kind), _row_blocks(head)
            buffer = head.new_empty(min(size, len(targets)), len(head))
            for start in range(0, len(targets), size):
                part = slice(start, start + size)
                h, counts = hidden[part].to(dtype), targets[part].ne(IGNORE)[:, None]
                target = targets[part].clamp(min=0)[:, None]
                z = buffer[: len(h)]  # logits (C, V)
                for rows in blocks:
                    torch.mm(h, head[rows].t(), out=z[:, rows])
                z[:, vocab_size:] = -torch.inf
                z_target = z.gather(1, target).to(wide)
                z_top = z.amax(1, keepdim=True).to(wide)
                p = torch.softmax(z, 1, dtype=wide, out=z if dtype == wide else None)
                # The softmax of the largest logit is exp(z_top - logsumexp).
                lse = z_top - p.amax(1, keepdim=True).log()
                nll = (lse - z_target) * counts
                nats[part] = nll[:, 0]
                if mean_row is not None:
                    uniform = (lse - (h.to(wide) @ mean_row)[:, None]) * counts
                    nll = (1 - smoothing) * nll + smoothing * uniform
                objective += nll.sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                # d objective / dz = counts (p - (1 - e) onehot - e / V); its dense part by products
                # in `dtype`, from the logits' own buffer.
                if dtype != wide:
                    p = z.copy_(p)
                if grad_hidden is not None:
                    rows_of_w = F.embedding(target[:, 0], head).to(wide).mul_(1 - smoothing)
                    if mean_row is not None:
                        rows_of_w += smoothing * mean_row
                    grad_hidden[part] = (torch.mm(p, head).to(wide) - rows_of_w) * counts
                if grad_weight is not None:
                    h = h * counts
                    for rows in blocks:
                        if dtype == wide:
                            grad_weight[rows].addmm_(p[:, rows].t(), h)
                        else:
                            grad_weight[rows] += torch.mm(p[:, rows].t(), h)
                    counted = h.to(wide)
                    grad_weight.index_add_(0, target[:, 0], counted, alpha=smoothing - 1)
                    if smoothing:
                        grad_weight -= smoothing / vocab_size * counted.sum(0)
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight[:vocab_size])
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, _: Any) -> Any:
        hidden, weight = ctx.grads
        del ctx.grads  # they are scaled in place: a second backward pass would scale them again
        for grad in (hidden, weight):
            if grad is not None:
                grad.mul_(scale)
        return hidden, weight, None, None


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
            found = _module_nll(
                nn.Identity(), logits.flatten(0, 1), targets.flatten(),
                self.label_smoothing,
            )  # fmt: skip
            return Nll(found.objective, found.nats.view_as(targets))
        hidden, head = self._hidden(inputs, positions)
        plain = type(head) is nn.Linear and head.bias is None and not head._forward_hooks
        flat = hidden.flatten(0, 1)
        if plain:
            found = linear_nll(flat, head.weight, targets.flatten(), self.label_smoothing)
        else:
            found = _module_nll(head, flat, targets.flatten(), self.label_smoothing)
        return Nll(found.objective, found.nats.view_as(targets))

    def own_loss(self) -> torch.Tensor | None:
        """What PEFT asks training to add to the mean nats of the last forward pass, or None.

        A term of KaSA or MonteCLoRA, with its weight in it: PEFT names such a method of a tuner
        `_get_…_loss`, and leaves it to the caller.
        """
        found = [loss for loss in (get() for get in self._own) if isinstance(loss, torch.Tensor)]
        return torch.stack(found).sum() if found else None

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
        made = torch.linspace(-100, 100, hidden.numel(), device=hidden.device)
        self.__dict__["made"] = made.view(hidden.shape).to(hidden.dtype)
        return self.__dict__["made"]


# What a model raises whose forward pass does not take a stand-in for its head.
FAILED = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError)

# Packed blocks have no padding and no cache, so that the mask is SDPA's own causal one.
# `transformers` looks for padding and packing in the values first, which makes the host wait for
# the device, and gives up SDPA's causal kernel under tracing. It makes no mask for a name that it
# knows no mask of.
CAUSAL = "sdpa_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def _plainly_causal(model: Any) -> bool:
    """Whether every layer attends to all that came before, by SDPA."""
    layers = getattr(model.config, "layer_types", None) or ["full_attention"]
    window = getattr(model.config, "sliding_window", None)
    return (
        getattr(model.config, "_attn_implementation", None) == "sdpa"
        and set(layers) == {"full_attention"}
        and window is None
    )


def _module_nll(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, e: float) -> Nll:
    """`linear_nll` for any head, a chunk at a time; its logits are made again in backward."""
    objective = torch.zeros((), device=hidden.device)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nats = torch.empty(targets.shape, dtype=wide, device=hidden.device)

    def chunk_nll(h: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = head(h)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        nll = F.cross_entropy(z, target, ignore_index=IGNORE, reduction="none")
        smooth = nll
        if e:
            smooth = F.cross_entropy(
                z, target, ignore_index=IGNORE, reduction="none", label_smoothing=e
            )
        return smooth.sum(), nll.detach()

    vocabulary = getattr(head, "out_features", None) or hidden.shape[-1]
    size = chunk_tokens(vocabulary, hidden.device.type)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        if torch.is_grad_enabled():
            one, nats[part] = checkpoint(
                chunk_nll, hidden[part], targets[part], use_reentrant=False
            )
        else:
            one, nats[part] = chunk_nll(hidden[part], targets[part])
        objective = objective + one
    return Nll(objective, nats)
