"""The loop against a plain PyTorch loop, and its schedule, best checkpoint and failures."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from harness import train as training
from harness.config import ConfigError, TrainConfig
from harness.data import Data, batch_of, block_order
from harness.loss import NextToken
from harness.methods import adapt

BLOCKS = 10


@pytest.fixture
def text():
    torch.manual_seed(1)
    rows = torch.randint(1, 64, (BLOCKS, 17)).tolist()
    return Data(Dataset.from_dict({"tokens": rows}).with_format("numpy"), {}, {}, False)


def config(make_run, *overrides):
    return make_run(
        "data.context=16", "train.batch_tokens=64", "train.micro_batch=2", "train.steps=20",
        "evaluate.every=5", "train.lr=1e-2", *overrides,
    )  # fmt: skip


def run_loop(model, text, run, tmp_path, validate=lambda: 1.0, step0=9.0, penalty=None):
    rows = []
    done = training.train(
        NextToken(model, run.train.label_smoothing), text, run, Accelerator(cpu=True), validate,
        rows.append, step0, tmp_path / "b", penalty,
    )  # fmt: skip
    return done, rows


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_warms_up_and_ends_where_it_says(schedule):
    cfg = TrainConfig(steps=100, lr=2.0, warmup=0.1, final_lr=0.25, schedule=schedule)
    rates = [training.learning_rate(step, cfg) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 2.0 if schedule == "constant" else 1.25
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle, rel=1e-2)


def test_one_step_and_no_warmup_are_schedules_too():
    assert training.learning_rate(0, TrainConfig(steps=1, lr=2.0, warmup=0.0)) == 2.0
    assert training.learning_rate(0, TrainConfig(steps=1, lr=2.0, warmup=1.0)) == 2.0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_twenty_steps_equal_a_plain_loop_with_transformers_own_loss(
    tiny, make_run, text, tmp_path, method
):
    run = config(make_run, f"method={method}", "train.weight_decay=0.1", "train.clip=0.5")
    torch.manual_seed(0)
    model = adapt(tiny, run)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, rows = run_loop(model, text, run, tmp_path)
    losses = [row["train/nll"] for row in rows]

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    model.train()
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}]
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    for step in range(20):
        ids = batch_of(text.blocks, block_order(run.seed, step, 4, BLOCKS))
        loss = model(input_ids=ids, labels=ids).loss  # all four blocks at once: no accumulation
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + vectors, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, run.train)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5), step
    assert losses[-1] < losses[0]


def test_accumulation_changes_nothing(tiny, make_run, text, tmp_path):
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    losses = []
    for micro in (1, 4):
        with torch.no_grad():
            for name, p in tiny.named_parameters():
                p.copy_(start[name])
        run = config(make_run, "method=full", f"train.micro_batch={micro}")
        losses.append([r["train/nll"] for r in run_loop(adapt(tiny, run), text, run, tmp_path)[1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_best_checkpoint_by_validation_is_what_remains(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=full")
    nlls, seen = iter([3.0, 2.0, 2.5, 2.6]), []

    def validate():
        seen.append({n: p.detach().clone() for n, p in tiny.named_parameters()})
        return next(nlls)

    done, rows = run_loop(adapt(tiny, run), text, run, tmp_path, validate)
    assert (done.best_step, done.best_nll, done.steps) == (10, 2.0, 20)
    assert all(torch.equal(p, seen[1][n]) for n, p in tiny.named_parameters())
    assert not all(torch.equal(p, seen[3][n]) for n, p in tiny.named_parameters())
    assert [row["step"] for row in rows if "eval/validation/nll" in row] == [5, 10, 15, 20]
    assert done.tokens == 20 * 64 and done.tokens_per_second > 0


def test_training_that_only_harms_leaves_the_start(tiny, make_run, text, tmp_path):
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    run = config(make_run, "method=full")
    done, _ = run_loop(adapt(tiny, run), text, run, tmp_path, lambda: 5.0, step0=1.0)
    assert done.best_step == 0
    assert all(torch.equal(p, start[n]) for n, p in tiny.named_parameters())


def test_a_nan_stops_the_run_and_names_the_step(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=full")

    def poison():
        with torch.no_grad():
            tiny.transformer.wte.weight[3, 3] = math.nan
        return 1.0

    with pytest.raises(training.NonFiniteLossError, match="nan at step 6 of 20"):
        run_loop(adapt(tiny, run), text, run, tmp_path, poison)


def test_a_penalty_moves_the_weights_as_in_a_plain_loop_and_not_the_logged_loss(
    tiny, make_run, text, tmp_path
):
    run = config(make_run, "method=full", "train.steps=1", "train.clip=null", "train.warmup=0")
    start = {n: p.detach().clone() for n, p in tiny.named_parameters()}

    def penalty():
        return 3.0 * tiny.transformer.wpe.weight.square().sum()

    _, rows = run_loop(tiny, text, run, tmp_path, penalty=penalty)
    after = tiny.transformer.wpe.weight.detach().clone()
    with torch.no_grad():
        for name, p in tiny.named_parameters():
            p.copy_(start[name])
    ids = batch_of(text.blocks, block_order(run.seed, 0, 4, BLOCKS))
    loss = tiny(input_ids=ids, labels=ids).loss
    assert rows[0]["train/nll"] == pytest.approx(loss.item(), rel=1e-5)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=run.train.lr, weight_decay=0.0)
    (loss + penalty()).backward()
    optimizer.step()
    moved = tiny.transformer.wpe.weight.detach()
    torch.testing.assert_close(after, moved, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(after, start["transformer.wpe.weight"])


def test_nothing_to_train_takes_no_step(tiny, make_run, text, tmp_path):
    run = config(make_run, "method=none")
    done, rows = run_loop(adapt(tiny, run), text, run, tmp_path)
    assert done.steps == 0 and rows == [] and not (tmp_path / "b").exists()


def test_a_global_batch_that_does_not_divide_among_ranks_is_refused(make_run):
    run = config(make_run)
    assert training.blocks_per_rank(run, 2) == 2
    with pytest.raises(ConfigError, match="do not divide among 3 processes"):
        training.blocks_per_rank(run, 3)


def test_weight_decay_spares_vectors(tiny):
    optimizer = training.make_optimizer(tiny, TrainConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)
    counted = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert counted == sum(p.numel() for p in tiny.parameters())
    assert SimpleNamespace(**optimizer.defaults).betas == (0.9, 0.999)
