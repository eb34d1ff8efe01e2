"""Published protocols against their sources: the guide's loop, lm-eval's own code, closed forms."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bos_tokenizer import with_bos
from datasets import Dataset
from omegaconf import OmegaConf
from scored_documents import Rank
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from wikitext_pages import PAGES, rows_of

from harness.config.errors import ConfigError
from harness.config.naming import identity, run_name
from harness.config.paths import ASSETS_DIR, CONF_DIR, REPOSITORY
from harness.config.schema import DataConfig
from harness.data import documents, hub
from harness.evaluation import protocols, sliding_window
from harness.models.next_token import NextToken
from harness.results import run_record

STRIDES = [64, 32, 13, 5]


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """A few KB as `datasets` gives WikiText: the pages above, and three chapters as a third."""
    kjv = documents.read(DataConfig("kjv", "kjv", validation_share=0.02, test_share=0.04))["test"]
    chapters = sorted((text for _, text in kjv), key=len)[:3]
    lines = [f" {line} " for text in chapters for line in text.split("\n") if line]
    text = "\n".join([PAGES.removesuffix("\n"), " ", " = Chapters = ", " ", *lines, " ", ""])
    return rows_of(text)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()


def measured(model, text: protocols.Text) -> dict:
    return protocols.measure(NextToken(model), text, batch_tokens=512, precision="fp32")


# --------------------------------------------------------------------------- Hugging Face's guide


def by_the_guide(model, ids: torch.Tensor, max_length: int, stride: int) -> float:
    """The loop of "Perplexity of fixed-length models", on ids of shape (1, n)."""
    total, tokens, before = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + max_length, ids.size(1))
        inputs = ids[:, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        valid = int((labels != -100).sum()) - 1
        total, tokens, before = total + loss.item() * valid, tokens + valid, end
        if end == ids.size(1):
            break
    return math.exp(total / tokens)


@pytest.mark.parametrize("stride", STRIDES)
def test_hf_guide_is_the_guides_loop(model, tokenizer, rows, stride):
    rows = {64: rows, 32: rows[:30], 13: rows[:20], 5: rows[:14]}[stride]
    text = protocols.hf_guide(rows, tokenizer, 64, stride)
    ids = tokenizer("\n\n".join(rows), return_tensors="pt")["input_ids"]
    assert ids.size(1) % 64 and ids.size(1) > 2 * 64
    found = measured(model, text)
    assert found["perplexity"] == pytest.approx(by_the_guide(model, ids, 64, stride), rel=1e-5)
    # Without overlap a window's first id is not predicted; with it, only the text's first is not.
    dropped = -(-ids.size(1) // 64) if stride == 64 else 1
    assert found["num_tokens"] == ids.size(1) - dropped
    plain = math.exp(found["nll_nats"] / found["num_tokens"])
    if stride < 64:  # the guide's weights are not those of the tokens
        assert abs(plain / found["perplexity"] - 1) > 3e-5


def test_hf_guide_on_less_than_a_window(model, tokenizer, rows):
    few = rows[:4]
    ids = tokenizer("\n\n".join(few), return_tensors="pt")["input_ids"]
    assert ids.size(1) < 64
    text = protocols.hf_guide(few, tokenizer, 64, 64)
    exact = by_the_guide(model, ids, 64, 64)
    assert measured(model, text)["perplexity"] == pytest.approx(exact, rel=1e-5)


def test_a_window_of_one_id_predicts_nothing(model, tokenizer):
    """There the guide's own loop divides zero by zero."""
    ids = tokenizer("in the beginning " * 40)["input_ids"][:33]

    class Fixed:
        def __call__(self, text, **_):
            return {"input_ids": ids if text else []}

    found = measured(model, protocols.hf_guide(["x"], Fixed(), 16, 16))
    assert found["num_tokens"] == 30
    exact = by_the_guide(model, torch.tensor([ids[:32]]), 16, 16)
    assert found["perplexity"] == pytest.approx(exact, rel=1e-5)
    assert math.isnan(by_the_guide(model, torch.tensor([ids]), 16, 16))


def test_the_guides_windows_by_hand():
    assert protocols.grid(10, 4, 4) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert protocols.grid(10, 4, 2) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    assert protocols.grid(3, 4, 2) == [(0, 3, 3)]
    assert protocols.grid(0, 4, 2) == []
    # 561 windows of gpt2's 287,644 ids of the raw test set at 512, and 281 at 1,024.
    assert [len(protocols.grid(287_644, 1024, s)) for s in (512, 1024)] == [561, 281]


