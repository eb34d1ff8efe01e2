"""The user's own text: one file, every kind of file, encodings, and held-out files of one's own."""

import bz2
import gzip
import json
import lzma
import random
from dataclasses import replace

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import documents, pairs, passages
from harness.system import encodings, files

WORDS = ["the", "of", "and", "king", "lord", "house", "son", "day", "man", "earth", "über", "海"]


def paragraphs(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(20, 150))) + "." for _ in range(count)]


def config(path, **options):
    return DataConfig("mine", "text_files", path=path, **options)


def read(path, **options):
    return documents.read(config(str(path), **options))


def texts(path, **options):
    return sorted(text for docs in read(path, **options).values() for _, text in docs)


# --------------------------------------------------------------------------- one file


@pytest.mark.parametrize("name", ["book.txt", "book.md", "book.rst"])
def test_one_text_file_is_split_at_blank_lines(tmp_path, name):
    written = paragraphs(900)
    (tmp_path / name).write_text("\n \n\n".join(written) + "\n", "utf-8")
    found = read(tmp_path / name)
    pieces = sorted(
        (doc for docs in found.values() for doc in docs), key=lambda doc: int(doc[0].split("#")[1])
    )
    again = [p for _, piece in pieces for p in piece.split("\n \n\n")]
    assert again == written  # every paragraph once, whole, and in order
    sizes = [len(piece) for _, piece in pieces[:-1]]
    assert min(sizes) > 2900 and max(sizes) < 2 * passages.PASSAGE_CHARS
    assert len(found["test"]) == len(found["validation"]) == round(0.05 * len(pieces))
    rule = documents.corpus(config(str(tmp_path / name))).rule()
    assert "paragraphs" in rule["documents"] and rule["split"].startswith("hash:")


def test_passages_do_not_depend_on_how_the_text_comes_in():
    whole = "\n\n".join(paragraphs(150)) + "\n" + " ".join(paragraphs(200)) + "\n".join("ab" * 9000)
    expected = list(passages.cut([whole]))
    assert len(expected) > 20 and max(map(len, expected)) <= 4 * passages.PASSAGE_CHARS
    assert "".join("".join(expected).split()) == "".join(whole.split())  # nothing is lost
    draw = random.Random(1)
    for _ in range(5):
        ends = sorted(draw.choices(range(len(whole)), k=40))
        pieces = [whole[a:b] for a, b in zip([0, *ends], [*ends, len(whole)], strict=True)]
        assert list(passages.cut(pieces)) == expected


def test_a_short_text_is_split_too_and_one_of_a_few_words_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs(12)), "utf-8")
    assert all(read(tmp_path / "a.txt").values())
    (tmp_path / "a.txt").write_text("A few words.\n\nAnd more.\n\nEnd.", "utf-8")
    with pytest.raises(ConfigError, match=r"1 document.*longer text"):
        read(tmp_path / "a.txt")


def test_contiguous_splits_are_spans_in_the_order_of_the_source(tmp_path):
    written = [json.dumps({"text": f"record {i}"}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join([*written, written[3]]))
    found = read(tmp_path / "a.jsonl", split="contiguous", test_share=0.1, validation_share=0.1)
    numbers = {name: [int(t.split()[1]) for _, t in docs] for name, docs in found.items()}
    assert numbers == {  # a copy of what is in training is training
        "train": [*range(80), 3], "validation": [*range(80, 90)], "test": [*range(90, 100)],
    }  # fmt: skip
    one = documents.corpus(config(str(tmp_path / "a.jsonl"), split="contiguous"))
    assert one.rule()["split"].startswith("contiguous")


def test_a_new_key_makes_another_run_and_left_alone_the_run_that_it_was(make_run, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs(50)), "utf-8")
    (tmp_path / "t.txt").write_text("\n\n".join(paragraphs(50, 1)), "utf-8")
    asked = ["data=text_files", f"data.path={tmp_path / 'a.txt'}"]
    plain = make_run(*asked)
    more = ["data.split=contiguous", f"data.test_path={tmp_path / 't.txt'}", "data.encoding=utf-8"]
    identities = {
        naming.identity(make_run(*asked, *some)) for some in ([], *([key] for key in more))
    }
    assert len(identities) == 4
    assert not {"split", "test_path", "validation_path", "encoding"} & set(
        naming._values(plain)["data"]
    )
    known = naming.identity(make_run(*asked, more[1]))
    (tmp_path / "t.txt").write_text("\n\n".join(paragraphs(50, 2)), "utf-8")
    assert naming.identity(make_run(*asked, more[1])) != known  # test text by its content


