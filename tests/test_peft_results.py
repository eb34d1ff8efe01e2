"""Results in the format of PEFT's method_comparison: read, compared, and written of our runs."""

from __future__ import annotations

import csv
import json

import pandas as pd
import pytest
from scipy import stats as scipy_stats
from synthetic_runs import put

from harness.config.errors import ConfigError
from harness.report import peft_export, peft_page, peft_results
from harness.report.__main__ import main

ITEMS = 1319
# The columns that their app takes from a file, with the types it turns them into.
THEIRS = {
    ("run_info", "experiment_name"): "string", ("run_info", "train_config"): "string",
    ("run_info", "peft_config"): "string", ("run_info", "total_time"): float,
    ("run_info", "peft_branch"): "string", ("run_info", "created_at"): "datetime64[ns, UTC]",
    ("train_info", "accelerator_memory_reserved_avg"): int,
    ("train_info", "accelerator_memory_max"): int,
    ("train_info", "accelerator_memory_reserved_99th"): int,
    ("train_info", "train_time"): float, ("train_info", "file_size"): int,
    ("meta_info", "package_info"): "string", ("meta_info", "system_info"): "string",
}  # fmt: skip
OF_METRICS = {
    "test accuracy": float, "train loss": float, "train samples": int, "train total tokens": int,
}  # fmt: skip


def record(right, *, name="lora/a", peft_type="LORA", version=4, status="success", **metrics):
    """A file's content as their versions have it: 1 of June 2025, 2, 3 (accelerators) and 4."""
    memory = "accelerator" if version > 2 else "cuda"
    train = {
        f"{memory}_memory_reserved_avg": 14 * 2**30, f"{memory}_memory_max": 22 * 2**30,
        f"{memory}_memory_reserved_99th": 20 * 2**30, "train_time": 941.9, "file_size": 36715216,
        "status": status,
    }  # fmt: skip
    if version > 1:
        train |= {"num_trainable_params": 9175040, "num_total_params": 3221924864}
    last = {"step": 5000, "test accuracy": right / ITEMS, "train loss": 0.6} | metrics
    if version > 3:
        last["forgetting"] = 0.05
    return {
        "run_info": {
            "created_at": "2026-07-15T05:41:18+00:00", "total_time": 1153.3,
            "experiment_name": name, "peft_branch": "main",
            "train_config": {"model_id": "meta-llama/Llama-3.2-3B", "seed": 0},
            "peft_config": {"peft_type": peft_type} if peft_type else None,
        },
        "train_info": train | {"metrics": [{"step": 250, "valid accuracy": 0.3}, last]},
        "meta_info": {"dataset_info": {"metamath": {"sha": "a"}, "gsm8k": {"sha": "b"}}},
    }  # fmt: skip


def save(folder, *records):
    folder.mkdir(exist_ok=True)
    for place, one in enumerate(records):
        (folder / f"r{place}.json").write_text(json.dumps(one))
    return folder


def test_intervals_and_tests_are_scipys(tmp_path):
    right = {"lily": 694, "hira": 677, "full": 622, "vera": 467, "ln": 0}
    folder = save(tmp_path / "f", *[record(n, name=name) for name, n in right.items()])
    found = peft_results.read(folder)
    assert [one.result.name for one in found.ranked] == list(right) and found.items == ITEMS
    for one in found.ranked:
        n = right[one.result.name]
        own = scipy_stats.binomtest(n, ITEMS).proportion_ci(method="wilson")
        assert one.interval == pytest.approx((own.low, own.high), abs=1e-9)
    for a, b in (("lily", "hira"), ("lily", "full"), ("hira", "vera"), ("vera", "ln")):
        counts = [[right[a], ITEMS - right[a]], [right[b], ITEMS - right[b]]]
        expected = scipy_stats.chi2_contingency(counts, correction=False).pvalue
        p = peft_results.two_proportions(right[a] / ITEMS, right[b] / ITEMS, ITEMS)
        assert p == pytest.approx(expected, rel=1e-9)
    # Of 10 pairs lily and full is the eighth (3 x 0.005), hira and full the ninth (2 x 0.03).
    assert [one.places for one in found.ranked] == ["1-2", "1-3", "2-3", "4", "5"]
    assert [one.ties_best for one in found.ranked] == [True, True, False, False, False]
    assert "1 of the 4 other rows cannot be told from it" in peft_results.answer(found)
    assert peft_results.two_proportions(1.0, 1.0, 10) == 1


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_every_version_of_their_files_is_read(version, tmp_path):
    folder = save(tmp_path / "f", record(600, version=version))
    (one,) = peft_results.read(folder).ranked
    assert one.result.memory_bytes == 22 * 2**30 and one.result.file_bytes == 36715216
    assert (one.result.trainable == 9175040) == (version > 1)
    assert (one.result.forgetting == 0.05) == (version > 3)
    shown = peft_page.sheet(peft_results.read(folder))
    assert ("forgot" in shown.headings) == (version > 3)
    assert ("trainable" in shown.headings) == (version > 1)


