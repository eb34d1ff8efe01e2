"""What the singular values and vectors of W, dW and W + dW say of an update.

Every singular value decomposition here goes through the eigenvectors of the smaller Gram matrix in
float64, which is several times as fast as LAPACK's own and exact to about 1e-8 of the largest
singular value: less than the rounding of fp32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import linalg

from harness.methods.svd import cached_factors

ENERGY = 0.9  # of r90
COLUMNS = 8192  # of a matrix that are held in float64 at one time


class Factors(NamedTuple):
    """U (m, p), s (p,) descending and V (n, p) with A = U diag(s) V^T, float64."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Spectrum:
    """The numbers of one dW (m, n); each rank could have been `full_rank` = min(m, n) at most."""

    full_rank: int
    rank: int  # singular values above the error of dW
    effective_rank: float  # exp of the entropy of s / sum(s) (Roy and Vetterli 2007)
    stable_rank: float  # ||dW||_F^2 / s_1^2
    r90: int  # the smallest k whose s_1 … s_k have 90 % of ||dW||_F^2


def factors(matrix: torch.Tensor, k: int | None = None) -> Factors:
    """Decompose A (m, n), with the first k columns of U and V only if k is given.

    Columns of the side that belong to no singular value are zero.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    a = matrix.t() if tall else matrix
    near, far, s = _sides(a, k)
    return Factors(far, s, near) if tall else Factors(near, s, far)


def left_vectors(matrix: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """Return U (m, p) of A (m, n), or its first k columns, in float64.

    V is not made where it is the longer side: of a wide matrix, such as embeddings, it is what
    takes the memory.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return factors(matrix, k).u
    return _eigenvectors(_gram(matrix), k)[1]


def _sides(a: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shorter side's vectors, the longer one's and s, of A (p, q) with p <= q."""
    values, near = _eigenvectors(_gram(a), k)
    s = values.clamp(min=0).sqrt()
    far = torch.cat([columns.double().t() @ near for columns in a.split(COLUMNS, 1)])
    norms = far.norm(dim=0)  # s again, and more exact where it is small
    s[: len(norms)] = norms
    far /= norms.clamp(min=1e-300)
    far[:, norms <= 1e-12 * s[0].clamp(min=1e-300)] = 0.0
    return near, far, s


def _gram(a: torch.Tensor) -> torch.Tensor:
    """A A^T (p, p) of A (p, q) in float64, without a float64 copy of all of A."""
    total = torch.zeros(len(a), len(a), dtype=torch.float64)
    for columns in a.split(COLUMNS, 1):
        block = columns.double()
        total += block @ block.t()
    return total


def _eigenvectors(gram: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues (p,), descending, and all eigenvectors (p, p) or the first k (p, k)."""
    p = len(gram)
    if k is None or 4 * k > p:
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0), vectors.flip(1)[:, :k]
    values = torch.linalg.eigvalsh(gram).flip(0)
    _, vectors = linalg.eigh(gram.numpy(), subset_by_index=[p - k, p - 1], check_finite=False)
    return values, torch.from_numpy(vectors[:, ::-1].copy())


def spectrum(s: torch.Tensor, shape: tuple[int, ...], error: float) -> Spectrum:
    """The numbers of a dW with singular values s (p,).

    `error` is the Frobenius norm of what rounding has added to dW (`Update.error`): of a matrix of
    such noise the largest singular value is about error (1/sqrt(m) + 1/sqrt(n)).
    """
    m, n = shape
    s = s.double().sort(descending=True).values
    energy = s.square()
    share = s / s.sum()
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    reached = (energy.cumsum(0) >= ENERGY * energy.sum() * (1 - 1e-12)).nonzero()
    return Spectrum(
        full_rank=len(s),
        rank=rank_above(s, (m, n), error),
        effective_rank=float(entropy.exp()),
        stable_rank=float(energy.sum() / energy[0]),
        r90=int(reached[0, 0]) + 1,
    )


def rank_above(s: torch.Tensor, shape: tuple[int, int], error: float) -> int:
    """Number of singular values that rounding does not explain, at least 1."""
    m, n = shape
    # Up to 2.2 times that of independent errors, found by trial: they hang on W and on dW.
    noise = 4 * error * (m**-0.5 + n**-0.5)
    return max(1, int((s > max(noise, 1e-7 * float(s.max()))).sum()))


def base_left(weight: torch.Tensor, stored_in_out: bool) -> torch.Tensor:
    """All left singular vectors U (m, p) of W (m, n), from the cache of factors if they are there.

    `stored_in_out` says that the base keeps W^T, which the cache then has the factors of.
    """
    stored = weight.t().contiguous() if stored_in_out else weight.contiguous()
    if (cached := cached_factors(stored)) is not None:
        left, _, right_t = cached
        return (right_t.t() if stored_in_out else left).double()
    return left_vectors(weight)


def intruders(base_u: torch.Tensor, after: torch.Tensor, k: int, epsilon: float) -> int:
    """Count the intruder dimensions of W + dW (arXiv 2410.21228, algorithm 1).

    Of its k left singular vectors with the largest singular values (all, where there are fewer),
    those whose |cosine| with every left singular vector of W, the columns of base_u (m, p), is
    below epsilon.
    """
    top = left_vectors(after, min(k, *after.shape))
    largest = (top.t() @ base_u.double()).abs().amax(1)
    return int((largest < epsilon).sum())


def amplification(before: torch.Tensor, svd: Factors, r: int) -> float:
    """||[dW]_r||_F / ||U^T W V||_F with the r first singular vectors of dW (2106.09685, 7.3).

    For a dW of rank r, [dW]_r is dW and this is the paper's factor: how often the size that W
    itself has in the directions in which it was changed. Infinite where W has nothing there.
    """
    u, v = svd.u[:, :r], svd.v[:, :r]
    before_norm = (u.t() @ before.double() @ v).norm()
    changed = svd.s[:r].norm()
    return float(changed / before_norm) if before_norm > 0 else float("inf")


def phi(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Similarities (I, J) of the subspaces of the first i columns of a and j of b, i, j from 1.

    phi(i, j) = ||a_i^T b_j||_F^2 / min(i, j), from 0 (orthogonal) to 1 (one holds the other)
    (2106.09685, 7.2); two random ones of R^d have max(i, j) / d on average. Columns (d, I) and
    (d, J) are orthonormal.
    """
    sums = (a.t() @ b).square().cumsum(0).cumsum(1)
    i = torch.arange(1, sums.shape[0] + 1, dtype=sums.dtype)[:, None]
    j = torch.arange(1, sums.shape[1] + 1, dtype=sums.dtype)[None]
    return sums / torch.minimum(i, j)
