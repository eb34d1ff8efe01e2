"""Quantised bases: their bytes, counts, gradients and what they cannot do.

Folders are written by bitsandbytes and torchao through transformers (`make test-quantised` installs
these); what needs neither runs with the other tests.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from harness.config.paths import ASSETS_DIR
from harness.models import quantized
from harness.models.next_token import NextToken
from harness.training import memory


def test_the_parts_of_a_tensor_subclass_are_followed():
    both = TwoTensor(torch.zeros(8, 8), torch.zeros(8, 8))
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(both, requires_grad=False)
    live = memory.LiveTensors(model)
    live.close()
    assert live.by_category["frozen_weights"] == 2 * 8 * 8 * 4
    assert quantized.parts(torch.zeros(2)) == quantized.parts(nn.Parameter(torch.zeros(2))) == []


def test_scales_beside_a_parameter_are_followed():
    class State:
        absmax, code, offset, state2 = torch.zeros(4), torch.zeros(16), None, None

    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    model.weight.quant_state = State()
    live = memory.LiveTensors(model)
    live.close()
    assert live.by_category["frozen_weights"] == 32 + 4 * (4 + 16)


def test_stored_bytes_are_those_of_the_tensors(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        quantized.stored_bytes(tmp_path)
    tiny.save_pretrained(tmp_path, max_shard_size="40KB")
    files = list(tmp_path.glob("*.safetensors"))
    held = [tensor for file in files for tensor in load_file(file).values()]
    assert len(files) > 1
    assert quantized.stored_bytes(tmp_path) == sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize(
    ("fields", "mixes"),
    [
        ({"load_in_8bit": True}, True),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, False),
        ({"load_in_4bit": True}, False),
        ({}, False),
    ],
)
def test_which_products_mix_the_tokens_of_a_batch(fields, mixes):
    stored = fields and {"quant_method": "bitsandbytes"} | fields
    for form in (stored, BitsAndBytesConfig(**fields) if fields else None):
        config = LlamaConfig(quantization_config=form)  # type: ignore[call-arg]
        assert quantized.mixes_tokens(config) == mixes


# --------------------------------------------------------------------------- with the libraries


def quantisation(name):
    if name == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name)


@pytest.fixture
def quantised(tmp_path, tokenizer):
    """The folder of a small Llama, or of gpt2_mini, quantised in a way by name."""

    def make(name, base="llama"):
        cfg = quantisation(name)
        source = ASSETS_DIR / "gpt2_mini"
        if base == "llama":
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=tokenizer.vocab_size, hidden_size=256, intermediate_size=704,
                num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256,
                bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            source = tmp_path / "plain"
            LlamaForCausalLM(config).save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=cfg, dtype=torch.float32
        )
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


LORA = ["method=lora", "method.r=8", "targets=all"]
SHORT = ["train.steps=4", "evaluate.interval=2", "data.validation_share=0.003",
         "data.test_share=0.003", "run_name=one"]  # fmt: skip


def base(folder):
    return ["model=local", f"model.path={folder}"]


@pytest.mark.quantised
@pytest.mark.parametrize(
    ("name", "which", "near"),
    [("nf4", "llama", 0.01), ("fp4", "gpt2_mini", 0.03), ("torchao", "llama", 0.07)],
)
def test_a_run_counts_packed_bytes_and_predicts_them(
    harness, quantised, tmp_path, name, which, near
):
    folder = quantised(name, which)
    done = harness(*base(folder), *LORA, *SHORT)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "outputs" / "scratch" / "one"
    result = json.loads((run_dir / "result.json").read_text())
    frozen = result["memory"]["by_category"]["frozen_weights"]
    assert frozen == pytest.approx(quantized.stored_bytes(folder), rel=1e-3)
    whole = AutoModelForCausalLM.from_pretrained(folder.parent / "plain" if which == "llama"
                                                 else ASSETS_DIR / which)  # fmt: skip
    assert result["parameters"]["base"] == sum(p.numel() for p in whole.parameters())
    predicted = result["predicted"]["peak_bytes"]
    assert predicted == pytest.approx(result["memory"]["peak_bytes"], rel=near)
    refused = harness(*base(folder), *LORA, *SHORT[:-1], "save_merged=always")
    assert refused.returncode != 0 and "cannot be merged into weights quantised" in refused.stderr
    refused = harness("export", str(run_dir), "out", "--merge")
    assert refused.returncode == 2 and "cannot be merged into weights quantised" in refused.stderr


@pytest.mark.quantised
@pytest.mark.parametrize("which", ["llama", "gpt2_mini"])
def test_evaluation_leaves_the_gradients_of_training_alone(make_run, quantised, which):
    """Against the same model that has evaluated nothing; counts are PEFT's own."""
    from harness import methods
    from harness.models import model_size, pretrained

    run = make_run(*base(quantised("nf4", which)), *LORA)
    ids = torch.arange(1, 25)[None]
    targets = ids.roll(-1, 1)
    found = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = methods.adapt(pretrained.load_model(run, pretrained.load_config(run.model)), run)
        counted = model_size.count_parameters(model)
        assert (counted.trainable, counted.total) == model.get_nb_trainable_parameters()
        predicts = NextToken(model)
        if evaluates:
            predicts.eval()
            with torch.no_grad():
                predicts(ids, targets)
        predicts.train()
        predicts(ids, targets).objective.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    fresh, used = found
    assert fresh and all(torch.equal(fresh[name], used[name]) for name in fresh)
    assert any(grad.abs().max() > 0 for grad in fresh.values())


@pytest.mark.quantised
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_ia3_on_four_bits_is_ia3_on_what_they_stand_for(
    harness, make_run, quantised, name, tmp_path
):
    """Gradients against those of the same weights written out; and a whole run."""
    from harness import methods
    from harness.models import pretrained

    ia3 = ["method=peft", "method.peft_type=IA3", "targets=all"]
    folder = quantised(name)
    run = make_run(*base(folder), *ia3)
    ids = torch.arange(1, 25)[None]
    found = []
    for written_out in (False, True):
        model = pretrained.load_model(run, pretrained.load_config(run.model))
        if written_out:
            model = model.dequantize()
            model.config.quantization_config = None
        model = methods.adapt(model.float() if written_out else model, run)
        assert written_out != any(p.dtype == torch.uint8 for p in model.parameters())
        torch.manual_seed(0)
        scales = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for scale in scales.values():
            scale.data.uniform_(0.5, 1.5)
        NextToken(model).train()(ids, ids.roll(-1, 1)).objective.backward()
        found.append({n: p.grad for n, p in scales.items()})
    packed_grads, plain_grads = found
    assert packed_grads.keys() == plain_grads.keys() and len(packed_grads) == 3 * 7
    for key, grad in packed_grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, plain_grads[key], rtol=1e-3, atol=1e-4)

    done = harness(*base(folder), *ia3, *SHORT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "outputs" / "scratch" / "one" / "result.json").read_text())
    assert result["parameters"]["trainable"] == sum(g.numel() for g in packed_grads.values())
    assert result["memory"]["by_category"]["frozen_weights"] == pytest.approx(
        quantized.stored_bytes(folder), rel=1e-3
    )
    refused = harness(*base(folder), *ia3, *SHORT[:-1], "save_merged=always")
    assert refused.returncode != 0 and "cannot be merged into weights quantised" in refused.stderr


@pytest.mark.quantised
def test_int8_with_outliers_is_refused_by_its_reason(harness, quantised):
    done = harness(*base(quantised("int8", "gpt2_mini")), *LORA, *SHORT)
    assert done.returncode != 0 and "llm_int8_threshold" in done.stderr
