"""A held-out text that is read in part: the same part for every run, recorded, and not mixed up."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import documents, subset, token_data
from harness.report import stats


@pytest.fixture
def cfg(tmp_path):
    rows = [f"The {i:03}th story is about a fox. " * (1 + i % 7) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return DataConfig(
        "mine", "text_files", path=str(tmp_path / "a.jsonl"), context_length=32,
        validation_share=0.2, test_share=0.3, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_the_part_is_of_whole_documents_in_the_order_of_their_hashes(cfg, tokenizer):
    whole = token_data.prepare(cfg, tokenizer)
    test = whole.held_out["test"]
    sizes = dict(zip(test["id"], token_data.document_sizes(test), strict=True))
    text = token_data.prepare(cfg, tokenizer, most={"test": 900, "validation": 10**6})
    part = text.held_out["test"]
    ranked = sorted(sizes, key=lambda key: hashlib.sha256(key.encode()).digest())
    count = len(part)
    assert 5 < count < 55 and set(part["id"]) == set(ranked[:count])
    assert sum(sizes[key] for key in ranked[:count]) <= 900
    assert sum(sizes[key] for key in ranked[: count + 1]) > 900
    assert len(text.held_out["validation"]) == 40 and text.num_documents["test"] == 60
    facts = text.facts["evaluated"]
    assert set(facts) == {"test"} and facts["test"]["documents"] == count
    assert facts["test"]["of_tokens"] == sum(sizes.values())
    rows = {row["id"]: row for row in whole.held_out["test"].with_format(None)}
    assert all(row == rows[row["id"]] for row in part.with_format(None))
    smaller = token_data.prepare(cfg, tokenizer, most={"test": 300}).held_out["test"]
    assert set(smaller["id"]) < set(part["id"])
    assert token_data.num_tokens(part) == facts["test"]["tokens"]  # as evaluation counts it
    assert token_data.document_sizes(part) == [len(row["tokens"]) for row in part]
    assert "evaluated" not in whole.facts


def test_one_document_is_read_however_long_and_a_prompt_with_all_its_completions():
    assert subset.within(["a", "b"], np.array([50, 60]), 1).shape == (1,)
    ids = ["p", "q", "p", "r", "q", "p"]
    for most in range(1, 60):
        rows = subset.within(ids, np.array([10, 10, 10, 5, 10, 10]), most)
        assert {i for i, key in enumerate(ids) if key in {ids[row] for row in rows}} == set(rows)


def test_what_is_predicted_of_evaluation_is_of_the_part(cfg, tokenizer):
    most = {"validation": 200, "test": 300}
    text = token_data.prepare(cfg, tokenizer, most=most)
    found = token_data.held_out_sizes(cfg, ("validation", "test"), tokenizer, most)
    assert found == [token_data.document_sizes(text.held_out[name]) for name in most]


def test_a_part_is_another_run_and_all_of_it_the_run_that_it_was(make_run):
    plain = make_run()
    assert "test_tokens" not in naming._values(plain)["evaluate"]
    parts = [make_run(f"evaluate.{key}_tokens=5000") for key in ("validation", "test")]
    assert len({naming.identity(run) for run in [plain, *parts]}) == 3
    for bad in ("evaluate.validation_tokens=0", "evaluate.test_tokens=-5"):
        with pytest.raises(ConfigError, match=r"expected 1 or more tokens, or null"):
            make_run(bad)
    with pytest.raises(ConfigError, match="reads the test set as a whole"):
        make_run("data=wikitext2", "evaluate=hf_guide", "evaluate.test_tokens=5000")


def test_runs_that_read_other_parts_are_not_compared():
    def evaluation(name, part):
        settings = {"context_length": 64} | ({"part": part} if part else {})
        one = np.array([[1.0, 2.0]]), np.array([3, 4])
        return stats.Evaluation(name, *one, (0,), ("a", "b"), settings)

    part = {"validation": {"documents": 5, "ids": "abc"}}
    whole, some = evaluation("whole", None), evaluation("some", part)
    stats.check([some, evaluation("again", part)])
    with pytest.raises(ConfigError, match="not evaluated alike: part is not given and"):
        stats.check([whole, some])


def test_a_long_validation_is_told_of(cfg, tokenizer, monkeypatch):
    monkeypatch.setattr(token_data, "LONG_TOKENS", 100)
    (said,) = token_data.prepare(cfg, tokenizer).warnings
    assert "evaluate.validation_tokens=100 reads a fixed part" in said
    assert token_data.prepare(cfg, tokenizer, most={"validation": 90}).warnings == []
    alone, facts = token_data.prepare_test(replace(cfg, name="other"), tokenizer, most=200)
    assert facts["documents"] == len(alone) < len(documents.read(cfg)["test"])
