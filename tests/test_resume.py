"""Runs that are cut at any moment go on to the same final numbers, bit for bit."""

import dataclasses
import os
import random
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from cut_runs import CONFIG, finish, outcome, start
from peft import PeftModel
from scored_documents import nats
from transformers import AutoModelForCausalLM

from harness.config.paths import ASSETS_DIR
from harness.data import documents
from harness.results import run_record
from harness.runs import launcher, outcomes, worker, worker_attempt
from harness.system.signals import Stop
from harness.training import checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a run that nothing cut, and how long its training took."""
    from hydra import compose, initialize_config_dir

    from harness.config.paths import CONF_DIR
    from harness.runs.composition import from_hydra

    folder = tmp_path_factory.mktemp("undisturbed")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run = from_hydra(compose("config", [*CONFIG, f"outputs_dir={folder}", "run_name=a"]))
    run.run_dir.mkdir(parents=True)
    began = time.monotonic()
    assert finish(start(run)) == 0
    first = time.monotonic() - began  # with the fork server's start
    again = dataclasses.replace(run, run_name="b")
    again.run_dir.mkdir(parents=True)
    began = time.monotonic()
    assert finish(start(again)) == 0
    seconds = min(first, time.monotonic() - began)
    assert outcome(again.run_dir) == outcome(run.run_dir)  # or nothing below means anything
    assert 0 < outcome(run.run_dir)[0]["best_step"] < 12
    return run, outcome(run.run_dir), seconds


@pytest.mark.slow
def test_a_further_text_is_evaluated_before_and_after(undisturbed):
    run, (quality, rows, *_), _ = undisturbed
    before, after = (
        pd.read_parquet(run.run_dir / f"documents-{name}.parquet")
        for name in ("more-before", "more")
    )
    assert len(after) > 1 and after.id.tolist() == before.id.tolist()
    texts = dict(documents.read(run.evaluate.also["more"], ("test",))["test"])
    base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()
    np.testing.assert_allclose(before.nll_nats, nats(base, texts, before.id), rtol=1e-5)
    adapted = PeftModel.from_pretrained(base, run.run_dir / "adapter").eval()
    np.testing.assert_allclose(after.nll_nats, nats(adapted, texts, after.id), rtol=1e-5)
    assert not np.allclose(after.nll_nats, before.nll_nats, rtol=1e-3)
    assert quality["also"]["more"]["after"]["nll_nats"] == pytest.approx(after.nll_nats.sum())
    assert quality["also"]["more"]["before"]["nll_nats"] == pytest.approx(before.nll_nats.sum())
    logged = {row["step"]: row["eval/more/nll"] for row in rows if "eval/more/nll" in row}
    assert logged == {
        step: pytest.approx(table.nll_nats.sum() / table.num_tokens.sum())
        for step, table in ((0, before), (12, after))
    }


def disturbed(undisturbed, tmp_path):
    run = dataclasses.replace(undisturbed[0], outputs_dir=str(tmp_path), run_name="cut")
    run.run_dir.mkdir(parents=True)
    return run


def kills(number):
    return [pytest.param(i, marks=pytest.mark.faults if i >= 2 else ()) for i in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", kills(20))
def test_a_kill_at_a_random_moment_changes_nothing(undisturbed, tmp_path, seed):
    run, (_, expected, seconds) = disturbed(undisturbed, tmp_path), undisturbed
    chance = random.Random(seed)
    for _ in range(3):  # cut three times, wherever it is then
        process = start(run)
        process.join(chance.uniform(0.1, 1.0) * seconds)
        process.kill()
        if finish(process) == 0:
            break
    if run_record.read(run.run_dir)["status"] != "finished":
        assert finish(start(run)) == 0
    assert outcome(run.run_dir) == expected
    left = {path.name for path in run.run_dir.iterdir()}
    assert not left & {run_record.CHECKPOINTS, run_record.BEST, run_record.RESERVE}


# Calls within the writing of a checkpoint, some of the first one and some of a later one.
MOMENTS = [
    ("save_file", 6), ("fsync", 11), ("_complete", 2), ("_sync", 7), ("_digest", 5),
    ("save_file", 2), ("save_file", 3), ("_link_or_copy", 2), ("_digest", 1), ("_sync", 1),
    ("_sync", 6), ("_sync", 12), ("_generators", 3), ("fsync", 2), ("fsync", 20),
]  # fmt: skip


@pytest.mark.parametrize(
    ("deadly", "number"),
    [pytest.param(*m, marks=pytest.mark.faults if i >= 2 else ()) for i, m in enumerate(MOMENTS)],
)
def test_a_kill_while_a_checkpoint_is_written_changes_nothing(
    undisturbed, tmp_path, deadly, number
):
    run, expected = disturbed(undisturbed, tmp_path), undisturbed[1]
    assert finish(start(run, deadly=deadly, number=number)) == -signal.SIGKILL
    cut = run_record.can_resume(run.run_dir)
    assert cut or (deadly, number) not in MOMENTS[:2]
    assert finish(start(run)) == 0
    assert outcome(run.run_dir) == expected
    assert bool(run_record.read(run.run_dir)["run"]["resumed_at"]) == cut


@pytest.mark.slow
@pytest.mark.parametrize("seed", kills(8))
def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, seed):
    run, expected = disturbed(undisturbed, tmp_path), undisturbed[1]
    assert finish(start(run, deadly="_generators", number=4)) == -signal.SIGKILL  # of step 8
    older, newer = sorted((run.run_dir / run_record.CHECKPOINTS).glob("[0-9]*"))
    chance = random.Random(seed)
    victim = chance.choice(sorted(newer.iterdir()))
    content = victim.read_bytes()
    if seed % 2:
        victim.write_bytes(content[: chance.randrange(len(content))])
    else:
        place = chance.randrange(len(content))
        victim.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    # The best weights are one file on the disk, as long as they are the best.
    both = victim.name == "best.safetensors" and victim.samefile(older / victim.name)
    assert finish(start(run)) == 0
    assert outcome(run.run_dir) == expected
    assert run_record.read(run.run_dir)["run"]["resumed_at"] == ([] if both else [4])
    assert "is damaged, the one before is used" in (run.run_dir / "log.txt").read_text()


@pytest.mark.faults
def test_with_every_checkpoint_damaged_the_run_begins_again(undisturbed, tmp_path):
    run, expected = disturbed(undisturbed, tmp_path), undisturbed[1]
    assert finish(start(run, deadly="_generators", number=4)) == -signal.SIGKILL
    for folder in (run.run_dir / run_record.CHECKPOINTS).glob("[0-9]*"):
        (folder / "state.safetensors").write_bytes(b"")
    assert finish(start(run)) == 0
    assert (
        outcome(run.run_dir) == expected and not run_record.read(run.run_dir)["run"]["resumed_at"]
    )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)]
)
def test_an_order_to_stop_says_resume_me(undisturbed, tmp_path, number):
    run, expected = disturbed(undisturbed, tmp_path), undisturbed[1]
    process = start(run)
    while run_record.last_metrics(run.run_dir).get("step", 0) < 3 and process.is_alive():
        time.sleep(0.005)
    os.kill(process.pid, number)
    assert finish(process) == worker.RESUME_ME
    assert run_record.read(run.run_dir)["status"] == "interrupted"
    step = run_record.last_metrics(run.run_dir)["step"]
    assert finish(start(run)) == 0
    assert outcome(run.run_dir) == expected
    assert run_record.read(run.run_dir)["run"]["resumed_at"] == [step]


@pytest.mark.slow
def test_a_kill_at_the_very_end_loses_no_step(undisturbed, tmp_path):
    run, expected = disturbed(undisturbed, tmp_path), undisturbed[1]
    assert finish(start(run, deadly="clear", number=1)) == -signal.SIGKILL
    assert outcome(run.run_dir) == expected  # the result was there already
    run = dataclasses.replace(run, run_name="export")
    run.run_dir.mkdir()
    assert finish(start(run, deadly="export", number=1)) == -signal.SIGKILL
    assert finish(start(run)) == 0
    assert outcome(run.run_dir) == expected
    assert run_record.read(run.run_dir)["run"]["resumed_at"] == [12]


def test_a_system_that_kills_for_memory_gets_half_the_micro_batch(
    undisturbed, tmp_path, monkeypatch
):
    run = disturbed(undisturbed, tmp_path)
    asked = []

    def attempt(run, claim, *, quiet):
        asked.append(run_record.read(run.run_dir)["run"]["micro_batch"])
        message = worker_attempt.KILLED_FOR_MEMORY if len(asked) == 1 else ""
        return outcomes.Outcome(run.run_dir, "failed", message, "oom" if message else "nan")

    monkeypatch.setattr(worker_attempt, "attempt", attempt)
    assert launcher.launch(run, "test").failure_class == "nan"
    assert asked == [None, 1]  # train.micro_batch is 2
    asked.clear()
    always = outcomes.Outcome(run.run_dir, "failed", worker_attempt.KILLED_FOR_MEMORY, "oom")
    monkeypatch.setattr(worker_attempt, "attempt", lambda *_, **__: asked.append(1) or always)
    assert launcher.launch(run, "test").failure_class == "oom" and len(asked) == 2
    assert finish(start(run, micro_batch=1)) == 0
    result = run_record.read(run.run_dir)
    assert result["train"].items() >= {"micro_batch_asked": 2, "micro_batch": 1}.items()
    expected, got = (losses(found) for found in (undisturbed[0].run_dir, run.run_dir))
    # The first one alone: then dropout, which is drawn in another order, tells them apart.
    assert got[0] == pytest.approx(expected[0], rel=1e-6) and len(got) == len(expected)


def losses(run_dir):
    return [row["train/nll"] for row in run_record.read_metrics(run_dir) if "train/nll" in row]


@pytest.mark.parametrize("retry", [0, 2])
def test_what_is_worth_it_is_tried_again(undisturbed, tmp_path, monkeypatch, retry):
    run = dataclasses.replace(disturbed(undisturbed, tmp_path), retry=retry)
    tries = []
    killed = outcomes.Outcome(run.run_dir, "failed", "killed", "killed")
    monkeypatch.setattr(worker_attempt, "attempt", lambda *_, **__: tries.append(1) or killed)
    assert launcher.launch(run, "test") == killed and len(tries) == 1 + retry
    wrong = outcomes.Outcome(run.run_dir, "failed", "wrong", "error")
    monkeypatch.setattr(worker_attempt, "attempt", lambda *_, **__: tries.append(1) or wrong)
    tries.clear()
    assert launcher.launch(run, "test") == wrong and len(tries) == 1


def test_every_generator_goes_on_where_it_was(tiny, tmp_path):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(tiny.parameters())
    (tmp_path / "best").write_bytes(b"best")
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second draw back
    checkpoint.save(
        tmp_path, checkpoint.state_tensors(tiny, optimizer), {}, tmp_path / "best", accelerator
    )

    def draws():
        return torch.rand(3).tolist(), random.gauss(0, 1), np.random.standard_normal(3).tolist()

    expected = draws()
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    checkpoint.restore_generators(checkpoint.latest(tmp_path), 0)
    assert draws() == expected


def test_a_checkpoint_holds_what_trains_and_restores_it(tiny, tmp_path):
    tiny.requires_grad_(False)
    tiny.transformer.wpe.requires_grad_(True)
    optimizer = torch.optim.AdamW([tiny.transformer.wpe.weight], fused=True)
    for _ in range(3):
        tiny.transformer.wpe.weight.square().sum().backward()
        optimizer.step()
    tensors = checkpoint.state_tensors(tiny, optimizer)
    assert {name.rpartition("/")[2] for name in tensors} == {"transformer.wpe.weight"}
    before = {name: t.clone() for name, t in tensors.items()}
    (tmp_path / "best").write_bytes(b"best")
    for _ in range(4):
        checkpoint.save(tmp_path, tensors, {"n": 1.5}, tmp_path / "best", Accelerator(cpu=True))
    assert len(list((tmp_path / run_record.CHECKPOINTS).iterdir())) == checkpoint.KEPT
    optimizer.step()
    fresh = torch.optim.AdamW([tiny.transformer.wpe.weight], fused=True)
    found = checkpoint.latest(tmp_path)
    checkpoint.restore(tiny, fresh, found.tensors)
    again = checkpoint.state_tensors(tiny, fresh)
    assert again.keys() == before.keys() and found.facts == {"n": 1.5}
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_stop_waits_where_it_must_and_not_where_it_need_not():
    stop = Stop()
    stop._handle_signal(signal.SIGTERM, None)  # nothing has begun that could be broken off
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        raise AssertionError("an order that was noted before breaks it off")
    stop._handle_signal(signal.SIGINT, None)  # the same order's echo, while its end is written
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        with stop.deferred():
            stop._handle_signal(signal.SIGINT, None)
            stop._handle_signal(signal.SIGTERM, None)  # the controller's echo of the same Ctrl-C
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                stop._handle_signal(signal.SIGINT, None)  # the second one does not wait
        raise KeyboardInterrupt
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        stop._handle_signal(signal.SIGTERM, None)
        raise AssertionError("what may be broken off is")
