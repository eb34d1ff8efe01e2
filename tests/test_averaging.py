"""`train.ema` and `train.neftune_alpha` against the code of torch and of transformers."""

import copy
import dataclasses
import signal

import pytest
import torch
from accelerate import Accelerator
from cut_runs import CONFIG, finish, outcome, start
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.integrations.neftune import neftune_post_forward_hook

from harness.config import naming
from harness.config.errors import ConfigError
from harness.data.token_data import batch_of, block_order
from harness.methods import adapt
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.system.signals import Stop
from harness.training import checkpoint, loop, memory, optimizers
from harness.training.averaging import Average
from harness.training.neftune import Noise

BLOCKS, STEPS, LR, DECAY = 10, 12, 1e-2, 0.8


def config(make_run, *overrides):
    return make_run(
        "data.context_length=16", "train.batch_tokens=64", "train.micro_batch=2",
        f"train.steps={STEPS}",
        "evaluate.interval=4", f"train.lr={LR}", "train.schedule=constant", "train.warmup=0",
        "method=lora", "method.r=4", *overrides,
    )  # fmt: skip


def adapted(tiny, run):
    torch.manual_seed(0)
    return adapt(copy.deepcopy(tiny), run)


def trained(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def train(model, text, run, *, optimizer=None, average=None, state=None, validate=None, save=None):
    """The harness's loop with what the worker gives it; the losses."""
    rows = []
    optimizer = optimizer or optimizers.make_optimizer(model, run.train)
    accelerator = Accelerator(cpu=True)
    state = state or loop.State(micro_batch=2)
    noise = run.train.neftune_alpha and Noise(model, run.train.neftune_alpha, run.seed)
    hooks = loop.Hooks(
        validate or (lambda: 1.0),
        lambda: None,
        (lambda: save(state, optimizer)) if save else (lambda: None),
        rows.append,
    )
    made = loop.Training(
        NextToken(model), text, run, accelerator, optimizer, None, average, noise or None
    )
    loop.train(made, state, hooks, Stop())
    return [row["train/nll"] for row in rows if "train/nll" in row]


def test_the_average_is_torchs_own_and_training_goes_on_as_without(tiny, make_run, text):
    """The weights at every validation, to the bit; after it, those that train."""
    run = config(make_run, f"train.ema={DECAY}")
    model, seen, expected = adapted(tiny, run), [], []
    average = Average(model, DECAY)
    losses = train(
        model, text, run, average=average, validate=lambda: seen.append(trained(model)) or 1.0
    )

    other = adapted(tiny, run)
    theirs = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    prepared, plain = NextToken(other), []
    prepared.train()
    step_by = torch.optim.AdamW(trains := [p for p in other.parameters() if p.requires_grad],
                                lr=LR, weight_decay=0.0, fused=True)  # fmt: skip
    for step in range(STEPS):
        if step % 4 == 0:
            expected.append(trained(theirs.module))
        nats = 0.0
        order = block_order(run.seed, step, 4, BLOCKS)
        for half in (order[:2], order[2:]):
            found = prepared(*batch_of(text.blocks, half))
            (found.objective / 64).backward()
            nats += found.nats.sum()
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        step_by.step()
        step_by.zero_grad()
        theirs.update_parameters(other)
        plain.append(nats.item() / 64)
    expected.append(trained(theirs.module))
    assert losses == plain
    assert len(seen) == len(expected) == 4
    for ours, wanted in zip(seen, expected, strict=True):
        assert all(map(torch.equal, ours, wanted))
    assert all(map(torch.equal, trained(model), trained(other)))
    assert not torch.equal(seen[-1][0], trained(model)[0])


def test_bytes_of_the_average_count_as_optimizer_state(tiny, make_run):
    run = config(make_run)
    model = adapted(tiny, run)
    optimizer = optimizers.make_optimizer(model, run.train)
    average = Average(model, DECAY)
    counted = []
    for held in ((), average.held()):
        with memory.LiveTensors(model, optimizer, held) as live:
            pass
        counted.append(live.by_category["optimizer_state"])
    without, with_it = counted
    assert with_it - without == sum(4 * p.numel() for p in trained(model)) > 0
    with average.in_model(), memory.LiveTensors(model, optimizer, average.held()) as live:
        pass
    assert live.by_category["optimizer_state"] == with_it


def test_average_and_noise_go_on_from_a_checkpoint_to_the_same_bits(tiny, make_run, text, tmp_path):
    run = config(make_run, "train.ema=0.9", "train.neftune_alpha=5", "train.checkpoint_interval=3")
    taken = {}

    def kept(model, optimizer, average):
        return checkpoint.state_tensors(model, optimizer) | average.tensors()

    def save(state, optimizer):
        folder = tmp_path / str(state.step)
        folder.mkdir()
        (folder / "best").write_bytes(b"best")
        tensors = kept(model, optimizer, average)
        checkpoint.save(folder, tensors, {}, folder / "best", Accelerator(cpu=True))
        taken[state.step] = copy.copy(vars(state))

    model = adapted(tiny, run)
    average, optimizer = Average(model, 0.9), optimizers.make_optimizer(model, run.train)
    losses = train(model, text, run, optimizer=optimizer, average=average, save=save)
    whole = {name: t.clone() for name, t in kept(model, optimizer, average).items()}
    assert {3, 4} <= taken.keys()
    for step in (3, 4):  # between validations, and at one
        torch.manual_seed(step)  # what the noise does not depend on
        model = adapted(tiny, run)
        average, optimizer = Average(model, 0.9), optimizers.make_optimizer(model, run.train)
        found = checkpoint.latest(tmp_path / str(step))
        checkpoint.restore(model, optimizer, found.tensors)
        average.restore(found.tensors)
        again = train(model, text, run, optimizer=optimizer, average=average,
                      state=loop.State(**taken[step]))  # fmt: skip
        assert again == losses[step:]
        now = kept(model, optimizer, average)
        assert now.keys() == whole.keys()
        assert all(torch.equal(now[name], tensor) for name, tensor in whole.items())
    assert losses != train(adapted(tiny, run), text, config(make_run))


def test_the_noise_is_that_of_transformers():
    """Drawn by the same generator; in eval mode there is none."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = nn.Embedding(16, 24)

        def get_input_embeddings(self):
            return self.embeddings

    model = Model()
    ids = torch.arange(12).reshape(2, 6)
    plain = model.embeddings(ids)
    noise = Noise(model, 5.0, seed=3)
    model.embeddings.neftune_noise_alpha = 5.0
    for step in (0, 7):
        noise.begin(step)
        first = model.embeddings(ids)
        torch.manual_seed(noise._generator.initial_seed())
        expected = neftune_post_forward_hook(model.embeddings, None, plain)
        torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(first, model.embeddings(ids))  # the next pass of the step
        torch.rand(5)
        noise.begin(step)
        assert torch.equal(first, model.embeddings(ids))
    most = 5 / (6 * 24) ** 0.5
    assert 0.9 * most < (first - plain).abs().max() < most
    for other in (Noise(Model(), 5.0, seed=4), Noise(Model(), 5.0, seed=3, rank=1)):
        other.begin(7)
        assert not torch.allclose(other._add(model.embeddings, None, plain), first, atol=most / 9)
    model.eval()
    assert torch.equal(model.embeddings(ids), plain)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.ema=1"], "train.ema=1.0: expected a decay in"),
        (["train.ema=-0.1"], "train.ema=-0.1: expected a decay in"),
        (["train.neftune_alpha=0"], "train.neftune_alpha=0.0: expected a finite number above 0"),
        (["optimizer=schedule_free", "train.ema=0.9"], "set train.ema=null"),
        (["train.ema=0.9", "launch.num_processes=2", "launch.accelerate=fsdp"],
         "launch.accelerate=fsdp: train.ema"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(make_run, overrides, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        make_run(*overrides)


def test_no_average_is_the_run_that_it_was(make_run):
    plain, zero, some, noisy = (
        naming.run_name(make_run(*more))
        for more in ([], ["train.ema=0"], ["train.ema=0.99"], ["train.neftune_alpha=5"])
    )
    assert plain == zero
    assert len({plain, some, noisy}) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_its_average_and_noise(make_run, tmp_path):
    """Through worker and disk; what is saved is the average, and its bytes are predicted."""
    run = make_run(*CONFIG, "train.ema=0.7", "train.neftune_alpha=5",
                   f"outputs_dir={tmp_path}", "run_name=whole")  # fmt: skip
    cut = dataclasses.replace(run, run_name="cut")
    for one in (run, cut):
        one.run_dir.mkdir(parents=True)
    assert finish(start(run)) == 0
    assert finish(start(cut, deadly="_generators", number=3)) == -signal.SIGKILL
    assert finish(start(cut)) == 0
    assert outcome(cut.run_dir) == outcome(run.run_dir)
    record = run_record.read(cut.run_dir)
    assert record["run"]["resumed_at"]
    assert record["saved_check"]["failure"] is None
    expected = record["predicted"]["by_category"]["optimizer_state"]
    assert record["memory"]["by_category"]["optimizer_state"] == expected
    assert expected > 2.9 * record["memory"]["by_category"]["trainable_weights"]
