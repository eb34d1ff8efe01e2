"""The LSTM model against torch.nn.LSTM and its equations, and adapters on every matrix of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness.models.lstm import (
    ADDITIVE,
    LSTMConfig,
    LSTMForCausalLM,
    LSTMLayer,
    effective_weight,
    register_lstm,
)

V, D, H = 37, 12, 16
TARGETS = ["embedding", "lstm.input", "lstm.recurrent", "head"]


def tiny_lstm(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: object) -> nn.Module:
    """Weights large enough that an error in any of them shows in the logits."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "embedding_size": D, "hidden_size": H, **fields}
    model = LSTMForCausalLM(LSTMConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model.to(dtype).eval()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(seed))


def base_logits() -> torch.Tensor:
    """Logits of the model without adapters, its weights frozen as PEFT freezes them.

    Torch picks another matrix product for the head when its weight requires a gradient, which with
    some libraries moves the last bit.
    """
    return tiny_lstm().requires_grad_(False)(tokens()).logits


def adapted(model: nn.Module, seed: int = 2, **fields: object) -> peft.PeftModel:
    """`model` under LoRA whose factors are all random, so that nothing is the identity."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    return randomized(peft.get_peft_model(model, config), seed)


def randomized(model: peft.PeftModel, seed: int = 2) -> peft.PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def equations(
    ids: torch.Tensor,
    e: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor,
    b_hh: torch.Tensor,
    w_out: torch.Tensor,
) -> torch.Tensor:
    """Logits (B, T, V) by the equations of an LSTM, one step at a time."""
    h = c = torch.zeros(len(ids), w_hh.shape[1], dtype=e.dtype)
    logits = []
    for t in range(ids.shape[1]):
        gates = e[ids[:, t]] @ w_ih.T + b_ih + h @ w_hh.T + b_hh
        i, f, g, o = gates.split(w_hh.shape[1], dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        logits.append(h @ w_out.T)
    return torch.stack(logits, dim=1)


# --------------------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch_lstm_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_lstm(dtype).train()
    embedding = nn.Embedding(V, D, dtype=dtype)
    lstm = nn.LSTM(D, H, batch_first=True, dtype=dtype)
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    twins = {
        "embedding.weight": embedding.weight,
        "lstm.input.weight": lstm.weight_ih_l0,
        "lstm.input.bias": lstm.bias_ih_l0,
        "lstm.recurrent.weight": lstm.weight_hh_l0,
        "lstm.recurrent.bias": lstm.bias_hh_l0,
        "head.weight": head.weight,
    }
    ours = dict(model.named_parameters())
    assert ours.keys() == twins.keys()
    with torch.no_grad():
        for name, twin in twins.items():
            twin.copy_(ours[name])
    logits = model(tokens()).logits
    expected = head(lstm(embedding(tokens()))[0])
    assert torch.equal(logits, expected)
    logits.float().pow(2).sum().backward()
    expected.float().pow(2).sum().backward()
    for name, twin in twins.items():
        assert twin.grad.abs().max() > 0
        assert torch.equal(ours[name].grad, twin.grad), name


def test_equals_its_equations_in_float64() -> None:
    model = tiny_lstm(torch.float64)
    lstm = model.lstm
    expected = equations(
        tokens(),
        model.embedding.weight,
        lstm.input.weight,
        lstm.recurrent.weight,
        lstm.input.bias,
        lstm.recurrent.bias,
        model.head.weight,
    )
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-12, atol=1e-12)


def test_loss_and_the_parts_of_the_output() -> None:
    model = tiny_lstm()
    ids = tokens()
    labels = ids.clone()
    labels[0, 4:] = -100
    out = model(input_ids=ids, labels=labels, output_hidden_states=True)
    expected = F.cross_entropy(
        out.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)
    inputs, hidden = out.hidden_states
    assert torch.equal(inputs, model.get_input_embeddings()(ids))
    assert torch.equal(model.get_output_embeddings()(hidden), out.logits)
    assert torch.equal(model(inputs_embeds=inputs).logits, out.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    right = torch.ones_like(ids)
    right[1, 6:] = 0
    assert torch.equal(model(ids, attention_mask=right).logits, out.logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


def test_a_token_changes_only_what_follows() -> None:
    model = tiny_lstm()
    ids = tokens()
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % V
    changed = (model(ids).logits != model(other).logits).any(dim=-1)
    assert changed[:, 5:].all()
    assert not changed[:, :5].any()


def test_generation_equals_a_loop() -> None:
    model = tiny_lstm()
    ids = tokens()
    expected = ids
    for _ in range(6):
        best = model(expected).logits[:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_lstm(dropout=0.5)
    expected = tiny_lstm()(tokens()).logits
    assert torch.equal(model(tokens()).logits, expected)
    assert not torch.allclose(model.train()(tokens()).logits, expected, atol=0.1)


def test_starts_as_torch_starts_an_lstm() -> None:
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=500, embedding_size=20, hidden_size=64))
    bounds = {"embedding": 0.1, "head": 0.1, "lstm.input": 64**-0.5, "lstm.recurrent": 64**-0.5}
    for name, parameter in model.named_parameters():
        bound = bounds[name.rpartition(".")[0]]
        assert 0.9 * bound < parameter.abs().max() <= bound, name


def test_learns_a_repeated_text() -> None:
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=V, embedding_size=D, hidden_size=H)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(V).log().item()) < 0.1
    assert losses[-1] < 0.3


# --------------------------------------------------------------------------- config, files, counts


@pytest.mark.parametrize("tied", [False, True])
def test_auto_classes_round_trip(tmp_path: Path, tied: bool) -> None:
    register_lstm()
    register_lstm()
    config = AutoConfig.for_model(
        "lstm",
        vocab_size=V,
        embedding_size=H,
        hidden_size=H,
        n_positions=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (model.head.weight is model.embedding.weight) == tied
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is LSTMForCausalLM
    assert (again.head.weight is again.embedding.weight) == tied
    assert again.config.max_position_embeddings == again.config.n_positions == 64
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_the_closed_form_on_the_meta_device(tied: bool) -> None:
    v, d, h, r = 4096, 256, 256, 8
    with torch.device("meta"):
        model = LSTMForCausalLM(LSTMConfig(tie_word_embeddings=tied))
    total = v * d + 4 * h * (d + h + 2) + (0 if tied else v * h)
    assert sum(p.numel() for p in model.parameters()) == total
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, v)
    if not tied:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=r, target_modules=TARGETS), low_cpu_mem_usage=True
        )
        trainable = r * ((v + d) + (d + 4 * h) + (h + 4 * h) + (h + v))
        assert model.get_nb_trainable_parameters() == (trainable, total + trainable)


# --------------------------------------------------------------------------- LoRA on every matrix


@pytest.mark.parametrize("targets", [*[[t] for t in TARGETS], TARGETS])
def test_active_merged_unloaded_disabled(targets: list[str]) -> None:
    ids = tokens()
    with torch.no_grad():
        expected = base_logits()
        model = adapted(tiny_lstm(), target_modules=targets)
        assert sorted(model.targeted_module_names) == sorted(targets)
        active = model(ids).logits
        assert (active - expected).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, active)
        model.merge_adapter()
        close = {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(model(ids).logits, active, **close)
        with model.disable_adapter():  # unmerges first, as PEFT's own layers do
            torch.testing.assert_close(model(ids).logits, expected, **close)
        torch.testing.assert_close(model(ids).logits, active, **close)
        unloaded = copy.deepcopy(model).merge_and_unload()
        assert type(unloaded) is LSTMForCausalLM
        assert type(unloaded.lstm.input) is type(unloaded.lstm.recurrent) is nn.Linear
        torch.testing.assert_close(unloaded(ids).logits, active, **close)
        dropped = model.unload()
        torch.testing.assert_close(dropped(ids).logits, expected, **close)


def test_logits_and_gradients_are_the_explicit_formula_in_float64() -> None:
    base = tiny_lstm(torch.float64)
    model = adapted(base, r=3, lora_alpha=6).train()  # scale alpha / r = 2
    out = model(tokens(), labels=tokens())
    out.loss.backward()

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_()

    factors, weights = {}, {}
    inner = model.base_model.model
    for name in TARGETS:
        layer = inner.get_submodule(name)
        if name == "embedding":  # stored transposed: A (r, V), B (d, r), W (V, d)
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors[name] = (a, leaf(a)), (b, leaf(b))
        product = factors[name][1][1] @ factors[name][0][1]
        delta = product.T if name == "embedding" else product
        weights[name] = layer.get_base_layer().weight.detach() + 2 * delta
    logits = equations(
        tokens(),
        weights["embedding"],
        weights["lstm.input"],
        weights["lstm.recurrent"],
        inner.lstm.input.base_layer.bias.detach(),
        inner.lstm.recurrent.base_layer.bias.detach(),
        weights["head"],
    )
    torch.testing.assert_close(out.logits, logits, rtol=1e-11, atol=1e-11)
    # transformers rounds the logits to float32 for its loss: follow it, and widen the tolerance.
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens()[:, 1:].flatten()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(TARGETS)
    assert all("lora_" in name for name in trained)
    for name, pairs in factors.items():
        for ours, theirs in pairs:
            assert theirs.grad.abs().max() > 1e-4
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_starts_as_the_base_and_moves_with_a_step() -> None:
    expected = base_logits()
    config = peft.LoraConfig(r=3, target_modules=TARGETS)
    model = peft.get_peft_model(tiny_lstm(), config).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert torch.equal(model(tokens()).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name in TARGETS:  # every adapter moved, not only the model as a whole
        layer = model.base_model.model.get_submodule(name)
        assert layer.get_delta_weight("default").abs().max() > 1e-5, name
    assert not torch.allclose(model(tokens()).logits, expected, atol=1e-3)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_adapter_round_trip(tmp_path: Path) -> None:
    model = adapted(tiny_lstm())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_lstm(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_several_adapters() -> None:
    model = adapted(tiny_lstm(), target_modules=["lstm.input", "lstm.recurrent"])
    first = model(tokens()).logits.detach()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lstm.recurrent"]))
    assert torch.equal(model(tokens()).logits, first)
    model.set_adapter("second")  # zero so far, and not on lstm.input at all
    assert torch.equal(model(tokens()).logits, base_logits())
    randomized(model)
    model.base_model.set_adapter(["default", "second"])
    both = model(tokens()).logits.detach()
    recurrent = model.base_model.model.lstm.recurrent
    weight, _ = effective_weight(recurrent, "lstm.recurrent")
    deltas = [recurrent.get_delta_weight(adapter) for adapter in ("default", "second")]
    assert all(delta.abs().max() > 1e-3 for delta in deltas)
    torch.testing.assert_close(weight, recurrent.base_layer.weight + sum(deltas))
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(merged(tokens()).logits, both, rtol=1e-5, atol=1e-5)


def test_bf16_base_rounds_as_merging_does() -> None:
    model = adapted(tiny_lstm(torch.bfloat16), target_modules=["lstm.input", "lstm.recurrent"])
    assert model.base_model.model.lstm.input.lora_A["default"].weight.dtype == torch.float32
    active = model(tokens()).logits
    model.merge_adapter()
    assert torch.equal(model(tokens()).logits, active)


@pytest.mark.parametrize("capability", [None, "AVX2"])
def test_bf16_autocast_trains(capability: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU without AVX-512, for which oneDNN has no LSTM in bf16."""
    with_onednn: list[Any] = []
    if capability is not None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        kernel = torch.lstm

        def noted(*args: Any) -> Any:
            with_onednn.append(torch.backends.mkldnn.enabled)
            return kernel(*args)

        monkeypatch.setattr(torch, "lstm", noted)
    model = adapted(tiny_lstm()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens(), labels=tokens())
    assert not any(with_onednn) and len(with_onednn) == (capability is not None)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    torch.testing.assert_close(out.logits.float(), model(tokens()).logits, rtol=0.1, atol=0.3)


