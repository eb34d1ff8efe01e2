"""Exported folders, loaded by processes that know transformers and PEFT alone."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCardData, metadata_load
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from trained_kinds import FULL, LORA, NONE, PROMPTS, QV, TRUNCATE, UDV
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from harness.artifacts import export
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR, REPOSITORY
from harness.data import documents
from harness.methods import joined_lora
from harness.models.split_qkv import UNFUSED_TARGETS, unfuse_qkv
from harness.results import run_record
from harness.runs import finished_run as saved

EXPORTS = {  # name -> run, --merge
    "lora": (LORA, False),
    "lora-merged": (LORA, True),
    "qv": (QV, False),
    "qv-merged": (QV, True),
    "full": (FULL, False),
    "udv": (UDV, False),
    "udv-merged": (UDV, True),
    "truncate-merged": (TRUNCATE, True),
    "prompts": (PROMPTS, False),
}
PLAIN = [name for name in EXPORTS if name.endswith("merged") or name == "full"]

# Runs the code of every folder's card there, and keeps logits of the same tokens.
READER = """
import json, os, re, sys
import torch
from safetensors.torch import save_file
folders, out = json.loads(sys.argv[1]), sys.argv[2]
torch.set_num_threads(int(sys.argv[5]))
ids = torch.load(sys.argv[3])
if sys.argv[4] == "plain":
    sys.modules["peft"] = None  # whoever imports it fails
kept = {}
for name, folder in folders.items():
    os.chdir(folder)
    code = re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1]
    foreign = "harness" in code
    assert foreign or "harness" not in sys.modules, name
    found = {}
    exec(code, found)
    assert foreign or "harness" not in sys.modules, name
    assert found["tokenizer"]("In the beginning")["input_ids"], name
    assert not found["model"].training, name
    with torch.no_grad():
        kept[name] = found["model"](input_ids=ids).logits.contiguous()
