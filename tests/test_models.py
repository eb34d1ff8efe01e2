"""What is done to a model for the sake of speed and memory leaves its function as it is."""

import math
import re
import shutil

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
)
from transformers.activations import ACT2FN

from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR, CONF_DIR
from harness.config.schema import TargetsConfig, TrainConfig
from harness.methods import adapt, targets
from harness.models import pretrained, transformer_blocks
from harness.models.next_token import NextToken
from harness.results import environment, run_record
from harness.training.memory import LiveTensors

PROMPTS = [
    "method=peft", "method.peft_type=PREFIX_TUNING", "+method.fields.num_virtual_tokens=4",
]  # fmt: skip


def gradients(model):
    """Of every parameter that trains, and the most bytes of activations on the way."""
    ids = torch.arange(1, 41).reshape(2, 20)
    prepared = NextToken(model)
    with LiveTensors(model) as live:
        prepared(ids[:, :-1], ids[:, 1:]).objective.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, live.category_peaks["activations"]


@pytest.mark.parametrize("method", ["full", "lora", "udv"])
def test_checkpointed_blocks_have_the_same_gradients(tiny, make_run, method):
    run = make_run(f"method={method}", "train.checkpointing=true")
    torch.manual_seed(0)
    model = adapt(tiny, run).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    plain, bytes_before = gradients(model)
    transformer_blocks.checkpoint_activations(model, run.train)
    again, bytes_after = gradients(model)
    assert bytes_after < bytes_before and plain.keys() == again.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, msg=name)


def test_the_fused_gelu_is_the_saved_one(make_run):
    ids = torch.arange(1, 41).reshape(2, 20)
    logits = []
    for gelu in ("fused", "as_saved"):
        run = make_run("model=gpt2_mini_init", "method=none", f"model.gelu={gelu}")
        config = pretrained.load_config(run.model)
        assert config.activation_function == {"fused": "gelu_pytorch_tanh"}.get(gelu, "gelu_new")
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(pretrained.load_model(run, config).eval()(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_the_shipped_models_logits_are_those_of_the_composed_gelu(make_run, tokenizer):
    ids = torch.tensor([tokenizer("Return the sum of all values in the given list.")["input_ids"]])
    run, logits = make_run("method=none"), []
    for gelu in (pretrained.FUSED_GELU, pretrained.COMPOSED_GELU):
        config = pretrained.load_config(run.model)
        config.activation_function = gelu
        with torch.no_grad():
            logits.append(pretrained.load_model(run, config).eval()(ids).logits)
    assert not torch.equal(*logits)  # another kernel, another rounding
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "activation"),
    [
        ([], "gelu_pytorch_tanh"),  # as it was saved
        (["model=gpt2_mini_init"], "gelu_new -> gelu_pytorch_tanh (fused)"),
        (["model=gpt2_mini_init", "model.gelu=as_saved"], "gelu_new"),
        (["model=lstm", "targets=lstm"], None),
    ],
)
def test_an_exchanged_gelu_is_recorded(make_run, overrides, activation):
    run = make_run(*overrides)
    assert (
        pretrained.facts(run.model, pretrained.load_config(run.model))["activation"] == activation
    )


def test_both_gelus_are_one_function():
    x = torch.linspace(-12, 12, 10_001, dtype=torch.float64)
    fused, composed = ACT2FN[pretrained.FUSED_GELU](x), ACT2FN[pretrained.COMPOSED_GELU](x)
    torch.testing.assert_close(fused, composed, rtol=1e-12, atol=1e-14)


def test_what_another_architecture_calls_its_gelu_is_exchanged_too(make_run):
    fields = "{model_type: phi, hidden_act: gelu_new, hidden_size: 32, num_attention_heads: 2}"
    run = make_run("model.asset=null", f"+model.architecture={fields}", "method=none")
    config = pretrained.load_config(run.model)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert pretrained.facts(run.model, config)["type"] == "phi"


def test_logits_that_change_after_the_head_are_known_without_values():
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    with torch.device("meta"):
        without = NextToken(GraniteForCausalLM(config))
    assert without._owner == NextToken(GraniteForCausalLM(config))._owner == []


def test_prompts_cannot_be_checkpointed(tiny, make_run):
    model = adapt(tiny, make_run(*PROMPTS))
    with pytest.raises(ConfigError, match=r"train\.checkpointing=true: .*set it to false"):
        transformer_blocks.checkpoint_activations(model, TrainConfig(checkpointing=True))


