"""Text is read, tokenised and packed a part at a time, to the same tables as all of it at once."""

import hashlib
import json
import os
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import (
    documents,
    hub,
    overlap,
    packing,
    pairs,
    records,
    sources,
    token_cache,
    token_data,
    token_tables,
)

WORDS = "the river and a stone were by the old house of the king".split()  # noqa: SIM905
# Of each table, written down before texts were read a part at a time.
RECORDED = {
    "kjv": ["3751317632fea4c3", "40e3486ba4d9f780", "549e04f1cf5a3f74"],
    "text": ["db5fd7350ff9b226", "65de361ec9053c86", "a060899419770b48"],
    "padded": ["1c459ffa7a8a115c", "3ad83bd3c558cfb8", "a80ae6faa655bf9b"],
    "packed": ["39df75978a32b402", "3ad83bd3c558cfb8", "a80ae6faa655bf9b"],
}


@pytest.fixture
def texts(tmp_path):
    rows = [
        " ".join(WORDS[(i * k) % 13] for k in range(3, 40 + i % 50)) + f" {i}" for i in range(120)
    ]
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    pairs = [{"prompt": f"{row[:30]} {i % 50}", "completion": row} for i, row in enumerate(rows)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    own = DataConfig(
        "m", "text_files", path=str(tmp_path / "a.jsonl"), context_length=64, train_share=0.5
    )
    pair = DataConfig("m", "pairs", path=str(tmp_path / "p.jsonl"), context_length=256)
    kjv = DataConfig("kjv", "kjv", validation_share=0.003, test_share=0.003, train_share=0.02)
    found = {"kjv": kjv, "text": own, "padded": replace(pair, packing="padded"), "packed": pair}
    return {name: replace(cfg, cache_dir=str(tmp_path / "c")) for name, cfg in found.items()}


def digest(table):
    found = hashlib.sha256()
    for row in table.with_format(None):
        found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()[:16]


def digests(text):
    return [digest(text.blocks), *(digest(table) for table in text.held_out.values())]


@pytest.mark.parametrize(
    ("name", "batch_chars"),
    [("kjv", 3000), ("kjv", None), ("text", 1), ("text", 3000), ("text", None), ("padded", None),
     ("packed", None)],
)  # fmt: skip
def test_blocks_and_documents_are_those_of_recorded_runs(
    texts, tokenizer, name, batch_chars, monkeypatch
):
    monkeypatch.setattr(packing, "BATCH_CHARS", batch_chars or packing.BATCH_CHARS)
    assert digests(token_data.prepare(texts[name], tokenizer)) == RECORDED[name]


def test_no_more_than_a_batch_of_documents_is_held(texts, tokenizer, monkeypatch):
    read, waiting, encode = [], [], token_cache.encode

    def documents_of(file, cfg, whole):
        for found in texts_of(file, cfg, whole):
            read.append(found)
            yield found

    def encoded(some, tokenizer):
        waiting.append((len(read) - 120, sum(map(len, some))))  # 120 were read to split them
        return encode(some, tokenizer)

    texts_of = sources._texts
    monkeypatch.setattr(sources, "_texts", documents_of)
    monkeypatch.setattr(token_cache, "encode", encoded)
    monkeypatch.setattr(packing, "BATCH_CHARS", 2000)
    token_data.prepare(texts["text"], tokenizer)
    assert len(waiting) > 5 and waiting[0][0] < 30  # the first was tokenised before most were read
    assert max(chars for _, chars in waiting) < 2500


def test_tokens_are_the_narrowest_integers(texts, tokenizer):
    text = token_data.prepare(texts["text"], tokenizer)
    assert text.blocks.features["tokens"].feature.dtype == "uint16"
    assert all(t.features["tokens"].feature.dtype == "uint16" for t in text.held_out.values())

    def vocabulary(highest):
        return SimpleNamespace(get_vocab=lambda: {"a": 0, "b": highest}, eos_token_id=0)

    assert packing.narrowest(vocabulary(2**16 - 1)) == pa.uint16()
    assert packing.narrowest(vocabulary(2**16)) == pa.int32()


def test_a_failure_in_the_middle_leaves_nothing_half_made(texts, tokenizer, tmp_path, monkeypatch):
    calls, encode = [], token_cache.encode

    def fails(some, tokenizer):
        calls.append(some)
        if len(calls) == 4:
            raise MemoryError("in the middle")
        return encode(some, tokenizer)

    monkeypatch.setattr(packing, "BATCH_CHARS", 2000)
    monkeypatch.setattr(token_cache, "encode", fails)
    with pytest.raises(MemoryError):
        token_data.prepare(texts["text"], tokenizer)
    assert list((tmp_path / "c" / "tokens").iterdir()) == []
    assert digests(token_data.prepare(texts["text"], tokenizer)) == RECORDED["text"]


def test_what_a_killed_run_left_is_cleared_away_a_day_later(tmp_path):
    first, second = (token_tables.Writer(tmp_path / name) for name in "ab")
    for writer in (first, second):
        writer.write(pa.table({"a": [1]}))
    for path in (first.scratch / token_tables.TABLE, first.scratch):
        os.utime(path, (0, time.time() - token_tables.LEFT_SECONDS - 10))
    third = token_tables.Writer(tmp_path / "c")
    assert not first.scratch.exists() and second.scratch.exists()
    second.finish()
    third.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("seed", range(5))
def test_an_array_of_records_is_read_a_part_at_a_time(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    rows = [
        {"text": ']}\\" ,[{' * draw.randint(0, 30), "n": draw.choice([1, None, {"a": [1, "]"]}])}
        for _ in range(draw.randint(0, 40))
    ]
    indent = draw.choice([None, 1])
    (tmp_path / "a.json").write_text(" \n" + json.dumps(rows, indent=indent) + "\n ")
    monkeypatch.setattr(records, "CHARS", draw.choice([1, 7, 100]))
    assert [record for _, record in records.records(tmp_path / "a.json")] == rows


def test_copies_are_found_in_several_passes_as_in_one(monkeypatch):
    draw = np.random.default_rng(0)
    training = draw.integers(0, 50, 5000)
    held_out = {}
    for name in ("validation", "test"):
        starts = enumerate(draw.integers(0, 4900, 40))
        spans = [(i, training[at : at + 100 if i % 3 else at + 80]) for i, at in starts]
        held_out[name] = [
            (f"{name} {i}", draw.permutation(span) if i % 3 else span) for i, span in spans
        ]
    whole = overlap.shared(held_out, [training])
    assert all(len(found) == 14 for found in whole.values())
    monkeypatch.setattr(overlap, "AT_ONCE", 500)
    assert overlap.shared(held_out, [training[:2000], training[2000:]]) == whole


def test_a_walk_gives_every_document_its_place(texts):
    corpus = documents.corpus(texts["text"])
    found = documents.read(texts["text"])
    for split, rank, document in corpus.walk(documents.SPLITS):
        assert found[split][rank] == document
    key, text = found["test"][1]
    assert corpus.text("test", key) == text


# --------------------------------------------------------------------------- the hub's rows


@pytest.fixture
def rows(tmp_path):
    """A data set as the hub has it, in a folder: 60 rows to train on, 20 to test."""
    (tmp_path / "set").mkdir()
    for name, count in (("train", 60), ("test", 20)):
        lines = [{"text": f"{name} {i}. " + " ".join(WORDS[: 3 + i % 11])} for i in range(count)]
        lines[4]["text"] = None
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "set" / f"{name}.jsonl").write_text(text)
    return DataConfig(
        "t", "hub", id=str(tmp_path / "set"), context_length=16, cache_dir=str(tmp_path)
    )


@pytest.mark.parametrize("most", [None, 7, 1000])
def test_streamed_rows_are_the_rows_of_the_copy_on_the_disk(rows, most):
    whole = documents.read(replace(rows, max_rows=most))
    streamed = replace(rows, streaming=True, max_rows=most)
    for _, found in hub.hub_splits(streamed).values():
        assert isinstance(found, datasets.IterableDataset)
    assert documents.read(streamed) == whole
    corpus = documents.corpus(streamed)
    assert len(whole["test"]) == {None: 19, 7: 6, 1000: 19}[most]
    assert corpus.rule() == documents.corpus(replace(rows, max_rows=most)).rule()


def test_streamed_pairs_are_those_of_the_copy(rows, tmp_path):
    lines = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(40)]
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa/train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    cfg = replace(rows, source="pairs", id=str(tmp_path / "qa"), max_rows=30)
    found = pairs.read(cfg)
    assert sum(map(len, found.values())) == 30 and pairs.read(replace(cfg, streaming=True)) == found


