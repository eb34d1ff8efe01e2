"""Columns by request, as axes of fronts and budgets, and equal FLOPs: by hand on written runs."""

import csv
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from synthetic_runs import put

from harness.config.errors import ConfigError
from harness.report import (
    anatomy,
    choices,
    costs,
    evidence,
    figures,
    requested,
    sheets,
    summary,
    table,
    views,
)
from harness.report.__main__ import main
from harness.results import run_record, schema

ATTACHED = {1: 1.2, 8: 1.1}  # seconds times the base's


def change(run_dir, **changes):
    record = run_record.read(run_dir)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = record
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    run_record.write(run_dir, record)


def spending(folder, seeds=3, beside=0):
    """LoRA of rank 8, 16 and 32: the larger the better, in bytes and FLOPs as in nats."""
    for r, nll in ((8, 3.0), (16, 2.8), (32, 2.6)):
        for seed in range(seeds):
            run_dir = put(folder, f"r{r}-s{seed}", r=r, seed=seed, nll=nll, beside=beside,
                          also=(2.0, 2.0 + r / 100))  # fmt: skip
            jitter = 1 + (seed - 1) / 1000
            latency = {
                kind: {
                    f"batch_{size}": {
                        model: {"tokens_per_second": 100.0 * size / times, "times_base": times}
                        for model, times in (("attached", ATTACHED[size] * jitter * (1 + r / 1000)),
                                             ("merged", jitter))
                    }
                    for size in (1, 8)
                }
                for kind in ("generate", "score")
            }  # fmt: skip
            change(run_dir, costs={
                "adapter_bytes": 1024 * r, "train_flops": 1e12 * r, "load_seconds": 0.1 * jitter,
                "latency": latency,
            })  # fmt: skip
    return folder


def summarised(folder):
    names = [row.name for row in evidence.find(folder).rows]
    lines = [(name, anatomy.ALL, key, 2.0 + i, 1.5 + i, 2.5 + i, 3)
             for i, name in enumerate(names) for key in anatomy.QUANTITIES]  # fmt: skip
    (folder / anatomy.FOLDER).mkdir()
    columns = ["name", "of", "quantity", "mean", "low", "high", "count"]
    frame = pd.DataFrame(lines, columns=columns)
    frame.to_csv(folder / anatomy.FOLDER / anatomy.FILE_NAME, index=False)