save_file(kept, out)
"""


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """name -> (run directory, exported folder)."""
    folder = tmp_path_factory.mktemp("exported")
    found = {}
    for name, (overrides, merge) in EXPORTS.items():
        found[name] = (finished_run(*overrides), folder / name)
        export.export(*found[name], merge=merge)
    return found


@pytest.fixture(scope="module")
def text():
    """Tokens (1, 65) of the first test document, after an end-of-text token."""
    return torch.tensor([[0, *torch.arange(1, 65).mul(61).remainder(4096).tolist()]])[:, :64]


@pytest.fixture(scope="module")
def reloaded(exported, text, tmp_path_factory):
    """name -> logits in a process that imports what the card says and no more."""
    folder = tmp_path_factory.mktemp("reloaded")
    torch.save(text, folder / "ids.pt")
    # The one that needs the harness comes last, so that the others are loaded without.
    others = sorted(exported.keys() - set(PLAIN), key=lambda name: name == "udv")
    kept = {}
    for kind, names in {"plain": PLAIN, "peft": others}.items():
        asked = json.dumps({name: str(exported[name][1]) for name in names})
        threads = str(torch.get_num_threads())  # with another number factors are rounded otherwise
        subprocess.run(
            [sys.executable, "-c", READER, asked, folder / kind, folder / "ids.pt", kind, threads],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            cwd=folder,
            check=True,
            timeout=120,
        )
        kept |= load_file(folder / kind)
    return kept


@pytest.mark.parametrize("name", EXPORTS)
def test_another_process_gets_the_same_logits(exported, reloaded, text, name):
    run = saved.load(exported[name][0])
    with torch.no_grad():
        model = run.model()
        adapted = model(input_ids=text).logits
        base = run.base()(input_ids=text).logits
        merged = export.merged(run)[0](input_ids=text).logits if name in PLAIN else None
    assert (adapted[:, -64:] - base).abs().max() > 0.05  # or nothing here means anything
    if merged is not None:
        assert torch.equal(reloaded[name], merged)
        torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    elif name == "qv":  # two products of rank 4 are here one of rank 8
        torch.testing.assert_close(reloaded[name], adapted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(reloaded[name], adapted)


@pytest.mark.parametrize("overrides", [LORA, QV, FULL, UDV, TRUNCATE, PROMPTS, NONE])
def test_the_model_read_back_is_the_one_that_was_evaluated(finished_run, overrides):
    run = saved.load(finished_run(*overrides))
    table = pd.read_parquet(run.run_dir / "documents-test.parquet").sort_values("num_tokens")
    row = table.iloc[0]
    written = dict(documents.read(run.run.data, ("test",))["test"])[row.id]
    tokens = [run.tokenizer.eos_token_id, *run.tokenizer(written)["input_ids"]]
    model, context, nats = run.model(), 64, 0.0
    for scored in range(1, len(tokens), context):  # the last window has its whole context
        end = min(scored + context, len(tokens))
        window = torch.tensor([tokens[max(0, end - context - 1) : end]])
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits[0, -(end - scored) :]
        losses = torch.nn.functional.cross_entropy(
            logits, window[0, -(end - scored) :], reduction="sum"
        )
        nats += float(losses)
    assert nats == pytest.approx(row.nll_nats, rel=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_a_merged_model_is_a_plain_gpt2(exported, name):
    folder = exported[name][1]
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.transformer.wte.weight
    config = AutoConfig.from_pretrained(folder)
    asset = AutoConfig.from_pretrained(ASSETS_DIR / "gpt2_mini").to_dict()
    own = {"use_cache": True}  # training did without, and so did the asset's
    own |= {key: config.to_dict()[key] for key in ("_name_or_path", "transformers_version")}
    assert config.to_dict() == asset | own  # the base's dropout, whatever the run's was
    assert model.generation_config.use_cache is True
    assert {"adapter_config.json"}.isdisjoint(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", EXPORTS)
def test_the_card_says_what_the_result_says(exported, name):
    run_dir, folder = exported[name]
    record = run_record.read(run_dir)
    text = (folder / "README.md").read_text()
    data = yaml.safe_load(text.split("---\n")[1])
    assert data == metadata_load(folder / "README.md")
    assert data["base_model"] == "gpt2_mini"
    assert data["library_name"] == ("transformers" if name in PLAIN else "peft")
    assert record["method"]["label"] in data["tags"]
    measured = {
        (m.dataset_split, m.metric_type): m.metric_value for m in ModelCardData(**data).eval_results
    }
    for split in ("validation", "test"):
        for metric in ("perplexity", "bits_per_byte"):
            assert measured[split, metric] == record["quality"][split][metric]
    before = record["quality"]["step0"]["validation"]["perplexity"]
    for said in (
        f"{before:.2f}",
        f"{record['quality']['test']['perplexity']:.2f}",
        f"{record['parameters']['trainable']:,} of",
        record["run"]["command"],
        str(record["environment"]["commit"]),
        f"torch {torch.__version__}",
        "a context of 64 tokens moved by 64",
        "| seed | 0 |",
    ):
        assert said in text, said
    assert "None" not in text
    notes = {
        "qv": "one adapter of rank 8 on `attn.c_attn`",
        "udv": "import harness.methods.udv",
        "full": "trained with `resid_pdrop` 0.1; the configuration has the base's 0.",
        "truncate-merged": "dense",
        "qv-merged": "one `c_attn` again",
    }
    for owner, note in notes.items():
        assert (note in text) == (owner == name)


def test_a_published_gelu_is_named_where_the_run_had_the_fused_one(
    finished_run, tmp_path, tmp_path_factory, text
):
    """A local folder in the hub's format, which says gelu_new, dropout and half precision."""
    base = tmp_path_factory.mktemp("bases") / "published"
    shutil.copytree(ASSETS_DIR / "gpt2_mini", base)
    config = json.loads((base / "config.json").read_text())
    config |= {"activation_function": "gelu_new", "resid_pdrop": 0.1, "dtype": "float16"}
    (base / "config.json").write_text(json.dumps(config))
    run_dir = finished_run(*LORA, "model=local", f"model.path={base}")

    done = export.export(run_dir, tmp_path / "adapter", merge=False)
    assert done.base_options == {"dtype": "float32", "activation_function": "gelu_pytorch_tanh"}
    assert done.moved == 0.0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert metadata_load(tmp_path / "adapter" / "README.md")["base_model"] == "published"
    assert json.dumps(str(base)) in card
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base)

    done = export.export(run_dir, tmp_path / "whole", merge=True)
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    assert config.activation_function == "gelu_pytorch_tanh"
    assert (config.resid_pdrop, str(config.dtype)) == (0.1, "torch.float32")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "`gelu_pytorch_tanh`, with which it was trained, where the base has `gelu_new`" in card

    moved = base.rename(base.with_name("elsewhere"))
    with pytest.raises(ConfigError, match=r"model\.path=.*published.*is not there"):
        saved.load(run_dir)
    moved.rename(base)


