"""Updates planted in weights, and what is measured of them; oracles: PEFT, LAPACK, closed forms."""

import copy
import dataclasses
import math

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from peft.tuners.lora import intruders as peft_intruders
from planted_updates import drawn, moved, pair_of
from transformers import AutoConfig, AutoModelForCausalLM

from harness.artifacts.anatomy import functions, settings, spectra, survey, updates
from harness.config.errors import ConfigError
from harness.methods import svd, weight_tying

SETTINGS = settings.read(["function_tokens=0"])


def orthonormal(rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64))[0]


def changes(base, adapted):
    return {update.name: update for update in updates.changed(pair_of(base, adapted))}


# ----------------------------------------------------------------------------- one matrix


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_factors_are_lapacks(shape):
    matrix = drawn(*shape)
    u, s, v = spectra.factors(matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix))
    torch.testing.assert_close((u * s) @ v.t(), matrix)
    for side in (u, v):
        torch.testing.assert_close(side.t() @ side, torch.eye(20, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_the_first_factors_alone_are_the_first_of_all(shape):
    matrix = drawn(*shape)
    u, s, v = spectra.factors(matrix, 5)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix))
    assert u.shape == (shape[0], 5) and v.shape == (shape[1], 5)
    nearest = spectra.factors(matrix)
    torch.testing.assert_close(
        (u * s[:5]) @ v.t(), (nearest.u * nearest.s)[:, :5] @ nearest.v[:, :5].t()
    )


@pytest.mark.parametrize("shape", [(20, 90), (90, 20)])
def test_a_matrix_that_is_read_a_part_at_a_time_has_the_same_factors(shape, monkeypatch):
    """Embeddings are many times as long as they are wide: float64 copies of them are large."""
    matrix = drawn(*shape)
    monkeypatch.setattr(spectra, "COLUMNS", 7)
    u, s, v = spectra.factors(matrix.float())
    torch.testing.assert_close((u * s) @ v.t(), matrix.float().double())
    for k in (5, None):
        wanted = torch.linalg.svd(matrix, full_matrices=False).U[:, :k]
        same = (spectra.left_vectors(matrix, k).t() @ wanted).abs()
        torch.testing.assert_close(same, torch.eye(len(same), dtype=torch.float64))
    before, after = matrix.float(), matrix.float() + 1e-3 * drawn(*shape, seed=1).float()
    parts = updates.Update("w", "", None, before, after, False, torch.bfloat16)
    noise = parts.rounding, parts.error
    monkeypatch.setattr(spectra, "COLUMNS", 8192)
    assert noise == pytest.approx((parts.rounding, parts.error), rel=1e-12)


def test_a_planted_rank_is_found_above_the_rounding_of_fp32():
    values = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    delta = (orthonormal(40, 3) * values) @ orthonormal(24, 3, 1).t() * 1e-3
    before = drawn(40, 24, seed=2).float()
    update = updates.Update(
        "w", "q", 0, before, (before.double() + delta).float(), False, torch.float32
    )
    found = spectra.spectrum(spectra.factors(update.delta).s, (40, 24), update.error)
    assert (found.rank, found.full_rank, found.r90) == (3, 24, 2)
    assert found.stable_rank == pytest.approx(21 / 16, rel=1e-4)
    share = values / 7
    assert found.effective_rank == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-2)
    noise = (update.after.double() - before.double() - delta).norm()
    assert float(noise) == pytest.approx(update.error, rel=0.15)


def test_equal_singular_values_have_their_number_as_every_rank():
    s = torch.tensor([3.0] * 10 + [0.0] * 6)
    found = spectra.spectrum(s, (16, 16), 0.0)
    assert (found.rank, found.r90) == (10, 9)
    assert found.effective_rank == pytest.approx(10) and found.stable_rank == pytest.approx(10)


def test_numbers_do_not_depend_on_rotations_of_inputs_and_outputs():
    w, delta = drawn(30, 20), 0.3 * drawn(30, 20, seed=1)
    left, right = orthonormal(30, 30, 2), orthonormal(20, 20, 3)

    def measured(w, delta):
        found = spectra.factors(delta)
        spectrum = spectra.spectrum(found.s, (30, 20), 0.0)
        intruders = spectra.intruders(spectra.factors(w).u, w + delta, 10, 0.5)
        amplified = spectra.amplification(w, found, 4)
        return [*dataclasses.astuple(spectrum), intruders, amplified]

    turned = measured(left @ w @ right, left @ delta @ right)
    assert turned == pytest.approx(measured(w, delta))


