"""`udv` as PEFT and transformers treat an adapter by its type, and factors that are open."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from udv_models import GPT2_TARGETS, adapt, gpt2, layers, logits, perturb

from harness.methods import svd
from harness.methods.udv import UDVConfig

# --------------------------------------------------------------------------- the type's name


def test_transformers_loads_and_deletes_the_adapter(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted = perturb(get_peft_model(base, UDVConfig(target_modules=GPT2_TARGETS)))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    by_load = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = logits(by_load)
    by_load.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(by_load), expected)
    by_load.delete_adapter("default")
    assert torch.equal(logits(by_load), before)

    by_folder = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(by_folder), expected)


def test_the_configuration_and_status_name_the_type(tmp_path):
    adapted = adapt(gpt2())
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "UDV"
    assert peft.PeftConfig.from_pretrained(tmp_path).peft_type.value == "UDV"
    assert peft.get_model_status(adapted).peft_types == {"default": "UDV"}


def test_what_other_tuners_alone_can_do_is_refused_in_pefts_own_words():
    with pytest.raises(ValueError, match="'UDV' is not compatible with the `PeftMixedModel`"):
        get_peft_model(gpt2(), UDVConfig(target_modules=GPT2_TARGETS), mixed=True)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: UDV and LORA"):
        hotswap.check_hotswap_configs_compatible(UDVConfig(), LoraConfig())


def test_a_batch_of_several_adapters_is_refused():
    model = adapt(gpt2())
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="udv cannot take adapter_names"):
        model(ids, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="udv cannot take adapter_names"):
        model.generate(input_ids=ids, adapter_names=["default", "default"], max_new_tokens=1)
    model(ids)


# ------------------------------------------------------------- factors that the weight leaves open


def matrix(values, rows=24, columns=16, seed=0):
    """A matrix (rows, columns) with these singular values, in float32."""
    draw = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64))
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.t()


@pytest.mark.parametrize(
    ("values", "rank", "determined"),
    [
        (range(16, 0, -1), "full", True),
        ([*range(16, 1, -1), 0], "full", False),
        ([*range(16, 1, -1), 0], 15, True),
        ([9, 9, *range(8, 0, -1), 0.5, 0.4, 0.3, 0.2, 0.1, 0.05], 1, False),
        ([9, 8, 8, *range(7, 0, -1), 0.5, 0.4, 0.3, 0.2, 0.1, 0.05], 1, True),
    ],
)
def test_zero_and_equal_singular_values_determine_no_vectors(values, rank, determined):
    weight = matrix([float(value) for value in values])
    chosen = {"rank": rank, "energy": None, "which": "top", "seed": 0, "key": "w"}
    _, found = svd.select_triplets(weight, stored_in_out=False, **chosen)
    assert found is determined


def zero_neurons(model):
    """Zero most of the MLP's neurons: exactly dependent rows and columns, as pruning leaves."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, 4:] = 0  # (in, out)
            block.mlp.c_proj.weight[4:] = 0
    return model


def test_only_open_factors_are_saved(tmp_path):
    adapted = perturb(adapt(zero_neurons(gpt2())))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    saved = peft.load_peft_weights(str(tmp_path))
    stored = {name for name in saved if "udv_frozen" in name}
    assert stored and all(".mlp." in name for name in stored)

    # Another process may start from other vectors: what the file holds must replace them.
    loaded = PeftModel.from_pretrained(zero_neurons(gpt2()), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), expected)
    buffers = {n.replace(".default", ""): b for n, b in loaded.named_buffers() if "udv_f" in n}
    for name in stored:
        buffers[name].add_(1)
    assert not torch.allclose(logits(loaded), expected)
    peft.set_peft_model_state_dict(loaded, saved)
    assert torch.equal(logits(loaded), expected)


def test_a_file_with_factors_loads_where_the_configuration_would_compute_them(tmp_path):
    stored = perturb(adapt(gpt2(), store_factors=True))
    stored.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"store_factors": False}))
    loaded = PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
    before = logits(loaded)
    for layer in layers(loaded):
        layer.udv_frozen_u["default"].add_(1)
    peft.set_peft_model_state_dict(loaded, peft.load_peft_weights(str(tmp_path)))
    assert torch.equal(logits(loaded), before)
    assert torch.equal(before, logits(stored))


THREADS = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[3])
import udv_models
from peft import PeftModel
from transformers import GPT2LMHeadModel
torch.set_num_threads(int(sys.argv[1]))
base = GPT2LMHeadModel.from_pretrained(sys.argv[2] + "/base").eval()
if sys.argv[4] == "save":
    model = udv_models.perturb(udv_models.adapt(base))
    model.save_pretrained(sys.argv[2] + "/adapter")
else:
    model = PeftModel.from_pretrained(base, sys.argv[2] + "/adapter").eval()
torch.save(udv_models.logits(model), sys.argv[2] + f"/logits-{sys.argv[4]}.pt")
"""


@pytest.mark.slow
def test_another_number_of_threads_loads_the_same_model(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=256, n_head=4, vocab_size=48, n_positions=16)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 124:] = 0
        model.transformer.h[0].mlp.c_proj.weight[124:] = 0
    model.save_pretrained(tmp_path / "base")
    tests = str(Path(__file__).parent)
    for threads, what in (("1", "save"), ("2", "load")):
        command = [sys.executable, "-c", THREADS, threads, str(tmp_path), tests, what]
        subprocess.run(command, check=True)
    saved, loaded = (
        torch.load(tmp_path / f"logits-{what}.pt", weights_only=True) for what in ("save", "load")
    )
    torch.testing.assert_close(loaded, saved, rtol=1e-4, atol=1e-4)