def test_a_gelu_by_its_other_name_is_named_too(finished_run, tmp_path, tmp_path_factory):
    """Phi keeps it as hidden_act."""
    base = tmp_path_factory.mktemp("bases") / "phi"
    tokenizer = AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini")
    config = AutoConfig.for_model(
        "phi", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=256,
        hidden_act="gelu_new", resid_pdrop=0.1, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    run_dir = finished_run(*LORA, "model=local", f"model.path={base}")
    done = export.export(run_dir, tmp_path / "adapter", merge=False)
    assert done.base_options == {"dtype": "float32", "hidden_act": "gelu_pytorch_tanh"}
    assert done.moved == 0.0
    export.export(run_dir, tmp_path / "whole", merge=True)
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    assert (config.hidden_act, config.resid_pdrop) == ("gelu_pytorch_tanh", 0.1)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "`hidden_act` is `gelu_pytorch_tanh`, with which it was trained" in card


def test_the_card_of_a_task_says_how_it_was_evaluated(finished_run, tmp_path, task):
    run_dir = finished_run(*task)
    export.export(run_dir, tmp_path / "adapter", merge=False)
    card = (tmp_path / "adapter" / "README.md").read_text()
    scores = run_record.read(run_dir)["quality"]["generation"]
    assert "Every reference after its prompt and an end-of-text token" in card
    assert "Every document by itself" not in card
    assert f"completions of 2 test prompts: BLEU {scores['bleu']:.2f}" in card
    (index,) = metadata_load(tmp_path / "adapter" / "README.md")["model-index"]
    named = {m["type"]: m["value"] for r in index["results"] for m in r["metrics"]}
    assert named["nist"] == pytest.approx(scores["nist"])


def test_a_base_frozen_in_bf16_is_merged_in_fp32(finished_run, tmp_path, text):
    run_dir = finished_run(*LORA, "train.precision=bf16", "model.frozen_dtype=bf16")
    run = saved.load(run_dir)
    export.export(run_dir, tmp_path / "whole", merge=True)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.float32
    with torch.no_grad():
        expected = run.model().float()(input_ids=text).logits
        torch.testing.assert_close(model(input_ids=text).logits, expected, rtol=1e-4, atol=1e-4)
    export.export(run_dir, tmp_path / "adapter", merge=False)
    assert 'dtype="bfloat16"' in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    "more",
    [
        ("targets.modules=[wte]", "train.lr=0.002"),
        ("+method.fields.modules_to_save=[lm_head]", "train.lr=0.001"),
    ],
)
def test_a_tied_head_comes_apart_where_one_end_is_adapted(finished_run, tmp_path, more):
    run_dir = finished_run("method=lora", "method.r=4", *more)
    export.export(run_dir, tmp_path / "whole", merge=True)
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "The head has a weight of its own" in card


def test_a_random_base_is_drawn_again_and_exported_whole(finished_run, tmp_path):
    run_dir = finished_run(*LORA, "model=gpt2_mini_init", "seed=3")
    with pytest.raises(ConfigError, match=r"drew its base at random.*add --merge"):
        export.export(run_dir, tmp_path / "adapter", merge=False)
    export.export(run_dir, tmp_path / "whole", merge=True)
    ours = load_file(tmp_path / "whole" / "model.safetensors")
    kept = load_file(run_dir / "model" / "model.safetensors")  # the worker's, of the same draws
    assert ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], kept[name]) for name in kept)
    assert "base_model" not in metadata_load(tmp_path / "whole" / "README.md")


