"""What experiments' own scripts find, on written runs whose gaps are known."""

import csv
import json
import sys

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import put

from harness.config.paths import REPOSITORY
from harness.report import anatomy, compression
from harness.report.table import rows

sys.path.insert(0, str(REPOSITORY / "experiments"))
import recording
from anatomy import findings
from claims_control import decompositions, interpolations
from main_seeds_control import decomposition

CONTROL = decomposition.CONTROL


def table(path):
    return list(csv.DictReader(path.open()))


# ------------------------------------------------------------------------- claims_control


def control_runs(folder):
    """Two settings with gaps of 0.4 and 1.0 nats, of which 0.3 and 0.2 are what stays frozen."""
    for steps, share, gap, frozen, seeds in ((80, 0.1, 1.0, 0.2, 2), (20, 1.0, 0.4, 0.3, 3)):
        truth = {"full": 3.0, CONTROL: 3 + frozen, "lora": 3 + gap}
        for name, nll in truth.items():
            for seed in range(seeds):
                also = {"docstrings_held_out": {}} if share < 1 else {}
                run_dir = put(
                    folder, f"{name}-{steps}-s{seed}", method=name, seed=seed, nll=nll, parts=1e-3,
                    train={"steps": steps}, data={"train_share": share}, evaluate={"also": also},
                    also=(2.0, nll - 0.5) if also else None,
                )  # fmt: skip
                for path in run_dir.glob("documents-more*"):  # its name here
                    path.rename(path.with_name(path.name.replace("more", "docstrings_held_out")))
                record = run_dir / "result.json"
                record.write_text(record.read_text().replace('"more"', '"docstrings_held_out"'))


def test_gaps_are_taken_apart_in_every_setting(tmp_path, monkeypatch, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(decompositions, "HERE", out)
    control_runs(runs)
    assert recording.evaluate([str(runs)], "", decompositions.judge) == 0, capsys.readouterr().err
    found = {
        (line["steps"], line["name"].split()[0], line["part"]): line
        for line in table(out / "decompositions.csv")
    }
    parts = {key: float(line["nats"]) for key, line in found.items()}
    lora = next(name for _, name, part in found if part == "gap")
    for steps, gap, frozen in (("80", 1.0, 0.2), ("20", 0.4, 0.3)):
        assert parts[steps, lora, "gap"] == pytest.approx(gap, abs=0.005)
        assert parts[steps, lora, "rank"] == pytest.approx(gap - frozen, abs=0.005)
        assert parts[steps, CONTROL, "frozen"] == pytest.approx(frozen, abs=0.005)
        line = found[steps, lora, "gap"]
        share = [float(line[f"share_frozen{end}"]) for end in ("", "_low", "_high")]
        assert share[0] == pytest.approx(frozen / gap, abs=0.01) and share[1] < share[0] < share[2]
        assert not found[steps, lora, "rank"]["share_frozen"]
    forgot = {name: nats for (steps, name, part), nats in parts.items() if part == "forgets"}
    assert forgot == {
        "full": pytest.approx(-0.2, abs=0.01), lora: pytest.approx(0.8, abs=0.01)
    }  # fmt: skip
    assert not [key for key in found if key[0] == "20" and key[2] == "forgets"]
    ordered = sorted(found.values(), key=lambda line: float(line["p"]))
    by_hand, largest = [], 0.0
    for place, line in enumerate(ordered):  # Holm's
        largest = max(largest, min(1.0, (len(ordered) - place) * float(line["p"])))
        by_hand.append(largest)
    assert [float(line["adjusted_p"]) for line in ordered] == pytest.approx(by_hand)
    assert len(table(out / "results.csv")) == 6


def test_a_setting_without_its_control_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decompositions, "HERE", tmp_path)
    runs = tmp_path / "runs"
    for name in ("full", "lora"):
        put(runs, name, method=name, train={"steps": 20}, data={"train_share": 1.0},
            evaluate={"also": {}})  # fmt: skip
    assert recording.evaluate([str(runs)], "", decompositions.judge) == 2
    assert capsys.readouterr().err == f"error: expected one row of {CONTROL}, and there are 0\n"
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(("arguments", "status"), [(["-h"], 0), ([], 2), (["a", "b"], 2)])
def test_a_script_tells_its_use(arguments, status, capsys):
    assert recording.evaluate(arguments, "how to", lambda folder: None) == status
    assert capsys.readouterr().out == "how to\n"


# ------------------------------------------------------------------------- anatomy


NLL = {
    "full": 3.0, findings.MATRICES: 3.3, findings.REST: 3.25, findings.EMBEDDINGS: 3.05,
    "lora r=1": 4.0, "lora r=8": 3.6, "lora r=64": 3.4,
    "lora r=1 +embeddings": 3.5, "lora r=8 +embeddings": 3.1, "lora r=64 +embeddings": 2.9,
}  # fmt: skip
SEEDS = range(3)


