"""The share of a gap that is frozen parts: exact cases, and the interval of the delta method."""

import math
import sys

import numpy as np
import pytest

from harness import stats
from harness.config import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "experiments" / "main_seeds_control"))
import decomposition

TOKENS = 100


def evaluation(name, per_token):
    """Nats of (R, N) documents of TOKENS tokens."""
    nll = np.atleast_2d(per_token) * TOKENS
    documents = tuple(f"d{i}" for i in range(nll.shape[1]))
    tokens = np.full(nll.shape[1], TOKENS)
    return stats.Evaluation(name, nll, tokens, tuple(range(len(nll))), documents, {})


def test_a_share_that_is_the_same_everywhere_has_no_interval():
    draw = np.random.default_rng(0)
    whole, gap = 3 + draw.normal(0, 0.2, (3, 30)), draw.uniform(0.2, 0.4, (3, 30))
    found = decomposition.share(
        *(evaluation(n, whole + part * gap) for n, part in (("f", 0), ("c", 0.78), ("l", 1)))
    )
    # Differences are known to the rounding of single precision, 1e-6 of 3 nats over a gap of 0.3.
    assert found == pytest.approx((0.78, 0.78, 0.78), abs=2e-5)


def test_over_many_documents_the_interval_is_that_of_the_delta_method():
    draw = np.random.default_rng(1)
    n = 400
    whole = 3 + draw.normal(0, 0.3, n)
    control = whole + 0.25 + draw.normal(0, 0.05, n)
    low = whole + 0.33 + draw.normal(0, 0.05, n)
    point, start, end = decomposition.share(
        *(evaluation(name, one) for name, one in (("f", whole), ("c", control), ("l", low)))
    )
    gap = (low - whole).mean()
    expected = (control - whole).mean() / gap
    residual = control - whole - expected * (low - whole)
    half = 1.96 * residual.std(ddof=1) / math.sqrt(n) / gap
    assert point == pytest.approx(expected)
    assert start == pytest.approx(expected - half, abs=0.05 * half)
    assert end == pytest.approx(expected + half, abs=0.05 * half)


def test_the_interval_is_where_the_difference_cannot_be_told_from_zero():
    draw = np.random.default_rng(2)
    whole = 3 + draw.normal(0, 0.3, (3, 20))
    control, low = (whole + gap + draw.normal(0, 0.05, (3, 20)) for gap in (0.25, 0.33))
    f, c, lora = (evaluation(n, one) for n, one in (("f", whole), ("c", control), ("l", low)))
    point, start, end = decomposition.share(f, c, lora)
    assert start < point < end
    for part, inside in ((start - 1e-6, False), (start + 1e-6, True), (end + 1e-6, False)):
        mixed = evaluation("mixed", (1 - part) * whole + part * low)
        found = stats.compare(c, mixed)
        assert (found.low < 0 < found.high) == inside


def test_where_there_is_no_gap_there_is_no_share():
    draw = np.random.default_rng(3)
    whole = 3 + draw.normal(0, 0.3, (3, 20))
    control, low = (whole + draw.normal(0, 0.05, (3, 20)) for _ in range(2))
    _, start, end = decomposition.share(
        *(evaluation(n, one) for n, one in (("f", whole), ("c", control), ("l", low)))
    )
    assert (start, end) == (-math.inf, math.inf)