# --------------------------------------------------------------------------- lm-evaluation-harness


def test_pages_are_those_of_the_file(rows):
    text = "".join(row or " \n" for row in rows)
    cut = [part for part in re.split(r"(?m)^(?= = [^=])", text) if part.strip()]
    found = protocols.pages(rows)
    assert len(found) == 3 and found[1].startswith(" = Second page = \n \n Its one")
    assert [page.rstrip("\n") for page in found] == [page.rstrip("\n") for page in cut]
    assert found[-1].endswith(" \n") and not found[0].endswith("\n")


def test_text_before_the_first_title_is_a_page():
    found = protocols.pages([" lead \n", "", " = A = \n", " = = B = = \n"])
    assert found == [" lead \n ", " = A = \n = = B = = \n"]


@pytest.fixture(scope="module")
def wikitext():
    """The functions of lm-eval's task."""
    pytest.importorskip("lm_eval", reason="lm_eval comes with the dev extra")
    from lm_eval.tasks.wikitext import preprocess_wikitext

    return preprocess_wikitext


def test_the_text_is_detokenised_as_by_lm_eval(rows, wikitext):
    odd = [
        " a /' 5/ b ( c [ d ] ) { e } ' f ' N N players ' = = = = G = = = = \n \n h ° i 's @-@ \n "
    ]
    for page in (*protocols.pages(rows), *odd):
        exact = wikitext.wikitext_detokenizer({"page": page})
        assert protocols.detokenise_as_lm_eval(page) == exact != page


@pytest.mark.parametrize(("context", "adds_bos"), [(64, False), (256, False), (64, True)])
def test_lm_eval_is_lm_evals_own_task(model, tokenizer, rows, wikitext, context, adds_bos):
    """Its task's functions, its model's rolling log-likelihood and its aggregation."""
    if adds_bos:
        tokenizer = with_bos()
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM

    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    pages = Dataset.from_dict({"page": protocols.pages(rows)})
    task = ConfigurableTask(
        config={
            "task": "pages",
            "custom_dataset": lambda **_: {"test": pages},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": wikitext.wikitext_detokenizer,
            "process_results": wikitext.process_results,
            "metric_list": [{"metric": metric} for metric in metrics],
        }
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=context, batch_size=4)
    exact = run(lm, {"pages": task}, bootstrap_iters=0, log_samples=False)["results"]["pages"]
    text = protocols.lm_eval(rows, tokenizer, context, context)
    lengths = [len(sequence) for sequence in text.sequences]
    assert min(lengths) < context < max(lengths)
    found = measured(model, text)
    for metric in metrics:
        assert found[metric] == pytest.approx(exact[f"{metric},none"], rel=1e-5)
    assert found["num_words"] == sum(
        wikitext.process_results(p, (0,))["word_perplexity"][1] for p in pages
    )


# --------------------------------------------------------------------------- like the GPT-2 paper


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        ("= = = Early life = = =", "=== Early life ==="),
        ('He said " no , no " ( twice ) .', 'He said "no, no" (twice).'),
        ("1 @,@ 200 @-@ ton , 3 @.@ 5 m", "1,200-ton, 3.5 m"),
        ("the town 's " + '" Mill "', 'the town\'s "Mill"'),
        ("a <unk> @-@ class ship , 18 @,@ <unk> t", "a <unk>-class ship, 18,<unk> t"),
        ("the U.S. Army of J. Adams", "the U.S. Army of J. Adams"),
        ("vitamin C . It", "vitamin C . It"),  # C. is an initial
        ("so ... he left ...", "so ... he left ..."),
        ("", ""),
    ],
)
def test_lines_are_detokenised_and_come_back(line, plain):
    assert protocols.detokenise(line) == plain
    assert protocols.retokenise(plain) == line


