"""Searches that grow, that try several seeds, or that are of learning rates, by a stub worker."""

import math

import pytest
import stub_search
from stub_searches import finish, several, start, taken, trials

from harness.config import rates
from harness.config.paths import CONF_DIR
from harness.results import run_record
from harness.runs import overrides, search_plan

BASIC = ["train.steps=8", "evaluate.interval=4", "experiment_name=x"]
TUNE = [
    "hydra.sweeper.points=3", *BASIC,
    "hydra.sweeper.grids=[{method: full, train.lr: 2.4},"
    "{method: lora, method.r: 8, train.lr: 7e-3}]",
]  # fmt: skip


def by_hand(centre, worse, seed, factor=2.0):
    """A grid that grows, as the search of rates was written before it was a search like any."""
    grid, todo = {}, rates.grid_around(centre, 3, factor)
    while todo:
        for lr in todo:
            apart = math.log10(lr / stub_search.BEST_LR)
            nll = 3 + apart**2 + worse + 2 * math.exp(-2) + 0.001 * seed
            grid[lr] = None if lr > stub_search.DIVERGES else nll
        todo = rates.further(grid, factor) if len(grid) < 12 else []
    return grid


def test_rates_are_searched_by_grids_that_grow_until_every_best_is_inside(tmp_path):
    old = "hydra.sweeper._target_=hydra_plugins.harness_rates.RateSweeper"
    own, shim = f"hydra.sweeper.file={tmp_path}/own.yaml", f"hydra.sweeper.file={tmp_path}/old.yaml"
    new, again, recorded, other, few = several(
        tmp_path,
        ["run", "experiment=tune", *TUNE, own],
        ["run", "experiment=tune", *TUNE, own],
        ["run", "experiment=tune", *TUNE, old, shim, "experiment_name=old"],
        ["run", "experiment=tune", *TUNE, own, "seed=3"],
        ["run", "experiment=tune", *TUNE, "hydra.sweeper.points=2"],
    )
    assert new[0] == 0, new
    found = rates.read(str(tmp_path / "own.yaml"))
    assert [t.family for t in found.tuned] == ["full", "lora"] and found.setting["seed"] == 1000
    for t, (centre, worse) in zip(found.tuned, [(2.4, 0.3), (7e-3, 0.1 / 8)], strict=True):
        expected = by_hand(centre, worse, 1000)
        assert list(t.grid) == sorted(expected)
        assert t.grid == pytest.approx(expected, abs=1e-5)
        assert rates.edge(t.grid) is None
    assert len(found.tuned[0].grid) == 11 and len(found.tuned[1].grid) == 3
    assert again[0] == 0 and "already finished" not in again[2]  # nothing was launched
    assert recorded[0] == 0 and "RateSweeper is now" in recorded[1]
    assert rates.read(str(tmp_path / "old.yaml")).tuned == found.tuned
    assert other[0] == 2 and "another setting (seed 1000 and 3)" in other[1]
    assert few[0] == 2 and "points=2" in few[1] and few[1].count("\n") == 1


@pytest.mark.parametrize("name", ["tune", "tune_control", "tune_anatomy"])
def test_a_recorded_search_of_rates_has_the_candidates_that_it_had(name):
    """Of every configuration five rates about its own."""
    runs = overrides.compose(f"experiment={name}")
    expected = [rates.grid_around(run.train.lr, 5, 2.0) for run in runs]
    planned = search_plan.plan([f"experiment={name}"])
    assert len(planned.brackets) == len(expected)
    assert planned.steps == 80 * 5 * len(expected)
    ends = [run.train.lr for run in planned.runs]
    assert ends == [rate for grid in expected for rate in (grid[0], grid[-1])]
    assert planned.settings.grow == 7 and not planned.runs[0].evaluate.test
    assert "SearchSweeper" in (CONF_DIR / "experiment" / "tune.yaml").read_text()