def test_planted_intruders_are_counted_and_no_others():
    u, v = orthonormal(32, 32), orthonormal(32, 32, 1)
    s = torch.linspace(2, 1, 20, dtype=torch.float64)
    w = (u[:, :20] * s) @ v[:, :20].t()  # 12 directions of the output are unused
    base_u = u[:, :20]
    new = (u[:, 20:23] * 10) @ v[:, 20:23].t()
    assert spectra.intruders(base_u, w + new, 10, 0.5) == 3
    assert spectra.intruders(base_u, w + new, 2, 0.5) == 2
    assert spectra.intruders(base_u, w + 0.5 * w, 10, 0.5) == 0  # the same directions, larger
    small = (u[:, 20:23] * 0.1) @ v[:, 20:23].t()
    assert spectra.intruders(base_u, w + small, 10, 0.5) == 0  # not among the first ten
    mixed = (0.6 * u[:, :1] + 0.8 * u[:, 21:22]) * 100 @ v[:, 21:22].t()
    assert spectra.intruders(base_u, w + mixed, 1, 0.5) == 0
    assert spectra.intruders(base_u, w + mixed, 1, 0.7) == 1


@pytest.mark.parametrize("conv1d", [False, True])
def test_intruders_are_those_of_pefts_own_code(tiny, conv1d):
    """PEFT takes the weight as it is stored: of Conv1D its singular vectors are on the input."""
    if conv1d:
        base, name = tiny, "mlp.c_fc"
    else:
        config = AutoConfig.for_model(
            "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
            initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(0)
        base, name = AutoModelForCausalLM.from_config(config), "mlp.up_proj"
    lora = peft.LoraConfig(r=4, target_modules=[name], fan_in_fan_out=conv1d)
    adapted = peft.get_peft_model(copy.deepcopy(base), lora)
    with torch.no_grad():
        for i, (key, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in key:
                parameter.copy_(drawn(*parameter.shape, seed=i))
    said = []
    peft_intruders.reduce_intruder_dimension(
        copy.deepcopy(adapted), top_k=10, threshold_epsilon=0.5, logging_sink=said.append
    )
    theirs = [int(line.rpartition(" ")[2]) if "No " not in line else 0 for line in said[:2]]
    ours = []
    for update in changes(base, adapted.merge_and_unload()).values():
        before, after = update.before, update.after
        if conv1d:
            before, after = before.t(), after.t()
        ours.append(spectra.intruders(spectra.factors(before).u, after, 10, 0.5))
    assert ours == theirs and sum(ours) > 0


def test_a_scaled_first_triplet_is_amplified_by_its_scale():
    w = drawn(30, 20)
    u, s, v = spectra.factors(w)
    delta = 7 * s[0] * torch.outer(u[:, 0], v[:, 0])
    assert spectra.amplification(w, spectra.factors(delta), 1) == pytest.approx(7)
    last = 7 * s[-1] * torch.outer(u[:, -1], v[:, -1])
    assert spectra.amplification(w, spectra.factors(last), 1) == pytest.approx(7)
    apart = torch.outer(u[:, 0], v[:, 1])
    assert spectra.amplification(w, spectra.factors(apart), 1) > 1e6


def test_phi_is_one_within_a_subspace_and_nothing_across():
    basis = orthonormal(64, 12)
    a = basis[:, :4]
    turned = a @ orthonormal(4, 4, 1)  # the same subspace, other vectors of it
    assert spectra.phi(a, turned)[3, 3] == pytest.approx(1)
    torch.testing.assert_close(spectra.phi(a, a).diagonal(), torch.ones(4, dtype=torch.float64))
    assert float(spectra.phi(a, basis[:, 4:8]).max()) < 1e-20
    assert spectra.phi(a, basis)[3, 11] == pytest.approx(1)  # holds it
    half = torch.stack([basis[:, 0], basis[:, 8]], 1)
    assert spectra.phi(a, half)[1, 1] == pytest.approx(0.5)
    by_chance = [
        float(spectra.phi(orthonormal(64, 8, s), orthonormal(64, 4, s + 99))[7, 3])
        for s in range(200)
    ]
    assert np.mean(by_chance) == pytest.approx(8 / 64, rel=0.1)


def test_base_directions_come_from_the_cache_where_it_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv(svd.CACHE_ENV, str(tmp_path))
    w = drawn(30, 20).float()  # as y = W x; stored as W^T
    computed = spectra.base_left(w, True)
    assert not list(tmp_path.rglob("*.safetensors"))
    svd.svd_factors(w.t().contiguous())
    monkeypatch.setattr(spectra, "left_vectors", None)
    cached = spectra.base_left(w, True)
    same = (cached.t() @ computed).abs()
    torch.testing.assert_close(same, torch.eye(20, dtype=torch.float64), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- models


def test_q_k_and_v_are_apart_and_oriented_as_outputs_by_inputs(tiny):
    found = changes(tiny, moved(tiny))
    names = [name for name in found if name.startswith("transformer.h.1.attn.c_attn.weight")]
    assert [name.rpartition(".")[2] for name in names] == ["q", "k", "v"]
    x = drawn(5, 32).float()
    attention = tiny.transformer.h[1].attn
    fused = attention.c_attn(x) - attention.c_attn.bias
    for name, expected in zip(names, fused.split(32, dim=-1), strict=True):
        torch.testing.assert_close(x @ found[name].before.t(), expected)
        assert found[name].layer == 1 and found[name].kind == name[-1]
    inner = found["transformer.h.0.mlp.c_fc.weight"]
    assert inner.before.shape == (128, 32) and inner.kind == "mlp_in"


def test_a_change_of_v_alone_is_a_change_of_no_other_weight(tiny):
    adapted = copy.deepcopy(tiny)
    with torch.no_grad():
        adapted.transformer.h[0].attn.c_attn.weight[:, 64:] += 1
    assert [u.kind for u in changes(tiny, adapted).values()] == ["v"]


def test_every_kind_of_weight_is_told_and_a_tied_one_counts_once(tiny):
    found = changes(tiny, moved(tiny))
    kinds = {}
    for update in found.values():
        kinds[update.kind] = kinds.get(update.kind, 0) + update.before.numel()
    assert kinds == {
        "embeddings": 64 * 32, "positions": 32 * 32, "norms": 5 * 2 * 32,
        "q": 2 * 1024, "k": 2 * 1024, "v": 2 * 1024, "o": 2 * 1024,
        "mlp_in": 2 * 4096, "mlp_out": 2 * 4096, "biases": 2 * (96 + 32 + 128 + 32),
    }  # fmt: skip
    assert sum(kinds.values()) == sum(p.numel() for p in tiny.parameters())
    rows, _ = survey.measure(pair_of(tiny, moved(tiny)), SETTINGS)
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_lora_on_tied_embeddings_is_a_change_of_the_embeddings_alone(tiny):
    lora = peft.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(tiny), lora)
    delta = adapted.get_submodule("base_model.model.transformer.wte").get_delta_weight("default")
    (update,) = changes(tiny, weight_tying.merged(adapted)).values()
    assert update.kind == "embeddings"
    torch.testing.assert_close(update.delta.t().float(), delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_neox", "bloom", "persimmon", "phi3", "mpt"])
def test_fused_projections_of_other_architectures_are_taken_apart(kind):
    """What each of q, k and v multiplies: hooks on the model's own attention say."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "vocab_size": 64, "intermediate_size": 64}  # fmt: skip
    own = {
        "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64},
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 64},
        "phi3": sizes | {"num_key_value_heads": 2, "pad_token_id": 0},
    }
    config = AutoConfig.for_model(kind, **own.get(kind, sizes))
    model = AutoModelForCausalLM.from_config(config).eval()
    found = [u for u in changes(model, moved(model)).values() if u.kind in "qkv"]
    assert [u.kind for u in found] == ["q", "k", "v"]
    assert [len(u.before) for u in found] == ([32, 16, 16] if kind == "phi3" else [32, 32, 32])
    (name,) = {u.name.rpartition(".weight")[0] for u in found}
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        # Without a value's matrix (and bias) attention adds nothing that depends on q and k.
        module = model.get_submodule(name)
        rows = updates.parts("qkv", module.weight, config)[2][1]
        module.weight[rows] = 0
        if module.bias is not None:
            module.bias[rows] = 0
        without = model(ids).logits
        rest = torch.ones(len(module.weight), dtype=torch.bool)
        rest[rows] = False
        module.weight[rest] = drawn(*module.weight[rest].shape, seed=9).float()
        torch.testing.assert_close(model(ids).logits, without)
    assert not torch.equal(before, without)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_change_of_a_merged_adapter_is_the_adapters_own(tiny, rank):
    lora = peft.LoraConfig(
        r=rank, target_modules=["c_attn", "mlp.c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(copy.deepcopy(tiny), lora)
    own = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = changes(tiny, adapted.merge_and_unload())
    for name, delta in own.items():
        ours = [u for key, u in found.items() if key.startswith(f"{name}.weight")]
        torch.testing.assert_close(
            torch.cat([u.delta for u in ours]).t(), delta, atol=1e-6, rtol=1e-5
        )
        for u in ours:
            s = spectra.factors(u.delta).s
            assert spectra.spectrum(s, u.before.shape, u.error).rank == rank


def test_a_base_in_bf16_has_a_noise_floor_of_its_steps(tiny):
    base = copy.deepcopy(tiny).to(torch.bfloat16)
    adapted = moved(copy.deepcopy(base).float(), scale=1e-4)
    update = changes(base, adapted)["transformer.h.0.mlp.c_fc.weight"]
    assert update.dtype == torch.bfloat16
    exact = tiny.transformer.h[0].mlp.c_fc.weight.detach()
    rounded = (exact.bfloat16().double() - exact.double()).norm()
    assert update.rounding == pytest.approx(float(rounded), rel=0.1)
    assert update.delta.norm() < update.rounding  # smaller than what bf16 would keep of it
    fp32 = changes(tiny, moved(tiny, scale=1e-4))["transformer.h.0.mlp.c_fc.weight"]
    assert fp32.delta.norm() > 1e3 * fp32.rounding


def test_nothing_is_left_of_an_unchanged_model(tiny):
    assert changes(tiny, tiny) == {}


def test_a_weight_that_is_not_finite_is_refused(tiny):
    broken = moved(tiny)
    with torch.no_grad():
        broken.transformer.wpe.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"wpe\.weight .* not finite"):
        changes(tiny, broken)


# ----------------------------------------------------------------------------- functions


def test_layers_before_a_change_put_out_what_they_did(tiny):
    adapted = moved(tiny, "transformer.h.1.mlp.c_fc.weight", scale=0.5)
    found = functions.distances(tiny, adapted, [torch.arange(24).view(2, 12)])
    assert [d.layer for d in found] == [0, 1, 2]
    assert [d.relative_change for d in found[:2]] == [0, 0]
    assert [d.cka for d in found[:2]] == pytest.approx([1, 1])
    assert found[2].relative_change > 0.01 and found[2].cka < 0.999


def test_sums_over_batches_are_cka_and_change_of_all_tokens():
    x, y = drawn(50, 6), drawn(50, 6, seed=1) + 3
    sums = functions.Sums()
    for part in range(0, 50, 20):
        sums.add(x[part : part + 20], y[part : part + 20])
    found = sums.distance(0)
    a, b = x - x.mean(0), y - y.mean(0)
    gram_a, gram_b = a @ a.t(), b @ b.t()
    expected = (gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())  # by examples
    assert found.cka == pytest.approx(float(expected))
    assert found.relative_change == pytest.approx(float((y - x).norm() / x.norm()))
    turned = functions.Sums()
    turned.add(x, 5 * x @ orthonormal(6, 6) + 1)
    assert turned.distance(0).cka == pytest.approx(1)


# ----------------------------------------------------------------------------- runs


def test_overlap_compares_matrices_of_runs_on_one_base(tmp_path):
    u, v = orthonormal(32, 8), orthonormal(16, 8, 1)
    runs = {
        tmp_path / "a": ("one", {"w": (u[:, :4], v[:, :4]), "x": (u, v)}),
        tmp_path / "b": ("one", {"w": (u[:, 4:], v[:, :4])}),
        tmp_path / "c": ("another", {"w": (u, v)}),
    }
    table = pd.DataFrame(list(survey.overlaps(runs)))
    assert set(zip(table.run_a, table.run_b, table.weight, strict=True)) == {("a", "b", "w")}
    assert sorted(set(table.i)) == [1, 2, 4]
    assert table[table.side == "out"].phi.max() < 1e-20
    same = table[(table.side == "in") & (table.i == table.j)]
    assert same.phi.tolist() == pytest.approx([1] * 3)
    assert same.chance.tolist() == [1 / 16, 2 / 16, 4 / 16]


def test_settings_that_cannot_be_are_refused_by_name():
    assert (SETTINGS.intruder_k, SETTINGS.intruder_epsilon) == (10, 0.5)  # the paper's
    for override, said in {
        "intruder_k=0": "intruder_k=0: expected a whole number from 1 on",
        "intruder_epsilon=1.5": "expected a cosine between 0 and 1",
        "epsilon=0.5": "expected KEY=VALUE",
        "directions": "did you mean 'directions'",
    }.items():
        with pytest.raises(ConfigError, match=said):
            settings.read([override])


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 10.0])
def test_the_rank_of_a_lora_is_found_however_large_it_is_beside_the_weight(size):
    w = 0.05 * drawn(64, 48).float()
    delta = drawn(64, 4, seed=1).float() @ drawn(4, 48, seed=2).float()
    delta *= size * w.norm() / delta.norm()
    update = updates.Update("w", "q", 0, w, w + delta, False, torch.float32)
    found = spectra.spectrum(spectra.factors(update.delta).s, (64, 48), update.error)
    assert found.rank == 4
