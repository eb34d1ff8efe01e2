"""The cached decomposition, against NumPy's float64 SVD and a cache that is broken on purpose."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.methods import svd
from harness.methods.svd import resolve_rank, svd_factors, truncated_factors

torch.set_num_threads(1)


def matrix(rows=12, columns=20, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64).to(dtype)


def cache_files(root) -> list[Path]:
    return sorted((Path(root) / "svd").iterdir())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_factors_match_numpy(shape, dtype):
    weight = matrix(*shape, dtype=dtype)
    u, s, vh = svd_factors(weight)
    p = min(shape)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], p), (p,), (p, shape[1]))
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-7
    np.testing.assert_allclose(s.double().numpy(), expected, rtol=tolerance)
    rebuilt = (u.double() * s.double()) @ vh.double()
    assert (rebuilt - weight.double()).abs().max() < 10 * tolerance * expected[0]


def test_sign_convention_makes_the_peak_of_each_column_of_u_positive():
    u, _, _ = svd_factors(matrix(30, 17))
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()
    # W and -W share U up to sign, so the convention must give both the same U, and Vh negated.
    u_minus, _, vh_minus = svd_factors(-matrix(30, 17))
    torch.testing.assert_close(u_minus, u, rtol=0, atol=1e-6)
    torch.testing.assert_close(vh_minus, -svd_factors(matrix(30, 17))[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_rank_k_error_is_the_tail_of_the_singular_values(k):
    weight = matrix(12, 20)
    u, d, v = truncated_factors(weight, stored_in_out=False, rank=k)
    error = np.linalg.norm((weight.double() - (u.double() * d.double()) @ v.double().T).numpy())
    tail = np.linalg.svd(weight.double().numpy(), compute_uv=False)[k:]
    assert error == pytest.approx(np.sqrt((tail**2).sum()), rel=1e-6)


def test_a_transposed_weight_gives_swapped_factors_of_the_same_decomposition():
    weight = matrix(12, 20)
    u, d, v = truncated_factors(weight, stored_in_out=True, rank=3)
    assert (u.shape, d.shape, v.shape) == ((20, 3), (3,), (12, 3))
    torch.testing.assert_close(truncated_factors(weight, stored_in_out=False, rank=3), (v, d, u))


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_energy_keeps_the_fewest_triplets_that_reach_it(energy, which):
    weight = matrix(12, 20)
    _, d, _ = truncated_factors(weight, stored_in_out=False, rank=None, energy=energy, which=which)
    squares = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
    squares = squares if which == "top" else squares[::-1]
    k = d.numel()
    assert squares[:k].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: k - 1].sum() < energy * squares.sum()


def test_energy_of_one_keeps_everything():
    weight = matrix(12, 20)
    factors = truncated_factors(weight, stored_in_out=False, rank=None, energy=1.0)
    assert factors[1].numel() == 12


def test_which_selects_the_triplets():
    weight = matrix(12, 20)
    _, s, _ = svd_factors(weight)

    def kept(which, **kwargs):
        return truncated_factors(weight, stored_in_out=False, rank=4, which=which, **kwargs)[1]

    assert torch.equal(kept("top"), s[:4])
    assert torch.equal(kept("bottom"), s[-4:])
    drawn = kept("random", seed=1, key="h.0.attn")
    assert torch.equal(drawn, kept("random", seed=1, key="h.0.attn"))
    others = [kept("random", seed=2, key="h.0.attn"), kept("random", seed=1, key="h.1.attn")]
    assert not any(torch.equal(drawn, other) for other in others)
    assert torch.isin(drawn, s).all() and drawn.unique().numel() == 4


@pytest.mark.parametrize(
    ("rank", "k"), [(1, 1), (100, 100), ("full", 100), (0.29, 29), (0.001, 1), (0.999, 100)]
)
def test_resolve_rank(rank, k):
    assert resolve_rank(rank, 100, "w") == k


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (101, "largest usable rank is 100"),
        (0, "rank=1"),
        (-3, "rank=1"),
        (8.0, "rank=8"),
        (1.0, "rank='full'"),
        (float("nan"), "rank='full'"),
        ("all", "rank='full'"),
        (True, "rank='full'"),
    ],
)
def test_bad_ranks_name_the_nearest_choice(rank, said):
    with pytest.raises(ValueError, match=said) as raised:
        resolve_rank(rank, 100, "w")
    assert repr(rank) in str(raised.value)


def test_bad_weights_are_refused():
    with pytest.raises(TypeError, match="int8"):
        svd_factors(torch.ones(3, 3, dtype=torch.int8))
    with pytest.raises(TypeError, match="matrix"):
        svd_factors(torch.ones(3))
    with pytest.raises(ValueError, match="no singular values"):
        svd_factors(torch.ones(0, 3))
    with pytest.raises(ValueError, match="NaN"):
        svd_factors(torch.full((3, 3), float("nan")))


def test_meta_weights_give_shapes_and_refuse_energy():
    weight = torch.empty(12, 20, device="meta", dtype=torch.bfloat16)
    before = svd.svd_counts()
    u, d, v = truncated_factors(weight, stored_in_out=False, rank=5, which="random")
    assert svd.svd_counts() == before
    assert (u.shape, d.shape, v.shape) == ((12, 5), (5,), (20, 5))
    assert u.is_meta and d.is_meta and v.is_meta
    with pytest.raises(ValueError, match=r"energy=0.9 needs the singular values of h\.0"):
        truncated_factors(weight, stored_in_out=False, rank=None, energy=0.9, key="h.0")


# --------------------------------------------------------------------------- the cache


def test_cache_is_read_back_bit_for_bit_and_counted(tmp_path):
    weight = matrix()
    counts, seconds = svd.svd_counts(), svd.svd_seconds()
    first = svd_factors(weight, tmp_path)
    second = svd_factors(weight.clone(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert svd.svd_counts() == {
        "computed": counts["computed"] + 1,
        "read": counts["read"] + 1,
    }
    assert svd.svd_seconds() > seconds
    assert len(cache_files(tmp_path)) == 1


def test_factors_that_other_threads_have_rounded_are_not_read(tmp_path):
    """One run's numbers must not hang on which other run came to the cache first."""
    svd_factors(matrix(), tmp_path)
    torch.set_num_threads(2)
    try:
        counts = svd.svd_counts()
        svd_factors(matrix(), tmp_path)
    finally:
        torch.set_num_threads(1)
    assert svd.svd_counts()["computed"] == counts["computed"] + 1
    assert len(cache_files(tmp_path)) == 2


