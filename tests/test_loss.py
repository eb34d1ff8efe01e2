"""Head and loss in chunks against float64 autograd on whole logits, for every option."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from harness.data.token_tables import IGNORE
from harness.models import loss
from harness.models.loss import linear_nll
from harness.models.next_token import NextToken
from harness.training.memory import LiveTensors

N, D, V = 37, 16, 50
CHUNK_TOKENS = loss.chunk_tokens


@pytest.fixture(autouse=True, params=[1, 32])
def small_chunks(request, monkeypatch):
    """Several chunks, the last one short, several blocks of rows; with W's own rows, and more."""
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 8)
    monkeypatch.setattr(loss, "CPU_ROWS", 16)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    monkeypatch.setattr(loss, "ROWS_MULTIPLE", {("cpu", d): request.param for d in dtypes})


def problem(dtype, ignored):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    targets = torch.randint(0, V, (N,))
    if ignored:
        targets[::5] = IGNORE
        targets[8:16] = IGNORE  # a whole chunk
    return hidden, weight, targets


def reference(hidden, weight, targets, smoothing, scale=1.0):
    """Objective, nats and gradients from whole logits, in float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = h @ w.t()
    objective = F.cross_entropy(
        logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    (scale * objective).backward()
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return objective.detach(), nats.detach(), h.grad, w.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_equal_float64_autograd(dtype, tolerance, trained, ignored, smoothing):
    hidden, weight, targets = problem(dtype, ignored)
    expected = reference(hidden, weight, targets, smoothing, scale=0.25)
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    got = linear_nll(hidden, weight, targets, smoothing)
    (0.25 * got.objective).backward()
    for mine, exact in zip((*got, hidden.grad, weight.grad), expected, strict=True):
        if mine is not None:
            limit = tolerance * exact.abs().max().item()
            assert (mine.double() - exact).abs().max().item() <= limit
    assert (hidden.grad is None, weight.grad is None) == (trained == "weight", trained == "hidden")


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_products_accumulate_in_fp32(autocast):
    """Sums over 64 chunks: in bf16, whose last place is 1/256, they would stand still or drift."""
    torch.manual_seed(0)
    tokens = 512
    hidden = (1 + 0.1 * torch.randn(tokens, D)).bfloat16()
    weight, targets = torch.randn(V, D).bfloat16(), torch.full((tokens,), 3)
    logits = (hidden.float() @ weight.float().t()).bfloat16().double()  # rounded, as they are
    nats = torch.logsumexp(logits, 1) - logits[:, 3]
    p = torch.softmax(logits, 1)
    p[:, 3] -= 1
    exact = p.t() @ hidden.double()
    if autocast:
        hidden, weight = hidden.float(), weight.float()
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = linear_nll(hidden, weight, targets)
    got.objective.backward()
    assert got.nats.dtype == got.objective.dtype == torch.float32
    torch.testing.assert_close(got.nats.double(), nats, rtol=1e-5, atol=1e-5)
    assert got.objective.item() == pytest.approx(nats.sum().item(), rel=1e-6)
    assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
    worst = ((weight.grad.double() - exact).abs() / exact.abs().amax(1, keepdim=True)).max()
    assert worst <= (2e-3 if autocast else 4e-3)  # a product's rounding; in bf16 the result's


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem(torch.float32, False)
    hidden = (1e3 * hidden).requires_grad_()
    expected = reference(hidden, weight, targets, 0.0)
    got = linear_nll(hidden, weight, targets)
    got.objective.backward()
    assert torch.isfinite(got.nats).all() and torch.isfinite(hidden.grad).all()
    torch.testing.assert_close(got.nats.double(), expected[1], rtol=1e-5, atol=1e-2)


def test_a_second_backward_pass_is_refused_and_not_wrong():
    hidden, weight, targets = problem(torch.float32, False)
    got = linear_nll(hidden.requires_grad_(), weight, targets)
    got.objective.backward(retain_graph=True)
    with pytest.raises((RuntimeError, AttributeError)):
        got.objective.backward()


def test_tokens_x_vocabulary_is_never_held(monkeypatch):
    monkeypatch.setattr(loss, "chunk_tokens", CHUNK_TOKENS)
    tokens, vocabulary = 2048, 10_000
    hidden = torch.randn(tokens, D, requires_grad=True)
    weight, targets = torch.randn(vocabulary, D), torch.randint(0, vocabulary, (tokens,))
    with LiveTensors(nn.Module()) as live:
        linear_nll(hidden, weight, targets).objective.backward()
    assert live.peak < tokens * vocabulary * 4 / 6


def ids(vocabulary=64, batch=3, length=20):
    torch.manual_seed(1)
    return torch.randint(0, vocabulary, (batch, length))


def check_model(model, smoothing=0.0):
    """`NextToken` against the model's own logits: objective, nats, every gradient."""
    model = model.double()
    blocks = ids(model.config.vocab_size)
    got = NextToken(model, smoothing)(blocks[:, :-1], blocks[:, 1:])
    got.objective.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=blocks).logits[:, -20:-1].flatten(0, 1)
    exact = F.cross_entropy(
        logits, blocks[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
    )
    exact.backward()
    torch.testing.assert_close(got.objective, exact)
    assert mine.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_tied_head_that_trains(tiny, smoothing):
    check_model(tiny, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_adapter_on_the_head_goes_through_the_module(tiny, smoothing):
    config = peft.LoraConfig(
        r=2, target_modules=["lm_head", "c_attn"], fan_in_fan_out=True, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    check_model(peft.get_peft_model(tiny, config), smoothing)


@pytest.mark.parametrize("change", [lambda z: 0.5 * z, lambda z: 30 * torch.tanh(z / 30)])
def test_logits_that_are_changed_after_the_head_are_taken_whole(tiny, change):
    class Scaled(GPT2LMHeadModel):
        def forward(self, *arguments, **named):
            out = super().forward(*arguments, **named)
            out.logits = change(out.logits)
            return out

    model = Scaled(tiny.config)
    model.load_state_dict(tiny.state_dict())
    assert not NextToken(model)._owner and NextToken(tiny)._owner
    check_model(model, 0.1)


def test_prompts_take_positions_and_keep_their_mask(tiny):
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    check_model(peft.get_peft_model(tiny, config))


def test_another_architecture():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    check_model(LlamaForCausalLM(config))


def test_a_sliding_window_keeps_its_own_mask(tiny):
    assert NextToken(tiny)._config is tiny.config
    tiny.config.sliding_window = 4
    assert NextToken(tiny)._config is None


def test_an_architecture_that_asks_for_its_attention_by_name_keeps_it(tiny):
    class ByName(GPT2LMHeadModel):
        def forward(self, *arguments, **named):
            if self.config._attn_implementation != "sdpa":
                raise TypeError("no mask")
            return super().forward(*arguments, **named)

    model = ByName(tiny.config)
    assert NextToken(model)._config is None
    check_model(model)


def test_the_model_is_left_as_it_was(tiny):
    head, attention = tiny.lm_head, tiny.config._attn_implementation
    model = NextToken(tiny)
    names = set(tiny.state_dict())
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 10**6), ids(batch=1, length=4))
    assert tiny.lm_head is head and tiny.config._attn_implementation == attention
    assert {name.removeprefix("model.") for name in model.state_dict()} == names
    assert copy.deepcopy(model)(ids(), ids()).nats.shape == (3, 20)


def test_composed_and_fused_gelu_are_one_function():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).double().eval()
    fused = copy.deepcopy(plain)
    for block in fused.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh")
    torch.testing.assert_close(plain(ids()).logits, fused(ids()).logits, rtol=1e-12, atol=1e-12)
