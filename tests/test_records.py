"""Reading people's files: the same as pandas, datasets and Python read, or refused by name."""

import bz2
import csv
import gzip
import json
import os
import random

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import documents, records
from harness.system import files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548117077\n"

# White space that str.splitlines() takes for a line's end, and what CSV and JSON escape.
ODD = [
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    ",",
    '"',
    "'",
    "\\",
    "\t",
    " ",
    "ü",
    "🎵",
]


def odd_texts(seed, count, ends=("\n",)):
    draw = random.Random(seed)
    letters = ["word", "x", *ODD, *ends]
    return ["a" + "".join(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(count)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    found = documents.read(DataConfig("mine", "text_files", path=str(path), **options))
    return sorted(text for docs in found.values() for _, text in docs)


# --------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("seed", range(5))
def test_csv_is_read_as_pandas_reads_it(tmp_path, seed, ends):
    texts = odd_texts(seed, 40, ["\n", "\r\n"])
    table = pd.DataFrame({"id": range(40), "text": texts, "empty": ""})
    path = tmp_path / "a.csv"
    table.to_csv(path, index=False, lineterminator=ends, encoding="utf-8-sig")
    expected = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    assert [record for _, record in records.records(path)] == expected
    assert [record["text"] for record in expected] == texts


def test_json_lines_are_those_of_datasets(tmp_path):
    texts = odd_texts(0, 200, ["\n", "\r\n", "\r"])
    lines = [json.dumps({"text": text, "n": i}, ensure_ascii=False) for i, text in enumerate(texts)]
    path = write(tmp_path / "a.jsonl", "\r\n".join(lines[:99]) + "\r\n\n" + "\n".join(lines[99:]))
    expected = datasets.load_dataset(
        "json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train"
    ).to_list()
    assert [record for _, record in records.records(path)] == expected
    assert [row["text"] for row in expected] == texts
    # One array of the same records, as json writes it.
    whole = write(tmp_path / "a.json", "\ufeff" + json.dumps(expected, indent=1))
    assert [record for _, record in records.records(whole)] == expected
    lines_too = write(tmp_path / "b.json", path.read_bytes())
    assert [record for _, record in records.records(lines_too)] == expected


def test_line_ends_are_python_s_in_every_format(tmp_path):
    texts = odd_texts(1, 9, ["\n", "\r\n", "\r"])
    for i, text in enumerate(texts):
        write(tmp_path / "t" / f"{i}.txt", text)
    expected = sorted(path.read_text("utf-8") for path in (tmp_path / "t").iterdir())
    assert "\r" in "".join(texts) and "\r" not in "".join(expected)
    rows = [{"text": text} for text in texts]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "a.json", json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["text"], *([t] for t in texts)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    write(tmp_path / "hub" / "train.jsonl", (tmp_path / "a.jsonl").read_bytes())
    for name in ("t", "a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert read(tmp_path / name) == expected, name
    hub = DataConfig("mine", "hub", id=str(tmp_path / "hub"))
    assert sorted(t for docs in documents.read(hub).values() for _, t in docs) == expected


# --------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,text\n1,a\n2,b, c, d\n3,e\n", "line 3: expected 2 fields as in the header, found 4"),
        ('id,text\n1,"a\nb"\n2,"c\n3,d\n', "line 4: not CSV .a quoted field does not end"),
    ],
)
def test_csv_that_pandas_refuses_is_refused_with_its_line(tmp_path, content, said):
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(pd.errors.ParserError):
        pd.read_csv(path)
    with pytest.raises(ConfigError, match=f"a.csv, {said}"):
        read(path)


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        # pandas fills these in, or takes the first columns for an index.
        ("a.csv", "text,id\na,1\nb\n", "line 3: expected 2 fields as in the header, found 1"),
        ("a.csv", "id,text\n1,a,b\n2,c,d\n", "line 2: expected 2 fields"),
        ("a.csv", "id,text,text\n1,a,b\n", "line 1: the header has 'text' twice"),
        ("a.csv", 'text\n"a" b\n', "line 2: not CSV"),
        ("a.csv", b"text\n" + b"a\n" * 5000 + b"b\0c\n", "line 5002: a NUL byte"),
        ("a.csv", b"text\na\ncaf\xe9\n", "line 3: not UTF-8 text .byte 0xe9"),
        ("a.jsonl", GOOD + b'{"text": "a", "text": "b"}\n', "line 2: not JSON .*'text' twice"),
        ("a.jsonl", GOOD + b'{"text": "a", "n": {"b": 1, "b": 2}}\n', "line 2: .*'b' twice"),
        ("a.jsonl", GOOD + b'{"text": "a", "n": NaN}\n', "line 2: not JSON .NaN"),
        ("a.jsonl", GOOD + b'{"text": "a", "n": -Infinity}\n', "line 2: not JSON .-Infinity"),
        ("a.jsonl", GOOD + b'{"text": "a"} {"text": "b"}\n', "line 2: not JSON .more after"),
        ("a.jsonl", b"\n" + GOOD + b'"a"\n', "line 3: expected a JSON object, found '\"a\"'"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "a\n', "line 2: not JSON"),
        ("a.jsonl", GOOD + b'{"text": 0}\n', "line 2: text is int, not text"),
        ("a.jsonl", GOOD + b'{"text": false}\n', "line 2: text is bool, not text"),
        ("a.jsonl", GOOD + b'{"text": ["a"]}\n', "line 2: text is list, not text"),
        ("a.jsonl", GOOD + b'{"text": "\\udc00"}\n', r"line 2, text: a lone surrogate .*\\udc00"),
        ("a.jsonl", GOOD + b'{"n": 1}\n', "line 2 has no such field"),
        ("a.json", "[" + '{"text": "a"}, 3]', "record 2: expected a JSON object, found '3]'"),
        ("a.json", '[{"text": "a"},]', "record 2: not JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "record 1: not JSON .expected , or ]"),
        ("a.json", '[{"text": "a"}', "record 1: not JSON"),
        ("a.json", '[{"text": "a"}] []', "not JSON .more after the array"),
        ("a.json", '{\n "text": "a"\n}', "line 1: not JSON"),
        ("a.txt", b"a" * 9000 + b"\n\xff\n", "line 2: not UTF-8"),
        ("a.txt", b"a" * 9000 + b"\n\0\n", "line 2: a NUL byte"),
        ("a.txt", "a text with words".encode("utf-16-le"), "looks like utf-16-le without a byte"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD * 500, mtime=0)[:-12],
            "cannot be read .Compressed file ended",
        ),
        ("a.jsonl.gz", GOOD, "cannot be read .Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl.zst", GOOD, "cannot be read .*ZSTD"),
        ("a.jsonl.7z", bz2.compress(GOOD), "is not one of .txt"),
        ("a.parquet.gz", gzip.compress(b"x", mtime=0), "is not a parquet file"),
    ],
)
def test_what_is_broken_or_ambiguous_is_refused_with_file_and_record(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=said) as error:
        read(path)
    assert name in str(error.value)