# --------------------------------------------------------------------------- held-out files


def test_held_out_files_of_ones_own_are_these_splits(tmp_path):
    for name, seed in (("train", 0), ("valid", 1), ("test", 2)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs(60, seed)), "utf-8")
    own = {f"{name}_path": str(tmp_path / f"{file}.txt") for name, file in
           (("validation", "valid"), ("test", "test"))}  # fmt: skip
    found = read(tmp_path / "train.txt", **own)
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        assert "\n\n".join(text for _, text in found[split]) == "\n\n".join(paragraphs(60, seed))
    half = read(tmp_path / "train.txt", test_path=own["test_path"])
    assert half["test"] == found["test"] and half["validation"]
    joined = [text for split in ("train", "validation") for _, text in half[split]]
    assert sorted(joined) == sorted(text for _, text in found["train"])


def test_a_file_in_two_splits_is_refused(tmp_path, make_run):
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs(60)), "utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join(paragraphs(60, 1)), "utf-8")
    asked = ["data=text_files", f"data.path={tmp_path}", f"data.test_path={tmp_path / 'b.txt'}"]
    with pytest.raises(ConfigError, match=r"data\.test_path: .*b\.txt is also among .* train"):
        make_run(*asked)
    with pytest.raises(ConfigError, match=r"data\.test_path=x\.txt belongs to text of your own"):
        make_run("data=kjv", "data.test_path=x.txt")


def test_pairs_have_held_out_files_too(tmp_path):
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i}", "completion": "c"} for i in range(20)]
        (tmp_path / f"{name}.ndjson").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "README.md").write_text("# what these are")
    cfg = DataConfig("p", "pairs", path=str(tmp_path / "a.ndjson"))
    found = pairs.read(replace(cfg, test_path=str(tmp_path / "b.ndjson")))
    assert [pair.prompt for pair in found["test"]] == [f"b {i}" for i in range(20)]
    assert len(found["train"]) + len(found["validation"]) == 20
    (tmp_path / "b.ndjson").unlink()
    assert pairs.read(replace(cfg, path=str(tmp_path))) == pairs.read(cfg)  # notes are no pairs


# --------------------------------------------------------------------------- kinds of files


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress}


def arrow(table, opened):
    sink = pa.BufferOutputStream()
    with opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("end", PACK)
def test_every_kind_gives_the_same_records_however_compressed(tmp_path, end):
    written = [f"document {i}, with a comma\ta tab\nand a line" for i in range(9)]
    table = pa.table({"text": written, "other": range(9)})
    frame = table.to_pandas()
    lines = "\n".join(json.dumps({"text": text}) for text in written)
    parquet = pa.BufferOutputStream()
    frame.to_parquet(parquet)
    contents = {
        "a.jsonl": lines.encode(), "a.ndjson": lines.encode(),
        "a.json": json.dumps([{"text": text} for text in written]).encode(),
        "a.csv": frame.to_csv(index=False).encode(),
        "a.tsv": frame.to_csv(index=False, sep="\t").encode(),
        "a.parquet": parquet.getvalue().to_pybytes(),
        "a.arrow": arrow(table, pa.ipc.new_file), "b.arrow": arrow(table, pa.ipc.new_stream),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / f"{name}{end}").write_bytes(PACK[end](content))
        assert texts(tmp_path / f"{name}{end}") == written, name
    for kind in (".txt", ".md", ".rst"):
        folder = tmp_path / f"folder{kind}"
        folder.mkdir()
        for i, text in enumerate(written):
            (folder / f"{i}{kind}{end}").write_bytes(PACK[end](text.encode()))
        assert texts(folder) == written


