"""Successive halving: who goes on to which step, a pure function of what was found so far.

Every candidate trains to the first rung; there the best 1/eta by validation nll go on to the next,
and so on to the end of the schedule (Jamieson and Talwalkar, arXiv 1502.07943). Rungs are steps of
one and the same schedule: a run pauses at one and goes on from it, so that no step is taken twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Candidate -> optimizer step -> validation nll, nats per token; infinite where it diverged.
Found = Mapping[int, Mapping[int, float]]


def todo(losses: Found, rungs: Sequence[int], eta: int) -> dict[int, int]:
    """Who trains now, and to which step; {} when all is decided.

    A rung is decided when all who came to it are there. Ties go to the earlier candidate. What
    diverged never goes on; if all that went on have diverged, the next best take their place.
    """
    going = sorted(losses)
    for index, step in enumerate(rungs):
        missing = {candidate: step for candidate in going if step not in losses[candidate]}
        if missing:
            return missing
        going = promoted(losses, going, rungs[index:], eta)
    return {}


def promoted(losses: Found, going: Sequence[int], rungs: Sequence[int], eta: int) -> list[int]:
    """Of those at rungs[0] the ones that go on to the later of `rungs`, the best first."""
    step, later = rungs[0], rungs[1:]
    ranked = sorted(going, key=lambda candidate: (losses[candidate][step], candidate))
    fit = [candidate for candidate in ranked if math.isfinite(losses[candidate][step])]
    keep = max(1, len(going) // eta)
    number = keep

    def lost(candidate: int) -> bool:
        return any(losses[candidate].get(rung) == math.inf for rung in later)

    while number < len(fit) and all(lost(candidate) for candidate in fit[:number]):
        number += keep
    return fit[:number]


def most_steps(candidates: int, rungs: Sequence[int], eta: int) -> int:
    """Optimizer steps of a search of so many candidates none of which diverges."""
    total, before = 0, 0
    for step in rungs:
        total += candidates * (step - before)
        candidates, before = max(1, candidates // eta), step
    return total


def most_at_the_end(candidates: int, rungs: Sequence[int], eta: int) -> int:
    """How many of so many candidates come to the last rung, if none diverges."""
    for _ in rungs[1:]:
        candidates = max(1, candidates // eta)
    return candidates
