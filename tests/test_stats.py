"""Intervals cover, tests reject and families hold as often as they say, on data of known truth."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats
from simulated_evaluations import SETTINGS, TRUTH, simulate

from harness.config.errors import ConfigError
from harness.report import ranking, stats


def evaluation(nll, tokens=None, name="a", seeds=None, **fields):
    """An evaluation of nll (R, N), by default of 1 token a document."""
    nll = np.array(nll, dtype=np.float64)
    tokens = np.ones(nll.shape[1], np.int64) if tokens is None else np.array(tokens)
    seeds = tuple(range(len(nll))) if seeds is None else seeds
    ids = tuple(f"doc{i}" for i in range(nll.shape[1]))
    return stats.Evaluation(name, nll, tokens, seeds, ids, SETTINGS, **fields)


# --------------------------------------------------------------------------- oracles


def test_the_estimate_weighs_documents_by_their_tokens():
    (found,) = stats.intervals([evaluation([[10, 90], [30, 80]], tokens=[10, 40])])
    assert found.log_perplexity == pytest.approx(105 / 50)
    assert found.low < found.log_perplexity < found.high
    assert found.perplexity == pytest.approx(tuple(np.exp([2.1, found.low, found.high])))
    assert (found.num_seeds, found.num_documents) == (2, 2)


def test_over_documents_alone_it_is_the_paired_t_test():
    a, b = np.random.default_rng(0).normal(3, 0.1, (2, 1, 20))
    found = stats.compare(
        evaluation(a, deterministic=True), evaluation(b, name="b", deterministic=True)
    )
    oracle = scipy_stats.ttest_rel(a[0], b[0])
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-9)
    interval = oracle.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.varies_over, found.warning) == ("documents", None)


def test_over_seeds_alone_it_is_the_paired_t_test():
    effects = np.random.default_rng(0).normal(3, 0.1, (2, 5))
    tokens = np.array([5, 10, 20])
    a, b = (evaluation(np.outer(e, tokens), tokens, n) for e, n in zip(effects, "ab", strict=True))
    found = stats.compare(a, b)
    oracle = scipy_stats.ttest_rel(*effects)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-6)
    assert found.varies_over == "seeds and documents"
    # The order in which seeds come does not matter, their ids do.
    turned = replace(b, nll=b.nll[::-1], seeds=b.seeds[::-1])
    assert stats.compare(a, turned).p == pytest.approx(found.p)


def test_over_seeds_of_other_ids_it_is_the_t_test_of_welch():
    effects = np.random.default_rng(1).normal(3, 0.1, 8)
    a = evaluation(np.outer(effects[:3], [1] * 4))
    b = evaluation(np.outer(effects[3:], [1] * 4), name="b", seeds=(10, 11, 12, 13, 14))
    found = stats.compare(a, b)
    assert not found.paired_seeds
    oracle = scipy_stats.ttest_ind(effects[:3], effects[3:], equal_var=False)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-6)


def test_seeds_that_only_one_has_do_not_enter_a_paired_difference():
    effects = np.random.default_rng(1).normal(3, 0.1, (2, 5))
    a, b = (evaluation(np.outer(e, [1] * 4), name=n) for e, n in zip(effects, "ab", strict=True))
    fewer = replace(b, nll=b.nll[[4, 0, 2]], seeds=(4, 0, 2))
    found = stats.compare(a, fewer)
    oracle = scipy_stats.ttest_rel(effects[0, [0, 2, 4]], effects[1, [0, 2, 4]])
    assert found.paired_seeds and found.p == pytest.approx(oracle.pvalue, rel=1e-6)
    assert found.difference == pytest.approx(np.diff(effects[::-1, [0, 2, 4]], axis=0).mean())
    alone = stats.compare(a, replace(b, nll=b.nll[[3]], seeds=(3,)))
    assert alone.varies_over == "documents" and "one seed" in alone.warning


def test_a_single_seed_of_others_is_taken_to_vary_as_the_others_do():
    effects = np.random.default_rng(1).normal(3, 0.1, 6)
    a = evaluation(np.outer(effects[:5], [1] * 4))
    b = evaluation(np.outer(effects[5:], [1] * 4), name="b", seeds=(9,))
    found = stats.compare(a, b)
    oracle = scipy_stats.ttest_ind(effects[:5], effects[5:])  # pooled: the variance of the five
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-6)
    assert found.warning == "one seed of b, taken to vary as the other's"


@pytest.mark.parametrize(("seeds", "alone"), [(2e-5, False), (2e-4, True)])
def test_between_seeds_and_documents_it_is_the_mean_of_two_approximations(seeds, alone):
    variance, df = np.array([seeds, 2e-4]), np.array([2.5, 40])
    total = variance.sum()
    t = scipy_stats.t.ppf(0.995, df)
    cochran_cox = variance @ t / total
    satterthwaite = scipy_stats.t.ppf(0.995, total**2 / (variance**2 / df).sum())
    mean = math.sqrt(total) * (cochran_cox + satterthwaite) / 2
    over_seeds = math.sqrt(seeds) * t[0]
    assert (over_seeds > mean) == alone
    half = stats.Components(*variance, *df).half_width(0.01)
    assert half == pytest.approx(over_seeds if alone else mean)


def test_documents_never_make_it_surer_than_the_t_test_over_seeds_alone():
    shown = 0
    for i in range(200):
        a, b = simulate(np.random.default_rng(i), 2, seeds=3, seed_sd=0.06)
        oracle = scipy_stats.ttest_rel(*(e.nll.sum(1) / e.tokens.sum() for e in (a, b))).pvalue
        assert stats.compare(a, b).p >= oracle * (1 - 1e-6)
        shown += oracle < 0.01
    assert shown > 0


@pytest.mark.parametrize("documents_df", [40, 999])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_a_true_null_is_rejected_as_often_as_said_also_far_out(seeds, documents_df):
    """The level by quadrature over both estimated components, S of R - 1 degrees of freedom."""
    df = seeds - 1
    grid = np.linspace(-40 / df - 3, math.log(30 / df + 3), 1000)  # of log(S / its truth)
    weights = np.exp(df / 2 * (grid - np.exp(grid)))
    q = (np.arange(40) + 0.5) / 40
    d = scipy_stats.chi2.ppf(q, documents_df) / documents_df
    drawn = np.stack(np.broadcast_arrays(np.exp(grid)[:, None], d), -1)  # (1000, 40, 2)
    parts = stats.Components(0, 0, df, documents_df)
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999):  # of seeds in the variance
        variance = drawn * [share, 1 - share]
        for alpha in (0.05, 0.005, 0.001):
            beyond = 2 * scipy_stats.norm.sf(stats._half_width(variance, parts, alpha))
            level = np.average(beyond.mean(1), weights=weights)
            assert level < (1.05 if alpha == 0.05 else 1.2) * alpha, (share, alpha)
            assert level > (0.03 if seeds > 2 else 0.02) or alpha < 0.05, share


def test_documents_vary_as_in_a_jackknife_loop():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 50, 12).astype(float)
    nll = rng.normal(3, 1, (1, 12)) * tokens
    estimate, found = stats._components([nll], tokens)
    rest = [np.delete(nll[0], n).sum() / np.delete(tokens, n).sum() for n in range(12)]
    assert estimate == pytest.approx(nll.sum() / tokens.sum())
    assert found.documents == pytest.approx(11 / 12 * sum((x - estimate) ** 2 for x in rest))
    assert found.documents_df == pytest.approx(tokens.sum() ** 2 / (tokens**2).sum() - 1)
    assert (found.seeds, found.seeds_df) == (0, 0)


def test_variances_of_seeds_and_documents_are_those_of_a_two_way_table():
    table = 3 + np.random.default_rng(2).normal(0, 1, (4, 9)) + np.arange(9)  # (R, N)
    by_seed, by_document = table.mean(1), table.mean(0)
    rest = table - by_seed[:, None] - by_document + table.mean()
    mean_square = (rest**2).sum() / (3 * 8)
    _, found = stats._components([table], np.ones(9))
    assert found.seeds == pytest.approx(by_seed.var(ddof=1) / 4)
    assert found.documents == pytest.approx(by_document.var(ddof=1) / 9 - mean_square / 36)
    assert (found.seeds_df, found.documents_df) == (3, 8)


@pytest.mark.parametrize("n", [2, 12])
def test_the_interval_of_one_is_that_of_the_t_test(n):
    ratios = np.random.default_rng(3).normal(3, 0.1, (1, n))
    (found,) = stats.intervals([evaluation(ratios, deterministic=True)])
    oracle = scipy_stats.ttest_1samp(ratios[0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), rel=1e-9)


@pytest.mark.parametrize("r", [3, 10])
def test_what_could_be_detected_is_that_of_the_t_test(r):
    parts = stats.Components(0.01**2, 0, r - 1, 50)
    found = stats.detectable(parts)
    t = scipy_stats.t.ppf(0.975, r - 1)
    power = scipy_stats.nct.sf(t, r - 1, found / 0.01) + scipy_stats.nct.cdf(
        -t, r - 1, found / 0.01
    )
    assert power == pytest.approx(0.8, abs=0.005)
    assert stats.detectable(parts, alpha=0.005) > found
    assert stats.detectable(stats.Components(0, 0, 0, 3)) == 0


def test_p_and_interval_agree_and_extremes_are_told():
    for e in (simulate(np.random.default_rng(i), 2) for i in range(30)):
        found = stats.compare(*e)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    same = stats.compare(e[0], replace(e[0], name="again"))
    assert (same.difference, same.p) == (0, 1)
    apart = replace(e[0], name="apart", nll=e[0].nll + 5 * e[0].tokens)
    assert stats.compare(e[0], apart).p == 0
    assert ranking.compare_all([e[0], apart])[0].better == "c0"


def test_documents_vary_as_in_the_bootstrap_of_scipy():
    (e,) = simulate(np.random.default_rng(11), documents=30)
    _, found = stats._components([e.nll[:1]], e.tokens.astype(float))
    oracle = scipy_stats.bootstrap(
        (e.nll[0], e.tokens),
        lambda nll, tokens, axis: nll.sum(axis) / tokens.sum(axis),
        paired=True, method="percentile", n_resamples=5000, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert math.sqrt(found.documents) == pytest.approx(oracle.standard_error, rel=0.05)


def test_seeds_vary_as_their_mean_does():
    ratios = np.random.default_rng(12).normal(3, 0.1, 4)
    _, found = stats._components([np.outer(ratios, [1, 1, 1])], np.ones(3))
    assert math.sqrt(found.seeds) == pytest.approx(scipy_stats.sem(ratios))


# ----------------------------------------------------------- what varies, and what is warned of


@pytest.mark.parametrize("flagged", [True, False])
def test_a_deterministic_method_varies_over_documents_only(flagged):
    (seeded,) = simulate(np.random.default_rng(6))
    fixed = replace(
        seeded, name="fixed", nll=np.repeat(seeded.nll[:1], 3, 0), deterministic=flagged
    )
    one, other = stats.intervals([fixed, seeded])
    assert (one.varies_over, one.warning) == ("documents", None)
    assert (other.varies_over, other.warning) == ("seeds and documents", None)
    once = replace(fixed, name="once", nll=fixed.nll[:1], seeds=(7,), deterministic=True)
    (alone,) = stats.intervals([once])
    assert (alone.low, alone.high) == pytest.approx((one.low, one.high))
    found = stats.compare(fixed, seeded)
    assert (found.varies_over, found.paired_seeds) == ("seeds and documents", True)
    assert stats.compare(once, seeded).p == pytest.approx(found.p)


def test_a_single_seed_is_warned_of():
    a, b = simulate(np.random.default_rng(7), 2)
    one = replace(a, name="one", nll=a.nll[:1], seeds=(0,))
    (found,) = stats.intervals([one])
    assert found.varies_over == "documents" and "one seed of one" in found.warning
    assert "one seed of one:" in stats.compare(one, b).warning
    both = stats.compare(one, replace(b, nll=b.nll[:1], seeds=(0,)))
    assert "one and c1" in both.warning and both.varies_over == "documents"


def test_documents_without_tokens_are_left_out():
    a, b = simulate(np.random.default_rng(8), 2)
    more = [
        replace(
            e,
            nll=np.insert(e.nll, 3, 0, axis=1),
            tokens=np.insert(e.tokens, 3, 0),
            documents=(*e.documents, "empty"),
        )
        for e in (a, b)
    ]
    assert stats.compare(*more).p == pytest.approx(stats.compare(a, b).p)
    assert stats.intervals(more) == stats.intervals([a, b])


def bad(index, value, field="nll"):
    def change(e):
        array = getattr(e, field).copy()
        array[index] = value
        return replace(e, **{field: array})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: replace(e, settings=SETTINGS | {"stride": 128}), "stride is 256 and 128"),
        (lambda e: replace(e, settings={"context_length": 256}), "stride is 256 and not given"),
        (
            lambda e: replace(e, documents=("x", *e.documents[1:])),
            "document doc0 is there and missing",
        ),
        (lambda e: replace(e, documents=e.documents[::-1]), "the first document is doc0 and doc4"),
        (bad(2, 1, "tokens"), r"tokens of document doc2 is \d+ and 1"),
        (bad((1, 2), np.nan), "c1: .*document doc2 of .* has nll nan under seed 1"),
        (bad((2, 0), np.inf), "c1: .*document doc0 of .* has nll inf under seed 2"),
        (bad(2, 0, "tokens"), "c1: not possible: document doc2 of 0 tokens"),
        (lambda e: replace(e, name="c0"), "configuration c0 is there 2 times"),
        (lambda e: replace(e, seeds=(0, 1, 1)), "c1: seed 1 is there 2 times"),
        (lambda e: replace(e, seeds=(0, 1)), r"c1: .* do not fit \(2, 5\)"),
        (
            lambda e: replace(e, deterministic=True),
            "c1: a deterministic method moved: document doc0.*seed 1",
        ),
        (bad(slice(1, None), 0, "tokens"), "c1: .*two documents with tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(change, said):
    a, b = simulate(np.random.default_rng(9), 2, documents=5)
    for refuse in (stats.intervals, lambda es: stats.compare(*es), ranking.compare_all):
        with pytest.raises(ConfigError, match=said):
            refuse([a, change(b)])


# --------------------------------------------------------------------------- calibration


def plausible(count, experiments, low, high):
    """Whether a rate in [low, high] gives such a count, but for 1 time in 1,000 on each side."""
    least = scipy_stats.binom.ppf(0.001, experiments, low)
    most = scipy_stats.binom.isf(0.001, experiments, high)
    return least <= count <= most


def calibrate(seeds, seed_sd, experiments):
    """How often, of experiments with five configurations that are equally good in truth:

    covers: the interval of one holds the truth; rejects: two are told apart (unpaired: with other
    seeds; deterministic: against a method without any); family: any of the ten pairs is, after
    Holm.
    """
    rng = np.random.default_rng([seeds, round(1000 * seed_sd)])
    counts: Counter[str] = Counter()
    for _ in range(experiments):
        evaluations = simulate(rng, 5, seeds, seed_sd=seed_sd)
        (found,) = stats.intervals(evaluations[:1])
        every = ranking.compare_all(evaluations)
        a, b = simulate(rng, 2, seeds, seed_sd=seed_sd, shared=0)
        unpaired = stats.compare(a, replace(b, seeds=tuple(range(seeds, 2 * seeds))))
        fixed = stats.compare(*simulate(rng, 2, seeds, seed_sd=seed_sd, fixed=1))
        counts += Counter(
            given=int(found.missing is None),
            covers=int(found.low <= TRUTH <= found.high),
            rejects=int(every[0].p < 0.05),
            unpaired=int(unpaired.p < 0.05),
            deterministic=int(fixed.p < 0.05),
            family=int(any(c.better for c in every)),
        )
    return counts


def check_calibration(seeds, seed_sd, experiments):
    counts = calibrate(seeds, seed_sd, experiments)
    print(f"\nseeds {seeds:2} sd {seed_sd:5}:", end="")  # the table of `make test-stats`
    tests = ("rejects", "unpaired", "deterministic")
    keys = ("given", "covers", *tests, "family")
    print(*(f" {key} {100 * counts[key] / experiments:.1f}" for key in keys), "%")
    assert counts["given"] > 0.95 * experiments
    assert plausible(counts["covers"], counts["given"], 0.93, 0.97)
    for test in tests:
        assert plausible(counts[test], experiments, 0.03, 0.07), test
    assert plausible(counts["family"], experiments, 0.0, 0.05)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_tests_and_families_are_calibrated(seeds):
    check_calibration(seeds, 0.01, 300)


@pytest.mark.stats
@pytest.mark.parametrize("seed_sd", [0.005, 0.01, 0.02, 0.04])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_tests_and_families_are_calibrated_in_the_long_run(seeds, seed_sd):
    check_calibration(seeds, seed_sd, 3000)


@pytest.mark.stats
@pytest.mark.parametrize("seed_sd", [0.03, 0.06])
@pytest.mark.parametrize("documents", [59, 1000])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_family_of_45_holds_where_seeds_outweigh_documents(seeds, documents, seed_sd):
    rng = np.random.default_rng([seeds, documents, round(1000 * seed_sd)])
    families, pairs = 0, Counter()
    for _ in range(1500):
        every = ranking.compare_all(simulate(rng, 10, seeds, documents, seed_sd=seed_sd))
        families += any(c.better for c in every)
        pairs += Counter({a: sum(c.p < a for c in every) for a in (0.05, 0.005, 0.001)})
    rates = [f"p < {a}: {100 * n / 45 / 1500:.3f}" for a, n in pairs.items()]
    print(f"\nseeds {seeds} sd {seed_sd} documents {documents}:", end="")
    print(f" family of 45 {100 * families / 1500:.1f} ", *rates, "%")
    assert plausible(families, 1500, 0.0, 0.05)


# ------------------------------------------------- where seeds and documents are not well behaved


def normal(rng, shape):
    return rng.standard_normal(shape)


def t3(rng, shape):
    return rng.standard_t(3, shape) / math.sqrt(3)


def exponential(rng, shape):
    return rng.exponential(1.0, shape) - 1


def lognormal(sd):
    return lambda rng, shape: np.exp(rng.normal(6.8, sd, shape))


def pareto(tail):
    return lambda rng, shape: 300 * rng.random(shape) ** (-1 / tail)


def draw(
    rng, experiments, seeds=1, documents=59, *, effects=normal, seed_sd=0.0, lengths=None,
    slope=0.0, diverging=0.0, by=1.0,
):  # fmt: skip
    """Experiments of one configuration each, as (evaluation, truth, seeds that diverged).

    nats/token = 3 + document (Student t, 5 df) + slope x (log tokens - 6.8) + seed + noise; a share
    `diverging` of seeds has `by` nats more. The truth is of seeds that do not, and of text whose
    documents have these lengths.
    """
    e, r, n = experiments, seeds, documents
    tokens = np.ceil((lengths or lognormal(0.6))(rng, (e, n))).astype(np.int64)
    expected = TRUTH + slope * (np.log(tokens) - 6.8)
    rate = expected + 0.24 * rng.standard_t(5, (e, n)) * math.sqrt(3 / 5)
    diverged = rng.random((e, r)) < diverging
    moved = seed_sd * effects(rng, (e, r)) + by * diverged
    nll = (rate[:, None] + moved[:, :, None] + 0.02 * normal(rng, (e, r, n))) * tokens[:, None]
    truth = (expected * tokens).sum(1) / tokens.sum(1)
    for i in range(e):
        yield evaluation(nll[i], tokens[i]), truth[i], tuple(np.flatnonzero(diverged[i]).tolist())


def coverage(drawn):
    """(intervals that hold the truth, intervals given, experiments)."""
    found = [(stats.intervals([e])[0], truth) for e, truth, _ in drawn]
    given = [(i, truth) for i, truth in found if i.missing is None]
    return sum(i.low <= truth <= i.high for i, truth in given), len(given), len(found)


def check_coverage(said, drawn, low=0.93, high=1.0, given=0.98):
    covers, there, experiments = coverage(drawn)
    print(f"\n{said}: covers {100 * covers / max(1, there):.1f} of {there} given", end="")
    assert there >= given * experiments
    assert plausible(covers, there, low, high)


FEW = [  # seeds, documents, effects of seeds, and how far these scatter
    (1, 2, normal, 0), (3, 2, normal, 0.01), (2, 59, normal, 0.01), (2, 59, normal, 0.2),
    (3, 59, t3, 0.05), (5, 59, t3, 0.05),
]  # fmt: skip
SKEWED = [(3, 0.2), (5, 0.2), (10, 0.2)]
DIVERGING = [(3, 0.3), (3, 3.0), (5, 0.3), (5, 3.0)]
HEAVY = [  # documents, their lengths, and how nats per token depend on these
    (2, lognormal(0.6), 0.1), (8, pareto(1.2), 0.1), (59, pareto(1.2), -0.1),
    (59, pareto(1.2), 0.1), (59, lognormal(1.5), 0.1), (59, lognormal(2.0), -0.1),
]  # fmt: skip


def check_few(rng, experiments, seeds, documents, effects, seed_sd):
    drawn = draw(rng, experiments, seeds, documents, effects=effects, seed_sd=seed_sd)
    said = f"{seeds} seeds ({effects.__name__}, {seed_sd}), {documents} documents"
    check_coverage(said, drawn, given=0.94)


def check_skewed(rng, experiments, seeds, seed_sd):
    drawn = draw(rng, experiments, seeds, effects=exponential, seed_sd=seed_sd)
    check_coverage(f"{seeds} exponential seeds", drawn, 0.87, 0.93, given=0.75)


def check_diverging(rng, experiments, seeds, by):
    """One seed in five diverges: who does is named, and where nobody did the interval holds."""
    drawn = list(draw(rng, experiments, seeds, seed_sd=0.01, diverging=0.2, by=by))
    named = [e.seeds_diverged for e, *_ in drawn]
    few = [(n, d) for n, (_, _, d) in zip(named, drawn, strict=True) if len(d) < seeds / 2]
    assert sum(n == d for n, d in few) >= 0.92 * len(few)
    assert all(set(n) <= set(d) for n, d in few)
    whole = [case for case in drawn if not case[2]]
    check_coverage(f"{seeds} seeds, one in five diverges by {by}", whole)


def check_heavy(rng, experiments, documents, lengths, slope):
    drawn = draw(rng, experiments, documents=documents, lengths=lengths, slope=slope)
    check_coverage(f"{documents} documents, slope {slope}", drawn, given=0.3)


NAMED = [  # how far one of three seeds is above the others, and how often it is named
    (0.08, 0.01, 0.03), (0.1, 0.20, 0.25), (0.2, 0.77, 0.82), (0.3, 0.94, 0.97),
]  # fmt: skip
ALL_WELL = [(normal, 3, 0.065, 0.08), (normal, 5, 0.01, 0.025), (exponential, 3, 0.14, 0.16)]
MU = 6.8
POPULATIONS = [  # lengths, their mean log by token, slope, and how often the population is covered
    (lognormal(0.6), MU + 0.6**2, 0.1, 0.93, 0.97), (lognormal(1.5), MU + 1.5**2, 0.1, 0.84, 0.88),
    (lognormal(2.0), MU + 2.0**2, -0.1, 0.73, 0.77),
    (pareto(1.2), math.log(300) + 1 / 0.2, 0.1, 0.23, 0.28),
]  # fmt: skip


def check_named(rng, experiments, by, low, high):
    """Groups of three seeds of which one diverged by little: how often this one is named."""
    drawn = draw(rng, experiments, 3, seed_sd=0.01, diverging=0.2, by=by)
    one = [e.seeds_diverged == diverged for e, _, diverged in drawn if len(diverged) == 1]
    print(f"\none of 3 seeds has {by} more: named in {100 * np.mean(one):.1f} %", end="")
    assert plausible(sum(one), len(one), low, high)


def check_all_well(rng, experiments, effects, seeds, low, high):
    """Groups of seeds none of which diverged: how often one is named."""
    drawn = draw(rng, experiments, seeds, effects=effects, seed_sd=0.2)
    named = [bool(e.seeds_diverged) for e, *_ in drawn]
    said = f"{seeds} seeds ({effects.__name__}, 0.2) that are well"
    print(f"\n{said}: one is named in {100 * np.mean(named):.1f} %", end="")
    assert plausible(sum(named), len(named), low, high)


def check_population(rng, experiments, lengths, mean_log, slope, low, high):
    """The truth is of the population, by token, and not of text with these lengths."""
    truth = TRUTH + slope * (mean_log - MU)
    drawn = ((e, truth, d) for e, _, d in draw(rng, experiments, lengths=lengths, slope=slope))
    check_coverage(f"population, slope {slope}", drawn, low, high)


@pytest.mark.parametrize("design", NAMED)
def test_a_seed_that_diverged_by_little_is_named_as_seldom_as_is_said(design):
    check_named(np.random.default_rng(26), 1500, *design)


@pytest.mark.parametrize("design", ALL_WELL)
def test_seeds_that_are_well_are_named_as_often_as_is_said(design):
    check_all_well(np.random.default_rng(27), 1500, *design)


@pytest.mark.parametrize("design", POPULATIONS)
def test_populations_of_lengths_are_covered_as_little_as_is_said(design):
    check_population(np.random.default_rng(28), 400, *design)


@pytest.mark.parametrize("design", FEW)
def test_intervals_cover_with_two_documents_or_two_seeds_and_heavy_tails_of_seeds(design):
    check_few(np.random.default_rng(25), 400, *design)


@pytest.mark.parametrize("design", SKEWED)
def test_with_skewed_seeds_intervals_cover_as_little_as_is_said(design):
    check_skewed(np.random.default_rng(21), 400, *design)


@pytest.mark.parametrize("design", DIVERGING)
def test_seeds_that_diverged_are_named(design):
    check_diverging(np.random.default_rng(22), 400, *design)


@pytest.mark.parametrize("design", HEAVY)
def test_intervals_cover_text_of_such_lengths_where_nats_depend_on_length(design):
    check_heavy(np.random.default_rng(23), 400, *design)


@pytest.mark.stats
def test_intervals_hold_or_are_not_given_in_the_long_run():
    for check, designs in (
        (check_few, FEW), (check_skewed, SKEWED), (check_diverging, DIVERGING),
        (check_heavy, HEAVY), (check_named, NAMED), (check_all_well, ALL_WELL),
        (check_population, POPULATIONS),
    ):  # fmt: skip
        for i, design in enumerate(designs):
            check(np.random.default_rng([24, i]), 5000, *design)


def test_no_interval_is_given_where_one_document_is_nearly_the_whole_text():
    (found,) = stats.intervals([evaluation([[3000, 40]], tokens=[1000, 10])])
    assert math.isnan(found.low) and math.isnan(found.perplexity[2])
    assert found.missing == "the 2 documents count as 1.0: one has nearly all tokens"
    (found,) = stats.intervals([evaluation([[3000, 1600]], tokens=[1000, 500])])
    assert found.missing is None and found.num_effective == pytest.approx(1500**2 / 1.25e6)


def test_a_seed_known_to_have_diverged_takes_the_interval_and_is_named():
    (e,) = simulate(np.random.default_rng(13), seeds=2)
    (found,) = stats.intervals([replace(e, diverged=(1,))])
    assert found.missing == "seed 1 of 2 diverged" and math.isnan(found.low)
    other = replace(e, name="other", nll=e.nll + 1)
    assert "c0: seed 1 of 2 diverged" in stats.compare(replace(e, diverged=(1,)), other).warning
    far = replace(e, nll=e.nll + np.array([[0], [1]]) * e.tokens)
    assert far.seeds_diverged == ()  # of two seeds the further one is not known


def test_what_is_the_same_to_rounding_is_not_told_apart():
    (a,) = simulate(np.random.default_rng(14))
    for shift in (1e-9, -1e-9, 1e-6):
        b = replace(a, name="b", nll=a.nll + shift * a.tokens)
        found = stats.compare(a, b)
        assert found.same and found.p == 1 and found.low < 0 < found.high
        assert found.warning == "the same to rounding (1e-06 of their nats)"
        assert ranking.compare_all([a, b])[0].better is None
    apart = stats.compare(a, replace(a, name="b", nll=a.nll + 1e-4 * a.tokens))
    assert apart.p == 0 and not apart.same and apart.warning is None
    single = replace(a, name="b", nll=(a.nll.astype(np.float32) * np.float32(1.0000002)))
    assert stats.compare(a, replace(single, nll=single.nll.astype(np.float64))).same
