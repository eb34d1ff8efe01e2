"""Copies across splits, against sets of strings; near-copies, against every span written out."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from harness.config.schema import DataConfig
from harness.data import documents, overlap, pairs, token_data
from harness.results import run_record

WORDS = ["river", "stone", "light", "people", "walked", "slowly", "old", "house", "bread", "salt"]


def sentence(draw, words=60):
    return " ".join(draw.choice(WORDS) for _ in range(words))


def config(tmp_path, splits, **fields):
    """A data set of records that comes split, or of one file."""
    for name, texts in splits.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    fields = {"source": "hub", "id": str(tmp_path)} | fields
    return DataConfig("mine", context_length=32, cache_dir=str(tmp_path / ".cache"), **fields)


# --------------------------------------------------------------------------- near-copies


def by_spans(held_out, training):
    """The definition, span by span: a run of spans of 13 that covers 50 tokens, or all."""
    size, span = 13, 50
    there = {tuple(training[i : i + size]) for i in range(len(training) - size + 1)}
    found = []
    for key, ids in held_out:
        spans = [tuple(ids[i : i + size]) in there for i in range(len(ids) - size + 1)]
        needed = min(span, len(ids)) - size + 1
        if len(ids) >= size and any(
            all(spans[i : i + needed]) for i in range(len(spans) - needed + 1)
        ):
            found.append(key)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_shared_spans_are_those_written_out(seed):
    draw = np.random.default_rng(seed)
    training = draw.integers(0, 4096, 4000)
    held_out = []
    for i in range(60):  # a stretch of training in a text of its own, of many lengths
        length = int(draw.choice([5, 12, 13, 20, 49, 50, 51, 70]))
        start = int(draw.integers(0, len(training) - length))
        before, after = (draw.integers(0, 4096, int(draw.integers(0, 4)) * 20) for _ in range(2))
        held_out.append(
            (f"d{i}", np.concatenate([before, training[start : start + length], after]))
        )
    expected = by_spans(held_out, training.tolist())
    assert 5 < len(expected) < 55
    cuts = np.sort(draw.integers(0, len(training), 300))  # pieces shorter than a span, and empty
    pieces = np.split(training.astype(np.int32), cuts)
    assert overlap.shared({"test": held_out}, pieces) == {"test": expected}


def test_a_span_of_fifty_tokens_is_one_and_of_forty_nine_is_none():
    training = np.arange(1000)
    own = np.arange(5000, 5100)
    held_out = {
        "validation": [("49", np.concatenate([own, training[7:56]]))],
        "test": [
            ("50", np.concatenate([own, training[7:57]])),
            ("13 of 13", training[:13]),
            ("12 of 12", training[:12]),
            ("13 of 14", training[:14] * (np.arange(14) < 13)),
        ],
    }
    found = overlap.shared(held_out, [training])
    assert found == {"validation": [], "test": ["50", "13 of 13"]}
    assert overlap.shared({"test": []}, [training]) == {"test": []}
    assert overlap.shared(held_out, []) == {"validation": [], "test": []}


# --------------------------------------------------------------------------- what a run is told


def test_copies_across_a_split_that_the_source_has_are_counted_and_told(tmp_path, tokenizer):
    draw = random.Random(0)
    train, validation, test = ([sentence(draw) for _ in range(n)] for n in (40, 10, 20))
    train += [*validation[:3], *test[:5], train[0], test[0]]
    near = test[10].split()
    train.append(" ".join([*near[:55], "and another end"]))
    test[11] += " Its own words."
    train.append(test[11][:-3])
    cfg = config(tmp_path, {"train": train, "validation": [*validation, test[0]], "test": test})
    text = token_data.prepare(cfg, tokenizer)
    counts = text.facts["duplicates"]
    everything = [*train, *validation, test[0], *test]
    assert counts == {
        "documents": len(everything) - len(set(everything)),
        "validation_in_training": 4,
        "test_in_training": 5,
        "test_in_validation": 1,
    }
    assert text.facts["near_duplicates"] == {"validation": 0, "test": 2}
    assert [warning.split(": ")[1].split(" are ")[0] for warning in text.warnings] == [
        "4 of 11 validation documents",
        "5 of 20 test documents",
        "1 of 20 test documents",
        "2 of 20 test documents",
    ]
    assert "share 50 tokens" in text.warnings[-1] and "test/10" in text.warnings[-1]
    # What is not trained on is not in training.
    fewer = token_data.prepare(replace(cfg, train_share=0.05), tokenizer).facts["duplicates"]
    kept = {text for _, text in documents.read(replace(cfg, train_share=0.05))["train"]}
    assert fewer["test_in_training"] == len(kept & set(test)) < 5
    without = token_data.prepare(cfg, tokenizer, test=False)
    assert set(without.facts["duplicates"]) == {"documents", "validation_in_training"}
    assert set(without.facts["near_duplicates"]) == {"validation"}


def test_copies_in_one_file_are_in_one_split_and_counted(tmp_path, tokenizer):
    draw = random.Random(1)
    texts = [sentence(draw) for _ in range(20)] * 10
    path = str(tmp_path / "all.jsonl")
    cfg = config(tmp_path, {"all": texts}, source="text_files", id=None, path=path)
    found = documents.read(cfg)
    assert not {t for _, t in found["test"]} & {t for _, t in found["train"]}
    text = token_data.prepare(cfg, tokenizer)
    assert text.num_documents == {"train": 180, "validation": 10, "test": 10}
    assert text.facts["duplicates"] == {
        "documents": 180, "validation_in_training": 0, "test_in_training": 0,
        "test_in_validation": 0,
    }  # fmt: skip
    assert text.facts["near_duplicates"] == {"validation": 0, "test": 0}
    (warning,) = text.warnings
    assert "180 of 200 documents are duplicates" in warning


def test_what_is_shared_is_found_once_and_kept_with_the_tokens(tmp_path, tokenizer, monkeypatch):
    draw = random.Random(2)
    path = str(tmp_path / "all.jsonl")
    texts = [sentence(draw) for _ in range(20)]
    cfg = config(tmp_path, {"all": texts}, source="text_files", id=None, path=path)
    first = token_data.prepare(cfg, tokenizer)
    assert not first.warnings
    (kept,) = (tmp_path / ".cache" / "overlap").iterdir()
    kept.write_text("{half a file")  # a damaged one is made again
    assert token_data.prepare(cfg, tokenizer).facts == first.facts
    monkeypatch.setattr(overlap, "shared", None)
    assert token_data.prepare(cfg, tokenizer).facts == first.facts


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_prompts_and_completions_of_training_in_another_split(tmp_path, tokenizer, packing):
    draw = random.Random(3)
    rows = [{"prompt": f"item {i}", "completion": sentence(draw)} for i in range(30)]
    again = [rows[0], rows[1] | {"completion": "another"}, rows[2] | {"prompt": "new"}]
    short = [{"prompt": "shorter", "completion": " ".join(rows[3]["completion"].split()[:20])}]
    for name, part in {"train": rows, "valid": rows[:1], "test": [*again, *short]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "extra.jsonl").write_text(lines)
    (tmp_path / "notes.docx").write_text("x")
    cfg = DataConfig(
        "p", "pairs", path=str(tmp_path), context_length=256, cache_dir=str(tmp_path / ".cache"),
        packing=packing,
    )  # fmt: skip
    text = token_data.prepare(cfg, tokenizer)
    assert text.facts["duplicates"] == {
        "documents": 3, "validation_in_training": 1, "test_in_training": 2, "test_in_validation": 1,
    }  # fmt: skip
    assert text.facts["near_duplicates"] == {"validation": 0, "test": 2}  # `new` and `shorter`
    assert text.facts["left_out"]["files"] == 2
    said = "\n".join(text.warnings)
    assert "2 file(s) are left out" in said and "extra.jsonl" in said and "notes.docx" in said
    assert "2 of 4 test prompts are in training too, word for word" in said
    assert len(pairs.read(cfg)["train"]) == 30  # nothing is taken out


@pytest.mark.slow
def test_the_packaged_text_repeats_itself_and_is_not_warned_of(tmp_path, tokenizer):
    cfg = DataConfig("kjv", "kjv", validation_share=0.02, test_share=0.04, cache_dir=str(tmp_path))
    text = token_data.prepare(cfg, tokenizer)
    assert set(text.facts["duplicates"].values()) == {0} and not text.warnings
    # 1 Samuel 31 and 1 Chronicles 10 tell of Saul's death in the same words, and so on.
    assert text.facts["near_duplicates"] == {"validation": 3, "test": 3}


@pytest.mark.slow
def test_a_run_tells_once_of_copies_and_of_files_left_out(harness, tmp_path):
    draw = random.Random(4)
    texts = [sentence(draw) for _ in range(20)]
    (tmp_path / "f").mkdir()
    config(tmp_path / "f", {"train": texts, "test": texts[:5]})
    (tmp_path / "g").mkdir()
    config(tmp_path / "g", {"all": texts})
    (tmp_path / "g" / "more.docx").write_text("x")
    also = "{source: text_files, path: g, validation_share: 0.1, test_share: 0.1}"
    done = harness(
        "data=hub", "data.id=f", "data.context_length=32", "train.batch_tokens=256",
        "train.steps=2",
        "method=none", f"+evaluate.also.g={also}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("5 of 5 test documents are in training too, word for word") == 1
    assert done.stderr.count("1 file(s) are left out: g/more.docx") == 1
    ((run_dir, result),) = run_record.collect(tmp_path / "outputs" / "scratch")
    assert result["data"]["duplicates"]["test_in_training"] == 5
    assert "test documents are in training" in (run_dir / "log.txt").read_text()


@pytest.mark.slow
def test_a_further_text_that_is_in_training_is_counted(harness, tmp_path):
    """`b` has the records of `a` in another order: its test split is other documents."""
    lines = [json.dumps({"text": f"{n} is the number of this line. " * 12}) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    done = harness(
        "data=text_files", "data.path=a.jsonl", "method=none", "run_name=one",
        "evaluate.also={mine: {source: text_files, path: b.jsonl, test_share: 0.45}}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "outputs/scratch/one/result.json").read_text())
    count = record["data"]["further_in_training"]["mine"]
    assert count > 10
    assert f"evaluate.also.mine: {count} of " in done.stderr


def test_copies_that_differ_in_white_space_are_in_one_split_and_are_counted(tmp_path, make_run):
    """Short ones, too, which are too short to be near-duplicates."""
    file = tmp_path / "copies.jsonl"
    texts = [f"Note {i} of the river." + end for end in ("", "\n", " ") for i in range(20)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = make_run("data=text_files", f"data.path={file}", "data.test_share=0.2")
    corpus = documents.corpus(run.data)
    found = overlap.duplicates({name: corpus.index(name) for name in documents.SPLITS})
    assert len(found["documents"]) == 40
    assert found["test_in_training"] == found["validation_in_training"] == []
    words = {
        name: {text.strip() for _, text in docs} for name, docs in documents.held(corpus).items()
    }
    assert len(words["test"]) > 1 and not words["test"] & words["train"]