def test_a_file_of_rates_is_of_one_setting_and_each_configuration_once(tmp_path):
    grids = "hydra.sweeper.grids=[{method: full, train.lr: 1e-2, train.steps: '8,12'}]"
    twice = "hydra.sweeper.grids=[{method: full, train.lr: 1e-2},{method: full, train.lr: 2e-2}]"
    settings, same = several(
        tmp_path, *(["run", "experiment=tune", *BASIC[1:], grid] for grid in (grids, twice))
    )
    assert settings[0] == 2 and "two grids are for the same configuration, full" in settings[1]
    assert same[0] == 2 and "two grids are for the same configuration, full" in same[1]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_an_interval_grows_where_the_best_is_at_its_end(tmp_path):
    space = ["search", "train.lr=tag(log,interval(1e-5,1e-4))", "search.trials=6"]
    said = finish(start(tmp_path, *space, "search.grow=6", *BASIC, "search.sampler=tpe"))
    rows = trials(tmp_path)
    # TPE proposes one at a time; what is added is half as many candidates in one bracket.
    assert [row["bracket"] for row in rows[:9]] == [*"012345", "6", "6", "6"]
    found = [float(row["train.lr"]) for row in rows]
    assert max(found[:6]) <= 1e-4 < min(found[6:])
    best = min(rows, key=lambda row: float(row["nll_at_8"] or "inf"))  # "": it has diverged
    assert abs(math.log10(float(best["train.lr"]) / stub_search.BEST_LR)) < 0.5
    assert "train.lr has grown: 0.0001 to 0.000316" in said
    assert "warning: the best train.lr" not in said
    before = taken(tmp_path)
    finish(start(tmp_path, *space, "search.grow=6", *BASIC, "search.sampler=tpe"))
    assert taken(tmp_path) == before and trials(tmp_path) == rows


@pytest.mark.slow
def test_the_best_is_that_of_the_mean_over_seeds(tmp_path):
    command = ["search", "method.r=8,64", "train.lr=7e-3,1e-2,1e-4", "search.sampler=grid",
               "search.rungs=[4]", "search.seeds=[7,13]", *BASIC]  # fmt: skip
    said = finish(start(tmp_path, *command))
    rows = {(row["method.r"], row["train.lr"]): row for row in trials(tmp_path)}
    # r=64 is ahead at the rung and diverges under seed 13, and with it in the mean.
    states = {key: row["state"] for key, row in rows.items()}
    assert states["64", "0.007"] == "diverged" and states["64", "0.01"] == "stopped"
    assert states["8", "0.007"] == "finished"
    winner = rows["8", "0.007"]
    one = 3 + 0.1 / 8 + 2 * math.exp(-2)
    assert float(winner["nll_at_8"]) == pytest.approx(one + 0.001 * 20 / 3, abs=1e-6)
    assert float(winner["spread"]) == pytest.approx(0.001 * 6.5064, abs=1e-5)
    assert winner["steps"] == "24" and "mean over 3 seeds" in said
    assert set(taken(tmp_path).values()) == {1}
    for name in (row["run"] for row in rows.values() if row["state"] == "stopped"):
        assert run_record.read(tmp_path / "outputs/x" / name)["status"] == "paused"


@pytest.mark.slow
def test_the_short_form_and_hyperband(tmp_path):
    command = ["-m", "search=hyperband", "train.lr=tag(log,interval(1e-4,1e-1))",
               "train.steps=9", "evaluate.interval=1", "experiment_name=x"]  # fmt: skip
    finish(start(tmp_path, *command))
    rows = trials(tmp_path)
    assert len(rows) == 9 + 5 + 3
    by_bracket = [[int(r["steps"]) for r in rows if r["bracket"] == b] for b in "012"]
    assert sorted(by_bracket[0]) == [1] * 6 + [3] * 2 + [9]
    assert sorted(by_bracket[1]) == [3] * 4 + [9]
    assert by_bracket[2] == [9] * 3
    assert set(taken(tmp_path).values()) == {1}


def test_a_plan_tells_what_a_search_takes(capsys):
    from harness.commands import cli

    space = ["method.r=1,8", "train.lr=1e-3,1e-2", "train.steps=27", "evaluate.interval=9"]
    status = cli.main(["plan", "search=halving", "search=grid", *space])
    said = capsys.readouterr().out
    assert status == 0
    assert "the search: 4 candidates, rungs 9, 27: 54 optimizer steps, 0.50" in said
    assert "s at most by the estimate" in said
