"""What a report says first, and how: its setting, answer, choices, columns and fronts."""

import csv
import html
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_runs import edit, one, put, ratio

from harness.config.paths import REPOSITORY
from harness.report import answer, choices, evidence, figures, files, setting, summary, table
from harness.report.__main__ import main
from harness.results import run_record
from harness.runs import grids as harness_grids
from harness.runs import hydra_task


def sweep_over(folder, **sections):
    """Four rows that differ in warm-up and in the share of the text, of two seeds each."""
    for warmup in (0.0, 0.1):
        for share in (0.25, 1.0):
            for seed in range(2):
                train = {"warmup": warmup, "steps": 4, "batch_tokens": 512}
                put(
                    folder, f"w{warmup}-t{share}-s{seed}", seed=seed, nll=3 + warmup - share / 9,
                    train=train, data={"name": "kjv", "train_share": share}, **sections,
                )  # fmt: skip
    return folder


def test_settings_in_which_rows_differ_are_columns_of_every_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "figures", lambda *_: [])  # drawing takes long
    folder = sweep_over(tmp_path / "scratch")
    assert main([str(folder)]) == 0
    shown, report = capsys.readouterr().out, folder / "report"
    wanted = {("0.25", "0"), ("1", "0"), ("0.25", "0.1"), ("1", "0.1")}
    table_of = [line.split() for line in shown[shown.index(" method") :].splitlines()[:6]]
    columns = [table_of[0].index(name) - 1 for name in ("train_share", "warmup")]  # "r, k" is two
    assert {tuple(line[i] for i in columns) for line in table_of[2:]} == wanted
    tables = {
        "md": [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in (report / "table.md").read_text().splitlines()
            if line.startswith("|")
        ],
        "tex": [
            [
                re.sub(r"\\textbf\{(.*)\}", r"\1", cell.strip().rstrip("\\ ")).replace("\\", "")
                for cell in line.split("&")
            ]
            for line in (report / "table.tex").read_text().splitlines()
            if "&" in line
        ],
        "csv": list(csv.reader((folder / "results.csv").open())),
        "html": html_table((report / "index.html").read_text()),
    }
    for kind, lines in tables.items():
        names = {"csv": ["config.data.train_share", "config.train.warmup"]}.get(
            kind, ["train_share", "warmup"]
        )
        found = [name.replace("\\_", "_") for name in lines[0]]
        places = [found.index(name) for name in names]
        rows = {
            tuple(f"{float(line[i]):g}" for i in places) for line in lines if is_row(line, places)
        }
        assert rows == wanted, kind
    assert {row.name for row in table.rows(folder)} == {
        f"lora all r=8 train_share={share} warmup={warmup}" for share, warmup in wanted
    }


def is_row(line, places):
    return all(re.fullmatch(r"[\d.]+", line[i]) for i in places)


def html_table(page):
    part = page[
        page.index('<table id="results">') : page.index("</table>", page.index('id="results"'))
    ]
    rows = re.split(r"<tr", part)[1:]
    return [
        [
            re.sub(r"<[^>]*>", "", cell).strip()
            for cell in re.findall(r"<t[hd] .*?</t[hd]>", row, re.S)
        ]
        for row in rows
    ]


