"""Weights that are not in the file, or do not fit, are refused by name; what is meant to be is not.

Files are written by `safetensors` and read back by `transformers`, whose loading report names what
is wrong; what may be left out is what published files leave out.
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from harness import methods
from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR
from harness.models import model_size, pretrained, weights

FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548118077\n"


@pytest.fixture
def folder(tiny, tmp_path):
    """A base in transformers' format."""
    tiny.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rewrite(folder, change, name=FILE):
    """Let `change` make another dict of tensors of the file's."""
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})


def loaded(make_run, folder, *more):
    run = make_run(
        "model=local", f"model.path={folder}", "data.context_length=32", "method=none", *more
    )
    return pretrained.load_with_misfits(run, pretrained.load_config(run.model))


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("h.1."), r"12 are missing from the file \(transformer\.h\.1\.attn\.c_attn\.bias"),
        (without("wte"), r"2 are missing from the file \(lm_head\.weight, transformer\.wte\.w"),
        (without("ln_f.bias"), r"1 is missing from the file \(transformer\.ln_f\.bias\)"),
        (
            lambda t: {f"module.{k}": v for k, v in t.items()},
            r"29 are missing .*; 26 are in the file and not in the model \(module\.transformer",
        ),
        (lambda t: t | {"score.weight": torch.ones(2)}, r"1 is in the file .*\(score\.weight\)"),
        (
            lambda t: t | {"transformer.wpe.weight": torch.ones(16, 32)},
            r"1 is of another shape \(transformer\.wpe\.weight 16x32, the model has 32x32\)",
        ),
    ],
    ids=["layer", "tied embedding", "one bias", "all", "another head", "shape"],
)
def test_weights_that_are_not_the_models_are_named(folder, make_run, change, said, capsys):
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=said) as error:
        loaded(make_run, folder)
    assert "\n" not in str(error.value) and "model.strict=false" in str(error.value)
    assert "REPORT" not in capsys.readouterr().err


def test_a_head_of_its_own_that_is_not_there_is_named(tmp_path, make_run):
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    loaded(make_run, tmp_path / "base")
    rewrite(tmp_path / "base", without("lm_head"))
    with pytest.raises(ConfigError, match=r"1 is missing from the file \(lm_head\.weight\)"):
        loaded(make_run, tmp_path / "base")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k.removeprefix("transformer."): v for k, v in t.items()},
        lambda t: t | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in (0, 1)},
        lambda t: t | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)},
        lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()},
    ],
    ids=["no prefix", "causal masks", "their fill", "the tied head too"],
)
def test_what_published_files_do_otherwise_loads(folder, make_run, tiny, change):
    rewrite(folder, change)
    model, misfits = loaded(make_run, folder, "model.gelu=as_saved")
    assert not misfits
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, tiny(ids).logits)


def test_the_masks_of_gpt_neo_are_no_weights(tmp_path, make_run):
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=64, hidden_size=32, num_layers=1, num_heads=2,
        attention_types=[[["global"], 1]], max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    prefix = "transformer.h.0.attn.attention"
    masks = {f"{prefix}.bias": torch.ones(1, 1, 32, 32), f"{prefix}.masked_bias": torch.tensor(0.0)}
    rewrite(tmp_path / "base", lambda t: t | masks)
    assert not loaded(make_run, tmp_path / "base")[1]
    rewrite(tmp_path / "base", lambda t: t | {f"{prefix}.q_proj.bias": torch.ones(32)})
    with pytest.raises(ConfigError, match=r"not in the model \(transformer.*q_proj\.bias\)"):
        loaded(make_run, tmp_path / "base")


def test_a_saved_lstm_loads(tmp_path, make_run):
    run = make_run("model=lstm", "targets=lstm")
    made = pretrained.load_model(run, pretrained.load_config(run.model))
    made.save_pretrained(tmp_path / "base")
    model, misfits = loaded(make_run, tmp_path / "base", "targets=lstm")
    assert not misfits
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in made.named_parameters())


def test_what_is_asked_for_in_part_is_drawn_from_the_seed_and_said(folder, make_run, tiny):
    rewrite(
        folder,
        lambda t: (
            without("h.1.mlp.c_fc")(t)
            | {"extra": torch.ones(1), "transformer.wpe.weight": torch.ones(16, 32)}
        ),
    )
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, misfits = loaded(make_run, folder, "model.strict=false")
        drawn.append(model.transformer.h[1].mlp.c_fc.weight)
    names = ["transformer.h.1.mlp.c_fc.bias", "transformer.h.1.mlp.c_fc.weight"]
    assert misfits.random == [*names, "transformer.wpe.weight"]
    assert misfits.unexpected == ["extra"]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    own = model.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(own, tiny.transformer.h[0].mlp.c_fc.weight)


def test_the_seed_moves_a_base_that_is_drawn_in_part(make_run):
    one, other = (make_run("method=none", "model.strict=false", f"seed={n}") for n in (0, 1))
    assert naming.identity(one) != naming.identity(other)
    one, other = (make_run("method=none", f"seed={n}") for n in (0, 1))
    assert naming.identity(one) == naming.identity(other)


# --------------------------------------------------------------------------- adapters


def adapter_in(folder, tiny):
    model = get_peft_model(tiny, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)


