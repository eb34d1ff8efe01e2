"""The replay of searches over a recorded grid (experiments/search/replay.py)."""

import csv
import math
import re
import sys

import pytest
from omegaconf import OmegaConf

from harness.config.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "experiments" / "search"))
pytest.importorskip("optuna")
import replay

RATES = (0.001, 0.01, 0.1)


@pytest.fixture
def table():
    """Nine points: nll falls with r, is lowest at the middle rate, and one point diverges."""
    found, shown = {}, {}
    for r in ("1", "8", "64"):
        for place, lr in enumerate(RATES):
            end = 5 - math.log10(int(r)) / 10 + abs(place - 1)
            lost = (r, place) == ("64", 2)
            found[r, str(place)] = {9: end + 0.5, 27: math.inf if lost else end}
            shown[r, str(place)] = lr
    return replay.Table("planted", ("method.r", "train.lr"), found, (9, 27), shown)


def test_a_grid_comes_back_as_it_was_recorded(table, tmp_path):
    replay.write_grid(table, tmp_path / "planted.csv")
    back = replay.read([str(tmp_path / "planted.csv")])
    assert (back.name, back.keys, back.rungs) == ("planted", table.keys, table.rungs)
    assert back.shown == table.shown
    for point, at in table.found.items():
        assert back.found[point] == pytest.approx(at, abs=1e-6)


@pytest.mark.parametrize("plan", ["random", "tpe + halving"])
def test_a_search_of_the_whole_grid_finds_its_best_and_pays_for_it(table, plan):
    sampler, rungs, batch = replay.plans(table)[plan]
    whole = len(table.found) * 27
    path = replay.search(table, sampler, 0, rungs, batch, whole)
    steps = [spent for spent, _ in path]
    assert steps == sorted(steps) and path[-1][1] == min(table.end.values())
    if len(rungs) == 1:
        assert steps[-1] == whole  # every point once
    else:
        assert steps[-1] < whole  # those that stop at the rung are not paid for to the end
    assert replay.at_steps(path, steps[0] - 1) == math.inf


def test_the_page_quotes_the_recorded_grid():
    recorded = replay.of_grid(REPOSITORY / "experiments" / "search" / "search_joint.csv")
    page = (REPOSITORY / "experiments" / "search" / "README.md").read_text("utf-8")
    end, rates = recorded.end, recorded.shown
    lowest_rate = min(rates.values())
    apart, falls = [], []
    for targets in ("attn", "all"):
        for r in ("1", "8", "64"):
            cells, nlls, best_rates = [], [], []
            for alpha in ("0.25r", "2r", "16r"):
                best = min((p for p in end if p[:3] == (targets, r, alpha)), key=end.__getitem__)
                star = "*" if rates[best] == lowest_rate else ""
                cells.append(f"{end[best]:.3f} at {rates[best]:g}{star}")
                nlls.append(end[best])
                best_rates.append(rates[best])
            assert f"| {targets} | {r} | {' | '.join(cells)} |" in page
            assert best_rates == sorted(best_rates, reverse=True)
            apart.append(max(nlls) - min(nlls))
            falls.append(best_rates[0] / best_rates[-1])
    assert f"the best of these four rates falls by {min(falls):.0f} to {max(falls):.0f}." in page
    assert f"alphas of one row are {min(apart):.3f} to {max(apart):.3f} nats apart" in page
    same = [end[p] for p in end if p[:2] == ("all", "64") and rates[p] == 0.005]
    assert f"they are {max(same) - min(same):.3f} apart" in page
    assert f"all matrices at 0.00125: {min(end.values()):.4f}." in page