def test_streaming_moves_no_identity_and_max_rows_does(make_run, rows):
    plain, streamed, fewer = (
        naming.identity(make_run("data=hub", f"data.id={rows.id}", *more))
        for more in ([], ["data.streaming=true"], ["data.max_rows=30"])
    )
    assert plain == streamed != fewer


def test_a_row_that_cannot_be_fetched_is_named(rows):
    def coming():
        yield from ({"text": f"row {i}"} for i in range(3))
        raise ConnectionError("the hub\ndoes not answer")

    fetched = hub.fetched(replace(rows, streaming=True), "train", coming())
    with pytest.raises(ConfigError, match=r"row 4 of train .*\(the hub does not answer\)"):
        list(fetched)
    with pytest.raises(ConnectionError):  # of a copy on the disk this is no matter of the hub
        list(hub.fetched(rows, "train", coming()))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=kjv", "data.streaming=true"], "data.streaming=True: data=kjv does not read it"),
        (["data=hub", "data.id=x/y", "data.max_rows=0"], "data.max_rows=0: expected 3 or more"),
        (["data=pairs", "data.path=p.jsonl", "data.max_rows=9"], "data.max_rows=9: data.path=p"),
    ],
)
def test_rows_of_what_is_not_on_the_hub_are_refused(
    make_run, tmp_path, monkeypatch, overrides, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError) as error:
        make_run("method=lora", *overrides)
    assert said in str(error.value)
