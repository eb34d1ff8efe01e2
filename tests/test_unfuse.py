"""Unfusing q, k and v: the same model, and LoRA on q and v as in the LoRA paper's own code."""

from __future__ import annotations

import copy
from pathlib import Path

import loralib
import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from harness.models.split_qkv import UNFUSED_TARGETS, fuse_qkv, is_unfused, unfuse_qkv

# name: (layers L, width d, heads, total parameters, {LoRA rank on q and v: trainable parameters})
PUBLISHED = {
    "gpt2": (
        *(12, 768, 12, 124_439_808),
        {1: 36_864, 2: 73_728, 4: 147_456, 8: 294_912, 64: 2_359_296},
    ),
    "gpt2-medium": (
        *(24, 1024, 16, 354_823_168),
        {1: 98_304, 2: 196_608, 4: 393_216, 8: 786_432, 64: 6_291_456},
    ),
    "gpt2-large": (
        *(36, 1280, 20, 774_030_080),
        {1: 184_320, 2: 368_640, 4: 737_280, 8: 1_474_560, 64: 11_796_480},
    ),
    "gpt2-xl": (
        *(48, 1600, 25, 1_557_611_200),
        {1: 307_200, 2: 614_400, 4: 1_228_800, 8: 2_457_600, 64: 19_660_800},
    ),
}
D, LAYERS, VOCAB = 32, 2, 61
QV = [UNFUSED_TARGETS["q"], UNFUSED_TARGETS["v"]]


def tiny_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: object) -> nn.Module:
    """GPT-2 with random biases too: `transformers` starts them at 0, which would hide a mix-up."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=D,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **fields,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    return model.to(dtype).eval()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(seed))


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (B, T, V) and the gradient of each parameter that has one, of the model's own loss."""
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    return out.logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def adapted(model: nn.Module, seed: int = 2, **fields: object) -> peft.PeftModel:
    """`model` under LoRA whose factors are all random, so that nothing is the identity."""
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": QV, **fields})
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    return model.eval()


# --------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_same_logits_and_gradients(dtype: torch.dtype, tolerance: float, eager: bool) -> None:
    implementation = "eager" if eager else "sdpa"
    fused = tiny_gpt2(dtype, attn_implementation=implementation)
    split = unfuse_qkv(copy.deepcopy(fused))
    expected, expected_grads = logits_and_gradients(fused)
    logits, grads = logits_and_gradients(split)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * 0.1)
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            name = f"transformer.h.{layer}.attn.c_attn"
            parts = [grads.pop(f"{name}.{part}.{kind}") for part in "qkv"]
            grads[f"{name}.{kind}"] = torch.cat(parts, dim=-1)
    assert grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected_grads[name], rtol=0, atol=tolerance * scale, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_keep_their_bits(dtype: torch.dtype) -> None:
    fused = tiny_gpt2(dtype)
    layer = fused.transformer.h[0].attn.c_attn
    x = torch.randn(33, D, dtype=dtype)
    columns = [
        torch.addmm(b, x, w.contiguous())
        for w, b in zip(layer.weight.split(D, dim=1), layer.bias.split(D), strict=True)
    ]
    if not torch.equal(torch.cat(columns, dim=1), layer(x)):
        pytest.skip("this CPU's matrix product depends on the number of columns")
    with torch.no_grad():
        expected = fused(tokens()).logits
        assert torch.equal(unfuse_qkv(fused)(tokens()).logits, expected)


def test_same_under_generation_with_a_cache() -> None:
    fused = tiny_gpt2()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = fused.generate(tokens(), **options)
    assert torch.equal(unfuse_qkv(fused).generate(tokens(), **options), expected)


def test_every_head_and_cross_attention_of_gpt2() -> None:
    model = GPT2Model(tiny_gpt2(add_cross_attention=True).config).eval()
    encoder = torch.randn(3, 5, D)
    expected = model(tokens(), encoder_hidden_states=encoder).last_hidden_state
    unfuse_qkv(model)
    assert isinstance(model.h[0].crossattention.c_attn, Conv1D)  # k and v of the encoder: kept
    assert {n for n, _ in model.h[0].attn.c_attn.named_children()} == {"q", "k", "v"}
    torch.testing.assert_close(
        model(tokens(), encoder_hidden_states=encoder).last_hidden_state, expected
    )


