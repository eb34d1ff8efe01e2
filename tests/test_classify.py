"""Classification by label words: likelihoods, accuracy and its baseline, beside perplexity."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from synthetic_runs import put
from transformers import AutoModelForCausalLM

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.data.pairs import Pair
from harness.evaluation import classification
from harness.models.next_token import NextToken
from harness.report import columns, table
from harness.results import run_record

LABELS = ("bad", "good", "neither good nor bad", "good indeed")  # one begins another
WORDS = ("film", "book", "meal", "song", "trip", "game", "play", "talk", "walk", "view")


def records(labels=LABELS, each=12):
    """Prompts of several lengths; the first label is twice as frequent as any other."""
    todo = [(label, n) for label in (labels[0], *labels) for n in range(each)]
    return [
        (f"No {i}: that {WORDS[i % 10]} was {'so ' * (i % 5)}{label[:3]}", label)
        for i, (label, _) in enumerate(todo)
    ]


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": prompt, "completion": label} for prompt, label in records()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task_run(make_run, task_file, tmp_path):
    return make_run(
        "data=pairs", f"data.path={task_file}", "data.context_length=64",
        "data.validation_share=0.1",
        "data.test_share=0.2", f"data.cache_dir={tmp_path}", "train.micro_batch=8",
    )  # fmt: skip


def test_accuracy_is_that_of_plain_transformers_likelihoods(task_run, tokenizer, tmp_path):
    """Each label after each prompt by itself, in float64 log-softmax, without a batch."""
    task = classification.read(task_run, tokenizer)
    assert task.labels == sorted(LABELS) and task.majority == "bad"
    model = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()
    found = task.measure(NextToken(model), tmp_path, context=64, stride=64, batch_tokens=512)
    end = tokenizer.eos_token_id
    for split, todo in task.prompts.items():
        right, losses = [], []
        examples = pd.read_parquet(tmp_path / f"classified-{split}.parquet")
        for pair, (_, kept) in zip(todo, examples.iterrows(), strict=True):
            scores = []
            for label in task.labels:
                given = [*tokenizer(pair.prompt)["input_ids"], end]
                ids = torch.tensor([*given, *tokenizer(f" {label}")["input_ids"], end])
                with torch.no_grad():
                    logits = model(ids[None]).logits[0].double()
                steps = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
                scores.append(float(steps[len(given) - 1 :].sum()))
            (gold,) = pair.completions
            right.append(task.labels[int(np.argmax(scores))] == gold)
            log_p = torch.log_softmax(torch.tensor(scores, dtype=torch.float64), 0)
            losses.append(-float(log_p[task.labels.index(gold)]))
            nats = [kept[f"nats {label}"] for label in task.labels]
            np.testing.assert_allclose(nats, -np.array(scores), rtol=1e-5)
            assert (kept["label"], kept["right"]) == (gold, right[-1])
        quality = found[split]
        assert quality["accuracy"] == np.mean(right) and quality["num_examples"] == len(todo)
        assert quality["log_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        gold = [pair.completions[0] for pair in todo]
        assert quality["majority_accuracy"] == np.mean([label == "bad" for label in gold])


def test_scores_agree_with_scikit_learn_and_scipy():
    """Accuracy, macro F1, log loss and Wilson's interval, on labels drawn at random."""
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    todo = [Pair(f"test/{i}", "x", [labels[draw.integers(3)]]) for i in range(200)]
    nats = draw.gamma(3.0, size=(200, 3))
    found = classification.quality(classification.scored(todo, labels, nats), labels, "b")
    gold = [pair.completions[0] for pair in todo]
    told = [labels[i] for i in nats.argmin(1)]
    shares = np.exp(-nats) / np.exp(-nats).sum(1, keepdims=True)
    assert found["accuracy"] == metrics.accuracy_score(gold, told)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(gold, told, average="macro"))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(gold, shares, labels=labels))
    right = round(found["accuracy"] * 200)
    wilson = binomtest(right, 200).proportion_ci(method="wilson")
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(wilson, abs=1e-6)


def test_every_completion_of_a_prompt_is_an_example():
    """A prompt that comes three times, once with another label; one that training never had."""
    todo = [Pair("p", "x", ["a", "a", "b"]), Pair("q", "y", ["z"])]
    found = classification.quality(
        classification.scored(todo, ["a", "b"], np.array([[1.0, 2.0], [1.0, 2.0]])), ["a", "b"], "a"
    )
    assert found["accuracy"] == found["majority_accuracy"] == 0.5
    assert (found["num_examples"], found["num_unseen"], found["log_loss"]) == (4, 1, np.inf)


def test_a_likelihood_that_is_no_number_gives_no_accuracy():
    examples = classification.scored([Pair("p", "x", ["a"])], ["a", "b"], np.array([[np.nan, 2.0]]))
    found = run_record.finite(classification.quality(examples, ["a", "b"], "a"))
    assert found["accuracy"] is found["macro_f1"] is None and found["majority_accuracy"] == 1


def test_only_few_completions_that_come_again_are_labels(task_run, make_run, tokenizer, tmp_path):
    for choice, there in (("auto", True), ("never", False)):
        ask = replace(task_run, evaluate=replace(task_run.evaluate, classify=choice))
        assert (classification.read(ask, tokenizer) is not None) == there
    sentences = tmp_path / "sentences.txt"  # completions that come once or twice are no labels
    sentences.write_text("".join(f"place {i}||Place {i // 2} is a pub .\n" for i in range(40)))
    plain = replace(task_run, data=replace(task_run.data, path=str(sentences)))
    assert classification.read(plain, tokenizer) is None
    always = replace(plain, evaluate=replace(plain.evaluate, classify="always"))
    assert len(classification.read(always, tokenizer).labels) > 10
    sentences.write_text("".join(f"place {i}||yes\n" for i in range(40)))
    assert classification.read(plain, tokenizer) is None
    with pytest.raises(ConfigError, match="every completion of data=pairs is 'yes'"):
        classification.read(always, tokenizer)
    with pytest.raises(ConfigError, match="data=kjv has no completions"):
        make_run("evaluate.classify=always")
    with pytest.raises(ConfigError, match="did you mean 'always'"):
        make_run("evaluate.classify=allways")


