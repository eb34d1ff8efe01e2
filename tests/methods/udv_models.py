"""Small models and what the tests of the `udv` tuner ask of them."""

import torch
from peft import get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from harness.methods.udv import UDVConfig, UDVLayer

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
