"""Models by hub id from a cache laid out as the hub's client does it, with no network; and code."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR, CONF_DIR, options
from harness.models import pretrained

ID = "openai-community/gpt2"
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
SMALL = [
    "method=lora", "train.steps=2", "evaluate.interval=2", "data.validation_share=0.003",
    "data.test_share=0.003", "data.context_length=64", "train.batch_tokens=512",
    "train.micro_batch=2",
]  # fmt: skip


def put_into_cache(cache, model_id, revision):
    """A tiny random GPT-2 with the tokenizer that ships here, as models--*/snapshots/*."""
    folder = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(snapshot)
    AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini").save_pretrained(snapshot)
    blobs = folder / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):  # blobs, and links to them
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    put_into_cache(folder, ID, REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.mark.slow
def test_a_run_of_gpt2_by_its_id_without_a_network(cache, harness, tmp_path):
    done = harness("model=gpt2", "run_name=mine", "targets=qv", *SMALL)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "outputs/scratch/mine/result.json").read_text())
    assert result["model"] == {
        "name": "gpt2",
        "type": "gpt2",
        "source": ID,
        "revision": REVISION,
        "activation": "gelu_new -> gelu_pytorch_tanh (fused)",
        "tied_embeddings": True,
        "causal": True,
    }
    base = 4096 * 16 + 64 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert result["parameters"]["base"] == base
    assert result["parameters"]["trainable"] == 2 * 2 * 2 * 8 * 16


def test_any_model_by_id_is_the_one_in_the_cache(cache, make_run):
    run = make_run("model=hub", f"model.id={ID}", "targets=qv")
    config = pretrained.load_config(run.model)
    model = pretrained.load_model(run, config)
    expected = GPT2LMHeadModel.from_pretrained(
        cache / f"models--{ID.replace('/', '--')}/snapshots/{REVISION}"
    )
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert pretrained.facts(run.model, config)["revision"] == REVISION  # which nobody gave
    assert len(pretrained.load_tokenizer(run.model, config)) == 4096


def test_a_revision_that_is_not_there_is_named(cache, make_run):
    run = make_run("model=gpt2", "model.revision=" + "a" * 40)
    with pytest.raises(ConfigError) as error:
        pretrained.load_config(run.model)
    for part in (f"'{ID}' at revision {'a' * 40}", f"cache has revision {REVISION}"):
        assert part in str(error.value)


def test_a_model_that_is_not_there_names_those_that_are(cache, make_run):
    with pytest.raises(ConfigError) as error:
        pretrained.load_config(make_run("model=gpt2_medium").model)
    for part in ("'openai-community/gpt2-medium' at revision", "gpt2_mini", ID, "model.path=…"):
        assert part in str(error.value)


def test_every_hub_model_is_pinned_to_a_commit(make_run):
    ids = {
        name: make_run(f"model={name}").model
        for name in options("model")
        if "\nid: " in (CONF_DIR / "model" / f"{name}.yaml").read_text()
        and name not in ("hub", "gpt2_mini", "smollm2_135m")
    }
    assert set(ids) == {"gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "distilgpt2"}
    for cfg in ids.values():
        assert cfg.id and len(cfg.revision or "") == 40 and int(cfg.revision, 16)


def test_an_id_is_asked_for(make_run):
    with pytest.raises(ConfigError, match=r"model\.id"):
        make_run("model=hub")


# ------------------------------------------------------------------------------------- own code

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({marker!r}).write_text("ran")
class OwnConfig(GPT2Config):
    model_type = "own_kind"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder with a model whose code is in it, and the file that the code would leave."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder, marker = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(ASSETS_DIR / "gpt2_mini", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_a_models_own_code_is_not_run(own_code, make_run, monkeypatch):
    folder, marker = own_code
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    run = make_run("model=local", f"model.path={folder}")
    with pytest.raises(ConfigError, match=rf"code of its own.*model\.remote_code={folder}"):
        pretrained.load_config(run.model)
    assert not marker.exists()


def test_a_models_own_code_is_run_where_it_is_asked_for_by_name(own_code, make_run):
    folder, marker = own_code
    run = make_run("model=local", f"model.path={folder}", f"model.remote_code={folder}")
    config = pretrained.load_config(run.model)
    assert marker.exists() and config.model_type == "own_kind"
    assert type(pretrained.load_model(run, config)).__name__ == "OwnModel"


@pytest.mark.parametrize("asked", ["true", "someone/else"])
def test_code_asked_for_by_another_name_is_refused(own_code, make_run, asked):
    folder, marker = own_code
    with pytest.raises(ConfigError, match=r"names another model than"):
        make_run("model=local", f"model.path={folder}", f"model.remote_code={asked}")
    assert not marker.exists()


def test_code_of_another_repository_is_refused(own_code, make_run):
    folder, marker = own_code
    path = folder / "config.json"
    path.write_text(path.read_text().replace("own.OwnConfig", "who/ever--own.OwnConfig"))
    run = make_run("model=local", f"model.path={folder}", f"model.remote_code={folder}")
    with pytest.raises(ConfigError, match=r"its code is that of who/ever"):
        pretrained.load_config(run.model)
    assert not marker.exists()
