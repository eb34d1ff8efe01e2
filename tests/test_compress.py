"""Low-rank parts of an update, adapters of them, and W + lambda dW: against LAPACK and PEFT."""

import copy

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from planted_updates import moved, pair_of
from transformers import AutoConfig, AutoModelForCausalLM

from harness.artifacts import compress, interpolate
from harness.artifacts.anatomy import curve, lowrank, updates
from harness.config.errors import ConfigError
from harness.report import stats
from harness.report.compression import perplexities

IDS = torch.arange(1, 25)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def lora_on(base, r, **options):
    config = peft.LoraConfig(
        r=r, target_modules=["c_attn", "mlp.c_fc"], fan_in_fan_out=True, init_lora_weights=False,
        **options,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(base), config)


def test_the_part_of_rank_k_is_the_nearest_matrix_of_that_rank(tiny):
    pair = pair_of(tiny, moved(tiny))
    found, beside = lowrank.decompose(pair)
    assert len(found) == 2 * 4 and all("h." not in name for name in beside if "ln_f" in name)
    for name, one in found.items():
        delta = pair.adapted.get_parameter(name).double() - pair.base.get_parameter(name).double()
        u, s, vh = torch.linalg.svd(delta)
        torch.testing.assert_close(one.s, s, atol=1e-6, rtol=1e-6)
        for k in (1, 5, len(s)):
            nearest = (u[:, :k] * s[:k]) @ vh[:k]
            torch.testing.assert_close(one.delta(k).double(), nearest, atol=2e-6, rtol=1e-4)


