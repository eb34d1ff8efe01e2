"""Head and cross-entropy in one, in chunks of tokens, never holding tokens x vocabulary.

    nll_i = logsumexp_j(z_ij) - z_i,t(i)       z = hidden W^T

With label smoothing e, what is minimised is (1 - e) nll_i + e (logsumexp_j(z_ij) - mean_j z_ij), as
`F.cross_entropy` defines it. Logits cost 12 V bytes a token the usual way, more than all else of a
small model together. Here a chunk's logits live while that chunk is worked on: its gradients,
softmax - onehot times W (and times hidden, where the head trains), are formed in the forward pass.

Legend: N tokens, C tokens of a chunk, d width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from harness.data.token_tables import IGNORE

CHUNK_BYTES = 8 * 2**20  # of one chunk's logits in fp32, with LEAST_TOKENS at least: fewer make
LEAST_TOKENS = {"cpu": 256, "cuda": 1024}  # slower products; more save a tenth, and cost memory
# Rows of 50,257 logits do not begin at multiples of 16 bytes, as a GPU's fast products ask for:
# there W gets further rows, of zeros, whose logits are -inf (experiments/bench/loss).
ROWS_MULTIPLE = {("cuda", torch.bfloat16): 64, ("cuda", torch.float16): 64}
CPU_ROWS = 512  # of W in one fp32 product on a CPU: a fifth to a half faster than all 50,257


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


def module_nll(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, e: float) -> Nll:
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
            chunk_objective, nats[part] = checkpoint(
                chunk_nll, hidden[part], targets[part], use_reentrant=False
            )
        else:
            chunk_objective, nats[part] = chunk_nll(hidden[part], targets[part])
        objective = objective + chunk_objective
    return Nll(objective, nats)