def test_cache_directory_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(svd.CACHE_ENV, str(tmp_path))
    svd_factors(matrix())
    assert len(cache_files(tmp_path)) == 1


def test_no_cache_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    svd_factors(matrix())
    monkeypatch.setenv(svd.CACHE_ENV, "")
    svd_factors(matrix())
    assert list(tmp_path.iterdir()) == []


def test_cache_key_is_the_content(tmp_path):
    weight = matrix()
    changed = weight.clone()
    changed[3, 4] += 1e-3
    for other in (weight, changed, weight.reshape(20, 12), weight.double(), weight.t()):
        svd_factors(other, tmp_path)
    assert len(cache_files(tmp_path)) == 5
    svd_factors(torch.nn.Parameter(weight), tmp_path)
    assert len(cache_files(tmp_path)) == 5


def test_every_rank_reads_the_same_factors(tmp_path):
    weight = matrix()
    before = svd.svd_counts()["computed"]
    kept = [
        truncated_factors(weight, stored_in_out=False, rank=k, cache_dir=tmp_path)
        for k in (2, 6, "full")
    ]
    assert svd.svd_counts()["computed"] == before + 1
    for u, d, v in kept[:2]:
        k = d.numel()
        full_u, full_d, full_v = kept[2]
        assert torch.equal(u, full_u[:, :k]) and torch.equal(d, full_d[:k])
        assert torch.equal(v, full_v[:, :k])


def truncate_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def other_file(path):
    from safetensors.torch import save_file

    save_file({"u": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [truncate_half, flip_a_bit, empty, other_file])
def test_a_damaged_cache_file_is_computed_again_and_replaced(tmp_path, damage):
    weight = matrix()
    good = svd_factors(weight, tmp_path)
    (path,) = cache_files(tmp_path)
    damage(path)
    before = svd.svd_counts()["computed"]
    with pytest.warns(UserWarning, match="computing it again"):
        again = svd_factors(weight, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(good, again, strict=True))
    assert svd.svd_counts()["computed"] == before + 1
    svd_factors(weight, tmp_path)
    assert svd.svd_counts()["computed"] == before + 1


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="could not be written"):
        factors = svd_factors(matrix(), tmp_path / "file")
    assert torch.equal(factors[1], svd_factors(matrix())[1])


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(svd, "save_file", full_disk)
    with pytest.warns(UserWarning, match="No space left"):
        svd_factors(matrix(), tmp_path)
    assert cache_files(tmp_path) == []


# The file is run by itself, without the package, whose import would take most of the test's time.
WRITER = """
import runpy, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
svd_factors = runpy.run_path(sys.argv[1])["svd_factors"]
weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
for _ in range(40):
    factors = svd_factors(weight, sys.argv[2])
    for path in (Path(sys.argv[2]) / "svd").glob("*.safetensors"):
        path.unlink(missing_ok=True)
print([factor.double().sum().item().hex() for factor in factors])
"""


def test_processes_share_a_cache_without_ever_reading_half_a_file(tmp_path):
    """Two processes write, read and delete the same file at once; a torn read would raise."""
    command = [sys.executable, "-c", WRITER, svd.__file__, str(tmp_path)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [worker.communicate(timeout=90) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert not [file for file in cache_files(tmp_path) if file.name.startswith(".")]
