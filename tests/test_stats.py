"""Intervals cover, tests reject and families hold as often as they say, on data of known truth."""

import math
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness import ranking, stats
from harness.config import ConfigError

TRUTH = 3.0  # nats/token
SETTINGS = {"context": 256, "stride": 256, "tokenizer": "gpt2_mini"}


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


def evaluation(nll, tokens=None, name="a", seeds=None, **fields):
    """An evaluation of nll (R, N), by default of 1 token a document."""
    nll = np.array(nll, dtype=np.float64)
    tokens = np.ones(nll.shape[1], np.int64) if tokens is None else np.array(tokens)
    seeds = tuple(range(len(nll))) if seeds is None else seeds
    ids = tuple(f"doc{i}" for i in range(nll.shape[1]))
    return stats.Evaluation(name, nll, tokens, seeds, ids, SETTINGS, **fields)


# --------------------------------------------------------------------------- oracles


def test_the_estimate_weighs_documents_by_their_tokens():
    (found,) = stats.intervals([evaluation([[10, 90], [30, 80]], tokens=[10, 40])], 100)
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


def test_the_interval_of_one_is_as_wide_as_that_of_the_t_test():
    ratios = np.random.default_rng(3).normal(3, 0.1, (1, 12))
    (found,) = stats.intervals([evaluation(ratios, deterministic=True)], 20_000)
    oracle = scipy_stats.ttest_1samp(ratios[0], 0).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(oracle.high - oracle.low, rel=0.03)


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


# --------------------------------------------------------------------------- bootstrap


def test_the_bootstrap_is_that_of_a_slow_loop(monkeypatch):
    evaluations = simulate(np.random.default_rng(3), 2, seeds=3, documents=7)
    evaluations[1] = replace(evaluations[1], seeds=(5, 6, 7))
    evaluations.append(replace(evaluations[0], name="c2", nll=evaluations[0].nll[::-1]))
    monkeypatch.setattr(stats, "CHUNK", 50)  # resamples in several chunks
    counts = []
    whole = stats._counts

    def kept(*arguments):
        counts.append(whole(*arguments))
        return counts[-1]

    monkeypatch.setattr(stats, "_counts", kept)
    found = stats.bootstrap(evaluations, 8)
    # By chunk: documents, then seeds 0 to 2, then seeds 5 to 7.
    documents, seeds, others = (np.concatenate(counts[i::3]) for i in range(3))
    assert len(counts) > 3 and len(documents) == 8
    for b in range(8):
        for c, e in enumerate(evaluations):
            drawn = np.repeat(np.arange(7), documents[b].astype(int))
            tokens = sum(e.tokens[n] for n in drawn)
            ratios = [sum(e.nll[r, n] for n in drawn) / tokens for r in range(3)]
            mine = np.repeat(range(3), (others if c == 1 else seeds)[b].astype(int))
            mean = sum(ratios) / 3
            away = sum(ratios[r] for r in mine) / 3 - mean
            assert found[b, c] == pytest.approx(mean + math.sqrt(3 / 2) * away)


