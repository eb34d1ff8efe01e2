"""Which parameters train, what is refused, and that an adapter starts as the base and leaves it."""

import pytest
import torch

from harness import methods, models
from harness.config import ConfigError
from harness.methods import adapt

IDS = torch.arange(1, 21).view(2, 10)
ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_none_trains_nothing_and_full_everything(tiny, make_run):
    total = sum(p.numel() for p in tiny.parameters())
    assert not trainable(adapt(tiny, make_run("method=none")))
    assert models.count_parameters(tiny).total == total
    full = adapt(tiny, make_run("method=full"))
    assert models.count_parameters(full).trainable == total
    assert tiny.lm_head.weight is tiny.transformer.wte.weight  # tied, counted once
    d, n_layer = 32, 2
    assert total == 64 * d + 32 * d + n_layer * (12 * d * d + 13 * d) + 2 * d


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [("c_attn", 4), ("attn", 6), ("mlp", 10), ("all", 16)],  # in units of r d
)
def test_lora_counts(tiny, make_run, targets, per_layer):
    model = adapt(tiny, make_run("method=lora", f"targets={targets}", "method.r=3"))
    assert models.count_parameters(model).trainable == per_layer * 3 * 32 * 2
    assert all("lora_" in name for name in trainable(model))


@pytest.mark.parametrize("name", ["gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"])
def test_published_counts_on_the_meta_device(make_run, name):
    layers, width, total, lora_r4 = {
        "gpt2": (12, 768, 124_439_808, 147_456),
        "gpt2_medium": (24, 1024, 354_823_168, 393_216),
        "gpt2_large": (36, 1280, 774_030_080, 737_280),
        "gpt2_xl": (48, 1600, 1_557_611_200, 1_228_800),
    }[name]
    shape = (
        "model.tokenizer=gpt2_mini", "model.architecture.vocab_size=50257",
        f"model.architecture.n_layer={layers}", f"model.architecture.n_embd={width}",
        "model.architecture.n_positions=1024", "model.architecture.n_head=1",
    )  # fmt: skip
    run = make_run("model=gpt2_mini_init", *shape, "method=lora", "method.r=4", "targets=c_attn")
    base = models.on_meta(models.load_config(run.model))
    assert models.count_parameters(base).total == total
    assert models.count_parameters(adapt(base, run)).trainable == lora_r4


def test_lora_fields_reach_peft(tiny, make_run):
    model = adapt(
        tiny,
        make_run(
            "method=lora", "method.r=4", "method.alpha=3r", "method.dropout=0.25",
            "method.use_rslora=true", "method.init=gaussian",
            "+method.fields.layers_to_transform=[1]",
        ),
    )  # fmt: skip
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.25)
    assert config.use_rslora and config.init_lora_weights == "gaussian" and config.fan_in_fan_out
    assert all(".h.1." in name for name in trainable(model))


@pytest.mark.parametrize(
    ("peft_type", "extra"),
    [
        ("IA3", []),
        ("FOURIERFT", ["+method.fields.n_frequency=10"]),
        ("VERA", []),
        ("PROMPT_TUNING", ["+method.fields.num_virtual_tokens=4"]),
        ("PREFIX_TUNING", ["+method.fields.num_virtual_tokens=4"]),
    ],
)
def test_any_peft_method_by_name_trains(tiny, make_run, peft_type, extra):
    from harness.loss import token_nll

    targets = "attn" if peft_type == "VERA" else "all"
    method = f"method.peft_type={peft_type}"
    model = adapt(tiny, make_run("method=peft", method, f"targets={targets}", *extra))
    assert 0 < models.count_parameters(model).trainable < models.count_parameters(model).total / 2
    nll = token_nll(model, IDS, IDS)
    assert nll.shape == IDS.shape
    nll.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_lora_is_the_base_at_the_start_and_not_after_a_step(tiny, make_run):
    with torch.no_grad():
        base = tiny(IDS).logits
    model = adapt(tiny, make_run("method=lora"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=IDS).logits, base)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.r=33"], r"method\.r=33 is larger than .* allows: 32 at most"),
        (["targets.modules=[attn.c_atn]"], r"'attn\.c_atn' matches no matrix.*attn\.c_attn"),
        (["targets.modules=[c_proj]"], r"several matrices of a layer.*attn\.c_proj, mlp\.c_proj"),
        (["targets.modules=[h.0.attn.c_attn]"], r"1 of 2 layers \(not in 1\)"),
        (["targets.modules=[]"], r"names no modules"),
        (["+method.fields.use_dorra=true"], r"did you mean 'use_dora'"),
        (["+method.fields.r=3"], r"method\.fields\.r: set it by its own key"),
        (["method.init=gausian"], r"."),
        (["method=peft", "method.peft_type=IA4"], r"did you mean 'IA3'"),
        (["method=peft", "method.peft_type=LOHA", "+method.fields.rr=3"], r"method\.fields\.rr"),
        (["method=peft", "method.peft_type=LOHA"], r"^LOHA does not fit this model: .*Conv1D"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny, make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        adapt(tiny, make_run(*overrides))


def test_embeddings_and_the_head_need_no_layer(tiny, make_run):
    found = methods.matched_targets(tiny, make_run("targets.modules=[wte]").targets)
    assert found == {"transformer.wte": (64, 32)}
