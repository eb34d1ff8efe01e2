"""What training moves without a gradient: resumed and best weights are those of the run."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.training import checkpoint
from harness.training.buffers import BUFFER, GENERATOR, NUMBER, SAMPLER, BufferState

MonteCLoRA = getattr(peft, "MontecloraConfig", None)
IDS = torch.arange(24).reshape(2, 12)
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, use_cache=False,
)  # fmt: skip


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


def resumed(tiny, made, halfway=lambda tensors: None):
    """Train six steps, and again from a checkpoint of three: equal, bit for bit, in all that is."""
    base = copy.deepcopy(tiny)
    model = made(tiny)
    optimizer, buffers = optimizer_of(model), BufferState(model)
    for _ in range(3):
        step(model, optimizer)
    tensors = checkpoint.state_tensors(model, optimizer) | buffers.tensors(factors=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    halfway(tensors)
    draws = torch.get_rng_state()
    for _ in range(3):
        step(model, optimizer)

    again = made(base)
    fresh, theirs = optimizer_of(again), BufferState(again)
    checkpoint.restore(again, fresh, tensors)
    theirs.restore(tensors)
    torch.set_rng_state(draws)
    for _ in range(3):
        step(again, fresh)
    found = dict(again.state_dict())
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.skipif(MonteCLoRA is None, reason="the installed PEFT has no MonteCLoRA")
def test_monteclora_resumes_bit_for_bit(tiny):
    def halfway(tensors):  # new samples are drawn on the way: four at a time
        assert any(name.startswith(SAMPLER) for name in tensors)
        assert sum("expert_weights" in name for name in tensors if name.startswith(BUFFER)) == 2

    resumed(tiny, monteclora, halfway)


@pytest.mark.skipif(not hasattr(peft, "PveraConfig"), reason="the installed PEFT has no PVERA")
@pytest.mark.parametrize("seed", [None, 3])
def test_pvera_resumes_bit_for_bit(tiny, seed):
    """With a seed, every layer draws from a generator of its own, which it holds in a dict."""

    def made(model):
        torch.manual_seed(1)
        fields = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
        config = peft.PveraConfig(generator_seed=seed, **fields)
        return peft.get_peft_model(model, config).train()

    def halfway(tensors):
        assert sum(name.startswith(GENERATOR) for name in tensors) == (2 if seed else 0)

    resumed(tiny, made, halfway)


@pytest.mark.skipif(not hasattr(peft, "VeloraConfig"), reason="the installed PEFT has no VeLoRA")
@pytest.mark.parametrize("start", ["batch_average_once", "batch_average", "random"])
def test_velora_resumes_bit_for_bit(start):
    """Its projection is made in the first step, and it notes in Python that it is made."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LLAMA)

    def made(model):
        torch.manual_seed(1)
        velora = peft.VeloraConfig(num_groups=4, init_type=start)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], velora_config=velora)
        return peft.get_peft_model(model, config).train()

    def halfway(tensors):
        noted = [tensor for name, tensor in tensors.items() if name.startswith(NUMBER)]
        assert [bool(one) for one in noted] == ([] if start == "random" else [True, True])

    resumed(llama, made, halfway)


def test_generators_are_found_wherever_a_module_holds_them():
    def made():
        model = nn.Sequential(nn.Linear(2, 2))
        model.mine = torch.Generator().manual_seed(1)
        model[0].by_name = {"a": [torch.Generator().manual_seed(2)], "b": None}
        return model, [model.mine, model[0].by_name["a"][0]]

    model, mine = made()
    for generator in mine:
        torch.rand(3, generator=generator)
    again, theirs = made()
    BufferState(again).restore(BufferState(model).tensors(factors=True))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))


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
