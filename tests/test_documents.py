import hashlib
import json
import random

import pandas as pd
import pytest

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import docstrings, documents


@pytest.fixture(scope="module")
def kjv():
    return documents.read(DataConfig("kjv", "kjv", validation_share=0.02, test_share=0.04))


def test_kjv_has_every_chapter_once_and_no_split_shares_one(kjv):
    ids = [name for docs in kjv.values() for name, _ in docs]
    assert len(ids) == len(set(ids)) == 1189
    assert {name: len(docs) for name, docs in kjv.items()} == {
        "train": 1117, "validation": 24, "test": 48,
    }  # fmt: skip


def test_kjv_text_is_whole_and_normalised(kjv):
    text = dict(doc for docs in kjv.values() for doc in docs)
    assert text["kjv/01.001"].startswith("In the beginning God created the heaven and the earth.")
    assert text["kjv/43.011"].count("Jesus wept.") == 1
    assert text["kjv/66.022"].endswith("Amen.")
    assert not any(c in t for t in text.values() for c in "[]0123456789")
    assert "darkness was upon the face" in text["kjv/01.001"]  # `[was]` in the edition


def test_the_split_depends_on_the_ids_alone():
    docs = [(f"doc{i}", f"text {i}") for i in range(100)]
    one = documents.split(docs, 0.1, 0.2)
    other = documents.split(docs[::-1], 0.1, 0.2)
    assert {k: sorted(v) for k, v in one.items()} == {k: sorted(v) for k, v in other.items()}
    assert [len(one[k]) for k in ("train", "validation", "test")] == [70, 10, 20]
    assert [d for d in docs if d in one["train"]] == one["train"]  # the source's order
    with pytest.raises(ConfigError, match="2 document"):
        documents.split(docs[:2], 0.1, 0.1)


