"""Singular value decomposition of a base weight: once per content, cached for the whole sweep.

    W = U diag(S) Vh        W (m, n), U (m, p), S (p,) descending, Vh (p, n), p = min(m, n)

Legend: m rows and n columns of the weight as it is stored, p = min(m, n), k the number of triplets
kept. The decomposition runs in float64 on the CPU, whatever the weight's dtype and device, and is
rounded once to float32 (float64 for a float64 weight): the last bits of LAPACK's answer move with
the thread count and the build, and the rounding hides nearly all of that, which is what lets an
adapter be saved without its factors and rebuilt later.

Sign convention: the entry of largest magnitude in each column of U (the first one on a tie) is
positive; the matching row of Vh carries the sign.

The cache holds one safetensors file per weight content,
`<cache>/svd/<sha256 of dtype, shape and bytes>.safetensors`, with all p triplets, so that every
rank k is a slice of the same factors. Its size is 4 p (m + n + 1) bytes for a float32 weight.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import math
import os
import time
import warnings
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

CACHE_ENV = "HARNESS_CACHE"
WHICH = ("top", "bottom", "random")
UNDETERMINED = 1e-7  # of the largest singular value; see `are_determined`

_FORMAT = "harness-svd-1"
_counters = {"seconds": 0.0, "computed": 0, "read": 0}


def svd_seconds() -> float:
    """Return the wall seconds this process has spent in `svd_factors`, cache reads included."""
    return _counters["seconds"]


def svd_counts() -> dict[str, int]:
    """Return how many decompositions this process has computed and how many it read from disk."""
    return {"computed": int(_counters["computed"]), "read": int(_counters["read"])}


def svd_factors(
    weight: torch.Tensor, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (m, p), S (p,) and Vh (p, n) of a weight (m, n), from the cache where it has them.

    The factors are contiguous, on the CPU, in float32 (float64 for a float64 weight). A meta weight
    gives meta factors of the same shapes, without a decomposition. Any process may read and write
    the same cache at the same time: a file appears whole (temporary file, then `os.replace`) and
    carries a checksum, and one that is damaged is computed again and replaced. Factors that another
    number of threads has computed are others.

    Args:
        weight: the matrix as it is stored; the caller swaps the factors of a transposed one.
        cache_dir: root of the cache; None reads the environment variable HARNESS_CACHE, and no
            value there means no cache.

    Raises:
        TypeError: the weight is not a floating-point matrix (a quantized one, for example).
        ValueError: the weight is not finite or has no elements.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TypeError(
            f"a weight of shape {tuple(weight.shape)} and dtype {weight.dtype} has no SVD here; "
            "expected a floating-point matrix (load the model unquantized)"
        )
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no singular values")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = weight.shape
    p = min(rows, columns)
    if weight.is_meta:
        shapes = ((rows, p), (p,), (p, columns))
        u, s, vh = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        return u, s, vh

    start = time.perf_counter()
    try:
        weight = weight.detach().cpu().contiguous()
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"a weight of shape {(rows, columns)} holds NaN or infinity; expected finite values"
            )
        path = _cache_path(weight, cache_dir)
        factors = _read(path, rows, columns, dtype) if path else None
        if factors is None:
            factors = _decompose(weight, dtype)
            _counters["computed"] += 1
            if path:
                _write(path, factors)
        else:
            _counters["read"] += 1
        return factors
    finally:
        _counters["seconds"] += time.perf_counter() - start


def cached_factors(
    weight: torch.Tensor, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return what `svd_factors` would, if the cache has it: nothing is decomposed."""
    weight = weight.detach().cpu().contiguous()
    path = _cache_path(weight, cache_dir)
    rows, columns = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return _read(path, rows, columns, dtype) if path else None


