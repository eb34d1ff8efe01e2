"""Tables and their statistics against numpy, scipy and closed forms, on runs written here."""

import csv
import html
import io
import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import synthetic_runs
from scipy import stats as scipy_stats
from synthetic_runs import DOCUMENTS, edit, one, put, ratio

from harness.config.paths import REPOSITORY
from harness.report import choices, columns, evidence, missing, ranking, summary, table, views
from harness.report.__main__ import main
from harness.results import run_record
from harness.system import lock


def cells(shown, first):
    return [line.split() for line in shown.splitlines() if line.startswith(f" {first}")]


def test_the_table_has_a_row_per_configuration_and_means_over_seeds(tmp_path, capsys):
    runs = [put(tmp_path, f"b8-s{seed}", seed=seed, nll=3 + seed / 10) for seed in range(2)]
    put(tmp_path, "a64", r=64, nll=2.5)
    put(tmp_path, "z-full", method="full", r=1, nll=2.0)
    put(tmp_path, "dead", status="failed")
    summary.show(tmp_path)
    shown = capsys.readouterr().out
    lines = cells(shown, "full") + cells(shown, "lora")
    assert [line[2] for line in lines] == ["1", "8", "64"]
    mean = math.exp(sum(map(ratio, runs)) / 2)
    assert lines[1][-4] == f"{mean:.2f}" and [line[-1] for line in lines] == ["1", "2", "1"]
    assert "failed: dead" in shown
    assert f"learning curves: harness report {tmp_path}" in shown
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert float(rows[1]["quality.test.perplexity"]) == pytest.approx(mean)
    assert rows[1]["runs"] == "b8-s0 b8-s1" and rows[1]["seeds"] == "2"
    drawn = [line for line in shown.splitlines() if line.startswith(" ")]
    assert drawn and all(len(line) <= 125 for line in drawn)


def test_only_the_runs_asked_for_are_shown_and_all_are_saved(tmp_path, capsys):
    put(tmp_path, "one", r=1)
    put(tmp_path, "two", r=2)
    summary.show(tmp_path, [tmp_path / "two"])
    assert len(cells(capsys.readouterr().out, "lora")) == 1
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


def test_the_report_of_nothing_says_so(tmp_path, capsys):
    (tmp_path / "main").mkdir()
    assert main([str(tmp_path / "mian")]) == 2
    assert "did you mean 'main'" in capsys.readouterr().err
    assert main([]) == 2
    assert main([str(tmp_path / "main")]) == 0
    assert "no finished run" in capsys.readouterr().out


def test_one_seed_is_warned_of_in_the_table_and_untrained_models_need_none(tmp_path, capsys):
    put(tmp_path, "none", method="none", r=1)
    assert main([str(tmp_path)]) == 0
    assert "ONE SEED" not in capsys.readouterr().out
    put(tmp_path, "one", r=8, nll=2.5)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ONE SEED: intervals and places are over documents alone" in shown
    assert "over 40 documents;" in shown
    for seed in range(1, 3):
        put(tmp_path, f"s{seed}", r=8, nll=2.5, seed=seed)
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "ONE SEED" not in shown and "over 40 documents and 3 seeds" in shown
    assert "3 seeds: intervals cover" in shown
    for seed in range(3, 5):
        put(tmp_path, f"s{seed}", r=8, nll=2.5, seed=seed)
    main([str(tmp_path)])
    assert "seeds: intervals cover" not in capsys.readouterr().out


def test_differences_are_those_of_the_runs_and_their_tests_those_of_scipy(tmp_path, capsys):
    for seed in range(5):  # documents alike in all, so that seeds alone count
        put(tmp_path, f"a{seed}", r=1, seed=seed, nll=3 + 0.01 * seed**2, parts=0)
        put(tmp_path, f"b{seed}", r=2, seed=seed, nll=2.99 + 0.02 * seed, parts=0)
    summary.tell(evidence.find(tmp_path), full=True)
    (line,) = csv.DictReader((tmp_path / "comparisons.csv").open())
    a, b = ([ratio(tmp_path / f"{x}{seed}") for seed in range(5)] for x in "ab")
    assert (line["text"], line["a"], line["b"]) == ("test", "lora all r=1", "lora all r=2")
    assert float(line["difference_nats_per_token"]) == pytest.approx(np.mean(a) - np.mean(b))
    oracle = scipy_stats.ttest_rel(a, b)
    assert float(line["p"]) == pytest.approx(oracle.pvalue, rel=1e-6)
    shown = capsys.readouterr().out
    assert "not told apart: lora all r=1 and lora all r=2" in shown
    assert cells(shown, "lora all r=")[-1]  # and every table has been drawn


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluation": {"context_length": 128}}, "context_length is 256 and 128"),
        ({"evaluation": {"stride": 64}}, "stride is 256 and 64"),
        ({"evaluation": {"tokenizer": "other"}}, "tokenizer is abc and other"),
    ],
)
def test_seeds_of_one_row_that_were_not_evaluated_alike_are_refused(tmp_path, capsys, change, said):
    put(tmp_path, "one", r=8)
    put(tmp_path, "two", r=8, seed=1, **change)
    assert main([str(tmp_path)]) == 2
    shown = one_line(capsys)
    assert "No intervals, places or comparisons on test:" in shown and said in shown
    assert "95 %:" not in shown and not (tmp_path / "comparisons.csv").exists()
    assert shown.count("lora all 8") == 1  # what was measured is still shown


