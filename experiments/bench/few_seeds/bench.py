"""Whether another test than that of `report.stats` claims more at 2 and 3 seeds, and still holds.

    python experiments/bench/few_seeds/bench.py      # about 12 minutes; writes results.csv

Families of six configurations are drawn, with documents as the King James test set has them. Every
pair is tested in four ways, Holm-adjusted over the 15 pairs of a family:

harness    `stats.compare`: seeds and documents are both random
documents  a paired t-test over documents, of the mean over seeds; seeds are taken as given
every seed the same within each seed, and a claim only where every seed has it, in one direction
pooled     `stats.compare` with the seeds' variance moderated over all pairs (limma: Smyth,
           Statistical Applications in Genetics and Molecular Biology 3, 2004, article 3)
"""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
from scipy import optimize, special

from harness.report import ranking, stats

CONFIGURATIONS, DOCUMENTS, FAMILIES = 6, 59, 1000
SEED_SD = 0.01  # nats per token
SCATTER = {  # standard deviation of each configuration's seeds
    "equal": lambda rng, c: np.full(c, SEED_SD),
    "scattered": lambda rng, c: SEED_SD * np.exp(rng.normal(0, 0.7, c)),
    "one in five ten times": lambda rng, c: np.where(np.arange(c) % 5 == 0, 10, 1) * SEED_SD,
}


def family(
    rng: np.random.Generator, seeds: int, scatter: str, step: float
) -> list[stats.Evaluation]:
    """Configurations whose true log-perplexities are `step` nats apart."""
    c, n = CONFIGURATIONS, DOCUMENTS
    tokens = np.ceil(np.exp(rng.normal(6.8, 0.6, n))).astype(np.int64)
    rate = 3 + 0.24 * rng.standard_t(5, n) * math.sqrt(3 / 5)
    rate = rate + 0.04 * rng.standard_normal((c, 1, n)) + 0.02 * rng.standard_normal((c, seeds, n))
    sd = SCATTER[scatter](rng, c)[:, None, None]
    rate = rate + sd * rng.standard_normal((c, seeds, 1)) + step * np.arange(c)[:, None, None]
    ids = tuple(map(str, range(n)))
    return [
        stats.Evaluation(f"c{i}", x * tokens, tokens, tuple(range(seeds)), ids, {})
        for i, x in enumerate(rate)
    ]


def over_documents(difference: np.ndarray, tokens: np.ndarray) -> float:
    """p of a paired t-test over documents of nats (N,)."""
    estimate, parts = stats._components([difference[None]], tokens.astype(float))
    return stats._p_value(estimate, parts)


def within_every_seed(a: stats.Evaluation, b: stats.Evaluation) -> float:
    """The largest p of the seeds, or 1 where they point different ways."""
    difference = a.nll - b.nll
    if len(set(np.sign(difference.sum(1)))) > 1:
        return 1.0
    return max(over_documents(d, a.tokens) for d in difference)


def pooled(pairs: list[tuple[stats.Evaluation, stats.Evaluation]]) -> list[float]:
    """p of every pair, its seeds' variance moderated by those of all."""
    found = [stats._components([a.nll - b.nll], a.tokens.astype(float)) for a, b in pairs]
    df = found[0][1].seeds_df
    logs = np.log([max(parts.seeds, 1e-12) for _, parts in found])
    centred = logs - special.digamma(df / 2) + math.log(df / 2)
    excess = centred.var(ddof=1) - special.polygamma(1, df / 2)
    most = CONFIGURATIONS * df
    if excess <= 0:
        prior, prior_df = math.exp(centred.mean()), math.inf
    else:
        half = optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-3, 1e6)
        prior, prior_df = (
            math.exp(centred.mean() + special.digamma(half) - math.log(half)),
            2 * half,
        )
    p = []
    for estimate, own in found:
        share = 1.0 if math.isinf(prior_df) else prior_df / (prior_df + df)
        seeds = share * prior + (1 - share) * own.seeds
        parts = stats.Components(seeds, own.documents, min(prior_df + df, most), own.documents_df)
        p.append(stats._p_value(estimate, parts))
    return p


def rates(seeds: int, scatter: str, step: float) -> dict[str, float]:
    """Share of families with any claim (step 0: a false one), else share of pairs claimed."""
    rng = np.random.default_rng([seeds, *scatter.encode(), round(1000 * step)])
    claimed: dict[str, list[float]] = {}
    for _ in range(FAMILIES):
        every = family(rng, seeds, scatter, step)
        pairs = list(itertools.combinations(every, 2))
        p = {
            "harness": [stats.compare(a, b).p for a, b in pairs],
            "documents": [over_documents((a.nll - b.nll).mean(0), a.tokens) for a, b in pairs],
            "every seed": [within_every_seed(a, b) for a, b in pairs],
            "pooled": pooled(pairs),
        }
        for name, values in p.items():
            found = ranking.holm(values) < stats.ALPHA
            claimed.setdefault(name, []).append(float(found.mean() if step else found.any()))
    return {name: float(np.mean(values)) for name, values in claimed.items()}


def main() -> None:
    """Write results.csv, a line a design."""
    with Path(__file__).with_name("results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        for seeds, scatter, step in itertools.product((2, 3, 5), SCATTER, (0.0, 0.05)):
            found = rates(seeds, scatter, step)
            if file.tell() == 0:
                writer.writerow(["seeds", "scatter", "step", *found])
            writer.writerow([seeds, scatter, step, *(f"{v:.3f}" for v in found.values())])
            file.flush()


if __name__ == "__main__":
    main()
