"""The fused LoRA product against PEFT's own layer and float64, and when it steps aside."""

import copy

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing._internal.two_tensor import TwoTensor
from transformers.pytorch_utils import Conv1D

from harness.methods.lora_layer import FusedLinear, fuse

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.linear = Conv1D(24, 16), nn.Linear(24, 8, bias=bias)
        nn.init.normal_(self.conv.bias)

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x)))


def pair(with_bias=True, **fields):
    """The same adapted model with PEFT's layers and with ours."""
    models = []
    for change in (lambda config: config, fuse):
        torch.manual_seed(2)
        config = peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=["conv", "linear"], init_lora_weights=False, **fields
        )
        models.append(peft.get_peft_model(Two(with_bias), change(config)))
    return models


def outcome(model, x, autocast=False):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.to(torch.promote_types(y.dtype, torch.float32)).square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts_own_in_float64(bias):
    plain, fused = pair(bias)
    assert all(
        isinstance(layer, FusedLinear)
        for layer in (fused.base_model.model.conv, fused.base_model.model.linear)
    )
    expected = outcome(plain.double(), X.double())
    got = outcome(fused.double(), X.double())
    assert len(got) == len(expected) == 2 + 4
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_is_no_farther_from_float64_than_pefts():
    plain, fused = pair()
    exact = outcome(copy.deepcopy(plain).double(), X.double())
    errors = [
        [
            ((mine.double() - true).norm() / true.norm()).item()
            for mine, true in zip(outcome(model, X, autocast=True), exact, strict=True)
        ]
        for model in (plain, fused)
    ]
    assert all(ours < 2 * theirs + 1e-3 for theirs, ours in zip(*errors, strict=True))


def test_an_input_that_needs_no_gradient_gets_none():
    _, fused = pair()
    fused(X).sum().backward()
    assert all(p.grad is not None for n, p in fused.named_parameters() if "lora_" in n)
    assert all(p.grad is None for n, p in fused.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize(
    "fields", [{"lora_dropout": 0.5}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}]
)
def test_what_is_more_than_the_product_is_left_to_peft(fields):
    plain, fused = pair(**fields)
    layer = fused.base_model.model.conv
    assert isinstance(layer, FusedLinear) and layer._fusable() is None
    torch.testing.assert_close(plain.eval()(X), fused.eval()(X))


def test_a_weight_of_a_tensor_class_is_left_to_peft():
    """Such a class has products of its own; here, those of two matrices at once."""
    torch.manual_seed(3)
    first, second = torch.randn(8, 24), torch.randn(8, 24)

    def adapted(weight):
        model = Two(bias=False)
        model.linear.weight = nn.Parameter(weight, requires_grad=False)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False)
        return peft.get_peft_model(model, fuse(config))

    both = adapted(TwoTensor(first.clone(), second.clone()))
    assert type(both.base_model.model.linear) is peft.tuners.lora.Linear
    y = both(X)
    for mine, weight in ((y.a, first), (y.b, second)):
        plain = adapted(weight)
        assert type(plain.base_model.model.linear) is FusedLinear
        torch.testing.assert_close(mine, plain(X))


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_on_any_part_is_called(part, register):
    _, fused = pair()
    layer = fused.base_model.model.conv
    target = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    calls = []
    handle = getattr(target, register)(lambda *arguments: calls.append(part))
    fused(X.clone().requires_grad_()).sum().backward()
    assert calls == [part]
    handle.remove()
    assert layer._fusable() == "default"


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_what_accelerate_hangs_on_a_part_is_called(part):
    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    plain, fused = pair()
    found = []
    for model in (plain, fused):
        layer = model.base_model.model.conv
        target = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        add_hook_to_module(target, Doubled())
        found.append(model(X))
        remove_hook_from_module(target)
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[1], fused(X))  # it does something
    assert layer._fusable() == "default"


def test_a_hook_on_every_module_is_called_as_often_as_by_peft():
    counts = []
    for model in pair():
        calls = []
        handle = register_module_forward_hook(lambda module, *_: calls.append(type(module)))  # noqa: B023
        model(X)
        handle.remove()
        counts.append(calls.count(torch.nn.Linear))
    assert counts[0] == counts[1] > 0


def test_second_derivatives_are_pefts_own():
    plain, fused = pair()
    found = []
    for model in (plain.double(), fused.double()):
        x = X.double().requires_grad_()
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = torch.tanh(model(x)).square().sum()
        first = torch.autograd.grad(loss, [x, *trained], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(penalty, [x, *trained])])
    assert len(found[0]) == 2 * (1 + 4)
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_merged_disabled_and_several_adapters_are_left_to_peft():
    plain, fused = pair()
    layer = fused.base_model.model.conv
    assert layer._fusable() == "default"
    active = fused(X)
    fused.merge_adapter()
    assert layer._fusable() is None
    torch.testing.assert_close(fused(X), active, rtol=1e-4, atol=1e-5)
    fused.unmerge_adapter()
    with fused.disable_adapter():
        assert layer._fusable() is None
        torch.testing.assert_close(fused(X), Two()(X))
    torch.testing.assert_close(active, plain(X), rtol=1e-5, atol=1e-6)


def test_the_saved_adapter_is_a_plain_lora(tmp_path):
    _, fused = pair()
    fused.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Two(), tmp_path)
    assert type(loaded.base_model.model.conv) is peft.tuners.lora.Linear
    torch.testing.assert_close(loaded(X), fused(X))
