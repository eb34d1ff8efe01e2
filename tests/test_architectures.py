"""Models that are not GPT-2 through the loss, adapted and whole, against transformers' own."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.methods import adapt
from harness.models import pretrained
from harness.models.next_token import NextToken

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 48, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_positions": 64},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 4, "max_position_embeddings": 64,
    },
    "phi": {"intermediate_size": 48},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},  # caps its logits
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 5},
}  # fmt: skip
METHODS = {
    "none": ["method=none"],
    "full": ["method=full"],
    "lora": ["method=lora", "method.r=4"],
    "udv": ["method=udv", "method.train=udv", "method.rank=8"],
    "head": ["method=lora", "method.r=4", "targets=ends"],
    "saved_head": ["method=lora", "method.r=4", "+method.fields.modules_to_save=[lm_head]"],
}
IDS = torch.arange(42).reshape(2, 21) % 39  # with id 1, which OPT pads with


def build(kind):
    torch.manual_seed(0)
    fields = COMMON | KINDS[kind]
    if kind == "gpt_neo":
        del fields["num_hidden_layers"], fields["num_attention_heads"]
    config = AutoConfig.for_model(kind, initializer_range=0.2, use_cache=False, **fields)
    for name in pretrained.dropout_fields(config):
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_nats_and_gradients_are_those_of_transformers(kind, method, make_run):
    run = make_run("model=hub", "model.id=some/model", *METHODS[method])
    model = adapt(build(kind), run)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.train()
    expected = model(input_ids=IDS, labels=IDS).loss
    found = NextToken(model)(IDS[:, :-1], IDS[:, 1:])
    assert found.nats.shape == (2, 20)
    assert found.nats.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    if method == "none":
        return
    expected.backward()
    plain = gradients(model)
    (found.objective / 40).backward()
    mine = gradients(model)
    assert mine.keys() == plain.keys() and mine
    for name, gradient in plain.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