def test_documents_are_resampled_as_scipy_does():
    (e,) = simulate(np.random.default_rng(11), documents=30)
    drawn = stats.bootstrap([replace(e, nll=e.nll[:1], seeds=(0,))], 5000)
    oracle = scipy_stats.bootstrap(
        (e.nll[0], e.tokens),
        lambda nll, tokens, axis: nll.sum(axis) / tokens.sum(axis),
        paired=True, method="percentile", n_resamples=5000, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert drawn.std() == pytest.approx(oracle.standard_error, rel=0.05)
    wanted = oracle.confidence_interval
    spread = oracle.standard_error
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(
        [wanted.low, wanted.high], abs=spread / 6
    )


def test_resamples_vary_over_seeds_as_their_mean_does():
    ratios = np.random.default_rng(12).normal(3, 0.1, 4)
    drawn = stats.bootstrap([evaluation(np.outer(ratios, [1, 1, 1]))], 20_000)
    assert drawn.std() == pytest.approx(scipy_stats.sem(ratios), rel=0.03)


def test_resamples_of_configurations_are_paired():
    a, b = simulate(np.random.default_rng(4), 2)
    shifted = replace(a, name="shifted", nll=a.nll + 0.5 * a.tokens)
    drawn = stats.bootstrap([a, shifted, b], 500)
    assert np.allclose(drawn[:, 1] - drawn[:, 0], 0.5)
    assert np.allclose(stats.bootstrap([b], 500)[:, 0], drawn[:, 2], rtol=1e-12, atol=0)


def test_fifty_configurations_of_five_seeds_and_a_thousand_documents_fit_in_memory():
    evaluations = simulate(np.random.default_rng(5), 50, seeds=5, documents=1000)
    tracemalloc.start()
    drawn = stats.bootstrap(evaluations, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.shape == (10_000, 50)
    assert peak < 2**29  # the bound is 2 GB


# ----------------------------------------------------------- what varies, and what is warned of


@pytest.mark.parametrize("flagged", [True, False])
def test_a_deterministic_method_varies_over_documents_only(flagged):
    (seeded,) = simulate(np.random.default_rng(6))
    fixed = replace(
        seeded, name="fixed", nll=np.repeat(seeded.nll[:1], 3, 0), deterministic=flagged
    )
    one, other = stats.intervals([fixed, seeded], 1000)
    assert (one.varies_over, one.warning) == ("documents", None)
    assert (other.varies_over, other.warning) == ("seeds and documents", None)
    once = replace(fixed, name="once", nll=fixed.nll[:1], seeds=(7,), deterministic=True)
    (alone,) = stats.intervals([once], 1000)
    assert (alone.low, alone.high) == pytest.approx((one.low, one.high))
    found = stats.compare(fixed, seeded)
    assert (found.varies_over, found.paired_seeds) == ("seeds and documents", True)
    assert stats.compare(once, seeded).p == pytest.approx(found.p)


def test_a_single_seed_is_warned_of():
    a, b = simulate(np.random.default_rng(7), 2)
    one = replace(a, name="one", nll=a.nll[:1], seeds=(0,))
    (found,) = stats.intervals([one], 500)
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
    assert stats.intervals(more, 500) == stats.intervals([a, b], 500)


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
        (lambda e: replace(e, settings={"context": 256}), "stride is 256 and not given"),
        (lambda e: replace(e, documents=("x", *e.documents[1:])), r"differ, by \['doc0', 'x'\]"),
        (lambda e: replace(e, documents=e.documents[::-1]), "by their order"),
        (bad(2, 1, "tokens"), r"document doc2 has \d+ and 1 tokens"),
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


def calibrate(seeds, seed_sd, experiments, resamples):
    """How often, of experiments with five configurations that are equally good in truth:

    covers: the interval of one holds the truth; percentiles: so do those of its resamples alone;
    rejects: two are told apart (unpaired: with other seeds; deterministic: against a method without
    any); family: any of the ten pairs is, after Holm.
    """
    rng = np.random.default_rng([seeds, round(1000 * seed_sd)])
    counts: Counter[str] = Counter()
    for _ in range(experiments):
        evaluations = simulate(rng, 5, seeds, seed_sd=seed_sd)
        one = evaluations[:1]
        (found,) = stats.intervals(one, resamples)
        low, high = np.quantile(stats.bootstrap(one, resamples), [0.025, 0.975])
        every = ranking.compare_all(evaluations)
        a, b = simulate(rng, 2, seeds, seed_sd=seed_sd, shared=0)
        unpaired = stats.compare(a, replace(b, seeds=tuple(range(seeds, 2 * seeds))))
        fixed = stats.compare(*simulate(rng, 2, seeds, seed_sd=seed_sd, fixed=1))
        counts += Counter(
            covers=int(found.low <= TRUTH <= found.high),
            percentiles=int(low <= TRUTH <= high),
            rejects=int(every[0].p < 0.05),
            unpaired=int(unpaired.p < 0.05),
            deterministic=int(fixed.p < 0.05),
            family=int(any(c.better for c in every)),
        )
    return counts


def check_calibration(seeds, seed_sd, experiments, resamples=1000):
    counts = calibrate(seeds, seed_sd, experiments, resamples)
    print(f"\nseeds {seeds:2} sd {seed_sd:5}:", end="")  # the table of `make test-stats`
    tests = ("rejects", "unpaired", "deterministic")
    keys = ("covers", "percentiles", *tests, "family")
    print(*(f" {key} {100 * counts[key] / experiments:.1f}" for key in keys), "%")
    assert plausible(counts["covers"], experiments, 0.93, 0.97)
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