def test_full_rank_with_what_moved_beside_is_the_runs_model_and_without_it_is_not(tiny):
    pair = pair_of(tiny, moved(tiny))
    expected = logits(pair.adapted)
    found, beside = lowrank.decompose(pair)
    kept = {name: pair.adapted.get_parameter(name).detach().clone() for name in beside}
    full = lowrank.by_rank(found, "full")
    lowrank.write_into(pair.adapted, pair, found, full, kept)
    torch.testing.assert_close(logits(pair.adapted), expected, atol=1e-5, rtol=1e-4)
    lowrank.write_into(pair.adapted, pair, found, full, {})
    for name, parameter in pair.adapted.named_parameters():
        assert (name in found) != torch.equal(parameter, pair.base.get_parameter(name))
    assert not torch.allclose(logits(pair.adapted), expected, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_lora_of_rank_r_is_whole_at_k_equal_r_and_not_below(tiny, options):
    adapted = lora_on(tiny, 3, **options)
    expected = logits(adapted)
    pair = pair_of(tiny, adapted.merge_and_unload())
    found, beside = lowrank.decompose(pair)
    assert beside == [] and len(found) == 4
    whole = 3 if "use_dora" not in options else 32  # DoRA scales W too: dW has every rank
    lowrank.write_into(pair.adapted, pair, found, lowrank.by_rank(found, whole), {})
    torch.testing.assert_close(logits(pair.adapted), expected, atol=1e-4, rtol=1e-4)
    lowrank.write_into(pair.adapted, pair, found, lowrank.by_rank(found, 2), {})
    assert float((logits(pair.adapted) - expected).abs().max()) > 0.05


def test_energy_gives_every_matrix_the_smallest_rank_that_has_it(tiny):
    found, _ = lowrank.decompose(pair_of(tiny, moved(tiny)))
    ranks = lowrank.by_energy(found, 0.7)
    assert len(set(ranks.values())) > 1
    for name, k in ranks.items():
        energy = found[name].s.square()
        assert energy[:k].sum() >= 0.7 * energy.sum() > energy[: k - 1].sum()
    three, _ = lowrank.decompose(pair_of(tiny, lora_on(tiny, 3).merge_and_unload()))
    assert set(lowrank.by_energy(three, 1.0).values()) == {3}


@pytest.mark.parametrize("by", ["rank", "energy"])
def test_plain_peft_loads_the_adapter_as_the_same_model(tiny, tmp_path, by):
    base = tmp_path / "base"
    tiny.save_pretrained(base)
    pair = pair_of(tiny, moved(tiny))
    found, _ = lowrank.decompose(pair)
    ranks = lowrank.by_rank(found, 4) if by == "rank" else lowrank.by_energy(found, 0.7)
    lowrank.save(copy.deepcopy(tiny), found, ranks, tmp_path / "adapter", str(base), None)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    lowrank.write_into(pair.adapted, pair, found, ranks, {})
    torch.testing.assert_close(logits(loaded), logits(pair.adapted), atol=1e-5, rtol=1e-4)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert bool(config.rank_pattern) == (by == "energy")
    sizes = {name: p.numel() for name, p in loaded.named_parameters() if "lora_" in name}
    assert sum(sizes.values()) == sum(found[n].num_parameters(k) for n, k in ranks.items())


def test_a_rank_above_a_matrix_names_it_and_the_largest(tiny):
    found, _ = lowrank.decompose(pair_of(tiny, moved(tiny)))
    with pytest.raises(ConfigError, match=r"rank=33 is above min\(m, n\) = 32 of .*h\.0\.attn"):
        lowrank.by_rank(found, 33)


def test_ranks_shares_and_scales_that_are_none_are_refused():
    assert list(compress.parse_ranks("1, 8,full")) == [1, 8, "full"]
    assert list(interpolate.parse_scales("0,-0.5,1.25")) == [0, -0.5, 1.25]
    for parse, bad in (
        (compress.parse_ranks, "0"), (compress.parse_ranks, "1.5"), (compress.parse_ranks, "all"),
        (compress.parse_shares, "1.1"), (compress.parse_shares, "0"), (compress.parse_shares, "x"),
        (interpolate.parse_scales, "nan"), (interpolate.parse_scales, "x"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=bad):
            list(parse(bad))


# --------------------------------------------------------------------------- W + lambda dW


def test_scales_of_0_and_1_are_base_and_run_bit_for_bit_and_a_half_lies_between(tiny):
    adapted = moved(tiny)
    pair = pair_of(tiny, adapted)
    chosen = list(updates.kept(pair))
    for scale in (0.5, 1.25, 1, 0, 1):
        interpolate.write_into(pair, chosen, scale)
        for name, parameter in pair.adapted.named_parameters():
            before, after = tiny.get_parameter(name), adapted.get_parameter(name)
            if scale in (0, 1):
                assert torch.equal(parameter, after if scale else before)
            else:
                expected = before + scale * (after - before)
                torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-6)


def test_a_kind_alone_moves_and_all_others_are_the_base(tiny):
    adapted = moved(tiny)
    pair = pair_of(tiny, adapted)
    chosen = [update for update in updates.kept(pair) if update.kind in ("k", "mlp_out")]
    interpolate.write_into(pair, chosen, 1)
    for name, parameter in pair.adapted.named_parameters():
        before, after = tiny.get_parameter(name), adapted.get_parameter(name)
        if name.endswith("c_attn.weight"):
            assert torch.equal(parameter[:, 32:64], after[:, 32:64])
            assert torch.equal(parameter[:, :32], before[:, :32])
            assert torch.equal(parameter[:, 64:], before[:, 64:])
        else:
            moves = name.endswith("mlp.c_proj.weight")
            assert torch.equal(parameter, after if moves else before)


def test_rows_of_one_head_after_another_are_written_where_they_were():
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "vocab_size": 64, "intermediate_size": 64}  # fmt: skip
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **config))
    adapted = moved(base)
    pair = pair_of(base, adapted)
    interpolate.write_into(pair, list(updates.kept(pair)), 1)
    for name, parameter in pair.adapted.named_parameters():
        assert torch.equal(parameter, adapted.get_parameter(name))


# --------------------------------------------------------------------------- intervals


def by_document(shift, seed):
    nll = [10.0 * (1 + shift) + 0.1 * seed + n / 3 for n in range(12)]
    shared = {"id": [f"d{n}" for n in range(12)], "num_tokens": [4] * 12, "text": "validation"}
    return pd.DataFrame(shared | {"rank": str(shift), "nll_nats": nll})


def test_intervals_are_those_of_stats_over_the_seeds_given():
    documents = [pd.concat([by_document(0, s), by_document(1, s)]) for s in range(3)]
    found = perplexities(documents, [0, 1, 2], ["rank", "text"]).set_index("rank")
    for shift in (0, 1):
        nll = np.stack([by_document(shift, s)["nll_nats"] for s in range(3)])
        ids = tuple(by_document(0, 0)["id"])
        (own,) = stats.intervals([stats.Evaluation("a", nll, np.full(12, 4), (0, 1, 2), ids, {})])
        row = found.loc[str(shift)]
        assert (row.perplexity, row.low, row.high) == pytest.approx(own.perplexity)
    alone = perplexities([by_document(0, 0).head(1)], [0], ["rank", "text"]).iloc[0]
    assert np.isnan(alone.low) and "(" not in curve.told(alone)
