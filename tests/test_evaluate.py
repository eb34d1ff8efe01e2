"""Against transformers' own loss, the sliding window's definition in float64, and closed forms."""

import math

import numpy as np
import pytest
import torch
from scored_documents import documents
from transformers import AutoConfig

from harness.evaluation import sliding_window
from harness.models.next_token import NextToken


def nll_of(model, docs, context, stride, batch_tokens=64):
    return sliding_window.document_nll(
        NextToken(model), docs, context=context, stride=stride, bos=0, batch_tokens=batch_tokens
    )


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (3, 1), (3, 3), (8, 1), (8, 3), (8, 8)])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 17])
def test_windows_score_every_token_once_with_enough_context(n, context, stride):
    scored = []
    for w in sliding_window.windows([n], context, stride):
        assert 0 < w.end - w.start <= context
        for target in range(w.end - w.scored, w.end):
            scored.append(target)
            seen = target - w.start + 1
            assert seen >= min(target + 1, context - stride + 1)
    assert scored == list(range(n))


def test_nll_equals_transformers_own_loss(tiny):
    docs = documents([30])
    nll, count = nll_of(tiny, docs, 32, 32)
    ids = torch.tensor([[0, *docs["tokens"][0].tolist()]])
    with torch.no_grad():
        assert nll[0] / count[0] == pytest.approx(tiny(ids, labels=ids).loss.item(), rel=1e-6)


def test_nll_does_not_depend_on_the_batch_size(tiny):
    docs = documents([5, 90, 33, 41, 2])
    one, _ = nll_of(tiny, docs, 16, 8, batch_tokens=1)
    many, _ = nll_of(tiny, docs, 16, 8, batch_tokens=4096)
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_the_model_comes_back_in_its_mode_and_without_gradients(tiny):
    tiny.train()
    nll_of(tiny, documents([9]), 8, 8)
    assert tiny.training and all(p.grad is None for p in tiny.parameters())


def test_the_metric_against_closed_forms():
    docs = documents([10, 30])
    nll, count = np.array([10.0, 70.0]), np.array([10, 30])
    got = sliding_window.quality(nll, count, docs)
    assert got == {
        "nll_nats": 80.0,
        "num_tokens": 40,
        "perplexity": pytest.approx(math.exp(2)),
        "word_perplexity": pytest.approx(math.exp(80 / 20)),
        "bits_per_byte": pytest.approx(80 / math.log(2) / (31 + 91)),
    }


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny):
    for p in tiny.parameters():
        p.data.zero_()
    docs = documents([50, 7])
    nll, counts = nll_of(tiny, docs, 16, 16)
    got = sliding_window.quality(nll, counts, docs)
    assert got["perplexity"] == pytest.approx(64, rel=1e-6)


def test_the_metric_refuses_nothing_and_survives_a_hopeless_model():
    with pytest.raises(ValueError, match="no token"):
        sliding_window.quality(np.array([0.0]), np.array([0]), documents([0]))
    got = sliding_window.quality(np.array([1e6]), np.array([10]), documents([10]))
    assert got["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("kind", "fields", "inner"),
    [
        ("gpt2", {"n_embd": 64}, 256),  # n_inner is null
        ("gpt_neo", {"hidden_size": 64}, 256),  # so is intermediate_size
        ("llama", {"hidden_size": 64, "intermediate_size": 96}, 96),
        ("bloom", {"hidden_size": 64}, 256),  # has neither
        ("mamba", {"hidden_size": 64, "expand": 2}, 128),
    ],
)
def test_an_evaluation_batch_fits_whatever_a_configuration_leaves_open(kind, fields, inner):
    """6 widths and the MLP's two in fp32: 64 MiB a layer."""
    config = AutoConfig.for_model(kind, **fields)
    assert sliding_window.batch_tokens(config) == 64 * 2**20 // (4 * (6 * 64 + 2 * inner))
