"""The `udv` tuner: its mathematics against NumPy and TinyLoRA, what it costs, and bad input."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, TinyLoraConfig, get_peft_model
from peft.tuners.tinylora import TinyLoraLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D
from udv_models import (
    FAMILIES,
    GPT2_TARGETS,
    MODES,
    adapt,
    close,
    gpt2,
    layers,
    logits,
    perturb,
    tokens,
)

from harness.methods import svd
from harness.methods.udv import UDVConfig, UDVLayer, UDVLinear, orthogonality_penalty

# --------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_equals_the_base_to_rounding(family, form):
    model = FAMILIES[family]()
    base = logits(model)
    close(logits(adapt(model, rank="full")), base)


@pytest.mark.parametrize("kind", ["conv1d", "linear", "embedding"])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_truncation_error_is_the_tail_of_the_singular_values(kind, k):
    torch.manual_seed(0)
    # Conv1D(10, 14) stores (in 14, out 10), Linear(10, 14) stores (out 14, in 10).
    layer = {
        "conv1d": lambda: Conv1D(10, 14),
        "linear": lambda: nn.Linear(10, 14),
        "embedding": lambda: nn.Embedding(14, 10),
    }[kind]()
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer)
    weight = layer.weight.detach().double().numpy()
    config = UDVConfig(rank=k, train="none", target_modules=["0"])
    merged = get_peft_model(model, config).merge_and_unload()
    error = np.linalg.norm(weight - merged[0].weight.detach().double().numpy())
    tail = np.linalg.svd(weight, compute_uv=False)[k:]
    assert error == pytest.approx(np.sqrt((tail**2).sum()), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_training_d_beside_the_residual_is_tinylora_with_unit_projections(family, form):
    """dW = U_r S_r diag(v) V_r^T there and U_r diag(D - D0) V_r^T here: D = S (1 + v)."""
    r, targets = 6, GPT2_TARGETS if family == "gpt2" else ["q_proj", "k_proj", "fc1", "fc2"]
    model = FAMILIES[family]()
    oracle_config = TinyLoraConfig(
        r=r, u=r, weight_tying=0.0, target_modules=targets, fan_in_fan_out=family == "gpt2"
    )
    oracle = get_peft_model(copy.deepcopy(model), oracle_config)
    ours = adapt(model, rank=r, train="d", residual="keep", target_modules=targets)
    theirs = [module for module in oracle.modules() if isinstance(module, TinyLoraLayer)]
    assert len(theirs) == len(layers(ours)) >= 8

    pairs = []
    draw = torch.Generator().manual_seed(1)
    unit = torch.zeros(r, r, r)
    unit[torch.arange(r), torch.arange(r), torch.arange(r)] = 1.0
    for layer, other in zip(layers(ours), theirs, strict=True):
        other.tinylora_P["default"] = unit
        v = other.tinylora_v["default"][other._tinylora_v_key["default"]]
        d, s = layer.udv_d["default"], layer.udv_frozen_d["default"]
        with torch.no_grad():
            v.copy_(torch.randn(r, generator=draw) * 0.3)
            d.copy_(s * (1 + v))
        pairs.append((d, s, v))

    for adapted in (ours, oracle):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    close(logits(ours), logits(oracle), 1e-4)
    assert (logits(ours) - logits(ours.unload())).abs().max() > 0.1
    for d, s, v in pairs:
        close(d.grad * s, v.grad, 1e-4)  # chain rule: dD/dv = S
        assert v.grad.abs().max() > 1e-4


@pytest.mark.parametrize(("train", "residual"), MODES)
def test_gradients_match_a_plain_weight_in_float64(train, residual, form):
    """Autograd through W written out as a dense matrix is the oracle, for every factor and x."""
    torch.manual_seed(0)
    base = nn.Linear(9, 7).double()
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    config = UDVConfig(rank=3, train=train, residual=residual, target_modules=["0"])
    model = perturb(get_peft_model(nn.Sequential(base), config))
    layer = layers(model)[0]
    u, d, v = (factor.detach().clone().requires_grad_() for factor in layer.factors("default"))
    dense = (u * d) @ v.T
    if residual == "keep":
        a, s, bh = torch.linalg.svd(weight)
        dense = dense + weight - (a[:, :3] * s[:3]) @ bh[:3]
    x = torch.randn(5, 9, dtype=torch.float64)
    x_ours, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn(5, 7, dtype=torch.float64)
    out = model(x_ours)
    expected = x_plain @ dense.T + bias
    close(out, expected, 1e-12)
    out.backward(upstream)
    expected.backward(upstream)
    close(x_ours.grad, x_plain.grad, 1e-12)
    for letter, factor in zip("udv", (u, d, v), strict=True):
        trained = getattr(layer, f"udv_{letter}")
        assert ("default" in trained) == (train != "none" and letter in train)
        if "default" in trained:
            close(trained["default"].grad, factor.grad, 1e-12)


@pytest.mark.parametrize(("train", "residual"), [mode for mode in MODES if mode[1] == "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_keep_starts_as_the_base_bit_for_bit(family, train, residual, dtype, form):
    model = FAMILIES[family](dtype=dtype)
    base = logits(model)
    assert torch.equal(logits(adapt(model, train=train, residual=residual)), base)


# --------------------------------------------------------------------------- cost


@pytest.mark.parametrize(("train", "residual"), MODES)
@pytest.mark.parametrize("rank", [4, 24, 32])
@pytest.mark.parametrize("count", [2, 40, 400])
@pytest.mark.parametrize("grad", [True, False])
def test_the_cheaper_form_is_chosen(train, residual, rank, count, grad, monkeypatch):
    """PyTorch's FLOP counter, run over both forms, decides which one it should have been."""
    if grad and train == "none":
        pytest.skip("nothing trains")
    config = UDVConfig(rank=rank, train=train, residual=residual, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(32, 48)), config)
    layer = layers(model)[0]
    x = torch.randn(count, 32)

    def flops(factored):
        with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
            patch.setattr(UDVLinear, "_factored_is_cheaper", lambda *_: factored)
            with torch.set_grad_enabled(grad):
                out = model(x.clone().requires_grad_(grad))
                if grad:
                    out.sum().backward()
        return counter.get_total_flops()

    with torch.set_grad_enabled(grad):
        chosen = layer._factored_is_cheaper(count, ["default"])
    assert flops(chosen) <= flops(not chosen)