def anatomy_runs(folder):
    """Runs of NLL, the base, a compressed update, and intruders in the order of forgetting."""
    lines = []
    for place, (name, nll) in enumerate({"none": 5.0, **NLL}.items()):
        method, _, rank = name.partition(" r=")
        r = int(rank.split()[0]) if rank else 300
        for seed in SEEDS if name != "none" else [0]:
            run_dir = put(folder, f"{name.replace(' ', '-')}-s{seed}", method=method, r=r,
                          seed=seed, nll=nll, parts=1e-3, also=(2.0, 2.0 + place / 10))  # fmt: skip
            for path in run_dir.glob("documents-more*"):  # its name here
                path.rename(path.with_name(path.name.replace("more", findings.OLD_TEXT)))
            record = json.loads((run_dir / "result.json").read_text())
            record["quality"]["also"] = {findings.OLD_TEXT: record["quality"]["also"]["more"]}
            fields = {"modules_to_save": ["lm_head"]} if "+" in name else {}
            record["config"]["method"] |= {"fields": fields}
            (run_dir / "result.json").write_text(json.dumps(record))
            if name != "full" or seed == 2:  # compressed for two of the three seeds
                continue
            count = np.arange(12)
            points = [
                pd.DataFrame({"rank": rank, "beside": beside, "text": text, "num_tokens": 10,
                              "id": [f"d{i}" for i in count],
                              "nll_nats": 10 * (3 + lost + (beside == "without")) + count / 50})
                for rank, lost in (("1", 0.7), ("64", 0.04), ("full", 0.0))
                for beside in ("with", "without") for text in ("validation", "test")
            ]  # fmt: skip
            pd.concat(points).to_parquet(run_dir / compression.COMPRESSED)
    for row in rows(folder):
        if (name := findings.label(row)) == "none":
            continue
        forgot = list(NLL).index(name)
        lines.append((row.name, anatomy.ALL, "intruders", 5.0 - forgot / 10, 4.0, 6.0, 3))
    (folder / anatomy.FOLDER).mkdir()
    columns = ["name", "of", "quantity", "mean", "low", "high", "count"]
    pd.DataFrame(lines, columns=columns).to_csv(folder / findings.SUMMARY, index=False)


def test_an_anatomys_gaps_ranks_and_correlation_are_those_that_were_planted(
    tmp_path, monkeypatch, capsys
):
    runs, out = tmp_path / "runs", tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(findings, "HERE", out)
    anatomy_runs(runs)
    assert recording.evaluate([str(runs)], "", findings.judge) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    gaps = {line["what"]: float(line["nats"]) for line in table(out / "gaps.csv")}
    for said, nats in {
        "all that stays frozen, at full rank": 0.3, "of these the embeddings": 0.25,
        "of these positions, norms and biases": 0.05, "LoRA r=1's gap": 1.0,
        "what training the embeddings gives LoRA r=1": 0.5,
        "what is left of r=1's gap with them": 0.5,
        "what is left of r=64's gap with them": -0.1, "r=8's rank, where embeddings train": 0.05,
    }.items():  # fmt: skip
        assert gaps[said] == pytest.approx(nats, abs=0.005), said
    for r, percent in ((1, 50), (8, 17), (64, -25)):
        assert f"left of LoRA r={r}'s gap where embeddings train: {percent} % (" in shown
    cut = {(line["rank"], line["beside"]): float(line["nats"]) for line in table(out / "ranks.csv")}
    assert cut == {
        ("1", "with"): pytest.approx(0.7), ("64", "with"): pytest.approx(0.04),
        ("1", "without"): pytest.approx(1.7), ("64", "without"): pytest.approx(1.04),
        ("full", "without"): pytest.approx(1.0),
    }  # fmt: skip
    assert "correlation of the two over 10 configurations: -1.00, p = 0.0002" in shown
    assert (out / "anatomy.csv").read_bytes() == (runs / findings.SUMMARY).read_bytes()


def test_an_anatomy_without_its_compression_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(findings, "HERE", tmp_path)
    anatomy_runs(tmp_path / "runs")
    for path in (tmp_path / "runs").rglob(compression.COMPRESSED):
        path.unlink()
    assert recording.evaluate([str(tmp_path / "runs")], "", findings.judge) == 2
    assert "full all k=300: no run has compress.parquet" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


# ------------------------------------------------------------------------- interpolations


def test_along_lambda_every_text_is_compared_with_the_run_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interpolations, "HERE", tmp_path)
    runs = tmp_path / "runs"
    truth = {0.0: (4.0, 2.0), 0.5: (3.2, 2.3), 1.0: (3.0, 3.0)}  # nats of the new and the old text
    count = np.arange(12)
    for r in (1, 8):
        for seed in SEEDS:
            run_dir = put(runs, f"r{r}-s{seed}", r=r, seed=seed)
            if r == 8:  # of this one alone
                points = [
                    pd.DataFrame({"scale": scale, "kinds": "all", "text": text, "num_tokens": 10,
                                  "id": [f"d{i}" for i in count],
                                  "nll_nats": 10 * nats + count / 50 + seed / 100})
                    for scale, both in truth.items()
                    for text, nats in zip(interpolations.TEXTS, both, strict=True)
                ]  # fmt: skip
                pd.concat(points).to_parquet(run_dir / compression.INTERPOLATED)
    assert recording.evaluate([str(runs)], "", interpolations.judge) == 0, capsys.readouterr().err
    found = {(float(line["scale"]), line["text"]): line
             for line in table(tmp_path / "interpolations.csv")}  # fmt: skip
    assert len(found) == 6
    for scale, both in truth.items():
        for text, nats, own in zip(interpolations.TEXTS, both, truth[1.0], strict=True):
            line = found[scale, text]
            shift = np.mean(count / 50) / 10 + 0.001  # the documents' and the seeds' own
            assert float(line["perplexity"]) == pytest.approx(np.exp(nats + shift), rel=1e-6)
            if scale == 1:
                assert not line["nats"]
            else:
                assert float(line["nats"]) == pytest.approx(nats - own)
    assert "no run has" not in capsys.readouterr().err