@pytest.mark.parametrize("method", ["none", "full"])
def test_an_adapter_in_a_base_folder_is_refused(folder, make_run, tiny, method):
    adapter_in(folder, tiny)
    run = make_run(
        "model=local", f"model.path={folder}", "data.context_length=32", f"method={method}"
    )
    with pytest.raises(ConfigError, match=r"base holds an adapter \(adapter_config\.json\)"):
        pretrained.load_config(run.model)
    with pytest.raises(ConfigError, match=r"would be put on the model unasked"):
        weights.load(folder)


def test_an_adapter_whose_weights_are_not_all_there_is_refused(folder, tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter_in(tmp_path / "adapter", tiny)
    whole = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    adapted = weights.load_adapter(base, tmp_path / "adapter")
    assert not adapted.training
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
    assert name in whole
    for change, said in (
        (without("h.1.attn.c_attn.lora_A"), rf"1 is missing from the file \({name}\)"),
        (lambda t: t | {"lora_C": torch.ones(1)}, r"not in the model \(lora_C\)"),
        (lambda t: t | {name: torch.ones(3, 32)}, r"size mismatch .*h\.1\.attn\.c_attn\.lora_A"),
    ):
        save_file(change(whole), tmp_path / "adapter" / ADAPTER_FILE)
        with pytest.raises(ConfigError, match=said):
            weights.load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")


# --------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", [FILE, "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_one(folder, make_run, name):
    (folder / FILE).unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ConfigError, match=rf"{name} is a git-lfs pointer .* `git lfs pull`"):
        weights.check_files(folder)
    with pytest.raises(ConfigError, match="git-lfs pointer"):
        loaded(make_run, folder)


def test_a_pointer_in_place_of_a_configuration_is_called_one(folder, make_run):
    (folder / "config.json").write_text(POINTER)
    with pytest.raises(ConfigError, match=r"config\.json is a git-lfs pointer"):
        loaded(make_run, folder)


def test_a_pointer_in_place_of_a_tokenizer_is_called_one(make_run, tmp_path):
    folder = shutil.copytree(ASSETS_DIR / "gpt2_mini", tmp_path / "base")
    (folder / "tokenizer.json").write_text(POINTER)
    run = make_run("model=local", f"model.path={folder}", "data.context_length=32")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is a git-lfs pointer"):
        pretrained.load_tokenizer(run.model, pretrained.load_config(run.model))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_named(folder, make_run, keep):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:keep])
    for read in (weights.check_files, lambda folder: loaded(make_run, folder)):
        with pytest.raises(ConfigError, match=r"model\.safetensors is cut short or no safetensors"):
            read(folder)


def test_a_shard_that_is_not_there_is_named(folder, tiny, make_run):
    (folder / FILE).unlink()
    tiny.save_pretrained(folder, max_shard_size="20KB")
    assert not loaded(make_run, folder)[1]
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ConfigError, match=rf"{last.name}, which the index .* is not there"):
        weights.check_files(folder)


def test_a_damaged_bin_file_is_named(folder, make_run, tiny):
    (folder / FILE).unlink()
    torch.save(tiny.state_dict(), folder / "pytorch_model.bin")
    assert not loaded(make_run, folder)[1]
    whole = (folder / "pytorch_model.bin").read_bytes()
    for content in (whole[:-5000], b"", b"weights"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match=r"base"):
            loaded(make_run, folder)


def test_a_config_of_another_size_is_refused(folder, make_run):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 16, "n_layer": 3}))
    with pytest.raises(ConfigError, match=r"12 are missing.*h\.2.*of another shape.*the model has"):
        loaded(make_run, folder)


def test_a_failed_allocation_is_no_fault_of_the_file(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="allocate") as error:
        weights.load(folder)
    assert not isinstance(error.value, ConfigError)


# --------------------------------------------------------------------------- quantised bases


def quantised(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))


@pytest.mark.parametrize(
    ("fields", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel|autoawq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
    ids=["gptq", "awq", "bitsandbytes 4", "bitsandbytes 8", "hqq"],
)
def test_a_quantised_base_names_the_package_that_reads_it(folder, make_run, fields, package):
    for name in package.replace("autoawq", "awq").split("|"):
        if importlib.util.find_spec(name):
            pytest.skip(f"{name} is installed")
    quantised(folder, **fields)
    run = make_run("model=local", f"model.path={folder}", "data.context_length=32", "method=lora")
    with pytest.raises(ConfigError, match=rf"quantised \({fields['quant_method']}\)") as error:
        pretrained.load_config(run.model)
    assert re.search(rf"install.*({package})", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["full", "udv", "truncate"])
def test_methods_that_need_the_weights_themselves_refuse_a_quantised_base(tiny, make_run, method):
    tiny.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    run = make_run(f"method={method}")
    with pytest.raises(ConfigError, match=rf"method={method}: gpt2_mini is quantised.*method=lora"):
        methods.check(tiny.to("meta"), run)


def test_packed_weights_are_counted_as_peft_counts_them(tiny):
    class Params4bit(torch.nn.Parameter):  # by its name, as in PEFT
        pass

    for block in tiny.transformer.h:
        packed = torch.zeros(block.mlp.c_fc.weight.numel() // 2, 1, dtype=torch.uint8)
        block.mlp.c_fc.weight = Params4bit(packed, requires_grad=False)
    model = get_peft_model(tiny, LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True))
    found = model_size.count_parameters(model)
    assert (found.trainable, found.total) == model.get_nb_trainable_parameters()
    assert found.total > sum(p.numel() for p in model.parameters())
