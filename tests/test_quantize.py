"""`model.quantize` against bitsandbytes' own functions, and plain transformers with PEFT.

What needs bitsandbytes is marked (`make test-quantised` installs it).
"""

import importlib.util
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from scored_documents import nats
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from harness import methods
from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.data import documents
from harness.models import linear, model_size, pretrained, quantize, quantized
from harness.models.next_token import NextToken
from harness.runs import estimate
from harness.training import memory

MINI = ASSETS_DIR / "gpt2_mini"
LORA = ["method=lora", "method.r=4", "targets=all"]


@pytest.fixture
def installed(monkeypatch):
    """Whether bitsandbytes is said to be there."""
    real = importlib.util.find_spec

    def say(there):
        def find(name, *rest):
            return there or None if name == "bitsandbytes" else real(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return say


def test_conv1d_as_linear_gives_the_same_logits(tiny):
    ids = torch.arange(24).reshape(2, 12)
    state = torch.random.get_rng_state()
    plain = tiny(ids).logits
    assert linear.turn(tiny) is tiny
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(type(m) is nn.Linear for m in tiny.modules()) == 2 * 4 + 1
    torch.testing.assert_close(tiny(ids).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.quantize=int4"], "model.quantize='int4'"),
        (["model.double_quant=true"], "model.double_quant=True: it is of weights of 4 bits"),
        (["model.quantize=int8", "model.compute_dtype=bf16"], "model.compute_dtype=bf16: it is"),
        (["model.quantize=nf4", "model.compute_dtype=fp32", "train.precision=bf16"],
         "model.compute_dtype=fp32 with train.precision=bf16"),
        (["model.quantize=nf4", "method=full"], "model.quantize=nf4: method=full trains every"),
        (["model.quantize=int8", "method=udv"], "model.quantize=int8: method=udv decomposes"),
        (["model.quantize=fp4", "method=truncate"], "model.quantize=fp4: method=truncate"),
        (["model.quantize=nf4", "method.init=pissa"], "method.init=pissa: this start reads"),
        (["model.quantize=nf4", "method.bias=all"], "model.quantize=nf4 with method.bias=all"),
        (["model.quantize=int8", "method=peft", "method.peft_type=HRA"], "method.peft_type=HRA"),
        (["model.quantize=nf4", "method=peft", "method.peft_type=LOKR"], "method.peft_type=LOKR"),
        (["model.quantize=nf4", "train.compile=true"], "with train.compile=true is untried"),
        (["model.quantize=nf4", "launch.num_processes=2", "train.micro_batch=4"],
         "with launch.num_processes=2 is untried"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(make_run, installed, overrides, said):
    installed(True)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")) as error:
        make_run(*overrides)
    assert "\n" not in str(error.value)


def test_without_the_package_there_is_the_pip_line(make_run, installed):
    installed(False)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[quantised\]'"):
        make_run("model.quantize=nf4")


def test_a_base_that_is_quantised_already_is_refused(make_run, installed, tmp_path):
    installed(True)
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = LlamaConfig(quantization_config=stored)  # type: ignore[call-arg]
    config.save_pretrained(tmp_path)
    run = make_run("model=local", f"model.path={tmp_path}", "model.quantize=nf4")
    with pytest.raises(ConfigError, match="quantised"):
        pretrained.load_config(run.model)


def test_quantising_makes_another_run_and_none_the_same_as_before(make_run, installed):
    installed(True)
    plain = make_run()
    asked = ["none", "int8", "nf4", "fp4"]
    runs = [make_run(f"model.quantize={name}") for name in asked]
    runs += [make_run("model.quantize=nf4", "model.double_quant=true")]
    assert naming.identity(runs[0]) == naming.identity(plain)
    assert len(set(map(naming.identity, runs))) == 5


# --------------------------------------------------------------------------- with bitsandbytes


def by_transformers(scheme):
    """gpt2_mini as transformers itself loads it quantised."""
    model = AutoModelForCausalLM.from_pretrained(
        MINI, quantization_config=scheme, dtype=torch.float32
    )
    quantized.keep_differentiable(model)
    return model.eval()


@pytest.mark.quantised
@pytest.mark.parametrize(
    "asked", [["int8"], ["nf4"], ["fp4", "model.double_quant=true"]], ids=lambda a: "-".join(a)
)
def test_the_packed_base_is_the_one_of_transformers(make_run, asked):
    """Logits to the bit, counts, what is packed, its bytes, and their prediction on no weights."""
    run = make_run(f"model.quantize={asked[0]}", *asked[1:], *LORA)
    config = pretrained.load_config(run.model)
    ours, theirs = pretrained.load_model(run, config).eval(), by_transformers(quantize.scheme(run))
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        adapted = methods.adapt(pretrained.load_model(run, config), run)
        counted = model_size.count_parameters(adapted)
        assert (counted.trainable, counted.total) == adapted.get_nb_trainable_parameters()
        written = quantize.dequantized(ours)
        assert torch.equal(written(ids).logits, theirs.dequantize().float()(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(MINI)
    assert model_size.count_parameters(plain).total == counted.total - counted.trainable

    packed = pretrained.load_model(run, config)
    packed(ids)
    on_meta = pretrained.on_meta(run, config)
    found = []
    for model in (packed, on_meta):
        with memory.LiveTensors(model) as live:
            pass
        found.append(live.by_category["frozen_weights"])
    matrices, per_weight = 4 * 12 * 256 * 256, {"int8": 1, "nf4": 0.5, "fp4": 0.5}[asked[0]]
    rest = 4 * (counted.total - counted.trainable - matrices)
    assert found[0] > rest + per_weight * matrices
    assert found[0] < rest + (per_weight + 0.07) * matrices
    if asked[0] != "int8":  # whose codes have two names on the meta device
        assert found[1] == found[0]


@pytest.mark.quantised
@pytest.mark.parametrize("double", [False, True])
def test_nf4_weights_are_what_bitsandbytes_unpacks(make_run, double):
    from bitsandbytes import functional

    run = make_run("model.quantize=nf4", f"model.double_quant={double}", *LORA)
    model = pretrained.load_model(run, pretrained.load_config(run.model))
    plain = AutoModelForCausalLM.from_pretrained(MINI)
    written = quantize.dequantized(model)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.3.mlp.c_proj"):
        weight = plain.get_submodule(name).weight.detach().t().contiguous()
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=double
        )
        expected = functional.dequantize_4bit(codes, state)
        found = written.get_submodule(name).weight
        assert torch.equal(found, expected)
        assert 0.05 < (found - weight).norm() / weight.norm() < 0.15
    assert torch.equal(written.lm_head.weight, plain.lm_head.weight)


@pytest.mark.quantised
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_the_prediction_follows_the_packed_layers(make_run, name):
    run = make_run(f"model.quantize={name}", *LORA, "data.context_length=32",
                   "train.batch_tokens=128",
                   "train.micro_batch=4", "train.threads=1")  # fmt: skip
    run, config, accelerator = estimate.setting(run)
    found = estimate.predict(run, config, accelerator)
    torch.manual_seed(0)
    model = methods.adapt(pretrained.load_model(run, config), run)
    predicts = NextToken(model).train()
    ids = torch.randint(0, 4096, (4, 33))
    report = {}
    for _ in range(2):
        predicts(ids[:, :-1], ids[:, 1:])  # scales go from parameters to layers
    with memory.measured(model, None, report):
        predicts(ids[:, :-1], ids[:, 1:]).objective.backward()
    for key in ("frozen_weights", "trainable_weights"):
        assert found.train["by_category"][key] == report["by_category"][key]
    kept = found.train["by_category"]["activations"]
    assert kept == pytest.approx(report["by_category"]["activations"], rel=0.1)


@pytest.mark.quantised
def test_a_run_says_what_quantising_and_merging_have_cost(harness, tmp_path):
    """Perplexities against plain transformers and PEFT on the same documents."""
    short = ["train.steps=8", "evaluate.interval=4", "data.validation_share=0.003",
             "data.context_length=32",
             "data.test_share=0.003", "train.batch_tokens=256", "run_name=one", "train.lr=2e-2",
             "train.threads=1"]  # fmt: skip
    done = harness("model.quantize=nf4", *LORA, *short)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "outputs" / "scratch" / "one"
    result = json.loads((run_dir / "result.json").read_text())
    assert "problems" not in result
    assert result["saved_check"]["failure"] is None
    cost = result["quality"]["quantization"]
    assert cost["quantized"] == result["quality"]["base"]["validation"]
    assert cost["adapted"] == result["quality"]["validation"]

    from harness.runs import composition

    run = composition.load(run_dir / "config.yaml")
    ids = pd.read_parquet(run_dir / "documents-validation.parquet").id
    texts = dict(documents.read(run.data, ("validation",))["validation"])

    def perplexity(model):
        tokens = AutoTokenizer.from_pretrained(MINI)
        count = sum(len(tokens(texts[name])["input_ids"]) for name in ids)
        return math.exp(sum(nats(model.eval(), texts, ids)) / count)

    scheme = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    adapter = run_dir / "adapter"
    expected = {
        "unquantized": AutoModelForCausalLM.from_pretrained(MINI),
        "quantized": by_transformers(scheme),
        "adapted": PeftModel.from_pretrained(by_transformers(scheme), adapter),
        "merged_dequantized": PeftModel.from_pretrained(
            by_transformers(scheme).dequantize().float(), adapter
        ).merge_and_unload(),
        "merged_original": PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(MINI), adapter
        ).merge_and_unload(),
    }
    assert cost.keys() == expected.keys()
    for name, model in expected.items():
        assert cost[name]["perplexity"] == pytest.approx(perplexity(model), rel=1e-4), name
    found = {name: part["perplexity"] for name, part in cost.items()}
    assert found["unquantized"] < found["quantized"] and found["adapted"] < found["quantized"]
    assert found["merged_dequantized"] == pytest.approx(found["adapted"], rel=1e-4)
    assert not np.isclose(found["merged_original"], found["adapted"], rtol=1e-4)

    exported = harness("export", str(run_dir), "out")
    assert exported.returncode == 0, exported.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantization_config={'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'" in card
    refused = harness("export", str(run_dir), "whole", "--merge")
    assert refused.returncode == 2 and "cannot be merged into weights quantised" in refused.stderr
    refused = harness("model.quantize=nf4", *LORA, *short[:-3], "save_merged=always")
    assert refused.returncode != 0 and "cannot be merged into weights quantised" in refused.stderr


@pytest.mark.quantised
def test_any_architecture_is_packed_but_its_head(make_run, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = make_run("model=local", f"model.path={tmp_path}", "model.quantize=nf4", *LORA,
                   "data.context_length=32")  # fmt: skip
    config = pretrained.load_config(run.model)
    model = pretrained.load_model(run, config)
    packed = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7 and not any("head" in name or "embed" in name for name in packed)
    assert quantized.packing_of(model.config) == "bitsandbytes"
    assert quantized.packing_of(config) is None  # so that it can be loaded again
    adapted = methods.adapt(model, run)
    NextToken(adapted).train()(*(torch.arange(1, 25)[None],) * 2).objective.backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(g is not None for g in grads) and any(g.abs().max() > 0 for g in grads)
