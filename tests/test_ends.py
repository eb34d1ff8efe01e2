"""Runs end after their steps or epochs, at a cap of seconds or FLOPs, or where nothing improves."""

import math

import pytest
from conftest import SHORT
from short_training import config, run_loop

from harness.config import ending, naming
from harness.config.errors import ConfigError
from harness.config.schema import EarlyStopping
from harness.methods import adapt
from harness.report import remarks, table
from harness.results import run_record

# ---------------------------------------------------------------------------- early stopping


@pytest.mark.parametrize(
    ("patience", "min_delta", "validations", "step"),
    [
        (1, 0.0, [9, 8, 8.1, 7], 2),
        (2, 0.0, [9, 8, 8.1, 7, 7, 7, 1], 5),
        (2, 0.0, [9, 8, math.nan, math.inf, 1], 3),  # what is not finite is no improvement
        (2, 0.5, [9, 8.6, 8.4, 8.2], None),  # 8.4 is 0.6 below 9
        (2, 0.5, [9, 8.6, 8.5, 1], 2),
        (1, 0.0, [9, 9, 1], 1),  # the same is no improvement
        (None, 0.0, [9, 10, 11, 12], None),
    ],
)
def test_patience_runs_out_where_it_says(patience, min_delta, validations, step):
    cfg = EarlyStopping(patience, min_delta)
    ended = [n for n in range(len(validations)) if ending.stops_early(validations[: n + 1], cfg)]
    assert (ended[0] if ended else None) == step


def test_training_ends_at_the_validation_that_exhausts_patience(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=full", "train.early_stopping.patience=2")
    nlls = iter([9.0, 3.0, 3.5, 3.4, 1.0])
    done, rows, saved = run_loop(adapt(tiny, run), text, run, tmp_path, lambda: next(nlls))
    assert (done.step, done.best_step, done.ended_by) == (15, 5, "early_stopping")
    assert [row["step"] for row in rows if "eval/validation/nll" in row] == [0, 5, 10, 15]
    assert saved == [5, 10, 15]  # the checkpoint knows that it ended


# --------------------------------------------------------------------------- caps


def test_seconds_are_a_cap_and_validation_is_read_where_it_ends(
    tiny,
    make_run,
    text,
    tmp_path,
    monkeypatch,
):
    run = config(make_run, "method=full", "train.max_seconds=7", "evaluate.interval=20")
    clock = iter(range(10_000))
    monkeypatch.setattr("harness.training.loop.time.perf_counter", lambda: next(clock))
    done, rows, _ = run_loop(adapt(tiny, run), text, run, tmp_path)
    assert done.ended_by == "max_seconds" and 0 < done.step < 20
    assert done.train_seconds >= 7 > done.train_seconds - done.train_seconds / done.step
    assert [row["step"] for row in rows if "eval/validation/nll" in row] == [0, done.step]


def test_flops_are_a_cap_that_the_schedule_ends_with(make_run):
    run = make_run("method=lora", "train.max_flops=1e12", "train.steps=80")
    per_step = 3e7 * run.train.batch_tokens
    assert ending.within_flops(run, 3e7).train.steps == math.floor(1e12 / per_step) == 16
    assert ending.within_flops(run, 1.0).train.steps == 80
    with pytest.raises(ConfigError, match=r"less than one optimizer step, 2.05e\+12"):
        ending.within_flops(run, 1e9)
    with pytest.raises(ConfigError, match="not known before it runs"):
        ending.within_flops(run, None)


# --------------------------------------------------------------------------- epochs


def test_epochs_are_steps_of_the_training_text(make_run):
    one = make_run(*SHORT[1:], "train.epochs=1")
    blocks = naming_blocks(one)
    per_step = one.train.batch_tokens // one.data.context_length
    assert one.train.steps == math.ceil(blocks / per_step) > 1
    half = make_run(*SHORT[1:], "train.epochs=0.5")
    assert half.train.steps == math.ceil(blocks / per_step / 2)
    same = make_run(*SHORT[1:], f"train.steps={one.train.steps}")
    assert naming.identity(same) == naming.identity(one)  # one run, however its length was said
    assert naming.run_name(same) == naming.run_name(one)


def test_epochs_go_with_completions_of_prompts(make_run, task):
    run = make_run(*SHORT[1:], *task, "train.epochs=2")
    assert run.train.steps >= 2 and run.evaluate.generate.num_beams == 2


def naming_blocks(run):
    """Blocks of training text, counted from the documents and not by `prepare`."""
    from harness.data import documents
    from harness.models import pretrained

    tokenizer = pretrained.load_tokenizer(run.model, pretrained.load_config(run.model))
    docs = documents.read(run.data, ("train",))["train"]
    tokens = sum(len(tokenizer(document)["input_ids"]) + 1 for _, document in docs)
    return (tokens - 1) // run.data.context_length


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.steps=5", "train.epochs=1"], "add train.steps=null"),
        (["train.epochs=0"], "train.epochs=0.0: expected a finite number above 0"),
        (["train.max_seconds=-1"], "train.max_seconds=-1.0"),
        (["train.max_flops=inf"], "train.max_flops=inf"),
        (["train.early_stopping.patience=0"], "train.early_stopping.patience=0"),
        (["train.early_stopping.min_delta=-1"], "train.early_stopping.min_delta=-1.0"),
        (["train.early_stopping=3"], "as in train.early_stopping.patience=3"),
    ],
)
def test_ends_that_cannot_be_are_refused_before_anything_is_read(make_run, overrides, said):
    with pytest.raises(ConfigError, match=said):
        make_run(*overrides)


def test_a_cap_makes_another_run(make_run):
    run = make_run("method=lora", "method.r=8", "targets=all", "train.steps=80", "train.lr=0.01")
    capped = make_run(
        "method=lora", "method.r=8", "targets=all", "train.steps=80", "train.lr=0.01",
        "train.max_flops=1e15",
    )  # fmt: skip
    assert naming.identity(run) != naming.identity(capped)


# --------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_says_what_ended_it_and_tables_say_it_too(harness, tmp_path):
    options = [*SHORT[2:], "method=lora", "train.lr=1e-9", "experiment_name=x"]
    early = ["train.steps=9", "evaluate.interval=1", "train.early_stopping.patience=2",
             "train.early_stopping.min_delta=0.1"]  # fmt: skip
    for more in (early, ["train.steps=9", "evaluate.interval=9", "train.max_flops=3e10"]):
        done = harness(*options, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        again = harness(*options, *more)
        assert "already finished" in again.stdout, again.stdout
    records = dict(run_record.collect(tmp_path / "outputs" / "x"))
    found = {r["run"]["ended_by"]: r["speed"]["steps"] for r in records.values()}
    assert found["early_stopping"] == 2 and 0 < found["max_flops"] < 9
    (capped,) = (r for r in records.values() if r["run"]["ended_by"] == "max_flops")
    step = capped["predicted"]["train_flops_per_token"] * 512
    assert capped["speed"]["steps"] == 3e10 // step
    said = remarks.remarks(table.rows(tmp_path / "outputs" / "x"))
    assert any("train.early_stopping ended it after 2 of 9 steps" in line for line in said)
    shown = harness("outputs/x", module="harness.report").stdout
    assert "train.max_flops ended it after" in shown
