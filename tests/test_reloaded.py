"""What was saved or exported is measured again on documents that the run measured."""

import json
import shutil

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harness.artifacts import export
from harness.config.errors import ConfigError
from harness.config.paths import ASSETS_DIR, REPOSITORY
from harness.evaluation import sliding_window
from harness.models.next_token import NextToken
from harness.results import run_record
from harness.runs import finished_run as saved
from harness.runs import saved_check

CONTEXT = 16


def nats_of(model, tokens):
    """Summed nats of a document by transformers' logits, windows of CONTEXT that do not overlap."""
    ids, nats, done = [0, *tokens], 0.0, 0
    while done < len(tokens):
        end = min(len(tokens), CONTEXT if not done else done + CONTEXT)
        part = torch.tensor([ids[max(0, end - CONTEXT) : end + 1]])
        with torch.no_grad():
            logits = model(part[:, :-1]).logits[0]
        loss = F.cross_entropy(logits, part[0, 1:], reduction="none")
        nats += float(loss[-(end - done) :].sum())
        done = end
    return nats


@pytest.fixture
def full(tiny, make_run, tmp_path):
    """A run of method=full as it stands on disk, with the model that it evaluated."""
    run = make_run(
        "method=full",
        f"data.context_length={CONTEXT}",
        "train.micro_batch=8",
        "train.batch_tokens=128",
    )
    rows = [[(7 * i + j) % 64 for j in range(n)] for i, n in enumerate((30, 3, 20, 0, 40))]
    documents = Dataset.from_dict({"id": list("abcde"), "tokens": rows})
    nll = [nats_of(tiny, tokens) for tokens in rows]
    found = (pd.Series(nll).to_numpy(), pd.Series(map(len, rows)).to_numpy())
    saved_check.keep(tmp_path, documents, found, bos=0)
    tiny.save_pretrained(tmp_path / "model")
    record = {"evaluation": {"context_length": CONTEXT, "stride": CONTEXT}, "saved": ["model"]}
    return saved.Saved(tmp_path, run, record)


def test_documents_are_kept_shortest_first_with_their_nats(full):
    table = pd.read_parquet(full.run_dir / saved_check.FILE_NAME)
    assert table.id.tolist() == ["c", "a", "e", "b"]  # of 20, 30, 40 and 3 tokens; none of 0
    assert table.predicted.tolist() == [20, 30, 40, 3]


def test_what_is_the_same_model_is_confirmed(full, tiny):
    assert saved_check.compare(full, tiny, "it") < 1e-6
    found = saved_check.check(full)
    assert found["failure"] is None and found["nats_per_token"] < 1e-6


@pytest.mark.parametrize("folder", ["model", "check"])
def test_what_is_another_model_is_noted_and_the_result_stands(full, folder):
    if folder == "model":
        file = full.run_dir / "model" / "model.safetensors"
        tensors = load_file(file)
        tensors["transformer.h.1.mlp.c_fc.weight"] *= 1.5
        save_file(tensors, file, metadata={"format": "pt"})
        said = "is not the model that the run evaluated: .* nats a token"
    else:
        (full.run_dir / saved_check.FILE_NAME).write_bytes(b"no table")
        said = "cannot be read"
    failure = saved_check.check(full)["failure"]
    assert pd.Series([failure]).str.contains(said).all()


def test_nats_that_are_no_number_are_no_agreement(full, tiny):
    with torch.no_grad():
        tiny.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="nan nats a token"):
        saved_check.compare(full, tiny, "it")


def test_in_bf16_other_kernels_pass_and_weights_that_moved_do_not(make_run, tokenizer, tmp_path):
    """The tolerance lies between: it is twice what rounding makes, and some of what these make."""
    run = make_run("model=gpt2_mini", "train.precision=bf16")
    base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini").eval()
    ids = tokenizer((REPOSITORY / "README.md").read_text("utf-8"))["input_ids"]
    documents = Dataset.from_dict({
        "id": list("abcdefgh"), "tokens": [ids[60 * i : 60 * i + 60] for i in range(8)],
    })  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        found = sliding_window.document_nll(
            NextToken(base), documents, context=256, stride=256, bos=0, batch_tokens=1024,
            batching=sliding_window.ONE_WIDTH,
        )  # fmt: skip
    saved_check.keep(tmp_path, documents, found, bos=0)
    one = saved.Saved(
        tmp_path, run, {"evaluation": {"context_length": 256, "stride": 256}, "saved": []}
    )
    assert saved_check.compare(one, base, "it") < 1e-4
    base.set_attn_implementation("eager")
    assert saved_check.compare(one, base, "it") < saved_check.TOLERANCE["bf16"] / 2
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in base.parameters():
            weight += 0.03 * weight.std() * torch.randn(weight.shape, generator=draw)
    with pytest.raises(ConfigError, match=r"at most 0\.01 is rounding"):
        saved_check.compare(one, base, "it")


def test_a_run_that_kept_nothing_is_not_called_confirmed(full, tiny):
    (full.run_dir / saved_check.FILE_NAME).unlink()
    assert saved_check.compare(full, tiny, "it") is None
    assert saved_check.check(full) == {"nats_per_token": None, "failure": None}


def test_the_generation_config_of_the_base_is_kept(tiny, make_run, tmp_path):
    """An invalid one, as many are published: do_sample is false beside a temperature."""
    tiny.save_pretrained(tmp_path / "base")
    own = {"do_sample": False, "temperature": 0.7, "eos_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    run = make_run(
        "model=local", f"model.path={tmp_path / 'base'}", "method=none", "data.context_length=32"
    )
    base = saved.Saved(tmp_path, run, {}).base()
    assert base.config.use_cache is True
    base.save_pretrained(tmp_path / "out")  # transformers refuses it if it was changed
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: kept[key] for key in own} == own


@pytest.mark.slow
@pytest.mark.parametrize("method", [("method=lora", "method.r=2"), ("method=full",)])
def test_a_base_that_changed_since_is_not_exported(finished_run, tmp_path_factory, method):
    base = tmp_path_factory.mktemp("bases") / "mine"
    shutil.copytree(ASSETS_DIR / "gpt2_mini", base)
    run_dir = finished_run(*method, "train.lr=0.002", "model=local", f"model.path={base}")
    confirmed = run_record.read(run_dir)["saved_check"]
    assert confirmed["failure"] is None and confirmed["nats_per_token"] < 1e-4
    file = (base if method[0] == "method=lora" else run_dir / "model") / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.0.mlp.c_fc.weight"] *= 1.05
    save_file(tensors, file, metadata={"format": "pt"})
    # A base's files are known by their digest; what the run saved is known by its nats.
    adapter = method[0] == "method=lora"
    said = "changed since this run was done" if adapter else "not the model that the run evaluated"
    for merge in (True, False) if adapter else (False,):
        with pytest.raises(ConfigError, match=said):
            export.export(run_dir, base.parent / "out", merge=merge)
    assert not (base.parent / "out").exists()
