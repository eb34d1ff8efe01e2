"""Many configurations compared: Holm's textbook case, ranks and fronts worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from simulated_evaluations import simulate

from harness.config.errors import ConfigError
from harness.report import ranking, stats


def comparison(a, b, difference, adjusted_p):
    parts = stats.Components(0, 1, 0, 9)
    return stats.Comparison(
        a, b, difference, 0, 0, adjusted_p, adjusted_p, parts, True, "documents", None
    )


def test_holm_is_that_of_the_textbook():
    # p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") in R
    assert ranking.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ranking.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert ranking.holm([]).tolist() == []


def test_what_few_seeds_can_show_is_said():
    assert "of other seeds nothing is known" in ranking.few_seeds(1)
    said = ranking.few_seeds(3, num_comparisons=10)
    t = scipy_stats.t.ppf(1 - 0.0025, 2)
    assert said.startswith("3 seeds: ") and f"10 comparison(s) is significant from {t:.1f} " in said
    assert ranking.few_seeds(5) is None


def test_two_seeds_are_said_to_show_hardly_any_difference_and_five_are_named():
    said = ranking.few_seeds(2, num_comparisons=10)
    t = scipy_stats.t.ppf(1 - 0.0025, 1)
    assert said.startswith("with 2 seeds hardly any difference can be shown")
    assert f"from {t:,.0f} standard errors" in said and "take 5" in said


def test_a_sweep_over_two_seeds_is_warned_of_before_it_starts():
    two = [(name, seed) for name in "ab" for seed in (0, 1)]
    assert ranking.warn_of_few_seeds(two).endswith("take 5: seed=0,1,2,3,4")
    assert ranking.warn_of_few_seeds([*two, ("b", 2)]) is None  # three find something
    assert ranking.warn_of_few_seeds(two[:2]) is None  # nothing to compare with
    assert ranking.warn_of_few_seeds([("a", 0), ("b", 0), ("b", 0)]) is None  # one seed
    assert ranking.warn_of_few_seeds([]) is None


def test_nothing_has_no_statistics():
    for make in (stats.intervals, ranking.compare_all, stats.check):
        with pytest.raises(ConfigError, match="no evaluation"):
            make([])


def test_ranks_share_where_methods_cannot_be_told_apart():
    names = ["d", "b", "a", "c"]
    found = [
        stats.Interval(n, "abcd".index(n), 0, 0, 3, 59, "seeds and documents", None) for n in names
    ]
    worse = {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d")}  # the second is, significantly
    pairs = [
        comparison(x, y, -1 if x < y else 1, 0.01 if tuple(sorted((x, y))) in worse else 0.05)
        for i, x in enumerate(names)
        for y in names[i + 1 :]
    ]
    shown = ranking.ranks(found, pairs)
    assert list(shown.items()) == [("a", "1"), ("b", "2-3"), ("c", "2-4"), ("d", "3-4")]
    with pytest.raises(ConfigError, match="a and c were not compared"):
        ranking.ranks(found, pairs[:-1])


def test_a_point_is_dominated_only_if_significantly_so():
    pairs = [
        comparison("cheap", "dear", -0.1, 0.2),  # cheaper, lower, but not significantly
        comparison("cheap", "bad", -0.5, 0.001),
        comparison("bad", "dear", 0.4, 0.04),
        comparison("cheap", "twin", -0.3, 0.01),  # equal in cost
        comparison("dear", "twin", -0.2, 0.5),
        comparison("bad", "twin", 0.2, 0.001),
    ]
    costs = {"cheap": 1.0, "dear": 3.0, "bad": 2.0, "twin": 1.0}
    assert ranking.pareto(costs, pairs) == {
        "cheap": (),
        "dear": (),
        "bad": ("cheap", "twin"),
        "twin": ("cheap",),
    }
    with pytest.raises(ConfigError, match="bad: a cost of nan"):
        ranking.pareto(costs | {"bad": math.nan}, pairs)


def test_holm_is_over_the_comparisons_shown():
    evaluations = simulate(np.random.default_rng(10), 4)
    every = ranking.compare_all(evaluations)
    assert len(every) == 6
    assert [c.adjusted_p for c in every] == ranking.holm([c.p for c in every]).tolist()
    (one,) = ranking.compare_all(evaluations, [("c2", "c0")])
    assert one.adjusted_p == one.p == pytest.approx(every[1].p)
    with pytest.raises(ConfigError, match="did you mean 'c2'"):
        ranking.compare_all(evaluations, [("c2x", "c0")])