def test_parquet_of_other_types_is_refused_with_its_record(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([None, 1, 2])}), path)
    with pytest.raises(ConfigError, match=r"a\.parquet, record 2: text is int"):
        read(path)
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(ConfigError, match="two columns are called 'text'"):
        read(path)
    pq.write_table(pa.table({"text": pa.array([b"\xff", b"a"]).cast(pa.binary())}), path)
    with pytest.raises(ConfigError, match="record 1: text is bytes"):
        read(path)


def test_a_folder_that_datasets_reads_is_checked_first(tmp_path):
    rows = "".join(f"{i},a{i}, b\n" for i in range(9))
    path = write(tmp_path / "hub" / "train.csv", "id,text\n" + rows)
    assert list(pd.read_csv(path)["text"]) == [" b"] * 9  # the first column is an index to pandas
    with pytest.raises(ConfigError, match=r"train\.csv, line 2: expected 2 fields"):
        read_hub(tmp_path / "hub")
    path.unlink()
    write(tmp_path / "hub" / "train.jsonl", "".join(f'{{"text": {i}}}\n' for i in range(9)))
    with pytest.raises(ConfigError, match="train record 1: text is int, not text"):
        read_hub(tmp_path / "hub")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.json", b'{"text": "one", "text": "two"}', "the key 'text' twice"),
        ("train.json", b'[{"text": "one", "score": NaN}]', "NaN is not JSON's"),
        ("train.txt", b"one\n\xff\n", r"train\.txt, line 2: not UTF-8"),
        ("data/train.txt", POINTER, "git-lfs pointer"),
        ("train.parquet", POINTER, "git-lfs pointer"),
    ],
)
def test_what_datasets_would_read_another_way_is_refused(tmp_path, name, content, said):
    write(tmp_path / "hub" / name, content)
    with pytest.raises(ConfigError, match=said):
        read_hub(tmp_path / "hub")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz"])