def truncated_factors(
    weight: torch.Tensor,
    *,
    stored_in_out: bool,
    rank: float | str | None = "full",
    energy: float | None = None,
    which: str = "top",
    seed: int = 0,
    key: str = "weight",
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (out, k), D (k,) and V (in, k) with W_out_in ~= U diag(D) V^T.

    Args:
        weight: the stored matrix: (in, out) if `stored_in_out` (Conv1D, Embedding), else (out, in).
        rank: how many triplets: an integer, a fraction of min(m, n) or "full"; see `resolve_rank`.
        energy: instead of `rank`, the share of the squared singular values to keep: the smallest k
            whose triplets, taken in the order of `which`, reach it.
        which: "top", "bottom" or "random" triplets. Random ones are drawn from `seed` and `key`,
            so that each matrix has its own draw and a reloaded adapter finds the same.
        key: the module's name, for `which="random"` and for messages.

    Raises:
        ValueError: a rank that does not fit, or `energy` for a weight on the meta device, whose
            singular values are not known.
    """
    return select_triplets(
        weight,
        stored_in_out=stored_in_out,
        rank=rank,
        energy=energy,
        which=which,
        seed=seed,
        key=key,
        cache_dir=cache_dir,
    )[0]


def select_triplets(
    weight: torch.Tensor,
    *,
    stored_in_out: bool,
    rank: float | str | None,
    energy: float | None,
    which: str,
    seed: int,
    key: str,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], bool]:
    """Return the factors of `truncated_factors`, and whether the weight determines them.

    See `are_determined`; factors that are not have to be saved with an adapter.
    """
    p = min(weight.shape)
    if energy is not None and weight.is_meta:
        raise ValueError(
            f"energy={energy} needs the singular values of {key}, whose weight is on the meta "
            f"device; expected a rank there (an integer up to {p}, a fraction or 'full')"
        )
    k = p if energy is not None else resolve_rank(rank, p, key)
    left, s, right_t = svd_factors(weight, cache_dir)
    order = _triplet_order(p, which, seed, key)
    if energy is not None:
        kept = s[order].double().square().cumsum(0)
        reached = torch.searchsorted(kept, energy * kept[-1])
        k = min(int(reached) + 1, p)
    # Ascending indices: D is in descending order whichever triplets were chosen.
    chosen = order[:k].sort().values.to(s.device)
    u, v = (right_t.t(), left) if stored_in_out else (left, right_t.t())
    factors = (u[:, chosen].contiguous(), s[chosen].contiguous(), v[:, chosen].contiguous())
    return factors, weight.is_meta or are_determined(s, chosen)


def are_determined(s: torch.Tensor, chosen: torch.Tensor) -> bool:
    """Whether the weight alone fixes the singular vectors of the triplets at `chosen` (k,).

    It does not for a singular value of zero, or for two that are equal: any rotation of their
    vectors fits, and LAPACK returns another one with another number of threads. Both are judged to
    UNDETERMINED times the largest value: a gap g turns the vectors by about eps(float64) S_1 / g
    (Wedin's theorem), which stays below float32's rounding above that.

    Args:
        s: all singular values of the weight, (p,), descending.
    """
    limit = UNDETERMINED * float(s[0])
    close = s[:-1] - s[1:] <= limit  # (p - 1,): value i and the next one
    unclear = s <= limit
    unclear[:-1] |= close
    unclear[1:] |= close
    return not bool(unclear[chosen].any())


def resolve_rank(rank: float | str | None, p: int, key: str) -> int:
    """Return the number of triplets k that `rank` means for a matrix with min(m, n) = p.

    An integer is itself, "full" is p, a fraction is the nearest integer to fraction * p and at
    least 1.

    Raises:
        ValueError: k is above p.
    """
    check_rank(rank, "rank")
    if rank == "full":
        return p
    assert rank is not None  # as check_rank has seen
    k = max(1, round(rank * p)) if isinstance(rank, float) else int(rank)
    if k > p:
        raise ValueError(
            f"rank={rank} is above min(m, n) = {p} of {key}; expected 1 to {p}, a fraction in "
            f"(0, 1) or 'full'; the largest usable rank is {p}"
        )
    return k


def check_rank(rank: object, label: str) -> None:
    """Raise ValueError unless `rank` is a positive integer, a fraction in (0, 1) or "full"."""
    if rank == "full":
        return
    nearest = "'full'"
    if isinstance(rank, int) and not isinstance(rank, bool):
        if rank >= 1:
            return
        nearest = "1"
    elif isinstance(rank, float):
        if 0.0 < rank < 1.0:
            return
        if math.isfinite(rank) and rank != 1.0:
            nearest = str(max(1, round(rank)))
    raise ValueError(
        f"{label}={rank!r} is not a rank; expected a positive integer, a fraction strictly between "
        f"0 and 1, or 'full'; the nearest valid choice is {label}={nearest}"
    )


def check_rank_or_energy(rank: object, energy: float | None) -> None:
    """Raise ValueError unless one of the two is given and valid and the other is None."""
    if energy is None:
        check_rank(rank, "rank")
    elif rank is not None:
        raise ValueError(f"rank={rank!r} and energy={energy} are alternatives; expected only one")
    elif not 0.0 < energy <= 1.0:
        raise ValueError(
            f"energy={energy} is not a share; expected more than 0 and at most 1; the nearest "
            f"valid choice is {'1.0' if energy > 1.0 else 'a share just above 0, or rank=1'}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}={value!r} is unknown; expected one of {', '.join(choices)}; the nearest is "
            f"{nearest!r}"
        )


def _triplet_order(p: int, which: str, seed: int, key: str) -> torch.Tensor:
    """Return the p triplet indices (p,) in the order in which they are kept."""
    if which == "top":
        return torch.arange(p)
    if which == "bottom":
        return torch.arange(p - 1, -1, -1)
    check_choice("which", which, WHICH)
    # crc32, because Python's own hash of a string changes from process to process.
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.randperm(p, generator=draw)


def _decompose(
    weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose in float64, fix the signs, round once to `dtype`."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]  # (p,)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u.dtype)
    u, vh = u * signs, vh * signs[:, None]
    return u.to(dtype).contiguous(), s.to(dtype).contiguous(), vh.to(dtype).contiguous()


def _cache_path(weight: torch.Tensor, cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The file of this weight's content and torch's threads; None without a cache."""
    root = cache_dir if cache_dir is not None else os.environ.get(CACHE_ENV)
    if not root:
        return None
    # LAPACK rounds otherwise with another number of threads, and a run's numbers with it.
    kind = f"{_FORMAT} {weight.dtype} {tuple(weight.shape)} {torch.get_num_threads()} threads"
    digest = hashlib.sha256(kind.encode())
    digest.update(_bytes(weight))
    return Path(root).expanduser() / "svd" / f"{digest.hexdigest()}.safetensors"


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory (NumPy has no bfloat16, hence the uint8 view)."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the SHA-256 of the factors' bytes as a uint8 tensor (32,)."""
    digest = hashlib.sha256()
    for factor in factors:
        digest.update(_bytes(factor))
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _read(
    path: Path, rows: int, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return the factors in a cache file, or None if it is absent, or damaged (with a warning)."""
    p = min(rows, columns)
    try:
        # One read of one open file: a memory map would open the path again, by then another file.
        tensors = load(path.read_bytes())
        u, s, vh, checksum = (tensors[name] for name in ("u", "s", "vh", "checksum"))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        warnings.warn(
            f"the SVD cache file {path} is damaged ({error!r}); computing it again", stacklevel=2
        )
        return None
    whole = (
        (u.shape, s.shape, vh.shape) == ((rows, p), (p,), (p, columns))
        and {u.dtype, s.dtype, vh.dtype} == {dtype}
        and torch.equal(checksum, _checksum((u, s, vh)))
    )
    if not whole:
        warnings.warn(
            f"the SVD cache file {path} fails its checksum; computing it again", stacklevel=2
        )
        return None
    return u, s, vh


def _write(path: Path, factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Put the factors at `path` in one step; a disk that refuses costs a warning, not the run."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = dict(zip(("u", "s", "vh"), factors, strict=True))
        save_file(tensors | {"checksum": _checksum(factors)}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the SVD cache file {path} could not be written ({error}); going on", stacklevel=2
        )
        with contextlib.suppress(OSError):
            temporary.unlink()
