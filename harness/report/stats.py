"""Intervals and paired tests from nats per seed and document; `ranking` has more than a pair.

The estimate is a ratio: log-perplexity = mean over seeds of sum(nll) / sum(tokens), nats per token.
Every seed is evaluated on the same documents (seeds and documents are crossed), and all
configurations are. Its variance has two parts, estimated apart as in a two-way table without
replication (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4):

    V = S + D,   S = variance of the seeds' log-perplexities / R,   D = jackknife over documents - I

I is what is particular to a seed and a document at once; S and D both hold it. R seeds give S only
R - 1 degrees of freedom, n documents of t tokens give D sum(t)^2 / sum(t^2) - 1 (Kish's effective
number, less 1). Half an interval's width is the largest of sqrt(S) t(R - 1), sqrt(D) t(n - 1) and

    sqrt(V) (t(f) + (S t(R - 1) + D t(n - 1)) / V) / 2,   V^2 / f = S^2 / (R - 1) + D^2 / (n - 1)

with Student's quantiles t(df): the mean of Satterthwaite's approximation (Biometrics Bulletin 2,
1946), too narrow for few seeds, and of Cochran and Cox's (Experimental Designs, 1957, 4.14), too
wide. Far out, where Holm looks, both can be narrower than the t-interval of the seeds alone; hence
the largest. Tests agree with intervals: p < 0.05 exactly where that of the difference leaves out 0.

An interval of one configuration is the estimate plus and minus half of that width. It is about text
whose documents have the lengths of these documents, and about seeds that scatter evenly about their
mean. None is given where a seed is named as diverged (`Evaluation.seeds_diverged`), because a few
seeds do not tell how many do, or where one document has nearly all tokens (FEW_DOCUMENTS). Limits:

seeds     Where exponential effects of seeds outweigh documents, it covers 87 to 93 % with 3 to 10
          seeds.
diverged  A seed that ends not far above the others is not named, and its group has an interval: of
          three seeds (sd 0.01 nats) whose one has 0.08, 0.1, 0.2 or 0.3 nats more, it is named in
          2, 23, 80 and 95 % of cases. Of two seeds none is named but by its own training. And seeds
          that did not diverge are named: of three normal ones with sd 0.2 in 7 % of groups (of five
          in 2 %), of three exponential ones in 15 %.
lengths   No interval is of the population that the documents were drawn from. Where nats per token
          change by 0.1 with the log of the length, 59 documents' interval has the population's
          value in 95 % of cases for log-normal lengths with sd 0.6 (of logs), but in 86 % with 1.5,
          75 % with 2, and 25 % for Pareto's with tail 1.2: few long documents have most tokens.

`make test-stats` simulates all of this. Tests over documents within seeds find more with 2 and 3
seeds, but also what is not there (experiments/bench/few_seeds).

Two configurations that differ by less than single precision moves (ROUNDING) are the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from harness.config.errors import ConfigError

Floats = NDArray[np.float64]
ALPHA = 0.05  # of every test; intervals are at 1 - ALPHA
SAME = 1e-4  # share of a document's nats that hardware and thread counts may move
ROUNDING = 1e-6  # share of a log-perplexity that single precision may move
FEW_DOCUMENTS = 1.25  # effective documents (Kish) under which one is nearly the whole text
PRESENT = ("missing", "there")  # a document, in one of two evaluations
APART, APART_NATS = 10, 0.1  # how far a seed that diverged lies above the others


@dataclass(frozen=True)
class Evaluation:
    """One configuration's nats of N documents under R seeds, and what they were made with."""

    name: str
    nll: Floats  # (R, N) nats
    tokens: NDArray[np.int64]  # (N,) predicted tokens; documents without any are left out
    seeds: tuple[int, ...]  # R
    documents: tuple[str, ...]  # N ids
    settings: Mapping[str, Any]  # of the evaluation: context, stride, tokenizer, …
    deterministic: bool = False  # the seed moves nothing (truncate, none)
    diverged: tuple[int, ...] = ()  # seeds whose training is known to have diverged

    @cached_property
    def by_seed(self) -> tuple[Floats, tuple[int, ...], Floats]:
        """nll (R, n) and tokens (n,) where there are any, and seeds, ascending; () if none matter.

        R is 1 where the seed moves nothing.
        """
        kept, order = self.tokens > 0, np.argsort(self.seeds)
        nll, tokens = self.nll[order][:, kept], self.tokens[kept].astype(np.float64)
        if self.deterministic or (len(nll) > 1 and (nll == nll[0]).all()):
            return nll.mean(0, keepdims=True), (), tokens
        return nll, tuple(self.seeds[i] for i in order), tokens

    @cached_property
    def seeds_diverged(self) -> tuple[int, ...]:
        """Seeds whose training has diverged: those that are known to have, and those far above.

        Far above is a seed whose log-perplexity exceeds the (lower) median of three or more seeds
        by over APART_NATS, and by over APART times what lies between that median and the lowest.
        """
        nll, seeds, tokens = self.by_seed
        if not seeds:
            return ()
        ratios = nll.sum(1) / tokens.sum()
        least, median = np.sort(ratios)[[0, (len(ratios) - 1) // 2]]
        limit = median + max(APART_NATS, APART * (median - least))
        far = (ratios > limit) & (len(seeds) > 2)
        return tuple(s for s, f in zip(seeds, far, strict=True) if f or s in self.diverged)


@dataclass(frozen=True)
class Components:
    """Variance of an estimate by source, (nats/token)^2, and the degrees of freedom of each."""

    seeds: float  # S
    documents: float  # D
    seeds_df: float  # 0 where seeds do not vary, or there is one
    documents_df: float

    @property
    def varies_over(self) -> str:
        """What the variance covers: "documents" or "seeds and documents"."""
        return "seeds and documents" if self.seeds_df else "documents"

    def half_width(self, alpha: float = ALPHA) -> float:
        """Half of the interval at 1 - alpha, nats per token; 0 where nothing varies."""
        return float(_half_width(np.array([self.seeds, self.documents]), self, alpha))


@dataclass(frozen=True)
class Interval:
    """A configuration's log-perplexity, nats per token, with its 95 % interval, if it has one."""

    name: str
    log_perplexity: float
    low: float  # NaN where there is no interval
    high: float
    num_seeds: int
    num_documents: int
    varies_over: str  # "documents" | "seeds and documents"
    warning: str | None
    num_effective: float = math.inf  # documents, by Kish: sum(tokens)^2 / sum(tokens^2)
    missing: str | None = None  # why there is no interval

    @property
    def perplexity(self) -> tuple[float, float, float]:
        """Perplexity per token, and the low and high end of its interval."""
        with np.errstate(over="ignore"):  # a model that diverged has an infinite one
            value, low, high = np.exp([self.log_perplexity, self.low, self.high])
        return float(value), float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Log-perplexity of `a` less that of `b`, nats per token: below 0, `a` is better."""

    a: str
    b: str
    difference: float
    low: float  # 95 %, not adjusted
    high: float
    p: float  # two-sided
    adjusted_p: float  # Holm's, over the comparisons it was made with
    components: Components  # variance of the difference
    paired_seeds: bool
    varies_over: str
    warning: str | None
    rounding: float = 0.0  # nats per token: a difference no larger is none

    @property
    def same(self) -> bool:
        """Whether the two are the same to the rounding of single precision."""
        return abs(self.difference) <= self.rounding

    @property
    def better(self) -> str | None:
        """Which of the two is significantly better after adjustment, or None."""
        return None if self.adjusted_p >= ALPHA else self.a if self.difference < 0 else self.b


def check(evaluations: Sequence[Evaluation]) -> None:
    """Raise ConfigError where an evaluation is not whole or differs from the first's terms."""
    if not evaluations:
        raise ConfigError("there is no evaluation to make statistics of")
    _check_once("configuration", [e.name for e in evaluations])
    for e in evaluations:
        _check_one(e)
        _check_same(evaluations[0], e)


def _check_once(what: str, values: Sequence[Any]) -> None:
    for value, count in Counter(values).most_common(1):
        if count > 1:
            raise ConfigError(f"{what} {value} is there {count} times")


def _check_one(e: Evaluation) -> None:
    _check_once(f"{e.name}: seed", e.seeds)
    _check_once(f"{e.name}: document", e.documents)
    shape, is_shape = (len(e.seeds), len(e.documents)), (e.nll.shape, e.tokens.shape)
    if is_shape != (shape, shape[1:]):
        raise ConfigError(f"{e.name}: shapes {is_shape} of nll and tokens do not fit {shape}")
    if not e.seeds or (e.tokens > 0).sum() < 2:
        raise ConfigError(f"{e.name}: an interval needs a seed and two documents with tokens")
    whole = np.isfinite(e.nll) & (e.tokens >= 0) & ((e.tokens > 0) | (e.nll == 0))
    moved = e.deterministic & (np.abs(e.nll - e.nll[0]) > SAME * np.abs(e.nll[0]))
    for r, n in np.argwhere(~whole | moved):
        what = "a deterministic method moved:" if whole[r, n] else "not possible:"
        nll_text = (
            f"nll {e.nll[r, n]} under seed {e.seeds[r]} ({e.nll[0, n]} under seed {e.seeds[0]})"
        )
        where = f"document {e.documents[n]} of {e.tokens[n]} tokens"
        raise ConfigError(f"{e.name}: {what} {where} has {nll_text}")


def difference(a: Evaluation, b: Evaluation) -> tuple[str, Any, Any] | None:
    """Return the first term that two evaluations differ in, and its values; None where alike."""
    for key in sorted(a.settings.keys() | b.settings.keys()):
        value_a, value_b = (e.settings.get(key, "not given") for e in (a, b))
        if value_a != value_b:
            return key, value_a, value_b
    if a.documents != b.documents:
        if not (apart := sorted(set(a.documents) ^ set(b.documents))):
            return "the first document", a.documents[0], b.documents[0]
        in_a, in_b = (PRESENT[apart[0] in e.documents] for e in (a, b))
        return f"document {apart[0]}", in_a, in_b
    for n in np.flatnonzero(a.tokens != b.tokens):
        return f"tokens of document {a.documents[n]}", a.tokens[n], b.tokens[n]
    return None


def _check_same(a: Evaluation, b: Evaluation) -> None:
    if differing := difference(a, b):
        what, value_a, value_b = differing
        where = f"{a.name} and {b.name} were not evaluated alike:"
        raise ConfigError(f"{where} {what} is {value_a} and {value_b}")


def _told_diverged(seeds: Sequence[int], count: int) -> str:
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{which} of {count} diverged"


def _alone(*evaluations: Evaluation) -> list[str]:
    alone = [e.name for e in evaluations if len(e.by_seed[1]) == 1]
    warning = f"one seed of {' and '.join(alone)}: how much seeds vary is not in the interval"
    return [warning] if alone else []


def _apart(*evaluations: Evaluation) -> list[str]:
    diverged = (e for e in evaluations if e.seeds_diverged)
    return [f"{e.name}: {_told_diverged(e.seeds_diverged, len(e.seeds))}" for e in diverged]


def effective(tokens: NDArray[Any]) -> float:
    """Kish's effective number of documents of these lengths: as many of equal length tell as much.

    sum(tokens)^2 / sum(tokens^2) (Survey Sampling, 1965, 11.7).
    """
    lengths = tokens.astype(np.float64)
    return float(lengths.sum() ** 2 / (lengths**2).sum())


def _components(parts: Sequence[Floats], tokens: Floats) -> tuple[float, Components]:
    """Estimate and variance of the sum of parts, each nll (R, n) with seeds of its own."""
    total, n = tokens.sum(), len(tokens)
    summed = np.sum([part.mean(0) for part in parts], axis=0)  # (n,)
    estimate = summed.sum() / total
    # Leaving out a document moves the ratio by its residual over the other documents' tokens.
    d = ((summed - estimate * tokens) ** 2 / (total - tokens) ** 2).sum() * (n - 1) / n
    s = over = 0.0
    for part, other in zip(parts, reversed(parts), strict=True):
        if (r := len(part)) > 1:
            ratio = part.sum(1) / total
            particular = part - part.mean(0) - np.outer(ratio - ratio.mean(), tokens)
            d -= (particular**2).sum() * n / ((n - 1) * r * (r - 1) * total**2)
            # A single seed of the other is taken to vary as much as one of these.
            of_part = ratio.var(ddof=1) * (1 / r + (len(other) == 1 < len(parts)))
            s, over = s + of_part, over + of_part**2 / (r - 1)
    seeds_df = s**2 / over if over else max(map(len, parts)) - 1.0  # Welch, where seeds are apart
    documents_df = max(effective(tokens) - 1, 1.0)
    return float(estimate), Components(
        float(s), max(float(d), 0.0), float(seeds_df), float(documents_df)
    )


def _half_width(variance: Floats, components: Components, alpha: float) -> Floats:
    """Half-widths (…) from variances over seeds and documents (…, 2)."""
    seeds_df, documents_df = components.seeds_df or 1.0, components.documents_df
    seeds_t, documents_t = -special.stdtrit([seeds_df, documents_df], alpha / 2)
    seeds, documents = variance[..., 0], variance[..., 1]
    total = seeds + documents
    share = seeds / (total + (total == 0))
    rest = documents / (total + (total == 0))
    # No share gives Satterthwaite more than df.sum(); only without any variance is this a bound.
    least = 1 / (seeds_df + documents_df)
    df = 1 / np.maximum(share**2 / seeds_df + rest**2 / documents_df, least)
    both = (-special.stdtrit(df, alpha / 2) + share * seeds_t + rest * documents_t) / 2
    single = np.maximum(np.sqrt(share) * seeds_t, np.sqrt(rest) * documents_t)
    return np.sqrt(total) * np.maximum(both, single)


def _p_value(difference: float, components: Components) -> float:
    """The alpha at which the interval just reaches 0, found on a log scale; 0 below 1e-100."""

    def beyond(log_alpha: float) -> float:
        return components.half_width(math.exp(log_alpha)) - abs(difference)

    least = math.log(1e-100)
    if difference == 0 or beyond(least) < 0:
        return float(difference == 0)
    return math.exp(optimize.brentq(beyond, least, 0.0))


def intervals(evaluations: Sequence[Evaluation]) -> list[Interval]:
    """Log-perplexity of every configuration with its 95 % interval (see the module's head).

    A deterministic configuration, and one whose seeds give identical nll, varies over documents
    only; so does the interval of a single seed, which carries a warning. Where there can be no
    interval, its ends are NaN and `missing` says why. Raises as `check` does.
    """
    check(evaluations)
    results = []
    for e in evaluations:
        nll, _, tokens = e.by_seed
        estimate, components = _components([nll], tokens)
        half, why, count = components.half_width(), None, effective(tokens)
        if seeds := e.seeds_diverged:
            why = _told_diverged(seeds, len(e.seeds))
        elif count < FEW_DOCUMENTS:
            why = f"the {len(tokens)} documents count as {count:.1f}: one has nearly all tokens"
        if why is not None:
            half = math.nan
        warning = "; ".join(_alone(e) + _apart(e)) or None
        counted = (len(e.seeds), nll.shape[1], components.varies_over, warning, count, why)
        results.append(Interval(e.name, estimate, estimate - half, estimate + half, *counted))
    return results


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """The difference of two configurations, with its 95 % interval and p-value.

    Documents are always paired. So are seeds (the same data order and initial draw), or one is
    deterministic: of what the seed moves, only the seeds that both have are compared. Where they
    have none in common they count as independent. A difference within ROUNDING of the larger
    log-perplexity is none: p is 1. Raises as `check` does.
    """
    check((a, b))
    (nll_a, seeds, tokens), (nll_b, other_seeds, _) = a.by_seed, b.by_seed
    if common := set(seeds) & set(other_seeds):
        nll_a = nll_a[[i for i, seed in enumerate(seeds) if seed in common]]
        nll_b = nll_b[[i for i, seed in enumerate(other_seeds) if seed in common]]
    paired = bool(common) or not seeds or not other_seeds
    difference, components = _components([nll_a - nll_b] if paired else [nll_a, -nll_b], tokens)
    # Nothing closer than this can be told apart, whatever documents and seeds say.
    rounding = ROUNDING * max(float(x.sum() / len(x)) for x in (nll_a, nll_b)) / float(tokens.sum())
    is_same = abs(difference) <= rounding
    half = max(components.half_width(), rounding)
    p = 1.0 if is_same else _p_value(difference, components)
    numbers = (difference, difference - half, difference + half, p, p)
    warnings = _alone(a, b)
    if len(common) == 1 and not warnings:
        warnings = [f"one seed that both {a.name} and {b.name} have: no variance over seeds"]
    elif warnings and not paired and len(nll_a) != len(nll_b):
        warnings = [
            f"one seed of {(a if len(nll_a) == 1 else b).name}, taken to vary as the other's"
        ]
    warnings += _apart(a, b)
    if is_same and difference:
        warnings.append(f"the same to rounding ({ROUNDING:g} of their nats)")
    warning = "; ".join(warnings) or None
    carried = (components, paired, components.varies_over, warning, rounding)
    return Comparison(a.name, b.name, *numbers, *carried)


def detectable(components: Components, alpha: float = ALPHA, power: float = 0.8) -> float:
    """The smallest true difference, nats per token, that `compare` finds with this power.

    The components count as true, and their estimates as chi-squared(df) / df times them, of which
    20,000 are drawn. alpha / m is on the safe side for m comparisons under Holm.
    """
    variance = np.array([components.seeds, components.documents])
    if (error := math.sqrt(variance.sum())) == 0:
        return 0.0
    df = np.array([components.seeds_df or 1, components.documents_df])
    drawn = variance * np.random.default_rng(0).chisquare(df, size=(20_000, 2)) / df
    half = _half_width(drawn, components, alpha)

    def excess(difference: float) -> float:
        detected = sum(special.ndtr((sign * difference - half) / error) for sign in (1, -1))
        return float(np.mean(detected)) - power

    return float(optimize.brentq(excess, 0.0, half.max() + 9 * error))