# --------------------------------------------------------------------------- other tuners

MATRICES = ["lstm.input", "lstm.recurrent"]
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=MATRICES, total_step=10),
    "c3a": lambda: peft.C3AConfig(target_modules=MATRICES, block_size=4),
    "delora": lambda: peft.DeloraConfig(target_modules=MATRICES),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=MATRICES, n_frequency=9),
    "gralora": lambda: peft.GraloraConfig(target_modules=MATRICES, r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=MATRICES),
    "lokr": lambda: peft.LoKrConfig(target_modules=MATRICES),
    "lora": lambda: peft.LoraConfig(target_modules=MATRICES, use_rslora=True),
    "mica": lambda: peft.LoraConfig(target_modules=MATRICES, init_lora_weights="mica"),
    "randlora": lambda: peft.RandLoraConfig(target_modules=MATRICES, r=4),
    "shira": lambda: peft.ShiraConfig(target_modules=MATRICES, r=2),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=MATRICES),
    "unilora": lambda: peft.UniLoraConfig(target_modules=MATRICES),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=MATRICES, num_vectors=8, vector_length=4),
    "vera": lambda: peft.VeraConfig(target_modules=MATRICES, r=4),
    "waveft": lambda: peft.WaveFTConfig(target_modules=MATRICES, n_frequency=9),
}
NO_SUM: dict[str, tuple[Callable[[], peft.PeftConfig], type[Exception], str]] = {
    "dropout": (
        lambda: peft.LoraConfig(target_modules=MATRICES, lora_dropout=0.1),
        ValueError,
        r"lstm\.input.*lora_dropout=0\), got 0\.1",
    ),
    "rank_dropout": (
        lambda: peft.LoKrConfig(target_modules=MATRICES, rank_dropout=0.2),
        ValueError,
        r"lstm\.input.*got 0\.2",
    ),
    "bias": (
        lambda: peft.LoraConfig(target_modules=MATRICES, lora_bias=True),
        ValueError,
        "lora_bias",
    ),
    "dora": (
        lambda: peft.LoraConfig(target_modules=["lstm.recurrent"], use_dora=True),
        TypeError,
        r"lstm\.recurrent: DoraLinearVariant.*lora",
    ),
    "ia3": (
        lambda: peft.IA3Config(target_modules=MATRICES, feedforward_modules=[]),
        TypeError,
        "ia3",
    ),
    "oft": (lambda: peft.OFTConfig(target_modules=MATRICES, oft_block_size=4), TypeError, "oft"),
    "hira": (lambda: peft.HiraConfig(target_modules=MATRICES), TypeError, "hira"),
    "pvera": (lambda: peft.PveraConfig(target_modules=MATRICES, r=4), TypeError, "pvera"),
}