def test_other_documents_or_a_missing_or_changed_file_are_told_of(tmp_path, capsys):
    put(tmp_path, "one", r=8)
    two = put(tmp_path, "two", r=16) / "documents-test.parquet"
    frame = pd.read_parquet(two)
    frame.assign(id=[f"x{i}" for i in range(DOCUMENTS)]).to_parquet(two)
    assert main([str(tmp_path)]) == 0
    assert "(other documents, such as doc0)" in one_line(capsys)
    frame.assign(nll_nats=frame.nll_nats * 0.9).to_parquet(two)
    assert main([str(tmp_path)]) == 2
    assert re.search(r"two/documents-test.parquet sums to .* result.json says", one_line(capsys))
    two.write_bytes(b"PAR1")
    assert main([str(tmp_path)]) == 2
    two.unlink()
    assert main([str(tmp_path)]) == 2
    assert "two/documents-test.parquet cannot be read" in one_line(capsys)


def one_line(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_what_is_not_in_the_table_is_told_of_with_its_reason(tmp_path, capsys):
    put(tmp_path, "fine")
    put(tmp_path, "left", r=1, status="failed")
    put(tmp_path, "again", r=2, status="failed")
    put(tmp_path, "cut", r=3, status="interrupted")
    put(tmp_path, "new", r=3, status="interrupted")
    put(tmp_path, "gone", r=4, status="running", train={"steps": 80})
    at_work = put(tmp_path, "at-work", r=5, status="running")
    for name, failure in (
        ("left", {"class": "oom", "message": "no room\nat all"}),
        ("again", {"class": "killed", "message": "the worker was killed"}),
    ):
        run_record.write(tmp_path / name, run_record.read(tmp_path / name) | {"failure": failure})
    (tmp_path / "cut" / "checkpoints" / "6").mkdir(parents=True)
    put(tmp_path, "broken")
    (tmp_path / "broken" / "result.json").write_text("{")
    no_test = run_record.read(put(tmp_path, "no-test", r=6))
    del no_test["quality"]["test"]
    run_record.write(tmp_path / "no-test", no_test)
    planned = {"fine": "", "left": "", "other": "holds another", "to-come": ""}
    run_record.write_sweep(tmp_path, planned)
    claim = lock.claim(at_work)
    found = {run.name: (run.status, str(run)) for run in missing.find(evidence.find(tmp_path))}
    claim.release()
    assert found == {
        "left": ("failed", "oom: no room; a sweep leaves it as it is until retry=1"),
        "again": ("failed", "killed: the worker was killed; the same command tries it again"),
        "cut": ("interrupted", "at step 6; the same command goes on with it"),
        "new": ("interrupted", "at step 6; the same command tries it again"),
        "gone": (
            "interrupted", "its process went at step 6 of 80; the same command tries it again",
        ),
        "at-work": ("running", "at step 6"),
        "broken": (
            "unreadable", "there is no result.json that can be read; rerun=true replaces it",
        ),
        "no-test": ("not compared", "it was not evaluated on the test set"),
        "other": ("refused", "holds another"),
        "to-come": ("waiting", "the sweep has not come to it; the same command does"),
    }  # fmt: skip
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    page = (tmp_path / "report" / "index.html").read_text()
    for name, (status, reason) in found.items():
        if name != "at-work":  # which nobody is at any more
            assert f"{status}: {name} ({reason})" in shown and html.escape(reason) in page


def test_only_untrained_models_have_neither_fronts_nor_budgets(tmp_path, capsys):
    put(tmp_path, "none", method="none", r=1, nll=4.0)
    put(tmp_path, "k8", method="truncate", r=8, nll=4.5)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Pareto" not in shown and "within a budget" not in shown
    assert "place: those" in shown


def written(run_dir, seconds):
    """Let the result have been written so many seconds after 2001."""
    os.utime(run_dir / "result.json", (10**9 + seconds,) * 2)
    return run_dir


def test_the_same_seed_twice_is_named_left_out_and_takes_nothing_from_others(tmp_path, capsys):
    written(put(tmp_path, "b-first"), 0)
    written(put(tmp_path, "a-again"), 5)
    written(put(tmp_path, "c-moved", nll=3.5), 9)
    put(tmp_path, "other", r=4, nll=3.3)
    rows = table.rows(tmp_path)
    assert [[d.name for d in row.run_dirs] for row in rows] == [["other"], ["b-first"]]
    assert [row.values["seeds"] for row in rows] == [1, 1]
    found = {run.name: (run.status, run.reason) for run in missing.find(evidence.find(tmp_path))}
    same = "the same configuration and seed as b-first, which finished first and is in the table; "
    assert found["a-again"] == ("repeated", same + "their numbers are the same")
    here, there = (f"{math.exp(ratio(tmp_path / name)):.6g}" for name in ("c-moved", "b-first"))
    differ = f"their numbers differ: test perplexity {here} here, {there} there"
    assert found["c-moved"] == ("repeated", same + differ) and len(found) == 2
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"repeated: a-again ({same}their numbers are the same)" in shown
    assert "no intervals" not in shown and "place: those" in shown
    assert "b-first, which finished first" in (tmp_path / "report" / "index.html").read_text()
    summary.show(tmp_path, [tmp_path / "a-again"])  # by itself it repeats nothing
    shown = capsys.readouterr().out
    assert len(cells(shown, "lora")) == 1 and "repeated" not in shown
    written(tmp_path / "a-again", -5)  # who finished first is kept, whatever it is called
    assert [d.name for d in table.rows(tmp_path)[1].run_dirs] == ["a-again"]


def read(configuration, text):
    def change(record):
        record["run"] |= {"configuration": configuration, "contents": {"data": f"sha256:{text}"}}

    return change


def test_runs_on_other_text_are_other_rows_with_a_name_of_their_own(tmp_path):
    data = {"source": "text_files", "path": "notes.jsonl"}
    for seed, name, text in ((0, "a", "111111aa"), (1, "b", "222222bb"), (2, "c", "111111aa")):
        run_dir = put(tmp_path, name, seed=seed, data=data)
        edit(run_dir, read(f"configuration of {text}", text))
    rows = {row.name: [d.name for d in row.run_dirs] for row in table.rows(tmp_path)}
    assert rows == {
        "lora all r=8 text=111111": ["a", "c"], "lora all r=8 text=222222": ["b"],
    }  # fmt: skip
    also = {row.values["also"] for row in table.rows(tmp_path)}
    assert also == {"text=111111", "text=222222"}
    assert len(evidence.find(tmp_path).found["test"].intervals) == 2


def test_one_text_by_two_spellings_of_its_path_is_one_row(tmp_path):
    for seed, path in enumerate(("notes.jsonl", "./notes.jsonl")):
        data = {"source": "text_files", "path": path}
        edit(put(tmp_path, f"s{seed}", seed=seed, data=data), read("one", "1234567"))
    assert [row.values["seeds"] for row in table.rows(tmp_path)] == [2]


def test_records_without_a_digest_are_told_apart_by_what_they_counted(tmp_path):
    for seed, blocks in ((0, 100), (1, 100), (2, 90)):
        counts = {"num_documents": {"train": 32, "test": 4}, "num_blocks": blocks}
        edit(put(tmp_path, f"s{seed}", seed=seed), lambda r, c=counts: r["data"].update(c))
    rows = {row.values["also"]: row.values["seeds"] for row in table.rows(tmp_path)}
    assert rows == {"data.blocks=100": 2, "data.blocks=90": 1}


def test_a_seed_that_diverged_is_named_and_no_interval_is_printed(tmp_path, capsys):
    for seed in range(3):
        put(tmp_path, f"a{seed}", r=1, seed=seed, nll=3 + 2 * (seed == 1))
        run_dir = put(tmp_path, f"b{seed}", r=2, seed=seed, nll=2.9)
        put(tmp_path, f"c{seed}", r=4, seed=seed, nll=2.8)
    edit(run_dir, lambda r: r["quality"]["validation"].update(perplexity=None))  # never below 100
    found = evidence.find(tmp_path).found["test"].intervals
    assert {name: i.missing for name, i in found.items()} == {
        "lora all r=1": "seed 1 of 3 diverged", "lora all r=2": "seed 2 of 3 diverged",
        "lora all r=4": None,
    }  # fmt: skip
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in cells(shown, "lora") if line[0] == "lora" and line[1] == "all"]
    assert [line[-3] for line in lines[:2]] == ["-", "-"] and "-" in lines[2][-3][1:]
    assert "No interval: lora all r=1 (seed 1 of 3 diverged), lora all r=2" in one(shown)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "(seed 1 of 3 diverged)" in page and not re.search(r"\bnan\b", page.split("<script")[0])
    by_rank = {row["method.rank"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert by_rank["1"]["quality.test.perplexity_low"] == ""
    assert by_rank["1"]["quality.test.no_interval"] == "seed 1 of 3 diverged"
    whole = by_rank["4"]
    assert whole["quality.test.no_interval"] == "" != whole["quality.test.perplexity_low"]


def test_what_intervals_are_for_is_said(tmp_path, capsys, monkeypatch):
    for seed in range(3):
        put(tmp_path, f"a{seed}", seed=seed)
    main([str(tmp_path)])
    shown = one(capsys.readouterr().out)
    assert (
        "If none of 3 seeds diverged, as many as 63.2 % of all seeds may still do so."
        in " ".join(shown.split())
    )
    assert "documents count as" not in shown
    monkeypatch.setattr(synthetic_runs, "TOKENS", np.array([5000] + [50] * (DOCUMENTS - 1)))
    put(tmp_path / "long", "a")
    main([str(tmp_path / "long")])
    shown = one(capsys.readouterr().out)
    count = 6950**2 / (5000**2 + 39 * 50**2)
    assert f"The 40 documents differ in length, and count as {count:.3g} of equal length" in shown


def test_seconds_are_shorter_only_beyond_their_spread_over_runs(tmp_path, capsys):
    seconds = {1: (10, 20, 30), 2: (21, 22, 23), 4: (25, 26, 27), 8: (90, 91, 92)}
    for r, values in seconds.items():
        for seed, value in enumerate(values):
            run_dir = put(tmp_path, f"{r}-{seed}", r=r, seed=seed, nll=2 + r / 10)
            edit(run_dir, lambda x, v=value: x["speed"].update(train_seconds=float(v)))
    rows = table.rows(tmp_path)
    front = evidence.fronts(rows, evidence.gather(rows))["training time"]
    names = {r: f"lora all r={r}" for r in seconds}
    assert front[names[2]] == ()  # r=1 is better and took 18 s on average, or 30
    assert front[names[4]] == (names[2],) and set(front[names[8]]) == set(front) - {names[8]}
    for a, b in ((1, 2), (2, 4), (4, 8), (1, 8)):
        test = scipy_stats.ttest_ind(np.log(seconds[a]), np.log(seconds[b]), equal_var=False)
        less = test.pvalue < 0.05 and test.statistic < 0
        assert ranking.is_less(seconds[a], seconds[b]) == less
    put(tmp_path, "single", r=16, nll=1.5)
    for seed in range(2):
        put(tmp_path, f"beside{seed}", r=32, seed=seed, nll=1.4, beside=1)
    rows = table.rows(tmp_path)
    assert set(evidence.fronts(rows, evidence.gather(rows))["training time"]) == set(names.values())
    assert main([str(tmp_path)]) == 0
    said = "without lora all r=16, lora all r=32: one run, or a shared machine"
    assert said in one(capsys.readouterr().out)
    assert said in (tmp_path / "report" / "index.html").read_text()


def test_steps_to_a_level_are_as_well_known_as_validation_was_read():
    """Curves of known truth, read every 10 steps: the interval over seeds covers 95 % or more."""
    rng = np.random.default_rng(0)
    for seeds, spread in ((1, 0.0), (3, 0.5), (3, 3.0), (3, 12.0), (5, 3.0)):
        covers = 0
        for _ in range(300):
            true = rng.uniform(12, 60)  # steps to the level, on average over seeds
            own = np.maximum(1, true + spread * rng.standard_normal(seeds))
            steps = np.arange(0, 151, 10)
            nll = np.log(1 + own[:, None]) - np.log(1 + steps)  # not a line between readings
            curve = views.Curve("", steps, steps, np.zeros((seeds, 16)), nll)
            found = curve.brackets(0.0)
            assert all(b.above < x <= b.reached for b, x in zip(found, own, strict=True))
            low, high = views.steps_interval(found)
            covers += low <= true <= high
        assert covers >= scipy_stats.binom.ppf(0.001, 300, 0.95), (seeds, spread)


def test_rows_are_compared_over_the_seeds_that_both_have(tmp_path, capsys):
    for seed in range(5):
        put(tmp_path, f"a{seed}", r=1, seed=seed, nll=3 + 0.1 * seed, parts=1e-4)
        if seed < 4:
            put(tmp_path, f"b{seed}", r=2, seed=seed, nll=2.99 + 0.1 * seed, parts=1e-4)
    put(tmp_path, "c0", r=4, nll=2.5)
    (pair, *_) = [
        c for c in evidence.gather(table.rows(tmp_path)).comparisons if c.b == "lora all r=2"
    ]
    assert pair.difference == pytest.approx(0.01, abs=1e-3) and pair.better == "lora all r=2"
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "and 1 to 5 seeds" in shown and "Not all rows have the same seeds" in shown
    assert "ONE SEED of lora all r=4:" in shown
    lines = list(csv.DictReader((tmp_path / "comparisons.csv").open()))
    assert "one seed of lora all r=4" in lines[-1]["warning"]


def test_how_a_rate_was_found_makes_no_other_row_and_further_texts_do(tmp_path):
    put(tmp_path, "a", seed=0, train={"lr": 1, "lr_from": "tuned", "rates": "x"})
    put(tmp_path, "b", seed=1, train={"lr": 1, "lr_from": "as tuned for r=4", "rates": None})
    assert [row.values["seeds"] for row in table.rows(tmp_path)] == [2]
    more = {"more": {"source": "kjv"}}
    put(tmp_path, "c", seed=2, train={"lr": 1}, evaluate={"also": more}, also=(2.0, 2.1))
    put(tmp_path, "d", seed=3, train={"lr": 1}, evaluate={"also": {}}, launch={"since": 3})
    assert {row.values["also"] for row in table.rows(tmp_path)} == {
        "", "evaluate.also=more", "evaluate.also=None",
    }  # fmt: skip


def test_where_texts_are_kept_and_what_is_written_make_no_other_row(tmp_path):
    put(tmp_path, "a", seed=0, save_merged=True, data={"name": "kjv", "cache_dir": None})
    put(tmp_path, "b", seed=1, save_merged=False, data={"name": "kjv", "cache_dir": "/elsewhere"})
    put(tmp_path, "c", seed=2, data={"name": "kjv", "cache_dir": ".cache"}, tracker="wandb")
    assert [row.values["seeds"] for row in table.rows(tmp_path)] == [3]


def test_the_speed_of_generation_is_in_the_csv_where_there_is_one(tmp_path):
    run_dir = put(tmp_path, "one", r=1)
    name = "quality.generation.tokens_per_second"
    assert name not in summary.results_csv(evidence.find(tmp_path))
    record = json.loads((run_dir / "result.json").read_text())
    record["quality"]["generation"] = {"bleu": 1.0, "tokens_per_second": 12.5}
    run_record.write(run_dir, record)
    (row,) = csv.DictReader(io.StringIO(summary.results_csv(evidence.find(tmp_path))))
    assert row[name] == "12.5"


def test_fields_that_only_one_method_has_and_how_runs_were_launched_tell_no_rows_apart(tmp_path):
    for name, fields in (("a", {"init": True, "r": 1}), ("b", {"which": "top", "r": 2})):
        run_dir = put(tmp_path, name, r=fields["r"], launch={"since": len(name) + fields["r"]})
        record = json.loads((run_dir / "result.json").read_text())
        record["config"]["method"] |= fields
        run_record.write(run_dir, record)
    assert [row.values["also"] for row in table.rows(tmp_path)] == ["", ""]


def test_the_csvs_hold_all_rows_and_never_what_is_no_longer_true(tmp_path, capsys):
    put(tmp_path, "one", r=1)
    put(tmp_path, "two", r=2)
    summary.show(tmp_path)
    put(tmp_path, "three", r=4)
    summary.show(tmp_path, [tmp_path / "three"])
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 3 and all(row["quality.test.perplexity_low"] for row in rows)
    assert len(list(csv.DictReader((tmp_path / "comparisons.csv").open()))) == 3
    put(tmp_path, "four", r=8, evaluation={"context_length": 64})
    summary.show(tmp_path, [tmp_path / "four"])
    assert len(list(csv.DictReader((tmp_path / "comparisons.csv").open()))) == 3
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [bool(row["quality.test.perplexity_low"]) for row in rows] == [True] * 3 + [False]


def test_a_further_text_that_cannot_be_compared_leaves_the_test_set_alone(tmp_path, capsys):
    for name in ("a", "b"):
        put(tmp_path, name, r=ord(name), also=(2.0, 2.1))
    frame = pd.read_parquet(tmp_path / "b" / "documents-more.parquet")
    frame.assign(id=frame.id + "x").to_parquet(tmp_path / "b" / "documents-more.parquet")
    assert main([str(tmp_path)]) == 0
    shown = one_line(capsys)
    assert "1 of 2 rows is not compared on more" in shown and "other documents" in shown
    assert "95 %" in shown and "not told apart" in shown


def test_what_has_overflowed_or_is_written_in_brackets_is_shown(tmp_path, capsys):
    put(tmp_path, "one", r=1, curve=(5.0, 900.0, 4.0))
    two = put(tmp_path, "two", r=2, method="lora [/b]", curve=(5.0, None, 4.0))
    record = json.loads((two / "result.json").read_text())
    record["quality"]["validation"]["perplexity"] = None
    run_record.write(two, record)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "lora [/b]" in shown and "inf" in shown


def test_every_number_stands_under_its_heading(tmp_path, capsys):
    put(tmp_path, "a", r=1, curve=(5.0, 4.0, 3.0))
    put(tmp_path, "b", r=2, curve=(5.0, 4.5, 4.0))
    main(["--wide", str(tmp_path)])
    shown = capsys.readouterr().out
    table_of = shown[shown.index("Validation perplexity at equal tokens") :].splitlines()
    headings = re.split(r"\s{2,}", table_of[2].strip())
    assert headings == [
        "configuration", "100 tokens", "200 tokens", "400 tokens", "0.5 s", "1 s", "2 s",
        "steps to 100", "steps to 50", "steps to 30",
    ]  # fmt: skip
    a, b = (re.split(r"\s{2,}", line.strip()) for line in table_of[4:6])
    e = [f"{math.exp(x):.2f}" for x in (4.5, 4.0, 3.0, 4.5, 4.0, 3.0)]
    assert a[:7] == ["lora all r=1", *e] and len(a) == len(headings)
    e = [f"{math.exp(x):.2f}" for x in (4.75, 4.5, 4.0, 4.875, 4.75, 4.5)]
    assert a[7:] == ["0-2", "2-4", "2-4"]  # between two readings: e^5 = 148, e^4 = 55, e^3 = 20
    assert b == ["lora all r=2", *e, "0-2", "-", "-"]  # e^4.5 = 90, e^4 = 55


def test_what_does_not_train_is_on_the_front_of_parameters_alone(tmp_path):
    put(tmp_path, "none", method="none", r=1, nll=4.0)
    put(tmp_path, "a", r=2, nll=3.0)
    rows = table.rows(tmp_path)
    front = evidence.fronts(rows, evidence.gather(rows))
    assert set(front["trainable parameters"]) == {row.name for row in rows}
    assert set(front["peak memory"]) == {"lora all r=2"}
    assert "training time" not in front  # how much the seconds of one run vary is not known


def test_names_take_what_tells_rows_apart(tmp_path):
    put(tmp_path, "a", r=8, alpha=16)
    put(tmp_path, "b", r=8, alpha=32)
    put(tmp_path, "c", r=4, alpha=8)
    put(tmp_path, "d", method="udv", r=4)
    put(tmp_path, "e", r=8, alpha=32, train={"clip": 3})
    put(tmp_path, "f", r=8, alpha=32, train={"clip": 4})
    assert sorted(row.name for row in table.rows(tmp_path)) == [
        "lora all r=4",
        "lora all r=8 alpha=16",
        "lora all r=8 alpha=32",
        "lora all r=8 alpha=32 clip=3",
        "lora all r=8 alpha=32 clip=4",
        "udv all k=4",
    ]


def test_fronts_and_budgets_count_what_is_significant(tmp_path):
    for seed in range(3):
        put(tmp_path, f"cheap{seed}", r=1, seed=seed, nll=3.0)
        put(tmp_path, f"same{seed}", r=2, seed=seed, nll=3.0)  # dearer, and not shown to be worse
        put(tmp_path, f"worse{seed}", r=4, seed=seed, nll=3.5)
        put(tmp_path, f"dear{seed}", r=8, seed=seed, nll=2.0)
    rows = table.rows(tmp_path)
    found = evidence.gather(rows)
    dominated = evidence.fronts(rows, found)
    assert set(dominated) == set(evidence.FRONTS)
    for front in dominated.values():
        names = {name.split("=")[1] for name, by in front.items() if not by}
        assert names == {"1", "2", "8"}
    costs = evidence.costs(rows, "trainable parameters")
    assert views.within(500, costs, found) is None
    best, ties = views.within(5000, costs, found)
    assert {best, *ties} == {"lora all r=1", "lora all r=2"}
    assert views.within(10_000, costs, found) == ("lora all r=8", [])
    assert found.ranks == {
        "lora all r=1": "2-3", "lora all r=2": "2-3", "lora all r=4": "4", "lora all r=8": "1"
    }  # fmt: skip
    worst = found.neighbours()[-1]
    assert worst.a == "lora all r=4" and worst.difference > 0 and worst.low < worst.high


def test_many_rows_are_compared_with_the_best_the_next_and_the_base(tmp_path, monkeypatch, capsys):
    for r in range(1, 7):
        put(tmp_path, f"r{r}", r=r, nll=3 - r / 10)
    put(tmp_path, "none", method="none", r=1, nll=4.0)
    monkeypatch.setattr(evidence, "EVERY_PAIR", 6)
    found = evidence.gather(table.rows(tmp_path))
    best = found.ordered[0]
    pairs = {frozenset((c.a, c.b)) for c in found.comparisons}
    assert len(pairs) == len(found.comparisons)
    assert {frozenset((best, name)) for name in found.ordered[1:]} <= pairs
    assert {
        frozenset(pair) for pair in zip(found.ordered, found.ordered[1:], strict=False)
    } <= pairs
    assert len(found.neighbours()) == 6 and not found.ranks
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "each is compared with the best" in shown and "Pareto" not in shown


def test_budgets_are_round_and_pairs_of_equal_cost_are_found(tmp_path):
    assert views.budgets([0, 4096, 4000, 131_072, 10_000]) == [5000, 10_000, 150_000]
    assert views.budgets([29 * 2**20, 97 * 2**20], 2**20) == [30 * 2**20, 100 * 2**20]
    for r, alpha in ((10, 1), (10, 2), (20, 1)):
        put(tmp_path, f"{r}-{alpha}", r=r, alpha=alpha)
    rows = table.rows(tmp_path)
    costs = evidence.costs(rows, "trainable parameters")
    (pair,) = views.matched(costs, evidence.gather(rows).comparisons)
    assert {pair.a, pair.b} == {"lora all r=10 alpha=1", "lora all r=10 alpha=2"}


def test_curves_are_read_at_equal_tokens_and_seconds(tmp_path):
    for seed, end in ((0, 3.0), (1, 3.2)):
        put(tmp_path, f"s{seed}", r=2, seed=seed, curve=(5.0, 4.0, end))
    (row,) = table.rows(tmp_path)
    found = views.curve(row)
    assert found.steps.tolist() == [0, 2, 4] and found.tokens.tolist() == [0, 200, 400]
    assert found.seconds.tolist() == [[0, 2, 4]] * 2  # a second a step
    assert found.at("tokens", 100) == pytest.approx((4.5, 0))
    value, half = found.at("seconds", 3)
    assert value == pytest.approx((3.5 + 3.6) / 2)
    interval = scipy_stats.t.interval(0.95, 1, value, scipy_stats.sem([3.5, 3.6]))
    assert half == pytest.approx(interval[1] - value)
    assert found.at("seconds", 4.5) is None
    assert found.brackets(4.5) == [views.Bracket(0, 1, 2, 4)] * 2
    assert found.brackets(5.5) == [views.Bracket(0, 0, 0, 4)] * 2
    first, second = found.brackets(3.1)
    assert (first.above, first.reached, second) == (2, 4, None)
    assert first.interpolated == pytest.approx(3.8)
    late = [views.Bracket(2, 3, 4, 4), views.Bracket(0, 1, 2, 4)]  # wide, as seeds differ
    assert views.steps_interval(late) == (0.0, 4.0)
    known = [views.Bracket(30, 33, 40), views.Bracket(30, 37, 40), views.Bracket(20, 29, 30)]
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem([33, 37, 29])
    assert views.steps_interval(known) == pytest.approx((80 / 3 - half, 110 / 3 + half))
    assert views.equal([found], "tokens") == [100, 200, 400]
    assert views.levels([found]) == [100, 50, 30]  # between e^5 = 148 and e^3.1 = 22


def test_forgetting_is_since_the_base_model_or_else_since_the_first_step(tmp_path, capsys):
    for seed in range(5):
        put(tmp_path, f"a{seed}", r=1, seed=seed, also=(2.0, 2.0 + 0.01 * seed), parts=0)
        put(tmp_path, f"b{seed}", r=2, seed=seed, also=(2.5, 3.0), parts=0)
    rows = table.rows(tmp_path)
    on = evidence.gather(rows, "more")
    moved, since = evidence.forgetting(rows, on)
    assert since == "before the first step"
    assert moved["lora all r=1"].difference == pytest.approx(0.02)
    assert moved["lora all r=2"].difference == pytest.approx(0.5)
    a = [ratio(tmp_path / f"a{seed}", "documents-more.parquet") for seed in range(5)]
    before = ratio(tmp_path / "a0", "documents-more-before.parquet")
    oracle = scipy_stats.ttest_1samp(a, before)
    assert moved["lora all r=1"].p == pytest.approx(oracle.pvalue, rel=1e-6)

    put(tmp_path, "none", method="none", r=1, also=(2.0, 2.0), parts=0)
    rows = table.rows(tmp_path)
    on = evidence.gather(rows, "more")
    moved, since = evidence.forgetting(rows, on)
    assert "base model (none" in since
    assert moved["lora all r=2"].difference == pytest.approx(1.0)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Forgetting: perplexity on more (40 documents)" in shown
    lines = list(csv.DictReader((tmp_path / "comparisons.csv").open()))
    assert [line["text"] for line in lines] == ["test"] * 3 + ["more"] * 3


def test_what_was_measured_beside_other_runs_is_marked(tmp_path, capsys):
    put(tmp_path, "alone", r=1)
    put(tmp_path, "beside", r=2, beside=1)
    main(["--wide", str(tmp_path)])
    shown = capsys.readouterr().out
    alone, beside = cells(shown, "lora")[:2]
    assert "3*" in beside and "1,234*" in beside and not any("*" in cell for cell in alone)
    assert "trainable parameters: lora all r=1" in shown
    assert "peak memory: lora all r=1\n" in shown  # what is not for comparison is on no front


@pytest.mark.parametrize(
    ("lr_from", "marked"),
    [
        ("default: width 768, alpha 16", True),
        ("default: half of the rate tuned on kjv", True),
        ("as tuned for r=4", True),
        ("interpolated between r=8 and r=64, for train.steps=80", True),
        ("tuned", False),
        ("tuned, for train.steps=80", False),
        ("set", False),
        (None, False),
    ],
)
def test_a_rate_that_was_not_found_for_the_row_is_marked(tmp_path, capsys, lr_from, marked):
    run_dir = put(tmp_path, "one")
    record = json.loads((run_dir / "result.json").read_text())
    record["method"]["lr_from"] = lr_from
    run_record.write(run_dir, record)
    summary.show(tmp_path)
    shown = capsys.readouterr().out
    assert ("~0.01" in cells(shown, "lora")[0]) == ("~: this learning rate" in shown) == marked


def test_the_readme_recomputes_a_number_of_the_table(tmp_path, capsys, monkeypatch):
    readme = (REPOSITORY / "README.md").read_text()
    [block] = re.findall(r"Five\s+lines\s+of\s+pandas[^\n]*\n\n((?:    .*\n)+)", readme)
    lines = [line[4:] for line in block.splitlines()]
    assert len(lines) <= 5
    folder = tmp_path / "outputs" / "main_seeds"
    for seed in range(3):
        run_dir = put(folder, f"mlp{seed}", r=8, seed=seed, nll=2 + seed / 10)
        record = json.loads((run_dir / "result.json").read_text())
        record["method"]["targets"] = "mlp"
        run_record.write(run_dir, record)
    put(folder, "other", r=4)
    summary.show(folder)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {})
    recomputed, said = map(float, capsys.readouterr().out.split())
    expected = math.exp(np.mean([ratio(folder / f"mlp{seed}") for seed in range(3)]))
    assert recomputed == pytest.approx(expected) and said == pytest.approx(expected)


def test_watching_writes_the_page_until_no_run_is_under_way(tmp_path, monkeypatch, capsys):
    from harness.report import __main__ as command

    put(tmp_path, "one", r=1)
    page = tmp_path / "report" / "index.html"
    seen = []

    def is_claimed(run_dir):  # asked after every look; a second run ends between the looks
        seen.append(page.read_text())
        if len(seen) == 1:
            put(tmp_path, "two", r=2)
        return len(seen) < 2

    monkeypatch.setattr(command.lock, "is_claimed", is_claimed)
    monkeypatch.setattr(command, "PERIOD_SECONDS", 1)
    assert main(["--watch", str(tmp_path)]) == 0
    assert 'http-equiv="refresh"' in seen[0] and "two/" not in seen[0] and "two/" in seen[1]
    assert 'http-equiv="refresh"' not in page.read_text()  # the last one stands still
    assert "watching:" in capsys.readouterr().out


def test_two_seeds_recommend_nothing_but_the_best(tmp_path):
    """With three the second row is as good; with two nothing can be said to be."""
    for number in (2, 3):
        folder = tmp_path / str(number)
        for seed in range(number):
            put(folder, f"a-s{seed}", r=8, seed=seed, nll=3.0, parts=0.5)
            put(folder, f"b-s{seed}", r=4, seed=seed, nll=3.01, parts=0.5)
        test = evidence.find(folder).found["test"]
        best, second = test.ordered
        assert all(c.better is None for c in test.comparisons)  # not told apart in either
        assert choices.ties_best(best, test)
        assert choices.ties_best(second, test) == (number == 3)


@pytest.mark.parametrize("width", [50, 200])
def test_only_columns_that_are_shown_are_explained(tmp_path, monkeypatch, capsys, width):
    for r in (1, 8):
        put(tmp_path, f"r{r}", r=r, nll=3.0 - r / 100)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    _, _, left = text.partition("not shown: ")
    left_out = left.partition(" ONE SEED")[0].split(", ")
    explained = {name for name, what in columns.LEGEND.items() if f"{name}: {what}" in text}
    assert explained == columns.LEGEND.keys() - set(left_out) and "test" in explained
    assert (explained != columns.LEGEND.keys()) == (width == 50)


@pytest.mark.parametrize(("held_out", "compared"), [(None, True), ("docstrings", False)])
def test_a_mixture_is_compared_with_the_text_whose_documents_it_is_evaluated_on(
    tmp_path, held_out, compared
):
    parts = {"kjv": {"weight": 9}, "docstrings": {"weight": 1}}
    for seed in range(3):
        put(tmp_path, f"alone-s{seed}", seed=seed, nll=3.0, data={"parts": None})
        mixture = {"parts": parts, "held_out_part": held_out}
        run_dir = put(tmp_path, f"mix-s{seed}", seed=seed, nll=3.1, data=mixture)
        record = run_record.read(run_dir)
        record["data"]["name"] = "kjv 9 + docstrings 1"
        run_record.write(run_dir, record)
    findings = evidence.find(tmp_path)
    assert len(findings.rows) == 2
    assert bool(findings.found.get("test") and findings.found["test"].comparisons) == compared
    assert bool(findings.found["test"].apart) != compared
