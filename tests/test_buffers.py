"""Buffers and drawn samples that training moves: resumed and best weights are those of the run."""

import copy

import peft
import pytest
import torch
from torch import nn

from harness import checkpoint
from harness.buffers import BUFFER, SAMPLER, BufferState

MonteCLoRA = getattr(peft, "MontecloraConfig", None)
IDS = torch.arange(24).reshape(2, 12)


def monteclora(model):
    torch.manual_seed(1)
    fields = {"num_samples": 3, "buffer_size": 4, "sample_scaler": 0.1}
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, monteclora_config=MonteCLoRA(**fields)
    )
    return peft.get_peft_model(model, config).train()


def step(model, optimizer):
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.skipif(MonteCLoRA is None, reason="the installed PEFT has no MonteCLoRA")
def test_monteclora_resumes_bit_for_bit(tiny):
    base = copy.deepcopy(tiny)
    model = monteclora(tiny)
    optimizer, buffers = optimizer_of(model), BufferState(model)
    for _ in range(3):
        step(model, optimizer)
    tensors = checkpoint.state_tensors(model, optimizer) | buffers.tensors(factors=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert any(name.startswith(SAMPLER) for name in tensors)
    assert sum("expert_weights" in name for name in tensors if name.startswith(BUFFER)) == 2
    draws = torch.get_rng_state()
    for _ in range(3):  # draws new samples on the way: four are drawn at a time
        step(model, optimizer)

    again = monteclora(base)
    fresh, theirs = optimizer_of(again), BufferState(again)
    checkpoint.restore(again, fresh, tensors)
    theirs.restore(tensors)
    torch.set_rng_state(draws)
    for _ in range(3):
        step(again, fresh)
    found = dict(again.state_dict())
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


class Running(nn.Module):
    """A weight, and running statistics that each forward pass moves."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("constant", torch.ones(2))

    def forward(self, x):
        return self.norm(self.linear(x))


def test_the_best_weights_come_with_their_running_statistics(tmp_path):
    torch.manual_seed(0)
    model = Running().train()
    buffers = BufferState(model)
    assert buffers.tensors(factors=True) == {}
    x = torch.randn(8, 3)
    model(x)
    checkpoint.save_trained(model, tmp_path / "best", buffers=buffers)
    expected = copy.deepcopy(model).eval()(x)
    moved = {name.removeprefix(BUFFER) for name in buffers.tensors(factors=True)}
    assert moved == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for _ in range(3):
        model(x + 5)
    assert not torch.equal(model.eval()(x), expected)
    with torch.no_grad():
        checkpoint.load_trained(model, tmp_path / "best", buffers=buffers)
    assert torch.equal(model.eval()(x), expected)
