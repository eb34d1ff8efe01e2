"""The live-tensor account against a step whose bytes can be counted by hand."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from harness.data.token_data import Data
from harness.evaluation import sliding_window
from harness.methods import adapt
from harness.models.next_token import NextToken
from harness.report import axes
from harness.system.signals import Stop
from harness.training import loop as training
from harness.training import memory, optimizers
from harness.training.memory import LiveTensors

KIB = 1024


def layers(trainable_second=True):
    """Two 64 x 64 fp32 matrices without bias: 16 KiB each."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].requires_grad_(False)
    model[1].requires_grad_(trainable_second)
    return model


def test_weights_are_split_into_frozen_and_trainable():
    model = layers()
    with LiveTensors(model) as live:
        pass
    assert live.by_category["frozen_weights"] == live.by_category["trainable_weights"] == 16 * KIB
    assert live.peak == 32 * KIB


def test_a_step_is_accounted_to_the_byte():
    model = layers()
    x = torch.zeros(32, 64)  # 8 KiB, made outside: not counted
    with LiveTensors(model) as live:
        loss = model(x).sum()  # h 8 KiB saved for the second matrix, y 8 KiB, loss 4 bytes
        loss.backward()
    # At the peak: both matrices, h, and what backward holds (y's gradient is an expanded scalar);
    # when the gradient of the second matrix is made, h and it are alive.
    assert live.by_category["trainable_weights"] == 16 * KIB
    assert 32 * KIB + 8 * KIB + 8 * KIB <= live.peak <= 32 * KIB + 8 * KIB + 16 * KIB + 64
    assert live.peak == sum(live.by_category.values())


def test_temporaries_that_are_gone_are_not_in_the_peak():
    model = layers()
    with LiveTensors(model) as live:
        for _ in range(10):
            torch.empty(256, KIB)  # 1 MiB, dropped at once
    assert live.peak == 32 * KIB + KIB * KIB
    with LiveTensors(model) as live:
        kept = [torch.empty(256, KIB) for _ in range(10)]
    assert len(kept) == 10 and live.peak == 32 * KIB + 10 * KIB * KIB


def test_views_and_in_place_results_are_counted_once():
    model = layers()
    with LiveTensors(model) as live:
        x = torch.empty(256, KIB)
        y = x.view(KIB, 256)[3:].t()
        y.mul_(0)
    assert live.peak == 32 * KIB + KIB * KIB


def test_gradients_and_optimizer_state_have_their_own_lines():
    model = layers()
    optimizer = torch.optim.AdamW([model[1].weight])
    for _ in range(2):
        report = {}
        with memory.measured(model, optimizer, report):
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            kept = model[1].weight.grad
            optimizer.zero_grad()
    got = report["by_category"]
    assert got["optimizer_state"] == 2 * 16 * KIB + 4  # two moments, and the step's number
    assert got["gradients"] == 16 * KIB == kept.nbytes
    assert report["peak_bytes"] == sum(got.values())
    assert set(got) == set(memory.CATEGORIES)
    assert set(got) == set(axes.CATEGORIES)  # what figures and dashboards colour


def test_by_the_allocator_what_is_there_is_told_apart_and_the_rest_is_activations(monkeypatch):
    """The way of a GPU, with an allocator that says 200 KiB: the optimizer has its state."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 200 * KIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 300 * KIB)
    model = layers()
    optimizer = torch.optim.AdamW([model[1].weight])
    report = {}
    for _ in range(2):
        live = memory.LiveTensors(model, optimizer)
        with memory._by_allocator(live, model, report, torch.device("cuda")):
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    got = report["by_category"]
    assert got["gradients"] == got["trainable_weights"] == 16 * KIB
    assert got["optimizer_state"] == 2 * 16 * KIB + 4
    assert sum(got.values()) == report["peak_bytes"] == 200 * KIB
    assert report["reserved_bytes"] == 300 * KIB
    assert not model[1].weight._post_accumulate_grad_hooks


def test_measuring_leaves_the_step_as_it_is(tiny):
    ids = torch.arange(1, 21).view(2, 10)

    def gradients():
        tiny.zero_grad()
        tiny(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in tiny.parameters()]

    plain = gradients()
    with LiveTensors(tiny):
        followed = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, followed, strict=True))


def test_frozen_models_hold_fewer_activations(tiny):
    ids = torch.arange(1, 21).view(2, 10)
    peaks = []
    for trainable in (True, False):
        tiny.zero_grad()
        tiny.requires_grad_(trainable)
        with LiveTensors(tiny) as live:
            tiny(ids).logits.sum()
        peaks.append(live.by_category["activations"])
    assert peaks[1] < peaks[0] / 2


def test_the_process_has_a_peak():
    assert memory.process_peak_bytes() > 50 * KIB * KIB


def test_every_phase_of_the_process_has_its_own_peak():
    peaks = memory.ProcessPeaks("before")
    peaks.turn("large")
    block = bytearray(200 * KIB * KIB)  # written to: its pages are resident
    del block
    with peaks.phase("small"):
        pass
    peaks.turn("end")
    if not peaks.by_phase:
        pytest.skip("the system does not let a process reset its peak")
    assert peaks.by_phase["large"] - peaks.by_phase["small"] > 150 * KIB * KIB
    assert peaks.peak_bytes >= peaks.by_phase["large"]
    assert set(peaks.by_phase) == {"before", "large", "small"}


@pytest.mark.parametrize("more", [{"steps": 10}, {"documents": 10}])
def test_the_peak_does_not_grow_with_steps_or_documents(tiny, make_run, tmp_path, more):
    def peak(steps=1, documents=1):
        """Live tensors over `steps` optimizer steps and an evaluation after each."""
        run = make_run(
            "method=lora", "data.context_length=16", "train.batch_tokens=64", "train.micro_batch=4",
            f"train.steps={4 * steps}", "evaluate.interval=2", "model.name=tiny",
        )  # fmt: skip
        model = NextToken(adapt(tiny, run))
        rows = torch.randint(1, 64, (8, 17)).tolist()
        text = Data(Dataset.from_dict({"tokens": rows}).with_format("numpy"), {}, {}, False, "")
        lengths = {"tokens": torch.randint(1, 64, (4 * documents, 20)).tolist()}
        held_out = Dataset.from_dict(lengths).with_format("numpy")

        def validate():
            nll, count = sliding_window.document_nll(
                model, held_out, context=16, stride=16, bos=0, batch_tokens=32
            )
            return nll.sum() / count.sum()

        if documents > 1 or more == {"documents": 10}:  # training's peak would hide evaluation's
            with LiveTensors(model) as live:
                validate()
            model.model.unload()
            return live.peak
        with LiveTensors(model) as live:
            optimizer = optimizers.make_optimizer(model.model, run.train)
            training.train(
                training.Training(model, text, run, Accelerator(cpu=True), optimizer),
                training.State(micro_batch=4),
                training.Hooks(validate, lambda: None, lambda: None, lambda row: None),
                Stop(),
            )
        model.model.unload()
        return live.peak

    assert peak(**more) <= peak() * 1.01
