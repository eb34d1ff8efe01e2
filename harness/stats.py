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

The interval of one configuration takes its shape from a hierarchical bootstrap (seeds and documents
resampled) and its width from the above: percentiles are stretched about the estimate until 1.96
standard deviations are half the width (after Hesterberg, The American Statistician 69, 2015).
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from harness.config import ConfigError

Floats = NDArray[np.float64]
ALPHA = 0.05  # of every test; intervals are at 1 - ALPHA
SAME = 1e-4  # share of a document's nats that hardware and thread counts may move
CHUNK = 2**22  # numbers in each of the bootstrap's working arrays (32 MiB)


@dataclass(frozen=True)
class Evaluation:
    """One configuration on N documents under R seeds."""

    name: str
    nll: Floats  # (R, N) nats
    tokens: NDArray[np.int64]  # (N,) predicted tokens; documents without any are left out
    seeds: tuple[int, ...]  # R
    documents: tuple[str, ...]  # N ids
    settings: Mapping[str, Any]  # of the evaluation: context, stride, tokenizer, …
    deterministic: bool = False  # the seed moves nothing (truncate, none)


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
    """A configuration's log-perplexity, nats per token, with its 95 % interval."""

    name: str
    log_perplexity: float
    low: float
    high: float
    num_seeds: int
    num_documents: int
    varies_over: str  # "documents" | "seeds and documents"
    warning: str | None

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
        said = f"nll {e.nll[r, n]} under seed {e.seeds[r]} ({e.nll[0, n]} under seed {e.seeds[0]})"
        where = f"document {e.documents[n]} of {e.tokens[n]} tokens"
        raise ConfigError(f"{e.name}: {what} {where} has {said}")


def _check_same(a: Evaluation, b: Evaluation) -> None:
    where = f"{a.name} and {b.name} were not evaluated alike:"
    for key in sorted(a.settings.keys() | b.settings.keys()):
        one, other = (e.settings.get(key, "not given") for e in (a, b))
        if one != other:
            raise ConfigError(f"{where} {key} is {one} and {other}")
    if a.documents != b.documents:
        apart = sorted(set(a.documents) ^ set(b.documents))
        raise ConfigError(f"{where} documents differ, by {apart[:3] if apart else 'their order'}")
    for n in np.flatnonzero(a.tokens != b.tokens):
        counts = f"{a.tokens[n]} and {b.tokens[n]} tokens"
        raise ConfigError(f"{where} document {a.documents[n]} has {counts}")


def _by_seed(e: Evaluation) -> tuple[Floats, tuple[int, ...], Floats]:
    """nll (R, n) and tokens (n,) where there are any, and seeds, ascending; none if none matter."""
    kept, order = e.tokens > 0, np.argsort(e.seeds)
    nll, tokens = e.nll[order][:, kept], e.tokens[kept].astype(np.float64)
    if e.deterministic or (len(nll) > 1 and (nll == nll[0]).all()):
        return nll.mean(0, keepdims=True), (), tokens
    return nll, tuple(e.seeds[i] for i in order), tokens


def _warning(*evaluations: Evaluation) -> str | None:
    alone = [e.name for e in evaluations if len(_by_seed(e)[1]) == 1]
    said = f"one seed of {' and '.join(alone)}: how much seeds vary is not in the interval"
    return said if alone else None


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
    documents_df = max(total**2 / (tokens**2).sum() - 1, 1.0)
    return float(estimate), Components(
        float(s), max(float(d), 0.0), float(seeds_df), float(documents_df)
    )


def _half_width(variance: Floats, components: Components, alpha: float) -> Floats:
    """Half-widths (…) from variances over seeds and documents (…, 2)."""
    df = np.array([components.seeds_df or 1.0, components.documents_df])
    t = -special.stdtrit(df, alpha / 2)
    total = variance.sum(-1)
    share = variance / np.where(total > 0, total, 1)[..., None]
    # No share gives Satterthwaite more than df.sum(); only without any variance is this a bound.
    satterthwaite = 1 / np.maximum((share**2 / df).sum(-1), 1 / df.sum())
    both = (-special.stdtrit(satterthwaite, alpha / 2) + share @ t) / 2
    return np.sqrt(total) * np.maximum(both, (np.sqrt(share) * t).max(-1))


