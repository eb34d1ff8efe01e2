"""Evaluation against its definition, token by token in float64, and against lm-eval's own code."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from harness.config.paths import ASSETS_DIR
from harness.config.schema import DataConfig
from harness.data import documents, packing
from harness.evaluation import sliding_window
from harness.models.lstm import LSTMConfig, LSTMForCausalLM
from harness.models.next_token import NextToken

# No overlap, half a window, one token at a time, and a stride that divides nothing.
WINDOWS = [(32, 32), (32, 16), (24, 1), (32, 13)]


# --------------------------------------------------------------------------- the definition


def gpt2_mini() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini")


def opt() -> nn.Module:
    """Another transformer: ReLU, positions of its own counting, biases everywhere."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, init_std=0.2, dropout=0.0,
        bos_token_id=3, eos_token_id=3, pad_token_id=None,
    )  # fmt: skip
    return OPTForCausalLM(config)


def lstm() -> nn.Module:
    """No positions and no attention; gates that keep, so that what lies far back shows."""
    model = LSTMForCausalLM(LSTMConfig(vocab_size=37, embedding_size=12, hidden_size=16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    model.lstm.input.bias.data[16:32] += 4.0  # of the gates i, f, g, o the second
    return model


def definition(
    model: nn.Module, ids: list[int], bos: int, context: int, stride: int
) -> list[float]:
    """Nats of t_1 … t_n, each from a forward pass over what it is given and nothing after it.

    t_0 is `bos`. Windows end at C, C + S, C + 2 S, …, the last one with the document; t_j is given
    what the first window that holds it has before it. A window is `context` tokens of input.
    """
    sequence, nats = [bos, *ids], []
    for j in range(1, len(sequence)):
        end = context
        while end < j:
            end += stride
        end = min(end, len(ids))
        given = sequence[max(0, end - context) : j]
        with torch.no_grad():
            logits = model(torch.tensor([given])).logits[0, -1]
        assert logits.dtype == torch.float64
        nats.append(-logits.log_softmax(-1)[sequence[j]].item())
    return nats


@pytest.mark.parametrize(("context", "stride"), WINDOWS)
@pytest.mark.parametrize("make", [gpt2_mini, opt, lstm])
def test_nats_are_the_definitions_in_float64(make, context, stride):
    torch.manual_seed(0)
    model = make().eval()
    bos, vocabulary = 3, model.config.vocab_size
    rng = np.random.default_rng(0)
    # Empty, shorter than the context, as long, one more, several windows.
    tokens = [rng.integers(0, vocabulary, n).tolist() for n in (0, 1, 9, context, context + 1, 75)]
    nll, count = sliding_window.document_nll(
        NextToken(model), Dataset.from_dict({"tokens": tokens}),
        context=context, stride=stride, bos=bos, batch_tokens=100,
    )  # fmt: skip
    exact = copy.deepcopy(model).double()
    for i, ids in enumerate(tokens):
        nats = definition(exact, ids, bos, context, stride)
        # What float32 rounds: up to 7e-7 of a single token's 10 nats, below 1e-7 of longer sums.
        assert nll[i] == pytest.approx(math.fsum(nats), rel=1e-5, abs=0)
        assert count[i] == len(nats) == len(ids)


# --------------------------------------------------------------------------- lm-eval


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Short chapters of the King James test split, a verse, and a text of several alphabets.

    No text begins or ends with white space: there lm-eval, which counts the pieces between runs of
    white space, has one word more than `str.split`, an empty one.
    """
    kjv = documents.read(DataConfig("kjv", "kjv", validation_share=0.02, test_share=0.04))["test"]
    chosen = sorted((text for _, text in kjv), key=len)[:2]
    chosen += ["Jesus wept.", "A naïve façade – two  spaces,\ta tab\n\nand 日本語 🙂 in one line."]
    assert all(text == text.strip() for text in chosen)
    return chosen


def by_lm_eval(
    model: nn.Module, tokenizer: object, texts: list[str], context: int
) -> dict[str, float]:
    """What lm-eval's own model, task and aggregation make of `texts`, without the hub."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM

    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task = ConfigurableTask(
        config={
            "task": "texts",
            "custom_dataset": lambda **_: {"test": Dataset.from_dict({"text": texts})},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": metric} for metric in metrics],
        }
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=context, batch_size=8)
    found = run(lm, {"texts": task}, bootstrap_iters=0, log_samples=False)["results"]["texts"]
    assert found["sample_len"] == len(texts)
    return {metric: found[f"{metric},none"] for metric in metrics}


@pytest.mark.parametrize(("context", "stride"), [(256, 256), *WINDOWS])
def test_perplexities_are_those_of_lm_eval(texts, tokenizer, monkeypatch, context, stride):
    """lm-eval's windows do not overlap; with overlap, its own function is asked for more context.

    Its `context_len` is the tokens of context of a window's first prediction: C - S + 1 here.
    """
    pytest.importorskip("lm_eval", reason="lm_eval comes with the dev extra")
    import lm_eval.utils

    model = gpt2_mini().eval()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    table = Dataset(packing.rows([("", text) for text in texts], ids, pa.uint16()))
    assert min(map(len, table["tokens"])) < context < max(map(len, table["tokens"]))
    ours = sliding_window.quality(
        *sliding_window.document_nll(
            NextToken(model), table,
            context=context, stride=stride, bos=tokenizer.eos_token_id, batch_tokens=2048,
        ),
        table,
    )  # fmt: skip
    if stride < context:
        rolling = lm_eval.utils.get_rolling_token_windows

        def overlapping(context_len, **rest):
            assert context_len == 1
            return rolling(context_len=context - stride + 1, **rest)

        monkeypatch.setattr(lm_eval.utils, "get_rolling_token_windows", overlapping)
    theirs = by_lm_eval(model, tokenizer, texts, context)
    assert theirs == {
        "word_perplexity": pytest.approx(ours["word_perplexity"], rel=1e-4),
        "byte_perplexity": pytest.approx(2 ** ours["bits_per_byte"], rel=1e-4),
        "bits_per_byte": pytest.approx(ours["bits_per_byte"], rel=1e-4),
    }