def test_a_metric_that_is_no_share_has_no_interval_and_no_rank(tmp_path):
    def similarity(value, name):
        one = record(0, name=name)
        del one["train_info"]["metrics"][-1]["test accuracy"]
        one["train_info"]["metrics"][-1]["test dino_similarity"] = value
        one["meta_info"]["dataset_info"] = {"sha": "a", "created_at": "2026"}
        one["run_info"]["train_config"]["dataset_id"] = "cats"
        return one

    folder = save(tmp_path / "f", similarity(0.7, "a"), similarity(0.74, "b"))
    found = peft_results.read(folder)
    assert [one.result.name for one in found.ranked] == ["b", "a"]
    assert found.items is None and found.ranked[0].interval is None
    assert found.ranked[0].result.task == "cats"
    headings = peft_page.sheet(found).headings
    assert "95 %" not in headings and "place" not in headings
    assert "no row can be told apart" in peft_results.answer(found)
    with pytest.raises(ConfigError, match="--items: test dino_similarity is no share of items"):
        peft_results.read(folder, 100)


def test_what_is_left_out_is_named(tmp_path):
    older = record(600, name="lora/a")
    older["run_info"]["created_at"] = "2025-06-17T05:41:18+00:00"
    folder = save(
        tmp_path / "f", record(610, name="lora/a"), older, record(0, name="x", status="failed")
    )
    found = peft_results.read(folder)
    assert [round(one.result.value * ITEMS) for one in found.ranked] == [610]
    assert found.skipped == [
        "r2.json: its status is 'failed', not 'success'",
        "r1.json: r0.json is a newer run of lora/a",
    ]
    assert any("r1.json" in note for note in peft_results.notes(found))


def other_model():
    one = record(500, name="b")
    one["run_info"]["train_config"]["model_id"] = "gpt2"
    return one


def without(*path):
    one = record(500)
    inner = one
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return one


UNKNOWN = record(500)
UNKNOWN["meta_info"]["dataset_info"] = {"piqa": {"sha": "a"}}