def test_any_tokens_come_back_or_the_line_is_left_alone():
    """Spaces go only where they are put back: what does not come back is in the tokens alone."""
    vocabulary = [
        "a", "Bob", "U.S.", "C", "7", "1893", "<unk>", "@-@", "@,@", "@.@", ".", ",", ";", "(", ")",
        "[", "]", '"', "'s", "'t", "'", "=", "%", "$", "...", "–", "-", "",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(3000):
        line = " ".join(rng.choice(vocabulary, rng.integers(1, 12)))
        assert protocols.retokenise(protocols.detokenise(line)) == line


def test_gpt2_paper_divides_by_words_and_lines(model, tokenizer):
    added = [
        *rows_of(PAGES),
        " Section 1.5 holds , as 1,000 do . \n",
    ]  # 1.5 and 1,000 are not WikiText's form
    text = protocols.gpt2_paper(added, tokenizer, 64, 32)
    lines = [line.strip(" ") for line in "".join(row or "\n" for row in added).splitlines()]
    plain = [protocols.detokenise(line) for line in lines[:-1]] + lines[-1:]
    ids = tokenizer("\n".join(plain))["input_ids"]
    assert text.sequences[0].tolist() == [tokenizer.eos_token_id, *ids]
    assert text.facts["lines_kept"] == 1
    assert text.facts["num_words"] == len(" ".join(lines).split()) + len(lines)
    nll, count = sliding_window.document_nll(
        NextToken(model), Dataset.from_dict({"tokens": [ids]}),
        context=64, stride=32, bos=tokenizer.eos_token_id, batch_tokens=512,
    )  # fmt: skip
    found = measured(model, text)
    assert found["num_tokens"] == count[0] == len(ids)
    assert found["nll_nats"] == pytest.approx(nll[0], rel=1e-6)
    exact = math.exp(nll[0] / text.facts["num_words"])
    assert found["word_perplexity"] == pytest.approx(exact, rel=1e-4)


# --------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_uniform_model_has_closed_forms(tokenizer, rows, name):
    config = GPT2Config(vocab_size=4096, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    found = measured(model, protocols.PROTOCOLS[name](rows, tokenizer, 64, 64))
    nats = found["num_tokens"] * math.log(4096)
    assert found["nll_nats"] == pytest.approx(nats, rel=1e-6)
    assert found["perplexity"] == pytest.approx(4096, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["num_tokens"] * 12 / found["num_bytes"])
    assert math.log(found["byte_perplexity"]) == pytest.approx(nats / found["num_bytes"])
    assert found[found["headline"]] > 1


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_ranks_divide_the_windows(tiny, tokenizer, rows, name):
    text = protocols.PROTOCOLS[name](rows, tokenizer, 32, 32)
    text = replace(text, sequences=[ids % 64 for ids in text.sequences])  # tiny's vocabulary
    whole, *parts = (
        sliding_window.window_nll(
            NextToken(tiny), text.windows, text.ids, batch_tokens=256, accelerator=rank
        )
        for rank in (None, Rank(0), Rank(1))
    )
    assert all(part.any() for part in parts)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_a_run_without_a_protocol_is_the_run_it_was(make_run):
    plain = make_run("method=none", "data=wikitext2")
    assert plain.evaluate.protocol == "documents" and protocols.read(plain, None) is None
    by_guide = make_run("method=none", "data=wikitext2", "evaluate=hf_guide")
    assert identity(by_guide) != identity(plain)
    # Recorded before there were protocols.
    recorded = (REPOSITORY / "experiments" / "main_seeds" / "results.csv").read_text()
    for overrides in (["method=none"], ["method=full", "seed=1"]):
        assert run_name(make_run("experiment=main_seeds", *overrides)) in recorded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.protocol=hf_guid"], r"evaluate\.protocol='hf_guid': did you mean 'hf_guide'"),
        (["evaluate=hf_guide"], r"hf_guide with data=kjv.*data=wikitext2"),
        (["data=wikitext2", "evaluate=hf_guide", "evaluate.test=false"], r"evaluate\.test=false"),
        (["data=wikitext2", "evaluate=lm_eval", "evaluate.stride=64"], r"stride=64.*256"),
        (["data=wikitext2", "evaluate=hf_guide", "data.document_chars=9"], r"document_chars"),
        (["data=text_files", "data.path={text}", "evaluate=hf_guide"], r"method=lora trains on"),
        (["data=text_files", "data.path={folder}", "evaluate=lm_eval"], r"one \.txt file"),
    ],
)
def test_what_a_protocol_cannot_do_is_refused(make_run, tmp_path, overrides, message):
    (tmp_path / "test.txt").write_text(PAGES)
    (tmp_path / "train.txt").write_text(PAGES)
    named = {"text": tmp_path / "test.txt", "folder": tmp_path}
    with pytest.raises(ConfigError, match=message):
        make_run(*(text.format(**named) for text in overrides))


