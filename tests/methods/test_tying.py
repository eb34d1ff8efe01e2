"""Tied embeddings, padded vocabularies and modules_to_save: counts, saving, merging."""

import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from harness.config.errors import ConfigError
from harness.methods import adapt
from harness.methods.weight_tying import merged
from harness.models import model_size, pretrained, weights
from harness.training import checkpoint

V, D, IDS = 80, 16, torch.arange(1, 41).reshape(2, 20)  # 80 rows, of which a tokenizer may have 64
BASES = {
    "gpt2": GPT2Config(
        vocab_size=V, n_positions=32, n_embd=D, n_layer=2, n_head=2, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    ),
    "tied": LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=True,
    ),
    "untied": LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
LORA = ["method=lora", "method.r=2"]
ENDS = 2 * (V + D)  # LoRA of rank 2 on an embedding or a head
BODY = {  # LoRA of rank 2 on every matrix of the two blocks
    "gpt2": 2 * 16 * 2 * D,
    "tied": 2 * 2 * (2 * (D + D) + 2 * (D + 8) + 3 * (D + 24)),
}
BODY["untied"] = BODY["tied"]
SAVE = "+method.fields.modules_to_save="
CASES = {  # overrides -> trainable parameters
    "embeddings": ([*LORA, "targets=embeddings"], lambda kind: ENDS),
    "head": ([*LORA, "targets=head"], lambda kind: ENDS),
    "ends": ([*LORA, "targets=ends"], lambda kind: 2 * ENDS),
    "save_first": ([*LORA, SAVE + "[FIRST]"], lambda kind: BODY[kind] + V * D),
    "save_head": ([*LORA, SAVE + "[lm_head]"], lambda kind: BODY[kind] + V * D),
    "save_both": ([*LORA, SAVE + "[FIRST,lm_head]"], lambda kind: BODY[kind] + 2 * V * D),
    "save_tied": (
        [*LORA, SAVE + "[lm_head]", "+method.fields.ensure_weight_tying=true"],
        lambda kind: BODY[kind] + V * D,  # one weight
    ),
    "udv": (["method=udv", "method.rank=4", "targets=ends"], lambda kind: 8),
    "udv_keep": (
        ["method=udv", "method.rank=4", "method.residual=keep", "targets=embeddings"],
        lambda kind: 4,
    ),
    "truncate": (["method=truncate", "method.rank=4", "targets=embeddings"], lambda kind: 0),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def base(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES[request.param]).save_pretrained(tmp_path / "base")
    return request.param, tmp_path / "base"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES, indirect=True)
def test_counts_merging_and_saving(base, case, make_run, tokenizer, tmp_path):
    kind, folder = base
    overrides, expected = CASES[case]
    if case == "save_tied" and kind == "untied":
        pytest.skip("nothing is tied: see the refusals")
    first = "wte" if kind == "gpt2" else "embed_tokens"
    overrides = [text.replace("FIRST", first) for text in overrides]
    run = make_run(
        "model=local",
        f"model.path={folder}",
        "data.context_length=32",
        "save_merged=always",
        *overrides,
    )
    plain = pretrained.load_model(run, pretrained.load_config(run.model))
    total = model_size.count_parameters(plain).total
    head = 0 if kind != "untied" else V * D
    assert total == V * D + head + sum(
        p.numel()
        for name, p in plain.named_parameters()
        if not name.endswith((first + ".weight", "lm_head.weight"))
    )
    model = adapt(plain, run)
    counted = model_size.count_parameters(model)
    assert counted.trainable == expected(kind)
    assert counted.total == total + counted.trainable
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    active = logits(model)
    assert case == "truncate" or not torch.allclose(
        active, logits(AutoModelForCausalLM.from_pretrained(folder))
    )
    saved = checkpoint.export(model, tokenizer, tmp_path, merged=True)
    assert saved == (["model"] if case == "truncate" else ["adapter", "model"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(whole), active, rtol=1e-4, atol=1e-4)
    if case == "save_tied":
        assert model_size.count_parameters(whole).total == total  # tied as before
    if "adapter" in saved:
        again = AutoModelForCausalLM.from_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
        torch.testing.assert_close(logits(loaded), active, rtol=1e-4, atol=1e-4)
        again = AutoModelForCausalLM.from_pretrained(folder)
        alone = logits(again)
        loaded = weights.load_adapter(again, tmp_path / "adapter")  # its names, too
        torch.testing.assert_close(logits(loaded), active, rtol=1e-4, atol=1e-4)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), alone)
    if case == "save_tied":
        first, last = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert first.weight is last.weight


@pytest.mark.parametrize("base", ["gpt2", "tied"], indirect=True)
def test_pefts_own_merge_moves_the_tied_head_too(base, make_run):
    """What `merged` is for: without it the logits change."""
    _, folder = base
    run = make_run(
        "model=local", f"model.path={folder}", "data.context_length=32", *LORA, "targets=embeddings"
    )
    different = []
    for merge in (lambda model: model.merge_and_unload(), merged):
        torch.manual_seed(1)
        model = adapt(pretrained.load_model(run, pretrained.load_config(run.model)), run)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        active = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            different.append((logits(merge(model)) - active).abs().max().item())
    assert different[0] > 0.1 and different[1] < 1e-4


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        ("untied", [SAVE + "[lm_head]"], "nothing that trains is tied here"),
        (
            "gpt2",
            [SAVE + "[wte]"],
            r"nothing that trains is tied here.*modules_to_save=\[lm_head\]",
        ),
        ("tied", ["targets=ends"], "two parameters over one memory"),
        ("tied", ["targets=embeddings"], "two parameters over one memory"),
    ],
    indirect=["base"],
)
def test_tying_that_peft_does_not_do_is_refused(base, overrides, message, make_run):
    _, folder = base
    tie = "+method.fields.ensure_weight_tying=true"
    run = make_run(
        "model=local", f"model.path={folder}", "data.context_length=32", *LORA, tie, *overrides
    )
    with pytest.raises(ConfigError, match=message):
        adapt(pretrained.load_model(run, pretrained.load_config(run.model)), run)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(make_run, tmp_path, tokenizer):
    AutoModelForCausalLM.from_config(BASES["gpt2"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = make_run("model=local", f"model.path={tmp_path}", "data.context_length=32")
    with pytest.raises(ConfigError, match=r"has 4096 ids, more than the model's vocabulary of 80"):
        pretrained.load_tokenizer(run.model, pretrained.load_config(run.model))