def test_a_git_lfs_pointer_is_no_text(tmp_path, name):
    path = write(tmp_path / name, POINTER)
    with pytest.raises(ConfigError, match=r"git-lfs pointer .* run `git lfs pull`"):
        files.find_files(str(path))


def read_hub(path):
    return documents.read(DataConfig("mine", "hub", id=str(path)))


# --------------------------------------------------------------------------- folders


def numbered(name, count=3):
    return "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)).encode()


def test_every_text_of_a_folder_is_read_once_and_the_rest_is_named(tmp_path):
    folder, other = tmp_path / "f", tmp_path / "other"
    write(folder / "a.jsonl", numbered("a"))
    write(folder / "B.JSONL", numbered("B"))
    write(
        folder / "c.jsonl.gz",
        gzip.compress(numbered("c"), mtime=0) + gzip.compress(numbered("c2"), mtime=0),
    )
    write(folder / "d.Json", "[" + numbered("d").decode().strip().replace("\n", ",") + "]")
    write(folder / "e.csv.GZ", gzip.compress(b"text\ne 0\ne 1\ne 2\n", mtime=0))
    write(folder / "g.txt.gz", gzip.compress("\ufeffg 0".encode(), mtime=0))
    write(other / "h.jsonl", numbered("h"))
    with pa.CompressedOutputStream(str(folder / "z.jsonl.zst"), "zstd") as stream:
        stream.write(numbered("z"))
    (folder / "more").symlink_to(other)
    (folder / "sub").mkdir()
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "0again.jsonl").symlink_to(folder / "a.jsonl")
    (other / "back").symlink_to(folder / "sub")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    write(folder / "notes.pdf", b"%PDF")
    write(folder / "sub" / "image.png", b"\x89PNG")
    write(folder / ".DS_Store", b"\0\0")
    write(folder / ".cache" / "i.jsonl", numbered("i"))
    expected = [f"{n} {i}" for n in ("a", "B", "c", "c2", "d", "e", "h", "z") for i in range(3)]
    assert read(folder) == sorted([*expected, "g 0"])
    left_out = [str(path.relative_to(folder)) for path in files.left_out(str(folder))]
    assert left_out == ["gone.jsonl", "notes.pdf", "sub/image.png"]
    found = documents.read(DataConfig("mine", "text_files", path=str(folder)))
    names = {key.partition("#")[0] for docs in found.values() for key, _ in docs}
    assert {"a.jsonl", "more/h.jsonl"} <= names  # by the real name, and where it is linked


def test_ids_do_not_depend_on_where_the_folder_is_or_how_it_is_spelled(tmp_path, monkeypatch):
    for place in ("one", "two/deeper"):
        write(tmp_path / place / "f" / "a.jsonl", numbered("a", 20))
        write(tmp_path / place / "f" / "b" / "c.jsonl", numbered("c", 20))
        write(tmp_path / place / "apart" / "d.jsonl", numbered("d", 20))
        (tmp_path / place / "f" / "linked").symlink_to(tmp_path / place / "apart")
    (tmp_path / "link").symlink_to(tmp_path / "one" / "f")
    monkeypatch.chdir(tmp_path / "one")
    spelled = [tmp_path / "one/f", tmp_path / "two/deeper/f", tmp_path / "link", "f", "../one/./f"]
    first, *others = [
        documents.read(DataConfig("mine", "text_files", path=str(path))) for path in spelled
    ]
    assert all(found == first for found in others)


def test_files_that_cannot_be_read_are_refused_among_others(tmp_path):
    write(tmp_path / "a.jsonl", numbered("a"))
    for name, content, said in (
        ("b.txt", b"", r"b\.txt is empty"),
        ("b.csv", b"\0\1\2", r"b\.csv is binary"),
        ("b.json", b'{"name": "a data set"}', r"b\.json, line 1 has no such field"),
    ):
        path = write(tmp_path / name, content)
        with pytest.raises(ConfigError, match=said):
            read(tmp_path)
        path.unlink()
    os.mkfifo(tmp_path / "pipe.txt")  # would wait for ever
    assert len(read(tmp_path)) == 3
    assert files.left_out(str(tmp_path)) == [tmp_path / "pipe.txt"]
