"""`Conv1D` turned into `nn.Linear`: the same model, only where it is wanted, and back as it was."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import peft
import pytest
import torch
from accelerate import Accelerator
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from harness import methods
from harness.config import peft_fields
from harness.config.errors import ConfigError
from harness.data.token_data import Batch
from harness.models import linear, model_size, pretrained
from harness.models.next_token import NextToken
from harness.models.split_qkv import unfuse_qkv
from harness.runs import estimate
from harness.training import checkpoint, loop, optimizers

TINY = (
    "model.asset=null", "data.context_length=16", "train.micro_batch=2", "train.batch_tokens=32",
    "evaluate.batch_tokens=32", "+model.architecture={model_type: gpt2, n_embd: 32, n_layer: 2, "
    "n_head: 2, n_positions: 128, vocab_size: 64, initializer_range: 0.2}",
)  # fmt: skip
IDS = torch.arange(2, 36).view(2, 17)


@pytest.fixture
def spread(tiny):
    """`tiny` with random biases, too, which start as zeros and would hide a mix-up."""
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return tiny


def outcome(model):
    """Logits and the gradients of the model's own loss, by name."""
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


# --------------------------------------------------------------------------- the same model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_logits_and_gradients_are_the_same(spread, dtype, tolerance):
    plain = spread.to(dtype)
    turned = linear.turn(copy.deepcopy(plain))
    matrices = [m for m in turned.modules() if isinstance(m, nn.Linear)]
    assert len(matrices) == 2 * 4 + 1
    assert not any(isinstance(m, Conv1D) for m in turned.modules())
    (logits, grads), (expected, expected_grads) = outcome(turned), outcome(plain)
    near = {"rtol": tolerance, "atol": tolerance * float(expected.abs().max())}
    torch.testing.assert_close(logits, expected, **near)
    assert all(p.is_contiguous() for p in turned.parameters())
    for name, gradient in expected_grads.items():
        flipped = isinstance(plain.get_submodule(name.rpartition(".")[0]), Conv1D)
        flipped = flipped and name.endswith("weight")
        near = {"rtol": tolerance, "atol": tolerance * float(gradient.abs().max()) + 1e-9}
        wanted = gradient.t() if flipped else gradient
        torch.testing.assert_close(grads[name], wanted, **near, msg=name)


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_turned_back_is_what_was_published(spread, tmp_path, apart):
    expected = copy.deepcopy(spread.state_dict())
    spread.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    turned = linear.turn(unfuse_qkv(spread) if apart else spread)
    assert linear.is_turned(turned)
    assert not turned.transformer.h[1].mlp.c_fc.weight.requires_grad
    back = linear.as_published(turned)
    assert back is spread and not linear.is_turned(back)
    assert type(back.lm_head) is nn.Linear and back.lm_head.weight is back.transformer.wte.weight
    assert not back.transformer.h[1].mlp.c_fc.weight.requires_grad
    back.save_pretrained(tmp_path)
    again, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    found = again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_must_be_merged_before_its_base_is_turned_back(tiny):
    adapted = peft.get_peft_model(linear.turn(tiny), peft.HRAConfig(r=2, target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        linear.as_published(adapted)


def test_counts_and_generation_are_as_before(spread):
    spread.config.use_cache = True
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = spread.generate(IDS[:, :5], **options)
    count = model_size.count_parameters(spread)
    assert model_size.count_parameters(linear.turn(spread)) == count
    assert torch.equal(spread.generate(IDS[:, :5], **options), expected)


# --------------------------------------------------------------------------- where it is wanted


def direct(kind, config_class):
    """PEFT's own configuration for one matrix of `tiny`, without the harness."""
    fields = {
        "ADALORA": {"total_step": 10}, "ADAMSS": {"r": 8}, "C3A": {"block_size": 8},
        "FOURIERFT": {"n_frequency": 20}, "FROD": {"progressbar": False}, "MISS": {"r": 4},
        "OFT": {"oft_block_size": 8, "r": 0}, "ROAD": {"group_size": 8}, "SHIRA": {"r": 4},
        "VBLORA": {"vector_length": 8}, "WAVEFT": {"n_frequency": 20},
        "IA3": {"feedforward_modules": []},
    }.get(kind, {})  # fmt: skip
    if "task_type" in inspect.signature(config_class).parameters:
        fields["task_type"] = "CAUSAL_LM"
    return config_class(target_modules=["attn.c_proj"], **fields)


MATRICES = {
    str(getattr(kind, "value", kind)): config_class
    for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if peft_fields.takes_matrices(str(getattr(kind, "value", kind)))
    and str(getattr(kind, "value", kind)) not in ("UDV", "XLORA", "POLY")
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MATRICES)
def test_the_list_is_of_the_methods_whose_layers_take_no_conv1d(tiny, kind):
    """PEFT itself is asked, on `Conv1D` and on the same model turned."""
    built = []
    for base in (copy.deepcopy(tiny), linear.turn(tiny)):
        try:
            model = peft.get_peft_model(base, direct(kind, MATRICES[kind]))
            built.append(any(p.requires_grad for p in model.parameters()))
        except (ValueError, TypeError, NotImplementedError):
            built.append(False)
    assert built == [kind not in peft_fields.LINEAR_ONLY, True]


@pytest.mark.parametrize(
    ("overrides", "turned"),
    [
        ([], False),
        (["method=full"], False),
        (["method=udv"], False),
        (["method=peft", "method.peft_type=IA3"], False),
        (["method=peft", "method.peft_type=LOHA"], True),
        (["method=peft", "method.peft_type=loha", "targets=qv"], True),
        (["method=peft", "method.peft_type=HRA", "targets=head"], False),  # which is nn.Linear
        (
            ["method=peft", "method.peft_type=HRA", "+method.fields.target_modules=[lm_head]"],
            False,
        ),
        (["method=peft", "method.peft_type=HRA", "+method.fields.target_modules=all-linear"], True),
        (["method=lora", "method.init=olora"], True),
        (["model.linear=true"], True),
        (["method=none", "model.linear=true"], True),
    ],
)
def test_auto_turns_where_the_method_needs_it_and_nowhere_else(make_run, overrides, turned):
    run = make_run(*TINY, *overrides)
    config = pretrained.load_config(run.model)
    for base in (pretrained.on_meta(run, config), pretrained.load_model(run, config)):
        assert linear.is_turned(base) == turned
        assert linear.is_turned(methods.adapt(base, run)) == turned


def test_olora_is_a_decomposition_of_the_weight_where_it_is_turned(make_run):
    """B's columns are orthonormal and the model is the base; on `Conv1D` PEFT takes W^T for W."""
    run = make_run(*TINY, "method=lora", "method.init=olora", "method.r=4", "targets=mlp")
    config = pretrained.load_config(run.model)
    torch.manual_seed(0)
    base = pretrained.load_model(run, config)
    weight = base.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (out, in)
    expected = base(input_ids=IDS).logits
    adapted = methods.adapt(base, run)
    q, r = torch.linalg.qr(weight)
    layer = adapted.base_model.model.transformer.h[0].mlp.c_fc
    torch.testing.assert_close(layer.lora_B["default"].weight, q[:, :4])
    torch.testing.assert_close(layer.lora_A["default"].weight, r[:4])
    torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.linear=maybe"], r"model\.linear='maybe': choose one of: False, True, auto"),
        (
            ["model.linear=false", "method=peft", "method.peft_type=LOHA"],
            r"model\.linear=false: PEFT's LOHA takes nn\.Linear and no Conv1D; write "
            r"model\.linear=auto",
        ),
        (
            ["model.linear=false", "method.init=olora"],
            r"model\.linear=false: OLoRA takes a weight as \(out, in\).*write model\.linear=auto",
        ),
        (
            ["model.linear=true", "model=lstm", "targets=lstm"],
            r"model\.linear=true: LSTMForCausalLM has no Conv1D to turn.*leave it at auto",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make_run, overrides, said):
    tiny = () if "model=lstm" in overrides else TINY
    with pytest.raises(ConfigError, match=said):
        run = make_run(*tiny, *overrides)
        pretrained.on_meta(run, pretrained.load_config(run.model))


def test_a_run_that_leaves_it_alone_is_the_run_that_it_was(make_run):
    from harness.config import naming

    plain, auto, true = (
        naming.identity(make_run(*TINY, *more))
        for more in ((), ("model.linear=auto",), ("model.linear=true",))
    )
    assert plain == auto != true


# --------------------------------------------------------------------------- training


def trained(run, steps=3):
    """Nats of every step's blocks before it, and the model."""
    config = pretrained.load_config(run.model)
    torch.manual_seed(0)
    base = pretrained.load_model(run, config)
    torch.manual_seed(1)
    model = methods.adapt(base, run)
    accelerator, nats = Accelerator(cpu=True), []
    optimizer = optimizers.make_optimizer(model, run.train, run.optimizer)
    batch = Batch(IDS[:, :-1], IDS[:, 1:], None)
    for _ in range(steps):
        predicts = NextToken(model).train()
        with torch.no_grad():
            nats.append(float(predicts(batch.inputs, batch.targets).nats.sum()))
        loop.accumulate(predicts, [batch], batch.inputs.numel(), accelerator)
        loop.apply(model, optimizer, accelerator, run.train)
    return nats, model


ALIKE = {
    "full": ["method=full"],
    "train_only": ["method=full", "method.train_only=[matrices]"],
    "lora": ["method=lora"],
    "dora": ["method=lora", "method.use_dora=true"],
    "pissa": ["method=pissa"],
    "qv": ["method=lora_paper", "method.dropout=0"],
    "udv": ["method=udv", "method.rank=8"],
    "udv-all": ["method=udv", "method.rank=8", "method.train=udv", "method.residual=keep"],
    "truncate": ["method=truncate", "method.rank=8"],
    "ia3": ["method=peft", "method.peft_type=IA3"],
    "tinylora": ["method=peft", "method.peft_type=TINYLORA"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALIKE)
def test_the_losses_are_those_of_the_model_as_it_is(make_run, name):
    run = make_run(*TINY, *ALIKE[name], "train.lr=1e-2")
    if run.method.name == "truncate":
        config = pretrained.load_config(run.model)
        turned = replace(run, model=replace(run.model, linear=True))
        logits = []
        for one in (run, turned):
            torch.manual_seed(0)
            logits.append(methods.adapt(pretrained.load_model(one, config), one)(IDS).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
        return
    expected, _ = trained(run)
    found, model = trained(replace(run, model=replace(run.model, linear=True)))
    assert linear.is_turned(model)
    assert abs(expected[0] - expected[-1]) > 0.01  # or nothing here means anything
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["LOHA", "HRA"])
def test_a_turned_run_is_predicted_counted_and_saved_as_a_plain_gpt2(make_run, tmp_path, kind):
    run = make_run(*TINY, "method=peft", f"method.peft_type={kind}", "targets=qv")
    _, model = trained(run)
    model.eval()
    logits = model(input_ids=IDS).logits
    accelerator = Accelerator(cpu=True)
    predicted = estimate.predict(run, pretrained.load_config(run.model), accelerator)
    if kind == "HRA":
        assert predicted.parameters == model_size.count_parameters(model)
        plain = replace(run, model=replace(run.model, linear="auto"), method=replace(
            run.method, peft_type="IA3"))  # fmt: skip
        other = estimate.predict(plain, pretrained.load_config(run.model), accelerator)
        assert predicted.evaluate_flops_per_token >= other.evaluate_flops_per_token

    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    saved = checkpoint.export(model, Tokenizer(), tmp_path, merged=True)
    assert saved == ["adapter", "model"]
    again, info = GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_code_on_an_adapters_own_page_loads_it_on_a_plain_gpt2(make_run, tmp_path):
    run = make_run(*TINY, "method=peft", "method.peft_type=HRA")
    _, model = trained(run)
    torch.manual_seed(0)
    plain = pretrained.load_model(replace(run, method=make_run("method=none").method),
                                  pretrained.load_config(run.model))  # fmt: skip
    assert not linear.is_turned(plain)
    checkpoint.export(model, None, tmp_path, merged=False)
    with pytest.raises((TypeError, ValueError), match="Conv1D"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    page = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    code = page.rpartition("```python\n")[2].partition("```")[0]
    assert "harness" not in code
    found = {"base": plain, "FOLDER": str(tmp_path / "adapter")}
    exec(code, found)
    expected = model.eval()(input_ids=IDS).logits
    assert torch.equal(found["model"].eval()(input_ids=IDS).logits, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "overrides",
    [["method=full"], ["method=lora", "+method.fields.modules_to_save=[mlp.c_fc]", "targets=attn"]],
    ids=["full", "modules_to_save"],
)
def test_a_turned_weight_that_trains_resumes_to_the_same_bits(make_run, overrides):
    """AdamW's fused kernel pairs weights and moments by address, whatever their strides."""
    run = make_run(*TINY, *overrides, "model.linear=true", "train.lr=1e-2")
    config, accelerator = pretrained.load_config(run.model), Accelerator(cpu=True)
    batch = Batch(IDS[:, :-1], IDS[:, 1:], None)

    def built():
        torch.manual_seed(0)
        model = methods.adapt(pretrained.load_model(run, config), run)
        return model, optimizers.make_optimizer(model, run.train, run.optimizer)

    def step(model, optimizer):
        loop.accumulate(NextToken(model).train(), [batch], batch.inputs.numel(), accelerator)
        loop.apply(model, optimizer, accelerator, run.train)

    model, optimizer = built()
    step(model, optimizer)
    tensors = checkpoint.state_tensors(model, optimizer)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}  # as filed
    step(model, optimizer)
    again, other = built()
    checkpoint.restore(again, other, tensors)
    step(again, other)
    found, expected = checkpoint.trained_state(again), checkpoint.trained_state(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
