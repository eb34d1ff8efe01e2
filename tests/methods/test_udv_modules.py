"""`udv` on every kind of module: targets, embeddings, tied weights, and dtypes."""

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from udv_models import (
    GPT2_TARGETS,
    MODES,
    TRAINED_MODES,
    VOCABULARY,
    adapt,
    close,
    gpt2,
    layers,
    logits,
    perturb,
    tokens,
    trainable,
)

from harness.methods.udv import UDVConfig, UDVLayer

# --------------------------------------------------------------------------- targets and embeddings


def test_gpt2_has_default_targets():
    adapted = adapt(gpt2(), target_modules=None)
    assert adapted.base_model.targeted_module_names == [
        f"transformer.h.{i}.attn.c_attn" for i in range(2)
    ]


def test_target_selection():
    def names(**fields):
        return [n.removeprefix("transformer.h.") for n in adapt(gpt2(), **fields).base_model.
                targeted_module_names]  # fmt: skip

    everything = [f"{i}.{name}" for i in range(2) for name in GPT2_TARGETS]
    assert names() == everything
    assert names(exclude_modules=["mlp.c_fc"]) == [n for n in everything if "c_fc" not in n]
    assert names(target_modules=["c_proj"], layers_to_transform=[1]) == [
        "1.attn.c_proj",
        "1.mlp.c_proj",
    ]
    assert names(target_modules=["c_proj"], layers_to_transform=0, layers_pattern="h") == [
        "0.attn.c_proj",
        "0.mlp.c_proj",
    ]
    assert names(target_modules=r".*1\.mlp\.c_fc") == ["1.mlp.c_fc"]


def test_rank_pattern_and_fractions():
    adapted = adapt(gpt2(), rank=0.5, rank_pattern={"c_fc": 3, r"h\.1\.attn\.c_attn": "full"})
    ranks = {
        name.removeprefix("base_model.model.transformer.h."): module.udv_specs["default"].rank
        for name, module in adapted.named_modules()
        if isinstance(module, UDVLayer)
    }
    assert ranks == {
        "0.attn.c_attn": 8, "0.attn.c_proj": 8, "0.mlp.c_fc": 3, "0.mlp.c_proj": 8,
        "1.attn.c_attn": 16, "1.attn.c_proj": 8, "1.mlp.c_fc": 3, "1.mlp.c_proj": 8,
    }  # fmt: skip


def test_energy_rank_per_matrix():
    model = gpt2()
    weights = [model.get_submodule(f"transformer.h.0.{n}").weight.detach() for n in GPT2_TARGETS]
    adapted = adapt(model, rank=None, energy=0.8)
    for weight, layer in zip(weights, layers(adapted), strict=False):
        squares = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
        k = layer.udv_specs["default"].rank
        assert squares[:k].sum() >= 0.8 * squares.sum() > squares[: k - 1].sum()


@pytest.mark.parametrize(("train", "residual"), MODES)
def test_embedding_and_head(train, residual, tmp_path):
    """An untied embedding and head, as in the LSTM, keep the whole contract."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, 10, padding_idx=0)
            self.head = nn.Linear(10, VOCABULARY)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids).tanh())

    model, ids = Head(), tokens()
    base = model(ids)
    weight = model.embed.weight.detach().clone()
    config = UDVConfig(rank=4, train=train, residual=residual, target_modules=["embed", "head"])
    adapted = perturb(get_peft_model(model, config))
    u, d, v = adapted.base_model.model.embed.factors("default")
    table = (v * d) @ u.T
    if residual == "keep":
        a, s, bh = torch.linalg.svd(weight.double(), full_matrices=False)
        table = table + (weight.double() - (a[:, :4] * s[:4]) @ bh[:4]).float()
    close(adapted.base_model.model.embed(ids), table[ids])
    active = adapted(ids)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids), base)
    adapted.merge_adapter()
    close(adapted(ids), active)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(ids), active)
    adapted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plain module has no embedding for PEFT to save
        loaded = PeftModel.from_pretrained(Head(), tmp_path)
    assert torch.equal(loaded(ids), active)
    if train != "none":
        adapted(ids).square().sum().backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    close(adapted.merge_and_unload()(ids), active)


def test_merging_one_of_two_tied_weights_leaves_the_other_alone():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    original = model.lm_head.weight
    adapted = perturb(adapt(model, target_modules=["wte"]))
    active = logits(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.merge_adapter()
        close(logits(adapted), active)
        adapted.unmerge_adapter()
        assert model.transformer.wte.weight is model.lm_head.weight is original
        assert torch.equal(logits(adapted), active)
        merged = adapted.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    close(logits(merged), active)


def test_modules_to_save_trains_beside_the_adapter(tmp_path):
    adapted = perturb(adapt(gpt2(), target_modules=["c_attn"], modules_to_save=["ln_f"]))
    assert {n.split(".modules_to_save")[0][-4:] for n in trainable(adapted) if "ln_f" in n}
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(adapted))


# --------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("train", "residual"), MODES)
def test_bfloat16(train, residual, form, tmp_path):
    model = gpt2(dtype=torch.bfloat16)
    base = logits(model)
    adapted = perturb(adapt(model, train=train, residual=residual), scale=0.05)
    layer = layers(adapted)[0]
    for letter in "udv":
        trained = letter in train and train != "none"
        wide = trained or letter == "d"
        dtype = torch.float32 if wide else torch.bfloat16
        assert layer._factor(letter, "default").dtype == dtype
    active = logits(adapted)
    assert active.dtype == torch.bfloat16
    # The same adapter on the same weights in float32 is the oracle.
    exact = perturb(adapt(gpt2(dtype=torch.bfloat16).float(), train=train, residual=residual), 0.05)
    reference = logits(exact)
    error = (active.float() - reference).norm() / reference.norm()
    assert error < 0.05
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), active)
    merged = adapted.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged).float() - reference).norm() / reference.norm() < 0.05


@pytest.mark.parametrize(("train", "residual"), TRAINED_MODES)
def test_autocast_trains_float32_masters(train, residual, form):
    adapted = adapt(gpt2(), train=train, residual=residual)
    full = logits(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapted(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    assert (out.logits.float() - full).norm() / full.norm() < 0.05
    assert {p.grad.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_adapter_dtype_can_follow_the_base():
    config = UDVConfig(rank=3, train="udv", residual="keep", target_modules=["c_attn"])
    adapted = get_peft_model(gpt2(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    base = logits(gpt2(dtype=torch.bfloat16))
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(adapted), base)


def test_replaced_buffers_stay_out_of_the_file(tmp_path):
    """Casting and moving put new buffers in: they must not become part of the adapter file."""
    config = UDVConfig(rank=3, residual="keep", target_modules=["c_attn"])
    adapted = get_peft_model(gpt2(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    for layer in layers(adapted):
        layer._move_adapter_to_device_of_base_layer("default")
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rsplit(".", 1)[1] for key in saved} == {"udv_d"}


def test_low_memory_loading_keeps_float32_masters(tmp_path):
    adapted = perturb(adapt(gpt2(dtype=torch.bfloat16), train="udv", residual="keep"))
    adapted.save_pretrained(tmp_path)
    base = gpt2(dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert layers(loaded)[0].udv_d["default"].dtype == torch.float32
    assert torch.equal(logits(loaded), logits(adapted))


def test_casting_while_merged_does_not_lose_the_original():
    adapted = adapt(gpt2())
    adapted.merge_adapter()
    adapted.to(torch.float64)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        close(logits(adapted), logits(gpt2().double()), 1e-12)