def test_the_split_of_kjv_is_the_recorded_one(kjv):
    digests = {k: hashlib.sha256(repr(docs).encode()).hexdigest()[:16] for k, docs in kjv.items()}
    assert digests == {
        "train": "744868f61c66dd0f",
        "validation": "0c9764a72f2c6e21",
        "test": "fee35663d5e92ed8",
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_two_splits_share_a_text_and_without_copies_nothing_moves(seed):
    draw = random.Random(seed)
    kinds = draw.choice([4, 20, 200])
    docs = [(f"a.jsonl#{i}", f"text {draw.randrange(kinds)}") for i in range(200)]
    validation_share, test_share = draw.choice([0.01, 0.05, 0.2]), draw.choice([0.02, 0.1, 0.2])
    found = documents.split(docs, validation_share, test_share)
    assert sorted(doc for part in found.values() for doc in part) == sorted(docs)
    assert [doc for doc in docs if doc in found["train"]] == found["train"]
    texts = {name: {text for _, text in part} for name, part in found.items()}
    assert all(texts.values())
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    alone = [text for _, text in docs]
    largest = max(alone.count(text) for text in texts["test"] | texts["validation"])
    for name, share in (("test", test_share), ("validation", validation_share)):
        room = round(share * 200)
        assert len(found[name]) <= max(room, largest)
        if largest <= room and kinds == 200:
            assert len(found[name]) == room
    # Copies apart: the documents in the order of SHA-256 of their ids, as it always was.
    unlike = [(key, f"{text} of {key}") for key, text in docs]
    ranked = sorted(unlike, key=lambda doc: hashlib.sha256(doc[0].encode()).digest())
    first, second = round(test_share * 200), round(validation_share * 200)
    found = documents.split(unlike, validation_share, test_share)
    assert found["test"] == ranked[:first]
    assert found["validation"] == ranked[first : first + second]


def test_copies_are_those_of_the_text_that_is_used():
    docs = [(f"d{i}", f"{'ab cd ef gh'[i % 4 * 3 :][:2]} and {i}") for i in range(40)]
    whole = documents.split(docs, 0.05, 0.05)
    assert [len(whole[name]) for name in documents.SPLITS] == [36, 2, 2]
    cut = documents.split(docs, 0.05, 0.05, document_chars=2)
    assert [len(cut[name]) for name in documents.SPLITS] == [20, 10, 10]
    assert all(
        len({text[:2] for _, text in part}) == 1 for name, part in cut.items() if name != "train"
    )
    with pytest.raises(ConfigError, match=r"40 document\(s\), 1 different, cannot be split"):
        documents.split([(key, "same") for key, _ in docs], 0.05, 0.05)


def test_a_smaller_share_of_the_training_text_is_within_a_larger_and_moves_nothing_else(kjv):
    def train(share):
        cfg = DataConfig("kjv", "kjv", validation_share=0.02, test_share=0.04, train_share=share)
        found = documents.read(cfg)
        assert (found["validation"], found["test"]) == (kjv["validation"], kjv["test"])
        return found["train"]

    hundredth, tenth = train(0.01), train(0.1)
    assert (len(hundredth), len(tenth), len(train(1e-6))) == (11, 112, 1)
    assert [doc for doc in kjv["train"] if doc in tenth] == tenth  # the source's order
    assert [doc for doc in tenth if doc in hundredth] == hundredth


def files(path, **options):
    return documents.read(DataConfig("mine", "text_files", path=str(path), **options))


def texts_of(splits):
    return sorted(text for docs in splits.values() for _, text in docs)


def test_every_file_format_gives_the_same_documents(tmp_path):
    texts = [f"document {i}, with a comma\nand a line; ünïcode" for i in range(5)]
    (tmp_path / "t").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "t" / f"{i}.txt").write_text(text, "utf-8")
    (tmp_path / "a.txt").write_text("\n===\n".join(texts), "utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts) + "\n\n")
    pd.DataFrame({"body": texts}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"body": texts}).to_parquet(tmp_path / "a.parquet")
    assert texts_of(files(tmp_path / "t")) == texts
    assert texts_of(files(tmp_path / "t" / "*.txt")) == texts
    assert texts_of(files(tmp_path / "a.txt", document_separator="\n===\n")) == texts
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert texts_of(files(tmp_path / name, text_field="body")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\x00\x01binary", "is binary"),
        ("a.txt", b"caf\xe9 latin-1", "not UTF-8"),
        ("a.txt", b"one document only", "1 document"),
        ("a.txt", b"  \n ", "0 document"),
        ("a.pdf", b"x", "not one of .txt"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', "did you mean 'txt'"),
        ("a.jsonl", b'["a"]\n', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "is int, not text"),
        ("a.parquet", b"text, not parquet", "not a parquet file"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a lone surrogate is not text"),
        ("a.csv", b"body\na\n", "no such field; choose one of: body"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        files(tmp_path / name)
    assert name in str(error.value) or "document" in message


def test_a_missing_path_or_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "novel.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"did you mean '.*novel\.txt'"):
        files(tmp_path / "novle.txt")
    with pytest.raises(ConfigError, match="in this folder"):
        files(tmp_path / "empty")


def test_docstrings_are_read_in_order_and_once(tmp_path):
    source = tmp_path / "m.py"
    source.write_text(
        '"""The module docstring, long enough."""\n'
        "class A:\n"
        '    """The class docstring, long enough."""\n'
        "    def f(self):\n"
        '        """A method docstring, long enough."""\n'
        "def g():\n"
        '    """short"""\n'
        '    "not a docstring but a long enough string"\n'
    )
    assert docstrings._docstrings_of(str(source)) == [
        "The module docstring, long enough.",
        "The class docstring, long enough.",
        "A method docstring, long enough.",
    ]
    source.write_text("def broken(:\n")
    assert docstrings._docstrings_of(str(source)) == []
    with pytest.raises(ConfigError, match="not-a-package is not installed"):
        documents.read(DataConfig("d", "docstrings", packages=["not-a-package"]))


def test_parsed_docstrings_are_kept_and_a_smaller_share_stays_within_the_larger(tmp_path):
    def read(share):
        return documents.read(
            DataConfig(
                "d", "docstrings", packages=["tqdm"], cache_dir=str(tmp_path),
                validation_share=share, test_share=share,
            )
        )  # fmt: skip

    large = read(0.2)
    (kept,) = (tmp_path / "docstrings").iterdir()
    texts = json.loads(kept.read_text())
    kept.write_text(json.dumps([[name, f"{i:02d} kept"] for i, (name, _) in enumerate(texts)]))
    small = read(0.1)
    assert {text[2:] for docs in small.values() for _, text in docs} == {" kept"}
    held_out = {name for split in ("validation", "test") for name, _ in small[split]}
    assert held_out <= {name for name, _ in large["test"]}
    # A test share of twice the size is test and validation together: conf/data/docstrings_held_out.
    both = {name for split in ("validation", "test") for name, _ in large[split]}
    cfg = DataConfig(
        "d", "docstrings", packages=["tqdm"], cache_dir=str(tmp_path), validation_share=0.2,
        test_share=0.4, document_chars=2,
    )  # fmt: skip
    test = documents.read(cfg, ("test",))
    assert {name for name, _ in test["test"]} == both and set(test) == {"test"}
    assert {len(text) for _, text in test["test"]} == {2}


def test_byte_order_marks_and_long_fields_are_read(tmp_path):
    long = "a long document " * 20_000  # beyond csv's own limit of 128 KiB
    (tmp_path / "a.csv").write_text(f"text\n{long}\nb\nc\n", "utf-8-sig")
    assert texts_of(files(tmp_path / "a.csv")) == sorted([long, "b", "c"])
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}", "utf-8-sig")
    assert texts_of(files(tmp_path / "*.txt")) == ["text 0", "text 1", "text 2"]