@pytest.mark.parametrize(
    ("records", "items", "said"),
    [
        ([], None, r"no result of PEFT's method_comparison in .*: it has no \*.json"),
        ([[1]], None, "r0.json is no result of PEFT's method_comparison: it is no object"),
        ([{"a": 1}], None, "r0.json is no result .*: it has no run_info"),
        ([without("train_info", "file_size")], None, r"is missing .*\(KeyError 'file_size'\)"),
        ([without("train_info", "metrics")], None, r"is missing .*\(KeyError 'metrics'\)"),
        ([record(500), other_model()], None, "several models do not compare: gpt2, meta-llama"),
        ([UNKNOWN], None, "size of the test set of piqa is not in the files: give --items N"),
        ([record(500.5)], None, r"r0.json: accuracy 0\.37945.* is no share of 1,319 items"),
        ([record(500)], 1000, "is no share of 1,000 items; give the size"),
        ([record(0, status="failed")], None, r"\(r0.json: its status is 'failed', not 'success'\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(records, items, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        peft_results.read(save(tmp_path / "f", *records), items)


def test_the_command_prints_and_writes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "MetaMathQA", *[
        record(n, name=f"{kind}/a", peft_type=kind)
        for n, kind in ((694, "LILY"), (677, "HIRA"), (467, "VERA"))
    ]) / "."  # fmt: skip
    assert main(["--peft-results", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "LILY/a has the highest accuracy, 52.6 % (95 % 49.9 to 55.3); 1 of the 2 other" in shown
    assert "what another seed would have given" in shown
    out = tmp_path / "outputs" / "peft_results" / "MetaMathQA"
    page = (out / "report" / "index.html").read_text()
    assert "LILY/a has the highest accuracy" in page and "../../../../MetaMathQA/r0.json" in page
    (first, *_) = csv.DictReader((out / "results.csv").open())
    assert first["quality.test.value"] == repr(694 / ITEMS)
    for name in ("parameters", "memory", "forgetting"):
        assert (out / "report" / "figures" / f"{name}.png").is_file()
    assert main(["--peft-results", str(tmp_path / "MetaMath")]) == 2
    assert "did you mean 'MetaMathQA'?" in capsys.readouterr().err
    assert main(["--peft-results", str(folder), "--items", "0"]) == 2
    assert "--items 0: expected a positive whole number" in capsys.readouterr().err
    assert main(["--peft-results", str(folder), "--items", "x"]) == 2


def test_our_runs_are_files_that_their_app_reads(tmp_path, capsys):
    folder = tmp_path / "x"
    for r in (1, 8):
        run_dir = put(
            folder, f"lora-r{r}", r=r, also=(2.0, 2.5), nll=3.0,
            train={"batch_tokens": 2048}, data={"context_length": 256},
        )  # fmt: skip
        result = json.loads((run_dir / "result.json").read_text())
        result |= {"date": "2026-11-29T17:41:26Z", "wall_seconds": 12.5}
        result["speed"] |= {"steps": 4, "tokens": 8192}
        accuracy = {"test": {"accuracy": 0.75}}
        result["quality"]["classification"] = accuracy if r == 8 else None
        (run_dir / "result.json").write_text(json.dumps(result))
        (run_dir / "adapter").mkdir()
        (run_dir / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"-" * 123)
    put(folder, "gone", status="failed")
    assert main(["--as-peft-results", str(folder)]) == 0
    assert capsys.readouterr().out.count("saved: ") == 2
    files = sorted((folder / peft_export.FOLDER).glob("*.json"))
    read = [json.loads(path.read_text()) for path in files]
    rows = []
    for one in read:
        assert one["train_info"]["status"] == "success"
        assert one["run_info"]["peft_config"]["peft_type"] == "LORA"
        packages = one["meta_info"]["package_info"]
        assert {f"{name}-version" for name in peft_export.PACKAGES} <= set(packages)
        row = {key: one[part][key] for part, key in THEIRS}
        rows.append(row | {key: one["train_info"]["metrics"][-1][key] for key in OF_METRICS})
    kinds = {key: kind for (_, key), kind in THEIRS.items()} | OF_METRICS
    frame = pd.DataFrame(rows)
    frame["created_at"] = pd.to_datetime(frame["created_at"])
    frame = frame.astype(kinds)
    assert frame["test accuracy"].isna().tolist() == [True, False]
    assert frame["test accuracy"][1] == 0.75 and frame["file_size"].tolist() == [123, 123]
    assert frame["train samples"].tolist() == [32, 32]
    last = read[0]["train_info"]["metrics"][-1]
    assert last["forgetting"] == pytest.approx(0.5, abs=0.05) and last["forgetting of"] == "more"
    assert last["train loss"] == 1.0
    # What has no accuracy is left out where it is read back, and said.
    with pytest.raises(ConfigError, match="size of the test set of kjv"):
        peft_results.read(folder / peft_export.FOLDER)
    back = peft_results.read(folder / peft_export.FOLDER, 4)
    assert [one.result.value for one in back.ranked] == [0.75]
    assert back.skipped == ["lora-r1.json: it has no test accuracy"]
    assert main(["--as-peft-results", str(tmp_path)]) == 2