def test_a_small_rank_never_materialises_the_weight(monkeypatch):
    model = adapt(gpt2(), rank=2)
    monkeypatch.setattr(UDVLayer, "_dense", lambda *_, **__: pytest.fail("materialised"))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    logits(model)


def test_what_is_stored(tmp_path):
    """The module docstring's table, in elements, for one 8 x 8 matrix at k = 3."""
    m, n, k = 8, 8, 3
    sizes = {"u": m * k, "d": k, "v": n * k}
    for train, residual in MODES:
        config = UDVConfig(rank=k, train=train, residual=residual, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(n, m, bias=False)), config)
        trained = sum(size for letter, size in sizes.items() if letter in train.replace("none", ""))
        frozen = sum(sizes.values()) - (trained if residual == "drop" else 0)
        assert model.get_nb_trainable_parameters() == (trained, trained + m * n)
        assert sum(buffer.numel() for buffer in model.buffers()) == frozen


# --------------------------------------------------------------------------- orthogonality


def test_orthogonality_penalty():
    adapted = adapt(gpt2(), train="udv", orthogonality=0.5, target_modules=["c_fc"])
    assert orthogonality_penalty(adapted).item() < 1e-9
    perturb(adapted)
    expected = 0.0
    for layer in layers(adapted):
        for factor in (layer.udv_u["default"], layer.udv_v["default"]):
            f = factor.detach().double().numpy()
            expected += 0.5 * np.linalg.norm(f.T @ f - np.eye(5)) ** 2
    penalty = adapted.orthogonality_penalty()
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert all(layer.udv_u["default"].grad.abs().max() > 0 for layer in layers(adapted))
    assert all(layer.udv_d["default"].grad is None for layer in layers(adapted))
    with adapted.disable_adapter():
        assert orthogonality_penalty(adapted).item() == 0.0
    assert orthogonality_penalty(adapt(gpt2(), train="udv")).item() == 0.0


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train": "s"}, r"train='s' is unknown; expected one of d, u, v, udv, none"),
        ({"train": "uv"}, r"train='uv' .* nearest is 'u"),
        ({"residual": "kept"}, r"residual='kept' is unknown; .*nearest is 'keep'"),
        ({"which": "tops"}, r"which='tops' is unknown; .*nearest is 'top'"),
        ({"energy": 0.0}, r"energy=0.0 is not a share; expected more than 0 and at most 1"),
        ({"energy": 1.5}, r"energy=1.5 .*nearest valid choice is 1.0"),
        ({"energy": float("nan")}, r"energy=nan is not a share"),
        ({"energy": 0.5, "rank": 4}, r"rank=4 and energy=0.5 are alternatives"),
        ({"rank": 0}, r"rank=0 is not a rank; .*nearest valid choice is rank=1"),
        ({"rank": 4.0}, r"rank=4.0 is not a rank; .*rank=4$"),
        ({"rank": "half"}, r"rank='half' is not a rank"),
        ({"rank_pattern": {"c_fc": -1}}, r"rank_pattern\['c_fc'\]=-1"),
        ({"orthogonality": -1.0, "train": "u"}, r"orthogonality=-1.0; expected 0 or more"),
        ({"orthogonality": 0.1}, r"orthogonality=0.1 with train='d' penalises nothing"),
        ({"train": "none", "residual": "keep"}, r"is the base model"),
        ({"init_weights": False}, r"init_weights=False skips the SVD"),
        (
            {"target_modules": ".*c_fc", "layers_to_transform": [0]},
            r"layers_to_transform=\[0\] needs target_modules as a list",
        ),
        ({"layers_pattern": "h"}, r"layers_pattern='h' needs layers_to_transform"),
    ],
)
def test_bad_configurations_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        UDVConfig(**fields)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_fc"]])
def test_a_rank_above_the_matrix_is_refused_before_any_work(targets, monkeypatch):
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("SVD"))
    model = gpt2()
    with pytest.raises(ValueError, match=r"rank=17 is above .*largest usable rank is 16"):
        adapt(model, rank=17, target_modules=targets)
    pattern = {r"h\.1\.mlp\.c_fc": 20}
    with pytest.raises(ValueError, match=r"rank=20 is above .* of transformer.h.1.mlp.c_fc"):
        adapt(model, rank=2, rank_pattern=pattern, target_modules=targets)
    assert not layers(model)