def _p_value(difference: float, components: Components) -> float:
    """The alpha at which the interval just reaches 0, found on a log scale; 0 below 1e-100."""

    def beyond(log_alpha: float) -> float:
        return components.half_width(math.exp(log_alpha)) - abs(difference)

    least = math.log(1e-100)
    if difference == 0 or beyond(least) < 0:
        return float(difference == 0)
    return math.exp(optimize.brentq(beyond, least, 0.0))


def intervals(evaluations: Sequence[Evaluation], resamples: int = 10_000) -> list[Interval]:
    """Log-perplexity of every configuration with its 95 % interval (see the module's head).

    A deterministic configuration, and one whose seeds give identical nll, varies over documents
    only; so does the interval of a single seed, which carries a warning. Raises as `check` does.
    """
    found = []
    for e, drawn in zip(evaluations, bootstrap(evaluations, resamples).T, strict=True):
        nll, _, tokens = _by_seed(e)
        estimate, components = _components([nll], tokens)
        spread = float(drawn.std()) * -special.ndtri(ALPHA / 2)
        stretch = components.half_width() / spread if spread > 0 else 0.0
        ends = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
        low, high = (estimate + (ends - estimate) * stretch).tolist()
        counted = (len(e.seeds), nll.shape[1], components.varies_over)
        found.append(Interval(e.name, estimate, low, high, *counted, _warning(e)))
    return found


def bootstrap(evaluations: Sequence[Evaluation], resamples: int, seed: int = 0) -> Floats:
    """Log-perplexities (B, C) of B resamples of seeds and documents, all C configurations at once.

    A resample has the same documents for every seed and configuration, and the same seeds for every
    configuration with those seed ids, so that differences of columns are paired. Resampled means
    over seeds vary too little, (R - 1) / R of what they should: their deviations from the mean of
    all seeds are inflated by sqrt(R / (R - 1)). Memory is the result and a few times CHUNK. Raises
    as `check` does.
    """
    check(evaluations)
    nll, seeds, (tokens, *_) = zip(*map(_by_seed, evaluations), strict=True)
    columns = np.concatenate(nll).T  # (n, sum of R)
    ends = np.cumsum([len(part) for part in nll])
    result = np.empty((resamples, len(evaluations)))
    documents = np.random.default_rng(seed)
    # A generator for each set of seed ids: no configuration's draws depend on the others.
    by_seeds = {ids: np.random.default_rng(zlib.crc32(f"{seed}:{ids}".encode())) for ids in seeds}
    step = max(1, CHUNK // max(columns.shape))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        weights = _counts(documents, rows, len(tokens))
        ratios = (weights @ columns) / (weights @ tokens)[:, None]  # (rows, sum of R)
        excess = {ids: _counts(g, rows, max(1, len(ids))) - 1 for ids, g in by_seeds.items()}
        for c, (ids, end) in enumerate(zip(seeds, ends, strict=True)):
            r = len(nll[c])
            inflated = excess[ids] * math.sqrt(r / max(1, r - 1))
            result[start : start + rows, c] = (ratios[:, end - r : end] * (1 + inflated)).mean(1)
    return result


def _counts(generator: np.random.Generator, rows: int, n: int) -> Floats:
    """How often each of n comes up in n draws with replacement, (rows, n)."""
    drawn = generator.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """The difference of two configurations, with its 95 % interval and p-value.

    Documents are always paired. So are seeds (the same data order and initial draw), or one is
    deterministic: of what the seed moves, only the seeds that both have are compared. Where they
    have none in common they count as independent. Raises as `check` does.
    """
    check((a, b))
    (one, seeds, tokens), (other, other_seeds, _) = _by_seed(a), _by_seed(b)
    if common := set(seeds) & set(other_seeds):
        one = one[[i for i, seed in enumerate(seeds) if seed in common]]
        other = other[[i for i, seed in enumerate(other_seeds) if seed in common]]
    paired = bool(common) or not seeds or not other_seeds
    difference, components = _components([one - other] if paired else [one, -other], tokens)
    half, p = components.half_width(), _p_value(difference, components)
    numbers = (difference, difference - half, difference + half, p, p)
    warning = _warning(a, b)
    if len(common) == 1 and not warning:
        warning = f"one seed that both {a.name} and {b.name} have: no variance over seeds"
    elif warning and not paired and len(one) != len(other):
        warning = f"one seed of {(a if len(one) == 1 else b).name}, taken to vary as the other's"
    carried = (components, paired, components.varies_over, warning)
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
        found = sum(special.ndtr((sign * difference - half) / error) for sign in (1, -1))
        return float(np.mean(found)) - power

    return float(optimize.brentq(excess, 0.0, half.max() + 9 * error))