@pytest.mark.parametrize("end", [end for end in PACK if end])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, end):
    packed = PACK[end](json.dumps({"text": "".join(paragraphs(50))}).encode())
    (tmp_path / f"a.jsonl{end}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match=rf"a\.jsonl{end} cannot be read"):
        read(tmp_path / f"a.jsonl{end}")


def test_a_list_of_paths_is_read_in_its_order_and_a_file_once(tmp_path, make_run):
    for name in "abc":
        rows = [json.dumps({"text": f"{name} {i}"}) for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    b, a = str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")
    assert [f.name for f in files.find_files([b, a, b])] == ["b.jsonl", "a.jsonl"]
    cfg = make_run("data=text_files", f"data.path=[{b},{a}]").data
    found = documents.read(cfg)
    assert sorted(t for docs in found.values() for _, t in docs) == sorted(
        f"{name} {i}" for name in "ab" for i in range(9)
    )
    with pytest.raises(ConfigError, match="expected a file, a folder, a glob or a list"):
        make_run("data=text_files", "data.path=[3]")


def test_a_saved_data_set_is_read_with_its_splits(tmp_path):
    def rows(name, count):
        return datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(count)]})

    rows("all", 30).save_to_disk(tmp_path / "one", num_shards=3)
    parts = {"train": rows("train", 30), "dev": rows("dev", 4), "test": rows("test", 5)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "one") == sorted(f"all {i}" for i in range(30))
    names = {"validation": "dev"}
    found = read(tmp_path / "several", split_names=names)
    assert {k: len(v) for k, v in found.items()} == {"train": 30, "validation": 4, "test": 5}
    assert files.left_out(str(tmp_path / "several")) == []
    hub = DataConfig("h", "hub", id=str(tmp_path / "several"), split_names=names)
    assert [[t for _, t in docs] for docs in documents.read(hub).values()] == [
        [t for _, t in docs] for docs in found.values()
    ]
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00003\.arrow is missing"):
        read(tmp_path / "one")


def test_notes_beside_records_are_no_text_and_a_folder_of_notes_is(tmp_path):
    (tmp_path / "README.md").write_text("what the records are")
    pd.DataFrame({"text": [f"r {i}" for i in range(5)]}).to_csv(tmp_path / "a.csv", index=False)
    assert texts(tmp_path) == [f"r {i}" for i in range(5)]
    assert files.left_out(str(tmp_path)) == [tmp_path / "README.md"]
    (tmp_path / "a.csv").unlink()
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"note {i}")
    assert texts(tmp_path) == ["note 0", "note 1", "note 2", "what the records are"]