# --------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip_is_exact(dtype: torch.dtype, training: bool) -> None:
    model = tiny_gpt2(dtype).train(training)
    model.transformer.h[0].attn.requires_grad_(False)
    before = copy.deepcopy(model)
    generator = torch.get_rng_state()
    assert unfuse_qkv(model) is model
    assert is_unfused(model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in before.parameters())
    for name, module in model.named_modules():
        assert module.training == training, name
        if name.endswith(tuple(UNFUSED_TARGETS.values())):
            assert module.weight.requires_grad == (".h.0." not in name)
            assert module.weight.is_contiguous()
            assert module.weight.untyped_storage().nbytes() == module.weight.nbytes
    assert fuse_qkv(model) is model
    assert not is_unfused(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [(n, m.training) for n, m in model.named_modules()] == [
        (n, m.training) for n, m in before.named_modules()
    ]
    state = model.state_dict()
    assert list(state) == list(before.state_dict())
    for name, tensor in before.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_columns_go_to_q_k_v_in_order() -> None:
    model = tiny_gpt2()
    weight = model.transformer.h[1].attn.c_attn.weight.detach().clone()
    split = unfuse_qkv(model).transformer.h[1].attn.c_attn
    assert torch.equal(split.q.weight, weight[:, :D])
    assert torch.equal(split.k.weight, weight[:, D : 2 * D])
    assert torch.equal(split.v.weight, weight[:, 2 * D :])


def test_each_direction_is_idempotent() -> None:
    model = tiny_gpt2()
    assert fuse_qkv(model) is model
    unfuse_qkv(model)
    modules = dict(model.named_modules())
    unfuse_qkv(model)
    assert all(modules[name] is module for name, module in model.named_modules())


def test_saved_after_fusing_loads_in_plain_transformers(tmp_path: Path) -> None:
    model = unfuse_qkv(tiny_gpt2())
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.v.weight.add_(0.5)
        expected = model(tokens()).logits
    fuse_qkv(model).save_pretrained(tmp_path)
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        torch.testing.assert_close(loaded(tokens()).logits, expected)


# --------------------------------------------------------------------------- LoRA on q and v


def loralib_twin(model: nn.Module, adapters: peft.PeftModel, r: int, alpha: int) -> nn.Module:
    """`model` with the LoRA paper's MergedLinear for each c_attn, and the factors of `adapters`.

    MergedLinear stacks the enabled parts: lora_A (2 r, d) holds A_q over A_v, lora_B (2 d, r) holds
    B_q over B_v, and its grouped convolution multiplies each B with its own A.
    """
    twin = copy.deepcopy(model)
    for layer, block in enumerate(twin.transformer.h):
        merged = loralib.MergedLinear(
            D,
            3 * D,
            r=r,
            lora_alpha=alpha,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=False,
        ).to(model.dtype)
        split = adapters.base_model.model.transformer.h[layer].attn.c_attn
        with torch.no_grad():
            merged.weight.copy_(block.attn.c_attn.weight)
            merged.bias.copy_(block.attn.c_attn.bias)
            for name in ("lora_A", "lora_B"):
                factors = [getattr(part, name)["default"].weight for part in (split.q, split.v)]
                getattr(merged, name).copy_(torch.cat(factors))
        block.attn.c_attn = merged
    loralib.mark_only_lora_as_trainable(twin)
    return twin.eval()


def test_lora_on_q_and_v_is_loralib_merged_linear() -> None:
    base = tiny_gpt2(torch.float64)
    model = adapted(unfuse_qkv(copy.deepcopy(base)), r=3, lora_alpha=12)
    twin = loralib_twin(base, model, r=3, alpha=12)
    expected, expected_grads = logits_and_gradients(twin)
    logits, grads = logits_and_gradients(model)
    assert (expected - base(tokens()).logits).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert len(grads) == 2 * len(expected_grads) == 2 * 2 * LAYERS
    for name, gradient in expected_grads.items():
        path, _, factor = name.rpartition(".")
        parts = [f"base_model.model.{path}.{part}.{factor}.default.weight" for part in "qv"]
        joined = torch.cat([grads[part] for part in parts])
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(joined, gradient, rtol=1e-10, atol=1e-14, msg=name)


def test_disabled_adapter_is_the_base_bit_for_bit() -> None:
    base = unfuse_qkv(tiny_gpt2())
    with torch.no_grad():
        expected = base(tokens()).logits
        model = adapted(base)
        assert not torch.allclose(model(tokens()).logits, expected, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, expected)


def test_merged_and_fused_is_a_plain_gpt2(tmp_path: Path) -> None:
    model = adapted(unfuse_qkv(tiny_gpt2()))
    with torch.no_grad():
        active = model(tokens()).logits
        merged = model.merge_and_unload()
        merged_logits = merged(tokens()).logits
        fuse_qkv(merged).save_pretrained(tmp_path)
        assert torch.equal(
            GPT2LMHeadModel.from_pretrained(tmp_path)(tokens()).logits, merged(tokens()).logits
        )
    assert type(merged) is GPT2LMHeadModel
    assert list(merged.state_dict()) == list(tiny_gpt2().state_dict())
    torch.testing.assert_close(merged(tokens()).logits, merged_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_logits, active, rtol=1e-4, atol=1e-4)


def test_adapter_saved_and_loaded_on_an_unfused_base(tmp_path: Path) -> None:
    model = adapted(unfuse_qkv(tiny_gpt2()))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(unfuse_qkv(tiny_gpt2()), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_suffix_names_its_own_layers_only(part: str) -> None:
    model = peft.get_peft_model(
        unfuse_qkv(tiny_gpt2()), peft.LoraConfig(target_modules=[UNFUSED_TARGETS[part]])
    )
    assert model.targeted_module_names == [
        f"transformer.h.{layer}.attn.c_attn.{part}" for layer in range(LAYERS)
    ]
    assert all(config.fan_in_fan_out for config in model.peft_config.values())


# --------------------------------------------------------------------------- published counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_from_meta_models(name: str) -> None:
    layers, width, heads, total, trainable = PUBLISHED[name]
    config = AutoConfig.for_model("gpt2", n_layer=layers, n_embd=width, n_head=heads)
    with torch.device("meta"):
        model = unfuse_qkv(AutoModelForCausalLM.from_config(config))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == total
    for r, expected in trainable.items():
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(r=r, target_modules=QV, fan_in_fan_out=True),
            low_cpu_mem_usage=True,
        )
        assert len(wrapped.targeted_module_names) == 2 * layers
        assert wrapped.get_nb_trainable_parameters() == (expected, total + expected)
        model = wrapped.unload()
    fuse_qkv(model)
    assert sum(p.numel() for p in model.parameters()) == total
    assert tuple(model.transformer.h[-1].attn.c_attn.weight.shape) == (width, 3 * width)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("function", [unfuse_qkv, fuse_qkv])
def test_other_architectures_are_named_and_refused(function: object) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=D,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*q_proj.*Only GPT-2"):
        function(model)


def test_adapters_block_both_directions_and_nothing_changes() -> None:
    fused = peft.get_peft_model(
        tiny_gpt2(),
        # The last layer alone: a check layer by layer would already have split the first.
        peft.LoraConfig(target_modules=["c_attn"], layers_to_transform=[1], fan_in_fan_out=True),
    )
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn is a peft.*unfuse before"):
        unfuse_qkv(fused)
    assert not is_unfused(fused)
    split = adapted(unfuse_qkv(tiny_gpt2()), layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn\.q is a peft.*merge_and_unload"):
        fuse_qkv(split)
    assert all(
        not isinstance(block.attn.c_attn, Conv1D) for block in split.base_model.model.transformer.h
    )


def test_mixed_dtypes_and_odd_shapes_are_refused() -> None:
    model = unfuse_qkv(tiny_gpt2())
    model.transformer.h[1].attn.c_attn.k.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"share dtype.*bfloat16.*float32"):
        fuse_qkv(model)
    model = tiny_gpt2()
    model.transformer.h[0].attn.c_attn = Conv1D(2 * D, D)
    with pytest.raises(ValueError, match=r"64 output columns, expected 96"):
        unfuse_qkv(model)
