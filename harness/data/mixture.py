"""Several texts in one training stream, each with a share of the blocks that is exact to a block.

Of the first n blocks of training, a part with the share w has n w, rounded up or down: whatever n
is. The blocks of a part come in the order that it has by itself: of the part alone, and with a
share of 0 for all others, training is the same. All of it is a function of shares, seed and step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def turns(shares: Sequence[Fraction], count: int) -> NDArray[np.int8]:
    """Which part each of the first `count` blocks is of.

    Block i (from 0) of a part with share w may come from place floor(i / w) on and must have come
    before place ceil((i + 1) / w); of those that may come, the one that must come first does, and
    this keeps all of them (Baruah et al. 1996, proportionate progress).
    """
    whole = math.lcm(*(share.denominator for share in shares))  # after which it comes again
    size = min(whole, 2 ** math.ceil(math.log2(max(2, count))))
    once = _turns(tuple(int(share * whole) for share in shares), whole, size)
    return np.resize(once, count)


@lru_cache(maxsize=4)
def _turns(shares: tuple[int, ...], whole: int, count: int) -> NDArray[np.int8]:
    order = np.empty(count, np.int8)
    taken = [0] * len(shares)
    for place in range(count):
        due = [
            (-((taken[j] + 1) * -whole // share), j)  # rounded up
            for j, share in enumerate(shares)
            if share and taken[j] * whole // share <= place
        ]
        _, chosen = min(due)
        order[place] = chosen
        taken[chosen] += 1
    return order


def places(shares: Sequence[Fraction], start: int, count: int) -> list[tuple[int, int]]:
    """(part, which of its blocks, from 0) of `count` blocks of training from `start` on."""
    all_turns = turns(shares, start + count)
    taken = [int((all_turns[:start] == j).sum()) for j in range(len(shares))]
    blocks = []
    for part in all_turns[start:].tolist():
        blocks.append((part, taken[part]))
        taken[part] += 1
    return blocks