def test_rows_of_a_file(tmp_path):
    (tmp_path / "wiki.test.txt").write_text(PAGES, "utf-8")
    cfg = DataConfig("mine", "text_files", path=str(tmp_path / "wiki.test.txt"))
    assert hub.raw_rows(cfg, "test") == rows_of(PAGES)


@pytest.mark.slow
def test_a_run_reports_the_protocol_beside_its_test_set(
    harness, tmp_path, monkeypatch, model, tokenizer
):
    """On a folder of text files by split, which the hub's library reads without a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(PAGES, "utf-8")
    asked = [
        "method=none", "data=hub", f"data.id={folder}", "data.context_length=64",
        "train.micro_batch=2",
        "train.batch_tokens=128",
    ]  # fmt: skip
    done = harness(*asked, "evaluate=hf_guide", "evaluate.stride=32", "run_name=guide")
    assert done.returncode == 0, done.stderr
    done = harness(*asked, "evaluate.stride=32", "run_name=plain")
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "outputs" / "scratch"
    guide, plain = (run_record.read(runs / name)["quality"] for name in ("guide", "plain"))
    found = guide.pop("test_protocol")
    assert guide == plain
    ids = tokenizer("\n\n".join(rows_of(PAGES)), return_tensors="pt")["input_ids"]
    assert found["perplexity"] == pytest.approx(by_the_guide(model, ids, 64, 32), rel=1e-4)
    facts = {key: found[key] for key in ("name", "context", "stride", "joiner", "bos", "dtype")}
    assert facts == {
        "name": "hf_guide", "context": 64, "stride": 32, "joiner": "\n\n", "bos": False,
        "dtype": "fp32",
    }  # fmt: skip


# --------------------------------------------------------------------------- harness verify


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache without a network, and in it a tiny model of 1,024 positions as gpt2."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fill() -> Path:
        root = tmp_path / "hf" / "hub" / "models--openai-community--gpt2"
        pinned = OmegaConf.load(CONF_DIR / "model" / "gpt2.yaml").revision
        snapshot = root / "snapshots" / pinned
        shutil.copytree(ASSETS_DIR / "gpt2_mini", snapshot)
        torch.manual_seed(0)
        size = {"vocab_size": 4096, "n_positions": 1024, "n_embd": 8, "n_layer": 1, "n_head": 1}
        special = {"bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(**size, **special)).save_pretrained(snapshot)
        return snapshot

    return fill


def test_verify_prints_what_is_published_beside_what_is_measured(
    harness, tmp_path, hub_cache, tokenizer
):
    snapshot = hub_cache()
    text = "".join(PAGES.replace("line is here", f"line {i} is here") for i in range(6))
    (tmp_path / "raw test.txt").write_text(text, "utf-8")
    both = ("--raw", "raw test.txt", "--tokenised", "raw test.txt")
    done: subprocess.CompletedProcess[str] = harness("verify", "--only", "gpt2", *both)
    assert done.returncode == 1, done.stderr  # the tiny model is not gpt2
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("gpt2 ")]
    assert [row[1:4] for row in rows] == [
        ["hf_guide", "1024", "29.94"], ["lm_eval", "1024", "37.37"],
        ["gpt2_paper", "1024", "29.41"],
    ]  # fmt: skip
    for row in rows:
        assert float(row[4]) - float(row[3]) == pytest.approx(float(row[5]), abs=2e-4)
    assert rows[0][6:8] == ["DIFFERS", "(0.01)"] and rows[2][6] == "Radford"
    ids = tokenizer("\n\n".join(rows_of(text)), return_tensors="pt")["input_ids"]
    exact = by_the_guide(GPT2LMHeadModel.from_pretrained(snapshot).eval(), ids, 1024, 1024)
    assert ids.size(1) > 1024 and float(rows[0][4]) == pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
def test_verify_says_what_is_missing(harness, hub_cache):
    done = harness("verify", "--only", "gpt2")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "error: nothing to compare: no weights of openai-community/gpt2 in the local hub cache, "
        "and the hub is out of reach"
    ]
    hub_cache()
    done = harness("verify", "--only", "gpt2")
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nothing to compare: data.id=Salesforce/wikitext: could not be")
