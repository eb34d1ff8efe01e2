"""What was prepared is found without reading the text, and a text that changed is noticed."""

import json
import os
import threading
import time
from dataclasses import replace

import pytest

from harness.config.errors import ConfigError
from harness.config.paths import PACKAGE
from harness.config.schema import DataConfig
from harness.data import documents, token_cache, token_data
from harness.system import digests


@pytest.fixture
def cfg(tmp_path):
    write(tmp_path / "a.jsonl", "fox")
    return DataConfig(
        "mine", "text_files", path=str(tmp_path / "a.jsonl"), context_length=32,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def write(path, animal):
    rows = [f"The {i:03}th story is about a {animal} and a dog. " * 6 for i in range(60)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def tokens(text):
    return [text.blocks[:], *(table[:] for table in text.held_out.values())]


def same(one, other):
    return repr(tokens(one)) == repr(tokens(other)) and one.facts == other.facts


def test_a_text_is_read_again_where_the_code_that_reads_it_changed(
    cfg, tokenizer, unread, monkeypatch
):
    """Once: its tables are found by what is in them."""
    token_data.prepare(cfg, tokenizer)
    monkeypatch.setattr(token_cache, "_code", lambda: "another version")
    assert not token_data.prepare(cfg, tokenizer).tokenized
    assert all(list(PACKAGE.glob(pattern)) for pattern in token_cache.READERS)
    unread()
    token_data.prepare(cfg, tokenizer)
    monkeypatch.setattr(token_cache, "_code", lambda: "a third")
    with pytest.raises(AssertionError, match="read again"):
        token_data.prepare(cfg, tokenizer)


@pytest.fixture
def unread(monkeypatch):
    """Call it, and from then on reading a text is an error."""

    def refuse(*_, **__):
        raise AssertionError("the text is read again")

    def stop():
        monkeypatch.setattr(documents, "corpus", refuse)
        monkeypatch.setattr(token_cache, "encode", refuse)

    return stop


def test_a_later_run_finds_the_text_without_reading_it(cfg, tokenizer, unread):
    first = token_data.prepare(cfg, tokenizer)
    alone, _ = token_data.prepare_test(cfg, tokenizer)
    unread()
    again = token_data.prepare(cfg, tokenizer)
    assert same(first, again) and again.num_documents == first.num_documents
    assert first.tokenized and not again.tokenized and again.facts["rule"]
    assert repr(token_data.prepare_test(cfg, tokenizer)[0][:]) == repr(alone[:])
    for change in ({"context_length": 16}, {"test_share": 0.2}, {"split": "contiguous"}):
        with pytest.raises(AssertionError, match="read again"):
            token_data.prepare(replace(cfg, **change), tokenizer)
    with pytest.raises(AssertionError, match="read again"):
        token_data.prepare(cfg, tokenizer, begins=(7,))


def test_a_changed_file_is_noticed_within_a_process(cfg, tokenizer, tmp_path):
    first = token_data.prepare(cfg, tokenizer)
    file = tmp_path / "a.jsonl"
    before = file.stat()
    write(file, "cat")  # the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time
    again = token_data.prepare(cfg, tokenizer)
    assert again.tokenized and not same(first, again)
    assert " cat " in tokenizer.decode(again.blocks[0]["tokens"])


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_remembered(
    cfg, tokenizer, tmp_path, monkeypatch
):
    encode = token_cache.encode

    def meanwhile(docs, words):
        write(tmp_path / "a.jsonl", "cat")
        return encode(docs, words)

    monkeypatch.setattr(token_cache, "encode", meanwhile)
    with pytest.raises(ConfigError, match=r"a\.jsonl changed while it was read"):
        token_data.prepare(cfg, tokenizer)
    monkeypatch.setattr(token_cache, "encode", encode)
    write(tmp_path / "a.jsonl", "fox")
    assert " fox " in tokenizer.decode(token_data.prepare(cfg, tokenizer).blocks[0]["tokens"])


def test_a_manifest_or_table_that_is_damaged_is_made_again(cfg, tokenizer, tmp_path):
    first = token_data.prepare(cfg, tokenizer)
    (manifest,) = (tmp_path / "cache" / "prepared").glob("*.json")
    for damaged in ("", "[]", '{"tables": {"train": "gone"}}'):
        manifest.write_text(damaged)
        assert same(token_data.prepare(cfg, tokenizer), first)
    for file in (tmp_path / "cache" / "tokens").glob("*/*.arrow"):
        whole = file.read_bytes()
        file.unlink()  # which is mapped into memory: it is not to be cut
        file.write_bytes(whole[:-100])
    assert same(token_data.prepare(cfg, tokenizer), first)


def test_a_second_run_waits_for_the_first_to_prepare_and_says_so(
    cfg, tokenizer, unread, monkeypatch, capfd
):
    started, go_on = threading.Event(), threading.Event()
    made = token_cache._made

    def slowly(*asked):
        started.set()
        assert go_on.wait(60)
        return made(*asked)

    monkeypatch.setattr(token_cache, "_made", slowly)
    found = []
    runs = [
        threading.Thread(target=lambda: found.append(token_data.prepare(cfg, tokenizer)))
        for _ in range(2)
    ]
    runs[0].start()
    assert started.wait(60)
    runs[1].start()
    deadline = time.monotonic() + 60
    said = ""
    while "waiting for it" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.05)
    assert "another run prepares data=mine: waiting for it" in said
    go_on.set()
    for run in runs:
        run.join(60)
    assert sorted(text.tokenized for text in found) == [False, True] and same(*found)


def test_many_small_files_are_not_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "LARGE_BYTES", 100)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    named = [(file.name, file) for file in sorted(tmp_path.glob("*.txt"))]
    first = digests.of_files(named, str(tmp_path / "cache"))
    hashed = []
    of_file = digests.of_file
    monkeypatch.setattr(digests, "of_file", lambda f, c: hashed.append(f) or of_file(f, c))
    assert digests.of_files(named, str(tmp_path / "cache")) == first and not hashed
    assert digests.of_files(named[::-1], str(tmp_path / "cache")) != first
    (tmp_path / "7.txt").write_text("text 8")
    hashed.clear()
    assert digests.of_files(named, str(tmp_path / "cache")) != first and hashed


def test_text_that_is_not_known_by_content_is_never_found(cfg):
    for content in ("", "packages:kjv 1", "unknown: no network"):
        token_cache.keep(cfg, content, "k", token_cache.Manifest({}, {}, {}, []))
        assert token_cache.find(cfg, content, "k") is None


def test_a_file_that_changes_between_the_two_readings_leaves_no_table(
    cfg, tokenizer, tmp_path, monkeypatch
):
    """The first reading finds the splits, the second one tokenises."""
    first = repr(
        tokens(token_data.prepare(replace(cfg, cache_dir=str(tmp_path / "other")), tokenizer))
    )
    corpus = documents.corpus

    def meanwhile(*asked):
        found = corpus(*asked)
        write(tmp_path / "a.jsonl", "cat")
        return found

    monkeypatch.setattr(documents, "corpus", meanwhile)
    with pytest.raises(ConfigError, match=r"a\.jsonl changed while it was read"):
        token_data.prepare(cfg, tokenizer)
    monkeypatch.setattr(documents, "corpus", corpus)
    write(tmp_path / "a.jsonl", "fox")
    assert repr(tokens(token_data.prepare(cfg, tokenizer))) == first