def test_the_page_quotes_the_recorded_replay():
    folder = REPOSITORY / "experiments" / "search"
    page = " ".join((folder / "README.md").read_text("utf-8").split())
    with (folder / "replay-search_joint.csv").open(newline="", encoding="utf-8") as stream:
        rows = {(row["plan"], row["steps"]): row for row in csv.DictReader(stream)}
    for row in rows.values():
        assert f"| {row['regret']} ± {row['standard_error']} " in page
    halved, plain = rows["random + halving", "972"], rows["random", "972"]
    said = f"{float(halved['found_best']):.0%} of 100 searches, and without it in {{:.0%}}"
    assert said.format(float(plain["found_best"])).replace("%", " %") in page
    ahead = float(plain["regret"]) - float(halved["regret"])
    assert f"they are {ahead:.4f} ±" in page
    said = r"TPE without halving is ahead of random by ([\d.]+) at a fifth .* and ([\d.]+) at three"
    quoted = re.search(said, page).groups()
    for steps, number in zip(("378", "594"), quoted, strict=True):
        ahead = float(rows["random", steps]["regret"]) - float(rows["tpe", steps]["regret"])
        assert float(number) == pytest.approx(ahead, abs=1.01e-4)  # of means rounded to 1e-4
    assert f"a fifth of the steps ({rows['tpe + halving', '378']['regret']})" in page


def test_the_page_quotes_the_replays_after_the_search_was_mended():
    folder = REPOSITORY / "experiments" / "search"
    page = (folder / "README.md").read_text("utf-8").split("## The same replays")[1]
    found = {}
    for name in ("replay-search_joint-untried.csv", "replay-untried.csv"):
        with (folder / name).open(newline="", encoding="utf-8") as stream:
            found[name] = {(row["plan"], row["steps"]): row for row in csv.DictReader(stream)}
    rows, first = found["replay-search_joint-untried.csv"], found["replay-untried.csv"]
    plans = list(dict.fromkeys(plan for plan, _ in rows))
    for steps in dict.fromkeys(steps for _, steps in rows):
        cells = [rows[plan, steps] for plan in plans]
        numbers = " | ".join(f"{row['regret']} ± {row['standard_error']}" for row in cells)
        assert f"| {steps} ({cells[0]['share']}) | {numbers} |" in page
    page = " ".join(page.split())
    half = {p: (float(rows[p, "972"]["regret"]), rows[p, "972"]["found_best"]) for p in plans}
    assert min(half.values())[0] == half["tpe + halving"][0]
    quoted = re.search(
        r"best in (\d+) % of 100 searches, random candidates with halving in (\d+) %, TPE alone in "
        r"(\d+) %, random candidates alone in (\d+) %",
        page,
    ).groups()
    said = ("tpe + halving", "random + halving", "tpe", "random")
    assert [int(q) for q in quoted] == [round(100 * float(half[p][1])) for p in said]
    ahead = half["random"][0] - half["tpe + halving"][0]
    assert f"{ahead:.4f} ± 0.0044 nats ahead" in page
    tpe = first["tpe", "1600"]
    assert f"in {round(100 * float(tpe['found_best']))} % instead of 56 %" in page
    assert f"regret {float(tpe['regret']):.3f} instead" in page


def test_the_page_quotes_what_halving_found_of_the_rates_of_tune():
    folder = REPOSITORY / "experiments" / "search"
    page = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    by_halving = OmegaConf.load(folder / "search-rates.yaml").tuned
    by_grid = OmegaConf.load(REPOSITORY / "conf" / "rates" / "gpt2_mini_kjv.yaml").tuned

    def configuration(entry):
        return tuple(str(entry[key]) for key in ("family", "targets", "rank", "scale", "variant"))

    full_grid = {configuration(entry): entry for entry in by_grid}
    losses = []
    for entry in by_halving:
        grid = full_grid[configuration(entry)]
        nll = {float(rate): value for rate, value in grid.validation_nll.items()}
        own = {float(rate): value for rate, value in entry.validation_nll.items()}[entry.lr]
        assert own == pytest.approx(nll[entry.lr], abs=2e-5)
        assert entry.lr in (grid.lr, grid.lr / 2), "within one step of the grid, and never above"
        if entry.lr != grid.lr:
            lost = nll[entry.lr] - nll[grid.lr]
            losses.append(lost)
            assert f"| {entry.lr:g} | {grid.lr:g} | {lost:.3f} |" in page
    same = len(by_halving) - len(losses)
    assert f"{same} of {len(by_halving)} are the same, and {len(losses)} are one step lower" in page
    with (folder / "search.csv").open(newline="", encoding="utf-8") as stream:
        candidates = list(csv.DictReader(stream))
    steps, every = sum(int(line["steps"]) for line in candidates), 80 * len(candidates)
    assert f"{steps:,} optimizer steps, {steps / every:.2f} of the {every:,} that" in page
