"""What a document follows, against the tokenizers' own encoding, lm-eval and transformers' loss."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from bos_tokenizer import with_bos
from scored_documents import documents as some_documents

from harness.artifacts import sample
from harness.config.errors import ConfigError
from harness.config.naming import identity
from harness.config.schema import DataConfig
from harness.data import documents, pairs, sequences, token_data
from harness.evaluation import prefix, sliding_window
from harness.models.next_token import NextToken
from harness.report import evidence
from harness.report.stats import check
from harness.results import run_record
from harness.runs import worker
from harness.runs.differences import difference, is_same
from harness.runs.run_directory import prepare


@pytest.mark.parametrize(
    ("adds", "asked", "name"),
    [
        (True, "auto", "bos"), (True, "bos", "bos"), (True, "eos", "eos"), (True, "none", "none"),
        (False, "auto", "eos"), (False, "bos", "bos"),
    ],
)  # fmt: skip
def test_auto_is_the_tokenizers_own_convention(adds, asked, name):
    tokenizer = with_bos(adds=adds)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "none": None}
    assert prefix.find(tokenizer, asked) == prefix.Prefix(name, ids[name])
    if asked == "auto" and adds:  # what an unaware user of the tokenizer evaluates with
        assert tokenizer("In the")["input_ids"][0] == ids[name]


def test_gpt2_keeps_its_end_of_text_token_and_its_runs_their_identity(tokenizer, make_run):
    for asked in ("auto", "bos", "eos"):
        assert prefix.find(tokenizer, asked) == prefix.Prefix("eos", tokenizer.eos_token_id)
    tokenizer = with_bos()
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match=r"evaluate\.prefix=bos: the tokenizer has no BOS"):
        prefix.find(tokenizer, "bos")
    with pytest.raises(ConfigError, match="choose one of: auto, bos, eos, none"):
        make_run("evaluate.prefix=cls")
    names = {identity(make_run(*asked)) for asked in ([], ["evaluate.prefix=auto"])}
    assert len(names) == 1 and identity(make_run("evaluate.prefix=none")) not in names


def test_training_sees_what_evaluation_gives(corpus):
    tokenizer = with_bos()
    token_data.prepare(corpus, tokenizer)  # another stream, which the cache must not mistake for it
    text = token_data.prepare(corpus, tokenizer, begins=prefix.find(tokenizer).begins)
    stream = []
    for _, words in documents.read(corpus)["train"]:
        stream += [*tokenizer(words)["input_ids"], tokenizer.eos_token_id]  # with its own BOS
    expected = [stream[i : i + 33] for i in range(0, len(stream) - 32, 32)]
    assert token_data.batch_of(text.blocks, list(range(text.num_blocks))).ids.tolist() == expected


def test_a_prompt_follows_bos_where_documents_do():
    tokenizer = with_bos()
    begins = prefix.find(tokenizer).begins
    pair = pairs.Pair("0", "name : Mill", ["Mill is old ."])
    cfg = DataConfig("p", "pairs", context_length=64, packing="padded")
    (row,) = sequences.evaluated([pair], tokenizer, cfg, begins).to_pylist()
    prompt = [*tokenizer(pair.prompt)["input_ids"], tokenizer.eos_token_id]
    assert [row["first"], *row["tokens"]][: len(prompt)] == prompt
    assert row["skipped"] == len(prompt) - 1
    assert sequences.prompt_ids(pair, tokenizer, begins) == prompt
    block = pa.concat_tables(sequences.blocks([pair], tokenizer, cfg, begins)[0]).to_pylist()[0]
    assert block["inputs"][: len(prompt)] == prompt


def test_a_prompt_that_is_cut_keeps_its_bos(make_run):
    tokenizer = with_bos()
    run = type("Saved", (), {"tokenizer": tokenizer, "run": make_run()})
    ids, dropped = sample.prompt_tokens(run, "In the beginning God", 3)
    assert ids == [tokenizer.bos_token_id, *tokenizer("In the beginning God")["input_ids"][-2:]]
    assert dropped == len(tokenizer("In the beginning God")["input_ids"]) - 3
    assert sample.prompt_tokens(run, "", 3) == ([tokenizer.bos_token_id], 0)


def test_without_a_prefix_the_first_token_is_given(tiny):
    """Against transformers' loss, which predicts a text from its second token on."""
    docs = some_documents([20, 1, 0, 2])
    nll, count = sliding_window.document_nll(
        NextToken(tiny), docs, context=32, stride=32, bos=None, batch_tokens=64
    )
    assert count.tolist() == [19, 0, 0, 1]
    for index in (0, 3):
        ids = torch.tensor(docs["tokens"][index])[None]
        with torch.no_grad():
            exact = tiny(ids, labels=ids).loss.item()
        assert nll[index] / count[index] == pytest.approx(exact, rel=1e-5)
    docs = some_documents([50])
    windowed, count = sliding_window.document_nll(
        NextToken(tiny), docs, context=8, stride=3, bos=None, batch_tokens=64
    )
    ids = docs["tokens"][0].tolist()
    after, _ = sliding_window.document_nll(  # the rest of the document after its first token
        NextToken(tiny), docs.map(lambda row: {"tokens": row["tokens"][1:]}),
        context=8, stride=3, bos=ids[0], batch_tokens=64,
    )  # fmt: skip
    assert count.tolist() == [49]
    np.testing.assert_allclose(windowed, after, rtol=1e-6)


def test_a_run_records_what_its_documents_follow(tmp_path, make_run, tiny):
    """A whole run of a model with a BOS: the nats are transformers' after that BOS."""
    tiny.resize_token_embeddings(4096)
    tiny.save_pretrained(tmp_path / "model")
    tokenizer = with_bos()
    tokenizer.save_pretrained(tmp_path / "model")
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"Story {i} is about a fox.")
    run = make_run(
        "model=local", f"model.path={tmp_path / 'model'}", "method=none", "data=text_files",
        f"data.path={tmp_path / '*.txt'}", "data.context_length=24", "train.batch_tokens=192",
        "data.validation_share=0.2", "data.test_share=0.2", f"outputs_dir={tmp_path / 'out'}",
        f"data.cache_dir={tmp_path / 'cache'}", "train.threads=1",
    )  # fmt: skip
    run.run_dir.mkdir(parents=True)
    prepare(run, "test")
    assert worker.main(run.run_dir, quiet=True) == 0
    record = json.loads((run.run_dir / "result.json").read_text())
    assert record["evaluation"]["prefix"] == {"name": "bos", "id": tokenizer.bos_token_id}
    exact = 0.0
    for _, words in documents.read(run.data)["test"]:
        ids = torch.tensor([tokenizer(words)["input_ids"]])
        with torch.no_grad():
            exact += tiny(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert record["quality"]["test"]["nll_nats"] == pytest.approx(exact, rel=1e-5)

    # Rows that followed another token are not compared; a record of before is one of EOS.
    def read(name, **evaluation):
        record["evaluation"] |= evaluation
        return replace(evidence._of_run(run.run_dir, record, "test", "after"), name=name)

    bos, eos = read("bos"), read("eos", prefix={"name": "eos", "id": 0})
    older = read("older", prefix=None)
    check([eos, older])
    with pytest.raises(ConfigError, match="prefix"):
        check([bos, older])
    assert run_record.get(record, "model.causal") is True

    # A finished run of before EOS gave way to BOS is not today's run.
    today = json.loads((run.run_dir / "result.json").read_text())
    assert is_same(today, run)
    del today["evaluation"]["prefix"]
    assert not is_same(today, run)
    assert "evaluate.prefix: eos there, auto now" in difference(today, run)
