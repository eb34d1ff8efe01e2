"""The evaluation batches of a run by rows and tokens, which its memory is predicted by."""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.config.run_config import RunConfig
from harness.data import token_data
from harness.evaluation import sliding_window
from harness.models import pretrained

Shape = tuple[int, int]  # of a batch: rows, tokens


def full_batch(run: RunConfig, model_config: PretrainedConfig) -> Shape:
    """The evaluation batch of a text that fills it with windows of the whole context."""
    tokens, context = _batch_tokens(run, model_config), run.evaluation_context
    return max(1, tokens // context), context


def _batch_tokens(run: RunConfig, model_config: PretrainedConfig) -> int:
    return run.evaluate.batch_tokens or sliding_window.batch_tokens(model_config)


def batches_of(
    run: RunConfig,
    model_config: PretrainedConfig,
    num_tokens: list[int],
    batching: str = sliding_window.PADDED,
) -> list[Shape]:
    """The evaluation batches of a text with documents of `num_tokens`; none of an empty one."""
    context = run.evaluation_context
    stride, tokens = run.evaluate.stride or context, _batch_tokens(run, model_config)
    return sliding_window.batch_shapes(num_tokens, context, stride, tokens, batching)


def largest_batch(run: RunConfig, model_config: PretrainedConfig) -> Shape:
    """The largest evaluation batch that `run` will make of its held-out texts, before it runs.

    Texts that are on this machine are read, and tokenised where the tokenizer is, too; without it a
    document is taken for as many tokens as it has bytes. A full batch stands for text that is not
    here (a hub's), or is long, and for a published protocol, which joins documents. `run` is the
    run as composed, with the files that `estimate.setting` leaves out.
    """
    full = full_batch(run, model_config)
    if run.evaluate.protocol != "documents":
        return full
    splits = ("validation", "test") if run.evaluate.test else ("validation",)
    texts = [(run.data, splits), *((cfg, ("test",)) for cfg in run.evaluate.also.values())]
    tokenizer = pretrained.tokenizer_at_hand(run.model, model_config)
    shapes: list[Shape] = []
    for cfg, wanted in texts:
        for num_tokens in token_data.held_out_sizes(
            cfg, wanted, tokenizer, token_data.most_tokens(run)
        ):
            if num_tokens is None:
                return full
            shapes += batches_of(run, model_config, num_tokens)
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape), default=full)
