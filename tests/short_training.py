"""A short training of the tiny GPT-2 by the loop itself, without a worker."""

from accelerate import Accelerator

from harness.models.next_token import NextToken
from harness.system.signals import Stop
from harness.training import loop as training
from harness.training import optimizers
from harness.training.checkpoint import load_trained, save_trained

BLOCKS = 10


def config(make_run, *overrides):
    return make_run(
        "data.context_length=16", "train.batch_tokens=64", "train.micro_batch=2", "train.steps=20",
        "evaluate.interval=5", "train.lr=1e-2", *overrides,
    )  # fmt: skip


def run_loop(model, text, run, tmp_path, validate=None, penalty=None):
    """Train as the worker does, with no file but the best weights; state, rows, saved steps."""
    rows, saved = [], []
    better_and_better = iter(range(100, 0, -1))
    validate = validate or (lambda: float(next(better_and_better)))
    accelerator = Accelerator(cpu=True)
    prepared = NextToken(model, run.train.label_smoothing)
    trains = any(p.requires_grad for p in model.parameters())
    optimizer = optimizers.make_optimizer(model, run.train) if trains else None
    state = training.State(micro_batch=run.train.micro_batch)
    best = tmp_path / "b"
    hooks = training.Hooks(
        validate, lambda: save_trained(model, best), lambda: saved.append(state.step), rows.append
    )
    trained = training.Training(prepared, text, run, accelerator, optimizer, penalty)
    training.train(trained, state, hooks, Stop())
    if trains:
        load_trained(model, best)
    return state, rows, saved


def losses_of(rows):
    return [row["train/nll"] for row in rows if "train/nll" in row]
