"""What the probes say of architectures, against what transformers computes for each of them."""

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from scored_documents import documents
from transformers import AutoConfig, AutoModelForCausalLM

from harness.config.errors import ConfigError
from harness.config.schema import GenerateConfig
from harness.data.pairs import Pair
from harness.data.token_tables import IGNORE
from harness.evaluation import generation, probes, sliding_window
from harness.models.next_token import NextToken

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "num_key_value_heads": 2, "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def build(kind, initializer_range=0.2, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, initializer_range=initializer_range, **SMALL | fields)
    return AutoModelForCausalLM.from_config(config).eval()


def causal(model, most=128):
    return probes.check_causal(NextToken(model), "mine", probes.config_of(model), most)


def batching(model, widest=96):
    return probes.batching(NextToken(model), "mine", probes.config_of(model), widest)


@pytest.mark.parametrize("initializer_range", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("kind", ["bert", "roberta"])  # 0.002: told in float64
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind, initializer_range):
    with pytest.raises(ConfigError, match=rf"model=mine: a {kind} model .*is_decoder"):
        causal(build(kind, initializer_range, is_decoder=False))
    assert causal(build(kind, initializer_range, is_decoder=True))


@pytest.mark.parametrize("initializer_range", [0.002, 0.2])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "phi3", "mamba"])
def test_a_causal_model_passes_with_large_and_small_weights(kind, initializer_range):
    assert causal(build(kind, initializer_range))


def test_prompts_and_narrow_weights_change_nothing_of_it():
    prompts = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    assert causal(peft.get_peft_model(build("gpt2"), prompts), 100)
    assert causal(build("llama").bfloat16())
    with pytest.raises(ConfigError, match="is_decoder"):
        causal(build("bert", is_decoder=False).bfloat16())


@pytest.mark.parametrize(("ahead", "is_found"), [(8, True), (40, True), (90, False)])
def test_what_looks_ahead_is_found_as_far_as_the_probe_reaches(ahead, is_found):
    """Each embedding has in it that of the token so many further on."""
    model = build("gpt2")

    def look(module, inputs, output):
        further = torch.zeros_like(output)
        further[:, :-ahead] = output[:, ahead:]
        return output + further

    model.get_input_embeddings().register_forward_hook(look)
    assert (ahead < probes.CAUSAL_LENGTH) == is_found
    if is_found:
        with pytest.raises(ConfigError, match="sees what it is to predict"):
            causal(model)
    else:
        assert causal(model)


def test_a_model_that_reacts_to_nothing_does_not_pass_in_silence(tiny, capsys):
    for parameter in tiny.parameters():
        parameter.data.zero_()
    assert not causal(tiny, 32)
    assert "could not be told" in capsys.readouterr().err


def test_most_models_may_share_padded_batches(tiny):
    assert batching(tiny, 32) == batching(build("llama")) == batching(build("opt")) == "padded"
    assert batching(build("phi3", **LONGROPE), 32) == "padded"  # below where the factors change


@pytest.mark.parametrize("initializer_range", [0.002, 0.2])
def test_longrope_is_evaluated_a_width_at_a_time(initializer_range):
    assert batching(build("phi3", initializer_range, **LONGROPE)) == "one_width"


def test_nats_of_a_document_are_those_of_it_alone_with_longrope():
    model = build("phi3", **LONGROPE)
    docs = documents([5, 20, 20, 90, 60, 31, 33, 70])
    exact = []
    with torch.no_grad():
        for tokens in docs["tokens"]:
            ids = torch.tensor([[0, *tokens.tolist()]])
            logits = model(input_ids=ids[:, :-1]).logits[0]
            exact.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum").item())
    options = {"context": 96, "stride": 96, "bos": 0, "batch_tokens": 4096}
    nll, _ = sliding_window.document_nll(
        NextToken(model), docs, batching=batching(model), **options
    )
    np.testing.assert_allclose(nll, exact, rtol=1e-5)
    padded, _ = sliding_window.document_nll(NextToken(model), docs, **options)
    assert np.abs(padded / exact - 1).max() > 1e-3  # what this test is for


class Crowded(torch.nn.Module):
    """A NextToken whose nats move with the mean of its batch, or with how often it was asked."""

    def __init__(self, model, by):
        super().__init__()
        self.inner, self.model, self.by, self.calls = NextToken(model), model, by, 0

    def forward(self, inputs, targets):
        found = self.inner(inputs, targets)
        self.calls += 1
        by = found.nats.mean() if self.by == "neighbours" else self.calls
        return found._replace(nats=torch.where(targets == IGNORE, 0, found.nats + 0.01 * by))


def test_rows_that_change_their_neighbours_are_evaluated_alone(tiny):
    crowded = Crowded(tiny, "neighbours")
    assert probes.batching(crowded, "mine", tiny.config, 32) == "one_row"
    with pytest.raises(ConfigError, match="given before"):
        probes.batching(Crowded(tiny, "calls"), "mine", tiny.config, 32)


def test_batches_hold_one_width_or_one_row_where_asked():
    todo = list(sliding_window.windows([3, 7, 7, 7, 2, 3], 8, 8))
    assert list(sliding_window._batches(todo, 21)) == [[1, 2, 3], [0, 5, 4]]
    assert list(sliding_window._batches(todo, 14, "one_width")) == [[1, 2], [3], [0, 5], [4]]
    assert all(len(batch) == 1 for batch in sliding_window._batches(todo, 99, "one_row"))


def test_pairs_that_would_change_one_another_in_training_are_refused(make_run):
    model = build("phi3", **LONGROPE)
    predicts, config = NextToken(model), model.config

    def check(*overrides):
        shape = ("data=e2e_nlg", "data.context_length=96", "train.batch_tokens=768")
        probes.check_blocks(predicts, make_run(*shape, *overrides), config)

    with pytest.raises(ConfigError, match=r"set data\.packing=padded"):
        check()
    with pytest.raises(ConfigError, match=r"micro_batch=8.*set train\.micro_batch=1"):
        check("data.packing=padded")
    check("data.packing=padded", "train.micro_batch=1")


@pytest.mark.parametrize(
    ("kind", "fields", "expected"), [("phi3", LONGROPE, "one_width"), ("llama", {}, "padded")]
)
def test_a_completion_is_that_of_its_prompt_alone(kind, fields, expected, tokenizer):
    model = build(kind, **fields | {"vocab_size": len(tokenizer)})
    texts = ["a house", "the river", "light and stone " * 12, "bread"]
    todo = [Pair(str(i), text, ["x"]) for i, text in enumerate(texts)]
    asked = GenerateConfig(num_beams=1, max_new_tokens=6, no_repeat_ngram=0)
    cpu = Accelerator(cpu=True)
    found = generation.check(model, tokenizer, todo, asked, cpu, 128)
    assert found == expected
    alone = [generation.complete(model, tokenizer, [pair], asked, cpu).texts[0] for pair in todo]
    assert generation.complete(model, tokenizer, todo, asked, cpu, found).texts == alone
    padded = generation.complete(model, tokenizer, todo, asked, cpu, "padded").texts
    assert (padded == alone) == (found == "padded")