@pytest.mark.parametrize("method", ["full", "lora method.bias=all"])
def test_what_trains_is_never_held_in_bf16(tiny, make_run, method):
    run = make_run(*f"method={method}".split(), "train.precision=bf16", "model.frozen_dtype=bf16")
    if method == "full":
        assert pretrained.dtype_of(run) == torch.float32
        return
    with pytest.raises(ConfigError, match=r"model\.frozen_dtype=bf16: this method trains .*bias"):
        adapt(tiny.to(pretrained.dtype_of(run)), run)


def test_freezing_in_bf16_moves_what_is_learned_by_rounding_only(finished_run):
    lora = ("method=lora", "method.r=4", "train.lr=0.02", "train.precision=bf16")
    plain, frozen = (
        run_record.read(finished_run(*lora, *more)) for more in ((), ("model.frozen_dtype=bf16",))
    )
    memory = [r["memory"]["by_category"]["frozen_weights"] for r in (plain, frozen)]
    assert memory[1] < 0.51 * memory[0]
    for name in ("step0.validation", "validation", "test"):
        one, other = (
            math.log(run_record.get(r, f"quality.{name}.perplexity")) for r in (plain, frozen)
        )
        assert one != other and abs(one - other) < 0.01, name  # nats a token; it learns 0.3


@pytest.mark.parametrize("kind", ["gpt2", "biogpt", "gpt_neo", "opt", "starcoder2", "phi", "lstm"])
def test_every_dropout_of_the_base_is_set(kind, make_run):
    run = make_run(
        f"+model.architecture.model_type={kind}", "model.asset=null", "model.tokenizer=gpt2_mini",
        "targets=lstm" if kind == "lstm" else "targets=all",
    )  # fmt: skip
    config = pretrained.load_config(run.model)
    assert any("drop" in name for name in vars(config))
    for name, value in vars(config).items():
        is_a_heads = name.startswith(("summary_", "classifier_"))  # of another task
        if "drop" in name and isinstance(value, float) and not is_a_heads:
            assert value == 0.0, name


def test_frozen_bf16_with_fp32_products_is_refused(make_run):
    with pytest.raises(ConfigError, match=r"set train\.precision=bf16"):
        make_run("model.frozen_dtype=bf16")


@pytest.mark.parametrize("has", [True, False])
def test_bf16_without_its_instructions_is_warned_of(monkeypatch, has):
    monkeypatch.setattr(environment, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = environment.precision_warning("bf16")
    assert said is None if has else "tens of times slower" in said
    assert environment.precision_warning("fp32") is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_have_the_same_gradients(tiny, make_run):
    model = adapt(tiny, make_run("method=lora"))
    plain, _ = gradients(model)
    transformer_blocks.compile_blocks(model)
    ids = torch.arange(1, 41).reshape(2, 20)
    NextToken(model)(ids[:, :-1], ids[:, 1:]).objective.backward()
    compiled = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in plain.items():
        torch.testing.assert_close(compiled[name], expected, msg=name)


def test_what_has_no_blocks_cannot_be_compiled(make_run):
    run = make_run("model=lstm", "method=full")
    model = pretrained.load_model(run, pretrained.load_config(run.model))
    with pytest.raises(ConfigError, match=r"train\.compile=true: .*set it to false"):
        transformer_blocks.compile_blocks(model)


def test_a_language_model_with_eyes_is_refused_and_can_be_saved_by_itself(tmp_path, make_run):
    """By the lines of conf/README.md; its logits are those of the whole model on text."""
    torch.manual_seed(0)
    parts = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 4096, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16}
    sight = {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=parts | text, vision_config=parts | sight, mm_tokens_per_image=4,
        image_token_index=4000, boi_token_index=4001, eoi_token_index=4002,
    )  # fmt: skip
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini").save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="gemma3 model takes more than text"):
        pretrained.load_config(make_run("model=local", f"model.path={tmp_path}/whole").model)
    with pytest.raises(ConfigError, match=r"several stacks of layers \(model\.language_model"):
        targets.resolve(whole, TargetsConfig("q", ["self_attn.q_proj"]))
    page = (CONF_DIR / "README.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(.*?AutoModelForImageTextToText.*?)```", page, re.DOTALL)
    exec(lines, {"SOURCE": str(tmp_path / "whole"), "FOLDER": str(tmp_path / "text")})
    run = make_run("model=local", f"model.path={tmp_path}/text")
    alone = pretrained.load_model(run, pretrained.load_config(run.model)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, whole(input_ids=ids).logits)
