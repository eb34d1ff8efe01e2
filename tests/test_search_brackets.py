"""Brackets of a search: rungs by themselves, Hyperband, intervals that grow, without any run."""

import math

import pytest

from harness.config import search_space
from harness.config.errors import ConfigError
from harness.config.search_space import Dimension
from harness.runs.search_settings import (
    Brackets,
    Settings,
    brackets_of,
    budget,
    hyperband_size,
    most_steps,
    rungs_of,
    short_forms,
)


@pytest.mark.parametrize(
    ("steps", "every", "eta", "expected"),
    [
        (81, 1, 3, (1, 3, 9, 27, 81)),
        (80, 10, 2, (10, 20, 40, 80)),
        (80, 10, 3, (20, 80)),  # 26.7 and 8.9, as multiples of 10
        (1000, 50, 3, (100, 300, 1000)),
        (27, 9, 3, (9, 27)),
    ],
)
def test_the_rungs_of_auto_are_each_a_part_of_the_next(make_run, steps, every, eta, expected):
    run = make_run(f"train.steps={steps}", f"evaluate.interval={every}")
    assert rungs_of(Settings(rungs="auto", eta=eta), run) == expected


def test_auto_without_a_rung_says_what_to_set(make_run):
    run = make_run("train.steps=100", "evaluate.interval=50")
    with pytest.raises(ConfigError, match=r"set evaluate.interval=11"):
        rungs_of(Settings(rungs="auto"), run)
    assert rungs_of(Settings(rungs="auto"), make_run("train.steps=100", "evaluate.interval=11"))


def test_hyperband_is_the_table_of_its_paper():
    """Table 1 of Li et al. (JMLR 2018): R = 81, eta = 3; n_i and r_i of every bracket."""
    paper = {
        4: [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        3: [(34, 3), (11, 9), (3, 27), (1, 81)],  # the paper's example rounds 33.75 up, too
        2: [(15, 9), (5, 27), (1, 81)],
        1: [(8, 27), (2, 81)],
        0: [(5, 81)],
    }
    brackets = Brackets((1, 3, 9, 27, 81), 3, True, trials=143, batch=81)
    steps = 0
    for place, s in enumerate([4, 3, 2, 1, 0]):
        size, rungs = brackets.of(place)
        going, found = size, []
        for index, rung in enumerate(rungs):
            found.append((going, rung))
            steps += going * (rung - (rungs[index - 1] if index else 0))
            going = max(1, going // 3)
        assert found == paper[s]
        assert size == hyperband_size(5, s, 3)
    assert sum(brackets.of(place)[0] for place in range(5)) == 143
    assert brackets.of(5) == brackets.of(0)  # and so again
    assert brackets.most_steps() == steps
    assert brackets.most_at_the_end() == 1 + 1 + 1 + 2 + 5


def test_a_budget_counts_the_seeds_at_the_end(make_run):
    run = make_run("train.steps=27", "evaluate.interval=9")
    settings = Settings(rungs=(9,), trials=9, seeds=(1, 2))
    brackets = brackets_of(settings, run, 0)
    assert brackets.most_steps() == 9 * 9 + 3 * 18
    assert most_steps(settings, [brackets]) == 9 * 9 + 3 * 18 + 2 * 3 * 27
    assert "9 candidates, rungs 9, 27, 3 seeds at the end: 297 optimizer steps" in budget(
        settings, [brackets]
    )
    # Of quasi-random points there are as many as of random ones.
    assert brackets_of(Settings(sampler="quasi_random"), run, 0).trials == 20


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["search=halving", "a=1"], ["hydra/sweeper=search", "hydra.sweeper.rungs=auto", "a=1"]),
        (["search=hyperband", "search.eta=2"],
         ["hydra/sweeper=search", "hydra.sweeper.rungs=auto", "hydra.sweeper.hyperband=true",
          "hydra.sweeper.eta=2"]),
        (["search=tpe"], ["hydra/sweeper=search", "hydra.sweeper.sampler=tpe"]),
    ],
)  # fmt: skip
def test_the_short_forms(given, expected):
    assert short_forms(given, always=False) == (expected, True)
    assert short_forms(["search.eta=2"], always=False) == (["search.eta=2"], False)
    with pytest.raises(ConfigError, match="did you mean 'halving'"):
        short_forms(["search=halfing"], always=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rungs": "atuo"}, "expected optimizer steps as"),
        ({"hyperband": True}, "hyperband=true without rungs"),
        ({"hyperband": True, "rungs": "auto", "batch": 3}, "batch=3 with"),
        ({"hyperband": True, "rungs": "auto", "sampler": "grid"}, "choose another sampler"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": (-1,)}, "whole numbers from 0"),
        ({"grow": -1}, "how often an interval may grow"),
        ({"grow": 1, "objectives": ("validation.nll", "saved.bytes")}, "no one best at an end"),
        ({"rungs": "auto", "objectives": ("validation.nll", "saved.bytes")}, "rungs=auto with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Settings(**settings)


# --------------------------------------------------------------------------- growth


@pytest.mark.parametrize(
    ("dimension", "end", "expected"),
    [
        (Dimension("k", (), 1e-4, 1e-2, log=True), "upper", (1e-2, 1e-1)),
        (Dimension("k", (), 1e-4, 1e-2, log=True), "lower", (1e-5, 1e-4)),
        (Dimension("k", (), 0.0, 1.0), "upper", (1.0, 1.5)),
        (Dimension("k", (), 4, 64, log=True, integer=True), "upper", (65, 256)),
        (Dimension("k", (), 4, 64, log=True, integer=True), "lower", (1, 3)),
        (Dimension("k", (), 8, 64, step=8, integer=True), "upper", (72, 72)),
        (search_space.by_factors("k", [1e-3, 2e-3, 4e-3], 2), "upper", (8e-3, 8e-3)),
        (search_space.by_factors("k", [1e-3, 2e-3, 4e-3], 2), "lower", (5e-4, 5e-4)),
    ],
)
def test_what_lies_beyond_an_end(dimension, end, expected):
    part = dimension.beyond(end)
    assert (part.low, part.high) == pytest.approx(expected)
    whole = dimension.with_part(part)
    assert whole.low == min(dimension.low, part.low)
    assert whole.high == max(dimension.high, part.high)


def test_nothing_lies_below_one_or_beyond_choices():
    assert Dimension("k", (), 1, 64, log=True, integer=True).beyond("lower") is None
    assert Dimension("k", ("1", "8", "64")).beyond("upper") is None


def test_values_by_factors_are_a_grid():
    (found,) = search_space.read(
        {"train.lr": {"low": 1e-3, "high": 1.6e-2, "factor": 2}}
    ).dimensions
    assert found.values() == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert found.text() == "0.001 to 0.016 by factors of 2"
    grown = found.with_part(found.beyond("lower"))
    assert grown.values() == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


@pytest.mark.parametrize(
    "given",
    [
        {"low": 0, "high": 1, "factor": 2},
        {"low": 1, "high": 2, "factor": 1},
        {"low": 1, "high": 2, "factor": 3},
        {"low": 1, "high": 2, "factor": 2, "step": 1},
        {"low": 1, "high": math.inf, "factor": 2},
    ],
)
def test_factors_that_cannot_be_are_refused(given):
    with pytest.raises(ConfigError, match="by factors of"):
        search_space.read({"train.lr": given})
