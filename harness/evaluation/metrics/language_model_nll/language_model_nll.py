"""An `evaluate` metric from sums of nats: token and word perplexity, and bits per byte.

Only sums and counts go in, so that documents of any length weigh by their tokens, and only the last
two compare across tokenizers.
"""

import math

import datasets
import evaluate

_DESCRIPTION = (
    "Perplexity per token and per word, and bits per byte, from summed nats per document."
)

_INPUTS = """
    nll_nats: list of float, summed negative log-likelihood of each document, in nats
    num_tokens: list of int, predicted tokens of each document
    num_words: list of int, white-space separated words of each document's original text
    num_bytes: list of int, UTF-8 bytes of each document's original text
Returns:
    nll_nats, num_tokens: the sums
    perplexity: exp(nats / tokens)
    word_perplexity: exp(nats / words), infinite where that overflows
    bits_per_byte: nats / (ln 2 x bytes)
"""


def _exp(x: float) -> float:
    """exp, infinite where it overflows."""
    return math.exp(x) if x < 709 else math.inf


class LanguageModelNll(evaluate.Metric):
    """Sums of nats over documents -> perplexity, word perplexity, bits per byte."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "nll_nats": datasets.Value("float64"),
                    "num_tokens": datasets.Value("int64"),
                    "num_words": datasets.Value("int64"),
                    "num_bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nll_nats, num_tokens, num_words, num_bytes):
        nats, tokens = math.fsum(nll_nats), int(sum(num_tokens))
        if tokens == 0:
            raise ValueError("no token was predicted: the documents are empty")
        return {
            "nll_nats": nats,
            "num_tokens": tokens,
            "perplexity": _exp(nats / tokens),
            "word_perplexity": _exp(nats / int(sum(num_words))),
            "bits_per_byte": nats / (math.log(2) * int(sum(num_bytes))),
        }