def test_the_setting_stands_under_every_title_with_the_command_as_typed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(files, "figures", lambda *_: [])
    folder = sweep_over(tmp_path / "scratch", model={"name": "gpt2_mini", "architecture": {}})
    typed = ["sweep", "train.warmup=0,0.1", "data.train_share=0.25,1", "data.path=a file"]
    monkeypatch.setattr("sys.argv", ["/venv/bin/harness", "-m", *typed[1:]])  # as Hydra reads it
    monkeypatch.setattr(hydra_task, "TYPED", typed)
    runs = [SimpleNamespace(run_dir=path) for path in folder.iterdir()]
    harness_grids._write_down(runs, {})
    for run_dir in folder.glob("w*"):
        edit(run_dir, lambda r: r.update(date="2026-11-25T10:00:00Z"))
    assert main([str(folder)]) == 0
    line = (
        "gpt2_mini on kjv · 4 steps x 512 tokens · context 256, documents after EOS · "
        "seeds 0, 1 · 2026-11-25 · "
        "harness sweep train.warmup=0,0.1 data.train_share=0.25,1 'data.path=a file'"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("scratch: ") and lines[2] == line
    assert (folder / "report" / "table.md").read_text().splitlines()[2] == line
    assert f"% {line}\n" in (folder / "report" / "table.tex").read_text()
    page = html.unescape((folder / "report" / "index.html").read_text())
    page = page[: page.index("Results")]
    assert all(fact in page for fact in line.split(" · "))


def test_a_sweep_ends_with_its_own_runs_and_the_folder_says_that_it_has_others(tmp_path, capsys):
    """Two sweeps without a name share a folder; nothing of one is in the report of the other."""
    for r in (1, 2):
        for seed in range(3):
            put(tmp_path, f"r{r}-s{seed}", r=r, seed=seed, nll=3 - r / 9, train={"steps": 4})
    for seed in range(3):  # r=1 once more, one seed more of r=2, and at other steps
        put(tmp_path, f"w{seed}", r=1, seed=seed, nll=2.5, train={"steps": 8})
    put(tmp_path, "w3", r=1, seed=3, status="failed")
    one = {f"r{r}-s{seed}": "" for r in (1, 2) for seed in range(2)}
    other = {f"w{seed}": "" for seed in range(4)}
    run_record.write_sweep(tmp_path, other, "harness sweep steps")
    assert main(["--last", str(tmp_path)]) == 0
    assert "lora all r=1" in capsys.readouterr().out
    run_record.write_sweep(tmp_path, one, "harness sweep ranks")
    summary.show(tmp_path, setting.last_sweep(tmp_path))
    own = capsys.readouterr().out
    found = evidence.find(tmp_path, setting.last_sweep(tmp_path))
    assert [row.name for row in found.rows] == ["lora all r=1", "lora all r=2"]
    assert [row.values["seeds"] for row in found.rows] == [2, 2] and not found.rows[0].settings
    assert len(found.found["test"].comparisons) == 1
    assert " · harness sweep ranks\n" in own and "sweep steps" not in own and "steps=8" not in own
    assert "failed" not in own and own.endswith(f"harness report --last {tmp_path}\n")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4  # all, as ever
    assert main(["--last", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Rows of" not in page and f"harness report --last {tmp_path}" in page
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    whole = capsys.readouterr().out
    said = f"Rows of 2 commands; of the last sweep alone: harness report --last {tmp_path}"
    assert said in " ".join(whole.split()) and "failed: w3" in whole
    page = (tmp_path / "report" / "index.html").read_text()
    assert said in page and "steps=8" in page


def test_a_folder_without_a_recorded_sweep_has_no_last_one(tmp_path, capsys):
    put(tmp_path, "one")
    assert main(["--last", str(tmp_path)]) == 2
    assert "no sweep into" in capsys.readouterr().err


def test_what_is_shown_is_what_was_typed(monkeypatch):
    monkeypatch.setattr(hydra_task, "TYPED", ["search", "method.r=1,8", "search.trials=3"])
    monkeypatch.setattr("sys.argv", ["/bin/harness", "-m", "hydra/sweeper=search"])
    assert hydra_task.typed() == "harness search method.r=1,8 search.trials=3"
    monkeypatch.setattr("sys.argv", ["/src/harness/__main__.py", "-m", "hydra/sweeper=search"])
    assert hydra_task.typed() == "python -m harness search method.r=1,8 search.trials=3"


def test_the_commands_of_several_sweeps_are_kept_and_an_old_record_is_read(tmp_path):
    runs = {f"r{r}": "" for r in (1, 2)}
    for name in (*runs, "r4"):
        put(tmp_path, name, r=int(name[1:]))
    old = {"hydra": {"overrides": {"hydra": ["hydra.mode=MULTIRUN"], "task": ["method.r=1,2"]}}}
    (tmp_path / "multirun.yaml").write_text(json.dumps(old))
    run_record.write_sweep(tmp_path, runs)
    edit(tmp_path / "r4", lambda r: r["run"].update(command="python -m harness method.r=4"))
    assert setting.find(tmp_path, table.rows(tmp_path)).commands == [
        "python -m harness -m method.r=1,2", "python -m harness method.r=4",
    ]  # fmt: skip
    for command in ("harness one", "harness two", "harness one"):
        run_record.write_sweep(tmp_path, {"r1": ""} if command == "harness one" else runs, command)
    assert [s["command"] for s in run_record.sweep_commands(tmp_path)] == [
        "harness two",
        "harness one",
    ]
    assert setting.find(tmp_path, table.rows(tmp_path)).commands == [
        "harness one", "harness two", "python -m harness method.r=4",
    ]  # fmt: skip
    assert run_record.read_sweep(tmp_path) == {"r1": ""}


def test_a_row_of_no_steps_does_not_look_like_a_trained_one(tmp_path, capsys):
    for seed in range(3):
        put(tmp_path, f"s{seed}", r=8, seed=seed, nll=2.5, train={"steps": 4})
        put(tmp_path, f"z{seed}", r=8, seed=seed, nll=4.0, train={"steps": 0})
    found = evidence.find(tmp_path)
    summary.tell(found, full=True, wide=True)
    files.write_page(found)
    shown = capsys.readouterr().out
    untrained, trained = sorted(
        (line for line in shown.splitlines() if re.match(r" lora.* [04] ", line)), key=len
    )[::-1][:2]
    assert "lora, untrained" in untrained and "8,000" not in untrained and "0.01" not in untrained
    assert "untrained" not in trained and "8,000" in trained
    assert "untrained: train.steps=0, so nothing was trained" in shown
    page = (tmp_path / "report" / "index.html").read_text()
    assert "lora, untrained" in page and "so nothing was trained" in page
    rows = table.rows(tmp_path)
    assert {row.name: row.trained for row in rows} == {
        "lora all r=8": True, "lora all r=8 untrained": False,
    }  # fmt: skip
    drawn = {f.axes.key: f for f in figures.figures(rows, evidence.find(tmp_path).found)}
    for key in ("parameters", "perplexity-memory", "perplexity-time", "curves-tokens"):
        assert {name for s in drawn[key].series for name in s.rows} == {"lora all r=8"}


def test_a_pareto_line_falls_and_what_is_not_significantly_worse_is_shaded(tmp_path):
    for seed in range(3):
        put(tmp_path, f"a{seed}", r=1, seed=seed, nll=3.0)
        put(tmp_path, f"b{seed}", r=2, seed=seed, nll=3.005)  # dearer and worse, if not surely so
        put(tmp_path, f"c{seed}", r=4, seed=seed, nll=3.5)
        put(tmp_path, f"d{seed}", r=8, seed=seed, nll=2.0)
    found = evidence.find(tmp_path)
    best = "lora all r=1" if found.found["test"].ordered[1] == "lora all r=1" else "lora all r=2"
    drawn = {f.axes.key: f for f in figures.figures(found.rows, found.found)}
    for key in ("parameters", "perplexity-memory", "perplexity-time"):
        [line] = [s for s in drawn[key].series if s.dash]
        assert line.y == sorted(line.y, reverse=True) and line.x == sorted(line.x)
        assert line.rows == list(dict.fromkeys(["lora all r=1", best, "lora all r=8"]))
        [shaded] = [s for s in drawn[key].series if s.halo]
        assert shaded.rows == ["lora all r=1", "lora all r=2", "lora all r=8"]


@pytest.mark.parametrize(
    ("seeds", "beside", "fronts"), [(2, 0, 3), (1, 0, 2), (2, 1, 1)]
)  # seconds of a single run, and memory beside other runs, are not for comparison
def test_what_is_not_comparable_has_no_front(tmp_path, seeds, beside, fronts):
    for r, nll in ((1, 3.0), (2, 2.5), (4, 2.0)):
        for seed in range(seeds):
            put(tmp_path, f"{r}-{seed}", r=r, seed=seed, nll=nll, beside=beside * (r == 4))
    found = evidence.find(tmp_path)
    drawn = [f for f in figures.figures(found.rows, found.found) if f.axes.key in COSTS[:3]]
    assert len(drawn) == 3
    assert [f.axes.key for f in drawn if any(s.dash or s.halo for s in f.series)] == COSTS[:fronts]
    budgets = choices.within_budgets(found.rows, found.found["test"])
    assert any("parameters" in choice.wanted for choice in budgets)
    assert any(choice.wanted.endswith(" s") for choice in budgets) == (seeds > 1)


COSTS = ["parameters", "perplexity-memory", "perplexity-time"]


def test_the_answer_says_what_little_training_saves_and_costs(tmp_path, capsys):
    for seed in range(3):
        full = put(tmp_path, f"full{seed}", method="full", r=100, seed=seed, nll=2.0)
        lora = put(tmp_path, f"lora{seed}", r=4, seed=seed, nll=2.5)
        edit(full, lambda r: r["memory"].update(peak_bytes=100 * 2**20))
        edit(lora, lambda r: r["memory"].update(peak_bytes=82 * 2**20))
    summary.show(tmp_path)
    shown = one(capsys.readouterr().out)
    best, small = (
        math.exp(np.mean([ratio(tmp_path / f"{name}{seed}") for seed in range(3)]))
        for name in ("full", "lora")
    )
    said = (
        "lora all r=4 (0.40 % of the parameters) trains 25 times fewer parameters than full all "
        f"k=100, needs 18 % less memory and ends at {small / best:.2f} times its perplexity."
    )
    assert said in shown and shown.index(said) < shown.index("95 %")
    assert shown.index(said) < shown.index("Which should I take?") < shown.index("targets")


def test_which_row_to_take_is_the_smallest_that_is_good_enough(tmp_path):
    for seed in range(3):
        put(tmp_path, f"a{seed}", r=50, seed=seed, nll=2.0)
        put(tmp_path, f"b{seed}", r=30, seed=seed, nll=2.0)  # as good, and smaller
        put(tmp_path, f"c{seed}", r=9, seed=seed, nll=2.0 + math.log(1.2))
        put(tmp_path, f"d{seed}", r=2, seed=seed, nll=3.0)
        put(tmp_path, f"e{seed}", r=1, seed=seed, nll=4.0)
    found = evidence.find(tmp_path)
    test = found.found["test"]
    picked = {(c.wanted, c.take) for c in choices.good_enough(found.rows, test)}
    best = test.ordered[0]
    wanted = {("lowest", best), ("up to 25 % higher", "lora all r=9")}
    if best == "lora all r=50":
        wanted |= {("not significantly higher", "lora all r=30")}
    assert picked == wanted
    assert choices.ties_best("lora all r=30", test) and choices.ties_best("lora all r=50", test)
    budgets = {(c.wanted, c.take) for c in choices.within_budgets(found.rows, test)}
    assert ("≤ 1,000 parameters", "lora all r=1") in budgets
    assert ("≤ 2,000 parameters", "lora all r=2") in budgets
    assert ("≤ 10,000 parameters", "lora all r=9") in budgets


def test_on_80_columns_a_row_is_a_line_and_wide_has_every_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = sweep_over(tmp_path / "scratch", also=(2.0, 2.2))
    put(
        folder,
        "long",
        method="a-method-with-quite-a-long-name-of-its-own" * 2,
        nll=3.3,
        also=(2, 2.5),
    )
    summary.tell(evidence.find(folder), full=True)
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if re.match(r" (lora|a-met)", line)]
    assert len(lines) > 5 * 3 and all(len(line.rstrip()) <= 80 for line in lines)
    results_of = shown[shown.index(" method") : shown.index(": test perplexity per token")]
    assert len(re.findall(r"^ (?:lora|a-met).* \d+\.\d\d", results_of, re.M)) == 5
    assert "not shown: " in shown and f"every column: harness report --wide {folder}" in shown
    summary.tell(evidence.find(folder), full=True, wide=True)
    shown = capsys.readouterr().out
    assert "not shown" not in shown and "step 0" in shown and "detectable" in shown


@pytest.mark.slow
def test_make_experiment_ends_with_the_page_even_if_a_run_failed(tmp_path):
    sweep_over(tmp_path / "a b" / "outputs" / "exp")
    tree = tmp_path / "a b"
    rule = re.search(r"^experiment: .*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.M)
    (tree / "Makefile").write_text(f"RUN := .venv/bin/python\nexperiment:\n{rule[1]}")
    program = tree / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\n[ "$2" = harness ] && { echo "the table"; exit 1; }\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    program.chmod(0o755)
    done = subprocess.run(
        ["make", "experiment", "EXPERIMENT=exp"], cwd=tree, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("make", "."))]
    assert done.returncode == 2 and lines[-2:][0] == "the table", done  # 2 is make's own
    assert lines[-1].startswith("page: outputs/exp/report/index.html")
    assert (tree / "outputs" / "exp" / "report" / "index.html").exists()


def said_of(folder, seeds, gap):
    """The answer to rows of these seeds, `gap` nats per token apart."""
    for r in (1, 8):
        for seed in seeds:
            name = f"r{r}s{seed}"
            put(folder, name, r=r, seed=seed, nll=3.0 - gap * (r == 8))
    rows = table.rows(folder)
    return answer.answer(rows, evidence.find(folder).found["test"])


def test_with_one_seed_nothing_is_called_significant_and_two_are_said_to_be_few(tmp_path):
    one = said_of(tmp_path / "one", [0], 0.5)
    assert "lower than every other's" in one and "significant" not in one
    assert "one seed: another may change the order" in one
    two = said_of(tmp_path / "two", [0, 1], 0.5)
    assert "With 2 seeds hardly any difference can be shown; take 5." in two
    five = said_of(tmp_path / "five", range(5), 0.5)
    assert "significantly lower than every other's" in five and "seed" not in five


def test_rows_that_differ_in_a_field_of_peft_are_told_apart_by_it(tmp_path):
    """One that most rows do not have: its key is in no other row's settings."""
    for fields, lr, nll in (({}, 0.04, 3.0), ({"modules_to_save": ["lm_head"]}, 0.008, 2.0)):
        name = f"lora-{lr}"
        run_dir = put(tmp_path, name, nll=nll)
        record = run_record.read(run_dir)
        record["config"]["method"]["fields"] = fields
        record["method"]["lr"] = lr
        run_record.write(run_dir, record)
    rows = table.rows(tmp_path)
    assert sorted(row.name for row in rows) == [
        "lora all r=8", 'lora all r=8 modules_to_save=["lm_head"]',
    ]  # fmt: skip
    assert {row.settings["method.fields.modules_to_save"] is None for row in rows} == {True, False}