def test_unsupported_modules_are_named():
    with pytest.raises(TypeError, match=r"0\.ln_1 is a LayerNorm; udv takes nn.Linear, Conv1D"):
        adapt(gpt2(), target_modules=["c_attn", "ln_1"])
    with pytest.raises(TypeError, match="max_norm"):
        config = UDVConfig(rank=1, target_modules=["0"])
        get_peft_model(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), config)


def test_a_wrong_fan_in_fan_out_is_corrected_aloud():
    base = logits(adapt(gpt2()))
    with pytest.warns(UserWarning, match="fan_in_fan_out=False is wrong for transformer.h.0"):
        wrong = adapt(gpt2(), fan_in_fan_out=False)
    assert torch.equal(logits(wrong), base)


def test_safe_merge_refuses_a_damaged_adapter():
    model = gpt2()
    base = logits(model)
    adapted = adapt(model)
    with torch.no_grad():
        layers(adapted)[0].udv_d["default"][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge_adapter(safe_merge=True)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)


# --------------------------------------------------------------------------- meta device


def meta_gpt2(num_layers, width):
    config = GPT2Config(n_layer=num_layers, n_embd=width, n_head=width // 64)
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


@pytest.mark.parametrize(("num_layers", "width"), [(12, 768), (24, 1024)])
@pytest.mark.parametrize("k", [1, 64, "full"])
def test_d_only_counts_on_the_meta_device(num_layers, width, k):
    """4 k L, and at k = d the published LoRA r=1 count on c_attn: 36,864 and 98,304."""
    adapted = adapt(meta_gpt2(num_layers, width), rank=k, target_modules=GPT2_TARGETS)
    count, _ = adapted.get_nb_trainable_parameters()
    assert count == 4 * num_layers * (width if k == "full" else k)
    if k == "full":
        assert count == {768: 36_864, 1024: 98_304}[width]
        lora = LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True)
        lora_model = get_peft_model(meta_gpt2(num_layers, width), lora)
        assert count == lora_model.get_nb_trainable_parameters()[0]
    assert all(parameter.is_meta for parameter in adapted.parameters())
    assert all(buffer.is_meta for layer in layers(adapted) for buffer in layer.buffers())


def test_udv_counts_on_the_meta_device():
    k, d, depth = 8, 768, 12
    adapted = adapt(meta_gpt2(depth, d), rank=k, train="udv", target_modules=GPT2_TARGETS)
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    expected = depth * sum(k * (m + n + 1) for m, n in shapes)
    assert adapted.get_nb_trainable_parameters()[0] == expected
    with pytest.raises(ValueError, match=r"energy=0.9 needs the singular values"):
        adapt(meta_gpt2(1, 64), rank=None, energy=0.9)