# --------------------------------------------------------------------------- q, k, v joined


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("letters", ["q", "qv", "qkv"])
def test_joined_lora_is_the_same_function(tiny, letters, rslora):
    ids = torch.arange(1, 31)[None]
    state = {name: t.clone() for name, t in tiny.state_dict().items()}
    modules = [UNFUSED_TARGETS[letter] for letter in letters]
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=[*modules, "mlp.c_fc"],
        fan_in_fan_out=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    apart = get_peft_model(unfuse_qkv(tiny), config).eval()
    with torch.no_grad():
        for name, p in apart.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    tensors = get_peft_model_state_dict(apart)
    assert joined_lora.is_split(config) and joined_lora.reason_unsupported(config) is None
    joined, written = joined_lora.join(config, tensors)
    plain = GPT2LMHeadModel(tiny.config).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        base = plain(ids).logits
        together = get_peft_model(plain, joined).eval()
        expected = get_peft_model_state_dict(together)
        assert written.keys() == expected.keys()
        found = set_peft_model_state_dict(together, written)
        assert not found.unexpected_keys
        logits = apart(ids).logits
        assert (logits - base).abs().max() > 0.1
        torch.testing.assert_close(together(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_joined_says_why():
    modules = list(UNFUSED_TARGETS.values())
    for fields, why in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"rank_pattern": {"attn.c_attn.q": 2}}, "ranks or scales"),
        ({"init_lora_weights": "pissa"}, "init=pissa"),
        ({"modules_to_save": ["lm_head"]}, "more than"),
    ):
        assert why in joined_lora.reason_unsupported(LoraConfig(target_modules=modules, **fields))
    assert not joined_lora.is_split(LoraConfig(target_modules=["attn.c_attn"]))


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "merge", "said"),
    [
        (NONE, False, "trained nothing"),
        (NONE, True, "trained nothing"),
        (TRUNCATE, False, "add --merge"),
        (PROMPTS, True, "PROMPT_TUNING trains prompts.*leave out --merge"),
    ],
)
def test_what_there_is_nothing_of_is_refused(finished_run, tmp_path, overrides, merge, said):
    with pytest.raises(ConfigError, match=said):
        export.export(finished_run(*overrides), tmp_path / "out", merge=merge)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(finished_run, tmp_path):
    run_dir, out = finished_run(*LORA), tmp_path / "out"
    out.mkdir()
    export.export(run_dir, out, merge=False)  # an empty folder may stand there
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="out is not empty"):
        export.export(run_dir, out, merge=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is not a folder"):
        export.export(run_dir, tmp_path / "file", merge=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file"}


def test_a_failure_leaves_nothing_behind(finished_run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "card", fail)
    with pytest.raises(OSError, match="No space left"):
        export.export(finished_run(*LORA), tmp_path / "out", merge=False)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_loads_to_another_model_is_not_written(finished_run, tmp_path, monkeypatch):
    # Logits differ where the published base is not what the run had: here, another dtype.
    monkeypatch.setattr(export, "base_options", lambda run: {"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="is not the model of the run"):
        export.export(finished_run(*LORA), tmp_path / "out", merge=False)
    assert not list(tmp_path.iterdir())


def test_other_folders_are_named_for_what_they_are(finished_run, tmp_path):
    run_dir = finished_run(*LORA)
    name = run_dir.name
    with pytest.raises(ConfigError, match=f"no folder .*did you mean '{re.escape(name)}'"):
        saved.load(run_dir.with_name(name[:-1]))
    with pytest.raises(ConfigError, match=f"experiment's folder.*{re.escape(name)}"):
        saved.load(run_dir.parent)
    with pytest.raises(ConfigError, match=r"not a run directory: it has no result\.json"):
        saved.load(tmp_path)
    cut = tmp_path / "runs" / name
    shutil.copytree(run_dir, cut)
    record = run_record.read(cut)
    failure = {"class": "nan", "message": "the loss is NaN\nat step 3"}
    run_record.write(cut, record | {"status": "failed", "failure": failure})
    with pytest.raises(ConfigError, match=r"status is failed \(nan: the loss is NaN\)"):
        saved.load(cut)
    run_record.write(cut, record)
    shutil.rmtree(cut / "adapter")
    with pytest.raises(ConfigError, match="adapter, which the run wrote, is not there"):
        export.export(cut, tmp_path / "out", merge=False)


def test_paths_of_a_run_are_found_from_where_it_was_started(finished_run, tmp_path, monkeypatch):
    """A relative base folder, and text that is gone, as seen from another working directory."""
    run_dir = finished_run(*LORA)
    moved = tmp_path / "start" / "outputs" / "scratch" / run_dir.name
    shutil.copytree(run_dir, moved)
    record, text = run_record.read(moved), (moved / "config.yaml").read_text()
    settings = yaml.safe_load(text)
    settings["outputs_dir"] = record["config"]["outputs_dir"] = "outputs"
    settings["model"] |= {"asset": None, "path": "bases/mine"}
    settings["data"] |= {"source": "text_files", "path": "gone/*.txt"}
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    run_record.write(moved, record)
    with pytest.raises(ConfigError, match=r"model\.path='bases/mine'.*start.*where the run was"):
        saved.load(moved)
    shutil.copytree(ASSETS_DIR / "gpt2_mini", tmp_path / "start" / "bases" / "mine")
    monkeypatch.chdir(tmp_path)
    assert saved.load(moved).run.model.path == str(tmp_path / "start" / "bases" / "mine")


def test_the_command_line(finished_run, tmp_path, harness, monkeypatch, capsys):
    run_dir = finished_run(*LORA)
    done = harness("export", str(run_dir), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "a LORA adapter" in done.stdout and "identical logits" in done.stdout
    assert not done.stderr
    monkeypatch.setattr(logging, "disable", lambda level: None)  # for the tests that follow
    assert export.main([str(run_dir), str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"error: .*out is not empty.*\n", capsys.readouterr().err)
