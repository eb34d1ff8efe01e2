"""Evaluations of configurations whose true difference is known."""

import math

import numpy as np

from harness.report import stats

TRUTH = 3.0  # nats/token
SETTINGS = {"context_length": 256, "stride": 256, "tokenizer": "gpt2_mini"}


def simulate(
    rng, configurations=1, seeds=3, documents=59, seed_sd=0.01, shared=0.5, fixed=0,
    document_sd=0.24, particular_sd=0.04, noise_sd=0.02, log_tokens_sd=0.6,
):  # fmt: skip
    """Configurations of log-perplexity TRUTH, on lengths as the King James test set has them.

    nats/token = TRUTH + document (Student t, 5 df) + document x configuration + seed (data order:
    `shared` x seed_sd) + seed x configuration + noise. The first `fixed` have no seed and no noise.
    """
    c, r, n = configurations, seeds, documents
    tokens = np.ceil(np.exp(rng.normal(6.8, log_tokens_sd, n))).astype(np.int64)
    rate = TRUTH + document_sd * rng.standard_t(5, n) * math.sqrt(3 / 5)
    rate = rate + particular_sd * rng.standard_normal((c, 1, n))
    moved = shared * seed_sd * rng.standard_normal((r, 1))
    moved = moved + seed_sd * rng.standard_normal((c, r, 1))
    moved = moved + noise_sd * rng.standard_normal((c, r, n))
    moved[:fixed] = 0
    ids = tuple(f"doc{i}" for i in range(n))
    return [
        stats.Evaluation(f"c{i}", x * tokens, tokens, tuple(range(r)), ids, SETTINGS)
        for i, x in enumerate(rate + moved)
    ]
