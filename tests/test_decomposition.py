"""The share of a gap that is frozen parts: exact cases, and the interval of the delta method."""

import csv
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from harness.config.paths import REPOSITORY
from harness.report import stats
from harness.results import run_record

sys.path.insert(0, str(REPOSITORY / "experiments"))
from main_seeds_control import decomposition

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


def row(folder, label, falls, every=10):
    """A row of runs whose validation perplexity falls by `falls` nats in 80 steps, on a line."""
    run_dirs, records = [], []
    for seed, fall in enumerate(falls):
        run_dirs.append(folder / f"{label}-{seed}")
        run_dirs[-1].mkdir()
        records.append({"config": {"seed": seed}})
        with run_record.Metrics(run_dirs[-1], 0, -1) as metrics:
            for step in range(81):
                if step:
                    metrics.log({"step": step, "train/nll": 3.0, "train/step_seconds": 0.5})
                if step % every == 0:
                    nll = math.log(200) - fall * step / 80
                    metrics.log({"step": step, "tokens": step, "eval/validation/nll": nll})
    values = {"method.label": label, "method.name": label, "method.rank": None}
    return SimpleNamespace(name=label, values=values, run_dirs=run_dirs, records=records)


def test_steps_are_given_between_readings_and_ratios_between_what_these_allow(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(decomposition, "HERE", tmp_path)
    # To 100 (0.69 nats): 80 * 0.69 / 4 = 13.9 steps, 80 * 0.69 / 1.6 = 34.7, and 36.9 or 30.8.
    falls = {"full": (4.0, 4.0), decomposition.CONTROL: (1.6, 1.6), "lora": (1.5, 1.8)}
    rows = [row(tmp_path, label, found) for label, found in falls.items()]
    decomposition.write_steps(rows)
    written = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert [(r["steps_to_100_above"], r["steps_to_100_reached"]) for r in written] == [
        ("10.0", "20.0"), ("10.0", "20.0"), *[("30.0", "40.0")] * 4,
    ]  # fmt: skip
    # To 45 (1.49 nats) the control and one run of LoRA need 75 and 80 steps, the other 66.
    assert [r["steps_to_45_reached"] for r in written] == ["30.0"] * 2 + ["80.0"] * 3 + ["70.0"]
    decomposition.show_steps(rows)
    shown = capsys.readouterr().out
    to_full = f"{decomposition.CONTROL} against full, to 100: steps: 30-40 against 10-20, ratio "
    assert f"{to_full}2.50 (1.50 to 4.00); p = 0" in shown  # no spread, and every ratio is above 1
    against = "lora against full-only-matrices, to 100: steps: 30-40 against 30-40, ratio"
    assert against in shown and "p = 1\n" in shown.split(against)[1]
    slow = row(tmp_path, "slow", (1.4, 1.4))  # never at 45
    decomposition.write_steps([slow])
    (first, _) = csv.DictReader((tmp_path / "steps.csv").open())
    assert (first["steps_to_45_above"], first["steps_to_45_reached"]) == ("", "")