def test_every_method_taken_as_a_sum_is_tested() -> None:
    assert CONFIGS.keys() - {"mica"} == ADDITIVE


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_effective_weight_is_what_the_layer_itself_computes(method: str) -> None:
    model = randomized(peft.get_peft_model(tiny_lstm(), CONFIGS[method]())).train()
    inner = model.base_model.model
    for name in MATRICES:
        layer = inner.get_submodule(name)
        x = torch.randn(5, layer.get_base_layer().in_features)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        expected = layer(x)
        weight, bias = effective_weight(layer, name)
        y = F.linear(x, weight, bias)
        assert (y - layer.get_base_layer()(x)).abs().max() > 1e-4
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)
        grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        theirs = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in theirs)
        for ours, other in zip(grads, theirs, strict=True):
            assert (ours is None) == (other is None)
            if other is not None:
                tolerance = 1e-4 * other.abs().max().item() + 1e-6
                torch.testing.assert_close(ours, other, rtol=0, atol=tolerance)
    with torch.no_grad():
        model.eval()
        active = model(tokens()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(tokens()).logits, active, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", NO_SUM)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_a_sum_is_refused(case: str) -> None:
    config, error, message = NO_SUM[case]
    model = peft.get_peft_model(tiny_lstm(), config())
    with pytest.raises(error, match=message):
        model(tokens())
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, base_logits())


