import numpy as np
import pytest

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import documents, token_cache, token_data


def test_blocks_are_the_joined_documents_cut_up_with_one_shared_id(corpus, tokenizer):
    text = token_data.prepare(corpus, tokenizer)
    stream = []
    for _, words in documents.read(corpus)["train"]:
        stream += [tokenizer.eos_token_id, *tokenizer.encode(words)]
    stream.append(tokenizer.eos_token_id)
    expected = [stream[i : i + 33] for i in range(0, len(stream) - 32, 32)]
    got = token_data.batch_of(text.blocks, list(range(text.num_blocks)))
    assert got.ids.tolist() == expected


def test_held_out_documents_keep_their_text_and_its_sizes(corpus, tokenizer):
    text = token_data.prepare(corpus, tokenizer)
    for split in ("validation", "test"):
        for (name, words), row in zip(
            documents.read(corpus)[split], text.held_out[split], strict=True
        ):
            assert row["id"] == name and tokenizer.decode(row["tokens"]) == words
            assert row["num_bytes"] == len(words.encode())
            assert row["num_words"] == len(words.split())


def test_a_second_run_tokenises_nothing_and_a_change_of_content_does(corpus, tokenizer, tmp_path):
    assert token_data.prepare(corpus, tokenizer).tokenized

    class Refuses:
        """Stands for the tokenizer but cannot encode."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **kwargs):
            raise AssertionError("tokenised again")

    again = token_data.prepare(corpus, Refuses())
    assert not again.tokenized and again.num_blocks > 0
    (tmp_path / "3.txt").write_text("Another story altogether. " * 30)
    assert token_data.prepare(corpus, tokenizer).tokenized


def test_a_damaged_cache_is_made_again(corpus, tokenizer, tmp_path):
    before = token_data.batch_of(token_data.prepare(corpus, tokenizer).blocks, [0]).ids
    for folder in (tmp_path / "cache" / "tokens").iterdir():
        for file in folder.glob("*.arrow"):
            file.write_bytes(b"")
    after = token_data.prepare(corpus, tokenizer)
    assert after.tokenized and (token_data.batch_of(after.blocks, [0]).ids == before).all()


def test_text_shorter_than_a_block_is_refused(tmp_path, tokenizer):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"short {i}")
    cfg = DataConfig("m", "text_files", path=str(tmp_path), cache_dir=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"shorter than one block of data\.context_length=256"):
        token_data.prepare(cfg, tokenizer)


def test_the_order_is_a_permutation_each_epoch_and_ignores_the_batch_size():
    one = [i for step in range(10) for i in token_data.block_order(7, step, 6, 20)]
    assert sorted(one[:20]) == sorted(one[20:40]) == list(range(20)) and one[:20] != one[20:40]
    assert one == [i for step in range(20) for i in token_data.block_order(7, step, 3, 20)]
    assert (
        one[:20] != [i for step in range(10) for i in token_data.block_order(8, step, 6, 20)][:20]
    )
    assert token_data.block_order(7, 5, 6, 20) == one[30:36]


def test_a_stored_table_is_memory_mapped(corpus, tokenizer):
    text = token_data.prepare(corpus, tokenizer)
    assert text.blocks.cache_files and all(d.cache_files for d in text.held_out.values())
    assert token_data.num_tokens(text.held_out["test"]) == sum(
        len(t) for t in text.held_out["test"]["tokens"]
    )
    assert token_data.batch_of(text.blocks, [0]).inputs.numpy().dtype == np.int64


def test_without_the_test_split_nothing_of_it_is_there_or_is_tokenised(
    corpus, tokenizer, tmp_path, monkeypatch
):
    read = []
    encode = token_cache.encode
    monkeypatch.setattr(token_cache, "encode", lambda docs, _: read.extend(docs) or encode(docs, _))
    text = token_data.prepare(corpus, tokenizer, test=False)
    assert set(text.held_out) == {"validation"} and set(text.num_documents) == {
        "train",
        "validation",
    }
    test = documents.read(corpus)["test"]
    assert test and read and not {words for _, words in test} & set(read)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    alone, _ = token_data.prepare_test(corpus, tokenizer)
    assert {row["id"] for row in alone} == {name for name, _ in test}
