"""The `udv` tuner: its mathematics against NumPy and TinyLoRA, and the whole PEFT contract."""

import copy
import json
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from peft.tuners.tinylora import TinyLoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from harness.methods import svd, udv
from harness.methods.udv import UDVConfig, UDVLayer, UDVLinear, orthogonality_penalty

torch.set_num_threads(1)

VOCABULARY = 48
GPT2_TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
MODES = [
    (train, residual)
    for train in ("d", "u", "v", "udv", "none")
    for residual in ("drop", "keep")
    if (train, residual) != ("none", "keep")
]
TRAINED_MODES = [mode for mode in MODES if mode[0] != "none"]


@pytest.fixture(autouse=True)
def no_ambient_cache(monkeypatch):
    monkeypatch.delenv(svd.CACHE_ENV, raising=False)


@pytest.fixture(params=["factored", "dense"])
def form(request, monkeypatch):
    """Force one of the two ways to compute, which the batch size would choose otherwise."""
    answer = request.param == "factored"
    monkeypatch.setattr(UDVLinear, "_factored_is_cheaper", lambda *_: answer)
    return request.param


def gpt2(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return spread(GPT2LMHeadModel(config)).to(dtype)


def llama(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=VOCABULARY, max_position_embeddings=16,
    )  # fmt: skip
    return spread(LlamaForCausalLM(config)).to(dtype)


def opt(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = OPTConfig(
        num_hidden_layers=2, hidden_size=16, ffn_dim=24, num_attention_heads=2, dropout=0.0,
        vocab_size=VOCABULARY, max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    return spread(OPTForCausalLM(config)).to(dtype)


def spread(model):
    """Make the matrices large enough that every one of them moves the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


FAMILIES = {"gpt2": gpt2, "llama": llama, "opt": opt}


def tokens():
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (2, 7), generator=draw)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def adapt(model, name="default", **fields):
    fields = {"rank": 5, "target_modules": "all-linear", **fields}
    return get_peft_model(model, UDVConfig(task_type="CAUSAL_LM", **fields), adapter_name=name)


def perturb(model, scale=0.2, seed=7):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
                parameter.add_(scale * noise.to(parameter.dtype))
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def layers(model):
    return [module for module in model.modules() if isinstance(module, UDVLayer)]


def states_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def close(one, two, tolerance=2e-5):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


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


# --------------------------------------------------------------------------- PEFT contract


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("train", "residual"), MODES)
def test_contract(family, train, residual, form):
    model = FAMILIES[family]()
    base_state, base = copy.deepcopy(model.state_dict()), logits(model)
    adapted = perturb(adapt(model, train=train, residual=residual))
    active = logits(adapted)
    assert (active - base).abs().max() > 1e-2

    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), active)

    adapted.merge_adapter()
    close(logits(adapted), active)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), active)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)

    adapted.merge_adapter(safe_merge=True)
    with adapted.disable_adapter():  # unmerges, as PEFT's own layers do
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), active)

    restored = copy.deepcopy(adapted).unload()
    assert states_equal(restored.state_dict(), base_state)
    unloaded = adapted.merge_and_unload()
    assert type(unloaded) is type(model) and not layers(unloaded)
    assert unloaded.state_dict().keys() == base_state.keys()
    close(logits(unloaded), active)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("train", "residual"), TRAINED_MODES)
def test_only_the_chosen_factors_train_and_one_step_changes_the_model(
    family, train, residual, form
):
    adapted = adapt(FAMILIES[family](), train=train, residual=residual).train()
    before = logits(adapted)
    frozen = {n: b.clone() for n, b in adapted.named_buffers()}
    base = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    expected = {f"udv_{letter}.default" for letter in train}
    assert {".".join(name.split(".")[-2:]) for name in trainable(adapted)} == expected
    assert len(trainable(adapted)) == len(train) * len(layers(adapted))

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    assert (logits(adapted) - before).abs().max() > 1e-3
    assert all(torch.equal(b, frozen[n]) for n, b in adapted.named_buffers())
    parameters = dict(adapted.named_parameters())
    assert all(torch.equal(parameters[n], value) for n, value in base.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("train", "residual"), MODES)
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load_round_trip(family, train, residual, store, low_memory, tmp_path):
    adapted = perturb(
        adapt(FAMILIES[family](), train=train, residual=residual, store_factors=store)
    )
    active = logits(adapted)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rsplit(".", 1)[1] for key in saved}
    trained = {f"udv_{letter}" for letter in train} if train != "none" else set()
    if not store:
        assert kinds == trained
    else:
        kept = "udv" if residual == "keep" else [x for x in "udv" if f"udv_{x}" not in trained]
        assert kinds == trained | {f"udv_frozen_{letter}" for letter in kept}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        loaded = PeftModel.from_pretrained(
            FAMILIES[family](), tmp_path, low_cpu_mem_usage=low_memory
        )
    assert torch.equal(logits(loaded), active)
    assert loaded.peft_config["default"].rank == 5
    assert loaded.peft_config["default"].train == train
    close(logits(loaded.merge_and_unload()), active)


def test_stored_factors_do_not_depend_on_the_svd(tmp_path, monkeypatch):
    """With every factor in the file, another sign or rounding of the SVD changes nothing."""
    adapted = perturb(adapt(gpt2(), train="d", residual="keep", store_factors=True))
    active = logits(adapted)
    adapted.save_pretrained(tmp_path)
    original = svd._decompose

    def flipped(*args):
        u, s, vh = original(*args)
        return -u, 2 * s, -vh

    monkeypatch.setattr(svd, "_decompose", flipped)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), active)

    # And with init_weights=False in the adapter's config, no SVD runs at all.
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"init_weights": False}
    path.write_text(json.dumps(config))
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("SVD"))
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), active)


def test_random_triplets_are_found_again_on_load(tmp_path):
    adapted = perturb(adapt(gpt2(), which="random", seed=3, residual="keep"))
    kept = layers(adapted)[0].udv_frozen_d["default"]
    assert not torch.equal(kept, layers(adapt(gpt2()))[0].udv_d["default"])
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(adapted))


def test_factors_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(svd.CACHE_ENV, str(tmp_path))
    first = adapt(gpt2(), rank=3)
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("SVD"))
    second = adapt(gpt2(), rank=3)
    assert torch.equal(logits(first), logits(second))
    adapt(gpt2(), rank="full")


def test_several_adapters(form):
    model = gpt2()
    base = logits(model)
    adapted = adapt(model, "one", train="d", residual="drop", target_modules=GPT2_TARGETS)
    config = UDVConfig(rank=0.5, train="udv", residual="keep", target_modules=["attn.c_attn"])
    before = trainable(adapted)
    adapted.add_adapter("two", config)
    assert trainable(adapted) == before
    perturb(adapted)
    one = logits(adapted)
    adapted.set_adapter("two")
    assert {name.rsplit(".", 1)[1] for name in trainable(adapted)} == {"two"}
    assert torch.equal(logits(adapted), base)
    perturb(adapted)
    two = logits(adapted)
    assert (two - base).abs().max() > 1e-2

    # Two at once add their differences from the base, active as merged.
    adapted.base_model.set_adapter(["one", "two"])
    both = logits(adapted)
    weight = model.transformer.h[0].attn.c_attn
    summed = weight.get_base_layer().weight + sum(
        weight.get_delta_weight(name) for name in ("one", "two")
    )
    adapted.merge_adapter(["one"])
    adapted.merge_adapter(["two"])
    close(weight.get_base_layer().weight, summed)
    close(logits(adapted), both)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), both)

    adapted.set_adapter("one")
    assert torch.equal(logits(adapted), one)
    adapted.delete_adapter("one")
    adapted.set_adapter("two")
    assert torch.equal(logits(adapted), two)
    assert not any("one" in layer.udv_specs for layer in layers(adapted))
    assert not any(name.endswith(".one") for name, _ in adapted.named_buffers())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)


def test_a_further_adapter_on_other_layers_waits_its_turn():
    model = gpt2()
    adapted = perturb(adapt(model, "one", target_modules=["c_attn"]))
    before, active = trainable(adapted), logits(adapted)
    adapted.add_adapter("two", UDVConfig(rank=2, target_modules=r".*(c_attn.*|mlp\.c_fc)"))
    assert trainable(adapted) == before
    assert torch.equal(logits(adapted), active)
    adapted.set_adapter("two")
    assert len(trainable(adapted)) == 4


def test_an_adapter_added_while_another_is_merged_decomposes_the_original():
    adapted = perturb(adapt(gpt2(), "one"))
    adapted.merge_adapter()
    adapted.add_adapter("two", UDVConfig(rank=5, target_modules="all-linear"))
    adapted.set_adapter("two")  # unmerges
    assert torch.equal(logits(adapted), logits(adapt(gpt2())))


def test_two_dropping_adapters_at_once(form):
    """delta_1 + delta_2 with both bypassing W: the sum holds W minus one time."""
    torch.manual_seed(0)
    base = nn.Linear(9, 7)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    model = get_peft_model(nn.Sequential(base), UDVConfig(rank=2, target_modules=["0"]))
    model.add_adapter("b", UDVConfig(rank=3, which="bottom", target_modules=["0"]))
    model.base_model.set_adapter(["default", "b"])
    u, s, vh = torch.linalg.svd(weight)
    u = u[:, :7]
    top, bottom = (u[:, :2] * s[:2]) @ vh[:2], (u[:, 4:] * s[4:]) @ vh[4:7]
    x = torch.randn(5, 9)
    close(model(x), x @ (top + bottom - weight).T + bias)


def test_adapters_reload_beside_each_other(tmp_path):
    one = perturb(adapt(gpt2(), train="d"))
    two = perturb(adapt(gpt2(), train="udv", residual="keep"), seed=8)
    expected = [logits(one), logits(two)]
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(gpt2(), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    assert torch.equal(logits(model), expected[0])
    model.set_adapter("two")
    assert torch.equal(logits(model), expected[1])


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


# --------------------------------------------------------------------------- coexistence


def test_registration_is_idempotent_and_leaves_the_others_alone():
    tables = [
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    ]
    before = [dict(table) for table in tables]
    udv.register()
    assert [dict(table) for table in tables] == before
    assert all(table["UDV"] for table in tables)
    prefixes = list(peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values())
    assert prefixes.count("udv_") == 1


def test_lora_and_udv_in_one_process(tmp_path):
    lora_config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    lora = perturb(get_peft_model(gpt2(), lora_config))
    ours = perturb(adapt(gpt2(), train="udv"))
    expected = {"lora": (lora, logits(lora)), "udv": (ours, logits(ours))}
    for name, (model, out) in expected.items():
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path / name)
        assert torch.equal(logits(loaded), out)
        assert loaded.active_peft_config.peft_type == name.upper()
    assert not layers(lora)


def test_one_matrix_takes_one_method():
    lora = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(TypeError, match=r"h\.0\.attn\.c_attn already carries"):
        get_peft_model(lora.base_model.model, UDVConfig(rank=2, target_modules=["c_attn"]))


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
    with pytest.raises(ValueError, match="NaN or infinity"):
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