def test_dropout_elsewhere_is_fine() -> None:
    model = adapted(tiny_lstm(), target_modules=["head"], lora_dropout=0.5).train()
    logits = model(tokens()).logits
    assert not torch.equal(logits, model(tokens()).logits)


def test_a_tuner_from_outside_peft_needs_only_the_public_interface() -> None:
    class Doubling(nn.Module, BaseTunerLayer):
        """W + s W with one trained number s."""

        adapter_layer_names = ("scale",)

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.scale = nn.ParameterDict({"default": torch.ones(())})

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            return self.scale[adapter] * self.base_layer.weight

    torch.manual_seed(0)
    layer, plain = LSTMLayer(D, H), LSTMLayer(D, H)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        plain.recurrent.weight.mul_(2)
    x = torch.randn(2, 5, D)
    base = layer(x)
    layer.recurrent = Doubling(layer.recurrent)
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.recurrent.scale["default"].grad.abs() > 0
    layer.recurrent.enable_adapters(False)
    assert torch.equal(layer(x), base)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1, got -5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_hidden_layers": 2}, "one layer, got num_hidden_layers=2"),
        (
            {"tie_word_embeddings": True, "embedding_size": 8, "hidden_size": 16},
            "embedding_size == hidden_size, got 8 and 16",
        ),
    ],
)
def test_bad_configs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTMConfig(**fields)


def test_bad_calls() -> None:
    model = tiny_lstm()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens(), inputs_embeds=torch.zeros(3, 11, D))
    left = torch.ones_like(tokens())
    left[2, :4] = 0
    with pytest.raises(ValueError, match="pad on the right"):
        model(tokens(), attention_mask=left)
    with pytest.raises(ValueError, match="keeps no cache"):
        model(tokens(), past_key_values=SimpleNamespace())
