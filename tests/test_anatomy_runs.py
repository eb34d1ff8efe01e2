"""The three commands on finished runs of every kind of method, and on what they refuse."""

import json
import logging
import shutil

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trained_kinds import FULL, LORA, NONE, PROMPTS, QV, TRUNCATE, UDV
from transformers import AutoModelForCausalLM

from harness.artifacts import compress, interpolate
from harness.artifacts.anatomy import __main__ as anatomy
from harness.artifacts.anatomy import updates
from harness.config.paths import ASSETS_DIR
from harness.runs import finished_run as saved

IA3 = ("method=peft", "method.peft_type=IA3", "train.lr=0.05")
PISSA = ("method=pissa", "method.r=4", "train.lr=0.002")
BF16 = (*LORA, "model.frozen_dtype=bf16", "train.precision=bf16")
CHANGED = {
    "full": FULL, "lora": LORA, "qv": QV, "udv": UDV, "truncate": TRUNCATE, "ia3": IA3,
    "pissa": PISSA, "bf16": BF16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def logs_again():
    yield
    logging.disable(logging.NOTSET)


def copied(run_dir, tmp_path):
    """A run of the session, copied, so that what is written to it stays here."""
    return shutil.copytree(run_dir, tmp_path / "e" / run_dir.name)


def record(run_dir):
    return json.loads((run_dir / "result.json").read_text())


@pytest.mark.parametrize("name", CHANGED)
def test_full_rank_and_lambda_1_are_the_run_and_lambda_0_its_base(finished_run, tmp_path, name):
    run_dir = copied(finished_run(*CHANGED[name]), tmp_path)
    quality = record(run_dir)["quality"]
    share = 1e-2 if name == "bf16" else 2e-5  # merged, the base of the bf16 run is held in fp32
    assert interpolate.main([str(run_dir), "--scales", "0,1"]) == 0
    found = pd.read_csv(run_dir / interpolate.CSV).set_index("scale")["perplexity"]
    assert found[1.0] == pytest.approx(quality["validation"]["perplexity"], rel=share)
    assert found[0.0] == pytest.approx(quality["base"]["validation"]["perplexity"], rel=share)
    assert compress.main([str(run_dir), "--ranks", "1,full"]) == 0
    table = pd.read_csv(run_dir / compress.CSV)
    full = table[(table["rank"] == "full") & (table["beside"] == compress.WITH)]
    assert float(full["perplexity"].iloc[0]) == pytest.approx(
        quality["validation"]["perplexity"], rel=share
    )
    documents = pd.read_parquet(run_dir / compress.PARQUET)
    whole = documents[(documents["rank"] == "full") & (documents["beside"] == compress.WITH)]
    own = pd.read_parquet(run_dir / "documents-validation.parquet")
    assert whole["nll_nats"].sum() == pytest.approx(own["nll_nats"].sum(), rel=share)


def test_the_parts_of_all_texts_are_those_that_the_run_evaluated(finished_run, tmp_path, capsys):
    """A further text, the test split, and validation that is read in part."""
    lines = [json.dumps({"text": f"Note {i} of the river. " * (3 + i % 7)}) for i in range(40)]
    (tmp_path / "old.jsonl").write_text("\n".join(lines))
    own = f"{{source: text_files, path: {tmp_path}/old.jsonl, test_share: 0.4}}"
    more = (
        f"+evaluate.also.old={own}",
        "evaluate.validation_tokens=300",
        "evaluate.test_tokens=200",
    )
    run_dir = copied(finished_run(*LORA, *more), tmp_path)
    quality = record(run_dir)["quality"]
    expected = {name: quality[name]["perplexity"] for name in ("validation", "test")}
    expected["old"] = quality["also"]["old"]["after"]["perplexity"]
    assert compress.main([str(run_dir), "--ranks", "full", "--test"]) == 0
    table = pd.read_csv(run_dir / compress.CSV)
    found = dict(zip(table["text"], table["perplexity"], strict=True))
    assert found == pytest.approx(expected, rel=2e-5)
    asked = [str(run_dir), "--test", "--texts", "test,old"]
    assert compress.main([*asked, "--ranks", "1"]) == 0
    assert list(pd.read_csv(run_dir / compress.CSV)["text"].unique()) == ["test", "old"]
    assert compress.main([str(run_dir), "--texts", "od"]) == 2
    assert "--texts:" in (said := capsys.readouterr().err) and "did you mean 'old'?" in said
    assert interpolate.main([str(run_dir), "--scales", "1", "--test"]) == 0
    table = pd.read_csv(run_dir / interpolate.CSV)
    found = dict(zip(table["text"], table["perplexity"], strict=True))
    assert found == pytest.approx(expected, rel=2e-5)
    assert anatomy.main([str(run_dir), "function_tokens=64"]) == 0
    layers = pd.read_parquet(run_dir / "anatomy" / "layers.parquet")
    assert set(layers["text"]) == {"validation", "old"}


def test_a_lora_is_whole_at_its_rank_and_plain_peft_loads_what_was_saved(
    finished_run, tmp_path, capsys
):
    run_dir = copied(finished_run(*LORA), tmp_path)
    arguments = ["--ranks", "2,4", "--energy", "0.9", "--save", str(tmp_path / "adapters")]
    assert compress.main([str(run_dir), *arguments]) == 0
    value = pd.read_csv(run_dir / compress.CSV).set_index("rank")["perplexity"]
    recorded = record(run_dir)["quality"]["validation"]["perplexity"]
    assert value["4"] == pytest.approx(recorded, rel=2e-5)
    assert abs(value["2"] / recorded - 1) > 1e-4
    assert f"{recorded:.2f} (all," in capsys.readouterr().out  # beside the LoRA trained at r=4
    ids = torch.arange(40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini")
        again = PeftModel.from_pretrained(base, tmp_path / "adapters" / "4")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(ASSETS_DIR / "gpt2_mini")
        own = PeftModel.from_pretrained(base, run_dir / "adapter")(ids).logits
    torch.testing.assert_close(again, own, atol=1e-3, rtol=1e-3)
    pattern = json.loads((tmp_path / "adapters" / "energy-0.9" / "adapter_config.json").read_text())
    assert len(set(pattern["rank_pattern"].values())) > 1


def test_the_change_of_q_and_v_alone_is_what_the_adapters_factors_multiply_to(finished_run):
    run = saved.load(finished_run(*QV))
    found = {u.name: u for u in updates.changed(updates.load(run))}
    assert {u.kind for u in found.values()} == {"q", "v"}
    tensors = load_file(run.run_dir / "adapter" / "adapter_model.safetensors")
    scale = run.run.method.lora_alpha / run.run.method.r
    for name, update in found.items():
        path, _, part = name.rpartition(".weight.")
        a, b = (tensors[f"base_model.model.{path}.{part}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(update.delta.float(), scale * b @ a, atol=1e-7, rtol=1e-4)


def test_an_experiment_has_tables_of_all_its_runs_and_names_those_without_a_change(
    finished_run, tmp_path, capsys
):
    kinds = (LORA, (*LORA, "seed=1"), FULL, NONE, PROMPTS)
    runs = [copied(finished_run(*overrides), tmp_path).name for overrides in kinds]
    folder = tmp_path / "e"
    assert anatomy.main([str(folder), "function_tokens=256"]) == 0
    said = capsys.readouterr().out
    for name, why in ((runs[3], "trained nothing"), (runs[4], "PROMPT_TUNING trains prompts")):
        assert f"left out: {name} (" in said and why in said
    weights = pd.read_parquet(folder / "anatomy" / "weights.parquet")
    assert set(weights["run"]) == set(runs[:3])
    of_lora = weights[weights["run"] == runs[0]]
    assert set(of_lora["rank"]) == {4} and len(of_lora) == 4 * 6
    assert "embeddings" not in set(of_lora["kind"])
    assert weights.groupby("run")["share"].sum().tolist() == pytest.approx([1] * 3)
    layers = pd.read_parquet(folder / "anatomy" / "layers.parquet")
    assert layers["cka"].between(0, 1 + 1e-9).all() and (layers["text"] == "validation").all()
    summary = pd.read_csv(folder / "anatomy" / "summary.csv")
    lora = summary[(summary["of"] == "matrices") & (summary["quantity"] == "relative_change")]
    assert sorted(lora["count"]) == [1, 2]
    assert (summary["low"] <= summary["mean"] * (1 + 1e-9)).all()
    overlap = pd.read_parquet(folder / "anatomy" / "overlap.parquet")
    assert len(overlap[["run_a", "run_b"]].drop_duplicates()) == 3
    assert overlap["phi"].between(0, 1 + 1e-9).all()


def test_what_has_no_change_to_look_at_is_refused_in_a_line(finished_run, tmp_path, capsys):
    lora = copied(finished_run(*LORA), tmp_path)
    for main in (anatomy.main, compress.main, interpolate.main):
        for run_dir, said in (
            (finished_run(*NONE), "trained nothing"),
            (finished_run(*PROMPTS), "trains prompts beside the model and changes no weight"),
            (tmp_path / "none", "no folder"),
        ):
            assert main([str(run_dir)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and said in line
    for main, arguments, said in (
        (compress.main, ["--ranks", "300"], "rank=300 is above min(m, n) = 256"),
        (interpolate.main, ["--only", "embeddings"], "no weight of kind 'embeddings' changed"),
        (anatomy.main, ["intruder_k=x"], "intruder_k=x: expected a whole number"),
    ):
        assert main([str(lora), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    shutil.rmtree(lora / "adapter")
    assert compress.main([str(lora)]) == 2
    assert "which the run wrote, is not there" in capsys.readouterr().err


def test_a_base_other_than_the_runs_is_refused(finished_run, tmp_path, capsys):
    base = shutil.copytree(ASSETS_DIR / "gpt2_mini", tmp_path / "base")
    run_dir = finished_run(*LORA, "model=local", f"model.path={base}")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight *= 1.5
    model.save_pretrained(base)
    for main in (anatomy.main, compress.main, interpolate.main):
        assert main([str(run_dir)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "changed since this run was done" in line