def test_labels_and_baseline_do_not_depend_on_the_share_of_the_training_text(task_run, tokenizer):
    """A sweep over data.train_share compares accuracies over the same labels."""
    little = replace(task_run, data=replace(task_run.data, train_share=0.05))
    whole, part = (classification.read(run, tokenizer) for run in (task_run, little))
    assert (whole.labels, whole.majority, whole.prompts) == (
        part.labels, part.majority, part.prompts
    )  # fmt: skip
    assert "classify" not in naming._values(task_run)["evaluate"]  # older runs are what they were


def test_where_a_split_is_read_in_part_just_that_part_is_classified(task_run, tokenizer):
    """Accuracy stands beside the perplexity of the same prompts; labels are of all."""
    whole = classification.read(task_run, tokenizer)
    ids = {split: {todo[0].id, todo[-1].id} for split, todo in whole.prompts.items()}
    part = classification.read(task_run, tokenizer, (), ids)
    assert {split: {one.id for one in todo} for split, todo in part.prompts.items()} == ids
    assert part.labels == whole.labels and part.majority == whole.majority
    for split, rows in part.sequences.items():
        assert len(rows) == len(part.labels) * len(part.prompts[split])


def test_without_a_test_set_validation_alone_is_classified(task_run, tokenizer):
    ask = replace(task_run, evaluate=replace(task_run.evaluate, test=False))
    assert set(classification.read(ask, tokenizer).prompts) == {"validation"}


def test_labels_that_look_alike_and_labels_that_are_new_are_warned_of(
    task_run, tokenizer, tmp_path
):
    folder = tmp_path / "split"
    folder.mkdir()
    for split, labels in (("train", ("good", "Good ", "bad")), ("test", ("good", "ugly"))):
        lines = [f"{prompt}||{label}\n" for prompt, label in records(labels, 8)]
        (folder / f"{split}.txt").write_text("".join(lines))
    ask = replace(task_run, data=replace(task_run.data, path=str(folder)))
    alike, unseen = classification.read(ask, tokenizer).warnings
    assert "'Good', 'good' differ in case or blanks alone" in alike
    assert "the test split has 1 completion(s)" in unseen and "'ugly'" in unseen


def test_a_label_that_does_not_fit_is_refused_before_training(task_run, tokenizer):
    """Every prompt fits with its own label; the longest prompt does not fit with the longest."""
    longest = max(lengths(task_run, tokenizer))
    tight = replace(task_run, data=replace(task_run.data, context_length=longest - 1))
    with pytest.raises(ConfigError, match=f"longer than data.context_length={longest - 1}"):
        classification.read(tight, tokenizer)


def lengths(run, tokenizer):
    task = classification.read(run, tokenizer)
    return [len(row["tokens"]) for rows in task.sequences.values() for row in rows]


def test_tables_show_accuracy_beside_perplexity_and_the_majority(tmp_path):
    for seed, right in enumerate((80, 90)):
        run_dir = put(tmp_path, f"lora-s{seed}", seed=seed)
        record = json.loads((run_dir / run_record.FILE_NAME).read_text())
        low, high = classification.wilson(right / 100, 100)
        record["quality"]["classification"] = {
            "labels": ["a", "b"], "majority": "a",
            "test": {
                "accuracy": right / 100, "accuracy_low": low, "accuracy_high": high,
                "macro_f1": 0.7, "log_loss": 0.4, "majority_accuracy": 0.55,
                "num_examples": 100, "num_unseen": 0,
            },
        }  # fmt: skip
        run_record.write(run_dir, record)
    put(tmp_path, "none", method="none")
    shown = table.rows(tmp_path)
    sheet = columns.sheet(shown, None)
    headings, lines = sheet.headings, sheet.texts
    cells = [dict(zip(headings, line, strict=True)) for line in lines]
    assert [(c["accuracy"], c["majority"]) for c in cells] == [("-", "-"), ("85.0 %", "55.0 %")]
    assert all(c["test"] != "-" for c in cells)
    said = " ".join(columns.notes(shown, []))
    assert "of 100 test examples" in said and "± 7." in said
    assert "quality.classification.test.log_loss" in table.csv_text(shown, {})


@pytest.mark.slow
def test_a_run_classifies_its_test_set(finished_run, task_file):
    """The numbers in result.json are of the weights that validation chose, on the test split."""
    run_dir = finished_run(
        "method=full", "train.lr=3e-3", "data=pairs", f"data.path={task_file}",
        "data.context_length=64",
        "data.validation_share=0.1", "data.test_share=0.2", "train.steps=30",
        "evaluate.interval=30",
    )  # fmt: skip
    record = run_record.read(run_dir)
    found = record["quality"]["classification"]["test"]
    examples = pd.read_parquet(run_dir / "classified-test.parquet")
    assert found["accuracy"] == examples["right"].mean() > found["majority_accuracy"]
    own = [row[f"nats {row['label']}"] for _, row in examples.iterrows()]
    assert sum(own) == pytest.approx(record["quality"]["test"]["nll_nats"], rel=1e-5)
    assert "accuracy" in columns.sheet(table.rows(run_dir.parent), None).headings