# --------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("written", "asked"),
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-32", None),
     ("utf-16-le", "utf-16-le"), ("utf-16-be", "UTF_16BE"), ("shift_jis", "shift_jis"),
     ("utf-16", "cp1252"), ("gb18030", "gb18030")],
)  # fmt: skip
def test_text_is_the_same_in_every_encoding(tmp_path, written, asked):
    words = [p.replace("über", "uber") for p in paragraphs(60)]
    whole = "\r\n\r\n".join(words)
    for name, content in {
        "a.txt": whole,
        "a.jsonl": "\r\n".join(json.dumps({"text": w}, ensure_ascii=False) for w in words),
        "a.csv": pd.DataFrame({"text": words}).to_csv(index=False, lineterminator="\n"),
    }.items():
        (tmp_path / name).write_bytes(content.encode(written))
    assert list(encodings.chunks(tmp_path / "a.txt", asked)) and "".join(
        encodings.chunks(tmp_path / "a.txt", asked)
    ) == "\n\n".join(words)
    assert texts(tmp_path / "a.jsonl", encoding=asked) == sorted(words)
    assert texts(tmp_path / "a.csv", encoding=asked) == sorted(words)
    pieces = texts(tmp_path / "a.txt", encoding=asked)
    assert sorted(w for piece in pieces for w in piece.split("\n\n")) == sorted(words)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_no_text_are_refused_with_place_and_likely_encoding(tmp_path, name):
    text = "".join(f"{i:05}\n" for i in range(30_000)) + "caf\xe9 \x96 \n"
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    place = rf"line 30001: not UTF-8 text \(byte 0xe9 at offset {180_003:,}"
    start = name.replace(".", r"\.")
    if name == "a.jsonl":
        (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n')
        place = r"line 2: not UTF-8 text \(byte 0xe9 at offset 27"
    with pytest.raises(ConfigError, match=rf"{start}, {place}.*looks like cp1252.*data\.encoding="):
        read(tmp_path / name)
    assert texts(tmp_path / name, encoding="cp1252")


def test_utf_16_without_a_mark_a_nul_and_an_unknown_encoding_are_refused(tmp_path, make_run):
    file = tmp_path / "a.txt"
    asked = ["data=text_files", f"data.path={file}"]
    lines = "".join(f"plain words of line {i}\n" for i in range(900))
    file.write_bytes(lines.encode("utf-16-le"))
    with pytest.raises(ConfigError, match=r"looks like utf-16-le .*data\.encoding=utf-16-le"):
        make_run(*asked)
    assert make_run(*asked, "data.encoding=utf-16-le")
    with pytest.raises(ConfigError, match=r"data\.encoding=utf-61: no such encoding"):
        make_run(*asked, "data.encoding=utf-61")
    file.write_text("fine\n" * 3000 + "a\0b\n")
    with pytest.raises(ConfigError, match=r"a\.txt, line 3001: a NUL byte"):
        read(file)
    file.write_bytes(("fine\n" * 3000 + "odd").encode("utf-16") + b"\0")
    with pytest.raises(ConfigError, match=r"a\.txt, line 3001: not UTF-16 text .*truncated data"):
        read(file)


def test_records_without_text_are_counted(tmp_path):
    rows = [{"text": f"record {i}"} for i in range(20)] + [{"text": None}, {"text": " \n"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig("t", "text_files", path=str(file))
    said = "without text (null or white space): 2 of train"
    assert documents.corpus(cfg).rule()["left_out"] == said
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    assert "left_out" not in documents.corpus(cfg).rule()


def test_files_and_pieces_without_text_are_counted(tmp_path):
    pieces = [f"piece {i}\n" for i in range(9)]
    file = tmp_path / "a.txt"
    file.write_text("---\n".join([*pieces[:5], " \n", *pieces[5:], ""]))  # ends in a separator
    cfg = DataConfig("t", "text_files", path=str(file), document_separator="---\n")
    assert (
        documents.corpus(cfg).rule()["left_out"] == "without text (null or white space): 1 of train"
    )
    assert sorted(texts(file, document_separator="---\n")) == pieces
    folder = tmp_path / "notes"
    folder.mkdir()
    for i, text in enumerate(["one", "two", " \n\n", "three"]):
        (folder / f"{i}.txt").write_text(text)
    cfg = DataConfig("t", "text_files", path=str(folder))
    assert (
        documents.corpus(cfg).rule()["left_out"] == "without text (null or white space): 1 of train"
    )


def test_a_second_separator_is_the_completion_s(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"a{i}||b||c{i}\n" for i in range(5)))
    found = pairs.read(DataConfig("p", "pairs", path=str(tmp_path / "p.txt")))
    assert {(p.prompt, *p.completions) for s in found.values() for p in s} == {
        (f"a{i}", f"b||c{i}") for i in range(5)
    }
    (tmp_path / "p.txt").write_text("".join(f"a{i}||b||c{i}\n" for i in range(5)) + "d||e\n")
    rule = pairs.task(DataConfig("p", "pairs", path=str(tmp_path / "p.txt"))).rule
    assert rule["separator_again"] == "5 completions have '||' in them"


def test_records_of_which_none_has_text_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": " "}\n' * 9)
    with pytest.raises(ConfigError, match=r"0 document.s. cannot be split"):
        documents.read(DataConfig("t", "text_files", path=str(file)))
    good = tmp_path / "b.jsonl"
    good.write_text('{"text": "some"}\n' * 9)
    own = {"validation_path": str(good), "test_path": str(tmp_path / "c.jsonl")}
    (tmp_path / "c.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ConfigError, match="the train split has no text"):
        documents.read(DataConfig("t", "text_files", path=str(file), **own))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=book.txt"], "data=text_files data.path=book.txt"),
        (["data=docstrings", "data.path=book.txt"], "data=text_files data.path=book.txt"),
        (["data.id=me/mine"], "did you mean data=hub"),
        (["data.packages=[torch]"], "did you mean data=docstrings"),
        (["data=docstrings", "data.prompt_style=e2e"], "did you mean data=pairs"),
    ],
)
def test_a_key_that_the_source_does_not_read_is_refused(make_run, overrides, said):
    with pytest.raises(ConfigError) as error:
        make_run("method=lora", *overrides)
    key = overrides[-1].partition("=")[0]
    assert key in str(error.value) and said in str(error.value)