def test_a_column_is_on_the_terminal_in_csv_markdown_latex_and_page(tmp_path, capsys):
    summarised(spending(tmp_path))
    wanted = "adapter_bytes,generate_attached_8,effective_rank,forgotten,speed.train_seconds"
    assert main(["--columns", wanted, str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    heads = ["adapter, KiB", "generation, attached, batch 8, × base", "effective",
             "forgotten, more", "speed.train_seconds, seconds"]  # fmt: skip
    for head in heads:
        assert head in shown
    assert f"harness report --columns {wanted} {tmp_path}" in shown
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [float(row["costs.adapter_bytes"]) for row in rows] == [8192, 16384, 32768]
    (first, *_) = rows
    mean = np.mean([1.1 * (1 + (seed - 1) / 1000) * 1.008 for seed in range(3)])
    path = "costs.latency.generate.batch_8.attached.times_base"
    assert float(first[path]) == pytest.approx(mean)
    assert float(first["anatomy.effective_rank"]) == 2
    moved, _ = evidence.forgetting(table.rows(tmp_path), evidence.find(tmp_path).found["more"])
    assert float(first["forgotten.more"]) == pytest.approx(moved[first["name"]].difference)
    assert first["speed.train_seconds"] == "8.0"
    assert (tmp_path / "results.csv").read_text().splitlines()[0].count("speed.train_seconds") == 1
    page = (tmp_path / "report" / "index.html").read_text()
    for name in ("table.md", "table.tex"):
        text = (tmp_path / "report" / name).read_text()
        for head in heads:
            assert head in text.replace("\\_", "_"), (name, head)  # as TeX has it
        assert "2.0 (1.5" in text and "8" in text
    assert all(head in page for head in heads)
    line = next(x for x in (tmp_path / "report" / "table.md").read_text().splitlines() if "32" in x)
    assert [cell.strip() for cell in line.strip("|").split("|")][-5] == "32"  # KiB


def test_latency_is_every_model_and_batch_size_that_was_measured(tmp_path):
    spending(tmp_path)
    found = requested.find(evidence.find(tmp_path, requested=["latency"]))
    said = [column.heading for column in found.columns]
    assert len(said) == 8 and said[0] == "generation, attached, batch 1, × base"
    assert said[-1] == "scoring, merged, batch 8, × base"
    (per_second,) = requested.find(
        evidence.find(tmp_path, requested=["score_merged_8_per_second"])
    ).columns
    assert per_second.heading == "scoring, merged, batch 8, tokens/s" and not per_second.cost


def test_what_other_runs_can_move_is_marked(tmp_path):
    spending(tmp_path, beside=1)
    names = ["adapter_bytes", "load_seconds"]
    found = requested.find(evidence.find(tmp_path, requested=names))
    exact, measured = found.cells(table.rows(tmp_path)[0])
    assert exact.shown == "8" and measured.shown == "0.1*"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("adaptr_bytes", "--columns adaptr_bytes: did you mean 'adapter_bytes'"),
        ("efective_rank", "did you mean 'effective_rank'"),
        ("speed.setup_second", "did you mean 'speed.setup_seconds'"),
        ("run.name", "--columns run.name: "),  # text
        ("generate_attached", "did you mean 'generate_attached_1'"),
        ("generate_attached_x", "did you mean 'generate_attached_1'"),
        ("", "expected names, as in --columns adapter_bytes,latency"),
        ("latency,,energy", "expected names"),
        ("latency", "no run of .* has costs.latency.*; evaluate.latency=true measures it"),
        ("energy", "no run of .* has costs.energy.train_joules; costs.energy.left_out"),
        ("effective_rank", "has effective_rank; harness anatomy .* makes it"),
        ("forgotten", "was evaluated on a further text; evaluate.also="),
        ("data.too_long.x", "--columns data.too_long.x: "),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line(tmp_path, capsys, names, said):
    put(tmp_path, "one")
    assert main([f"--columns={names}", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and len(error.splitlines()) == 1
    assert not (tmp_path / "report").exists() and not (tmp_path / "results.csv").exists()


def test_the_list_has_every_name_with_its_unit_and_each_is_known(capsys):
    assert main(["--columns", "help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split("  ")[0]: line for line in lines}
    assert {*requested.COLUMNS, *requested.GROUPS} <= set(listed)
    requested.check([*requested.COLUMNS, *requested.GROUPS])
    for name, column in requested.COLUMNS.items():
        assert column.what and (not column.unit or column.unit in listed[name])
    for column in requested.COLUMNS.values():  # or it would be empty for ever
        if not column.key.startswith(requested.ANATOMY):
            assert schema._find(column.key) is not None, column.key
    for title in costs.COSTS:
        assert schema._find(costs.of(title).path) is not None, title
    assert schema._find(costs.latency_path("score_fused_4")) is not None


def test_without_a_request_nothing_is_added(tmp_path, capsys):
    spending(tmp_path)
    summary.tell(evidence.find(tmp_path), full=True)
    assert "adapter" not in capsys.readouterr().out
    assert "costs." not in (tmp_path / "results.csv").read_text()


def test_exact_costs_are_on_fronts_and_budgets_and_the_smallest_is_found(tmp_path, capsys):
    spending(tmp_path)
    for seed in range(3):  # as good as r=32, in half the bytes of it and more than r=16
        run_dir = put(tmp_path, f"other-s{seed}", r=24, seed=seed, nll=3.2)
        change(run_dir, costs={"adapter_bytes": 24 * 1024})
    rows = table.rows(tmp_path)
    found = evidence.gather(rows)
    (dominated,) = evidence.fronts(rows, found, ["adapter size"]).values()
    front = [name for name, by in dominated.items() if not by]
    assert sorted(front) == ["lora all r=16", "lora all r=32", "lora all r=8"]
    assert set(dominated["lora all r=24"]) == {"lora all r=8", "lora all r=16"}
    bought = {c.wanted: c.take for c in choices.within_budgets(rows, found, None, ["adapter size"])}
    assert bought == {"adapter ≤ 10 KiB": "lora all r=8", "adapter ≤ 20 KiB": "lora all r=16"}
    asked = evidence.find(tmp_path, requested=["adapter_bytes"])
    summary.tell(asked, full=True)
    shown = capsys.readouterr().out
    assert "  adapter size: lora all r=32, lora all r=16, lora all r=8" in shown
    assert "adapter ≤ 20 KiB" in shown
    drawn = figures.figures(asked.rows, asked.found, ["adapter size"])
    (own,) = (f for f in drawn if f.axes.key == "perplexity-adapter-size")
    assert own.axes.x == "adapter, KiB" and "(lora all r=8" in own.alt
    assert {x for s in own.series for x in s.x} == {8, 16, 24, 32}


def test_measured_costs_count_only_beyond_their_spread(tmp_path, capsys):
    spending(tmp_path)
    rows = table.rows(tmp_path)
    found = evidence.gather(rows)
    name = "generate_attached_1"
    values = costs.run_values(rows, name)["lora all r=8"]
    sure = costs.sure_costs(rows, name)["lora all r=8"]
    logs = np.log(values)
    upper = scipy_stats.t.interval(0.95, 2, logs.mean(), scipy_stats.sem(logs))[1]
    assert sure == pytest.approx(math.exp(upper)) and sure > np.mean(values)
    # Times differ by 0.8 % from rank to rank, more than runs do: nobody dominates r=8.
    dominated = evidence.fronts(rows, found, [name])[name]
    assert dominated["lora all r=8"] == ()
    # Loading takes as long for all: not less, so that r=32 is no better for its cost.
    assert set(evidence.fronts(rows, found, ["loading time"])["loading time"].values()) == {()}
    for row in rows:  # without any spread "no more" is exact, and the best dominates
        for run_dir in row.run_dirs:
            change(run_dir, costs__load_seconds=0.1)
    same = evidence.fronts(table.rows(tmp_path), found, ["loading time"])["loading time"]
    assert same["lora all r=8"] == ("lora all r=16", "lora all r=32")


@pytest.mark.parametrize("setting", [{"seeds": 1}, {"beside": 1}])
def test_latency_of_one_run_or_a_shared_machine_is_shown_and_not_compared(
    tmp_path, capsys, setting
):
    spending(tmp_path, **setting)
    rows = table.rows(tmp_path)
    assert costs.sure_costs(rows, "generate_attached_1") == {}
    assert evidence.fronts(rows, evidence.gather(rows), ["generate_attached_1"]) == {}
    summary.tell(evidence.find(tmp_path, requested=["generate_attached_1"]))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Generation, attached, batch 1 is not compared: one run, or a shared machine" in shown


def test_curves_are_read_at_equal_flops(tmp_path):
    """5, 4, 3 nats after 0, 200, 400 tokens, of 10 and 20 FLOPs each: at 1000, 2000 and 4000."""
    for r, per_token in ((8, 10.0), (16, 20.0)):
        run_dir = put(tmp_path, f"r{r}", r=r)
        change(run_dir, predicted={"train_flops_per_token": per_token}, speed__steps=4,
               speed__tokens=400)  # fmt: skip
    rows = table.rows(tmp_path)
    cheap, dear = (views.curve(row) for row in rows)
    assert cheap.flops.tolist() == [0, 2000, 4000] and dear.flops.tolist() == [0, 4000, 8000]
    assert views.equal([cheap, dear], "flops") == [1000, 2000, 4000]
    assert [cheap.at("flops", f)[0] for f in (1000, 2000, 4000)] == [4.5, 4, 3]
    assert [dear.at("flops", f)[0] for f in (1000, 2000, 4000)] == [4.75, 4.5, 4]
    assert dear.at("flops", 8001) is None
    shown = sheets.learning(rows)
    place = shown.headings.index("2e-09 TFLOPs")
    assert [line[place].shown for line in shown.lines] == [
        f"{math.exp(4):.2f}", f"{math.exp(4.5):.2f}"
    ]  # fmt: skip
    assert "FLOPs" in shown.title
    # As many FLOPs a token: equal tokens say it all.
    change(tmp_path / "r16", predicted={"train_flops_per_token": 10.0})
    alike = [views.curve(row) for row in table.rows(tmp_path)]
    assert views.equal(alike, "flops") == []
    change(tmp_path / "r16", predicted=None)  # a rank by energy: only a run can tell
    one = [views.curve(row) for row in table.rows(tmp_path)]
    assert one[1].flops is None and views.equal(one, "flops") == []


def test_flops_are_of_every_position_also_of_prompts(tmp_path):
    """A step of 256 positions, of which 100 are predicted: 4 steps are 1024 positions."""
    run_dir = put(tmp_path, "pairs", train={"batch_tokens": 256})
    change(run_dir, predicted={"train_flops_per_token": 10.0}, speed__steps=4, speed__tokens=400)
    (row,) = table.rows(tmp_path)
    assert costs.costs([row], costs.FLOPS) == {row.name: 10240}
    assert views.curve(row).flops.tolist() == [0, 5120, 10240]
    change(run_dir, costs={"train_flops": 9.0})  # what a run has written down counts
    assert costs.costs(table.rows(tmp_path), costs.FLOPS) == {row.name: 9}


def test_names_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'load_seconds'"):
        requested.check(["load_second"])
    assert main(["--columns", "load_second", str(tmp_path / "nowhere")]) == 2


def test_text_that_was_read_before_step_0_is_part_of_what_training_costs(tmp_path):
    for name, known in (("a", True), ("b", False)):
        run_dir = put(tmp_path, name, r=8 if known else 4, seed=0)
        path = run_dir / "result.json"
        record = json.loads(path.read_text())
        record["speed"] |= {"start_seconds": 5.0, "start_flops": 3e12 if known else None}
        record["costs"] = {"train_flops": 1e12}
        path.write_text(json.dumps(record))
    rows = table.rows(tmp_path)
    seconds, flops = costs.costs(rows, costs.TIME), costs.costs(rows, costs.FLOPS)
    assert seconds == {"lora all r=8": 8 + 5.0, "lora all r=4": 4 + 5.0}
    assert flops == {"lora all r=8": 4e12}  # the other's cannot be told
