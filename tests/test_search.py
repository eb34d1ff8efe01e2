"""A search as a user starts it: planted problems, kills, two controllers, bad input, real runs."""

import csv
import json
import math
import os
import random
import signal
import subprocess
from collections import Counter

import pytest
import stub_search
import yaml
from conftest import SHORT
from stub_searches import SEARCH, finish, several, start, taken, trials

from harness.config import naming, rates
from harness.results import run_record
from harness.runs.overrides import compose


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, finish(start(folder, *SEARCH))


def test_the_winner_of_a_planted_problem_is_found_and_no_step_is_taken_twice(undisturbed):
    folder, said = undisturbed
    rows = trials(folder)
    assert len(rows) == 12 == len({row["run"] for row in rows})
    assert Counter(row["state"] for row in rows) == {"finished": 1, "stopped": 11}
    assert sorted(int(row["steps"]) for row in rows) == [4] * 8 + [8] * 3 + [16]
    assert set(taken(folder).values()) == {1} and len(taken(folder)) == 8 * 4 + 3 * 8 + 16
    assert "72 optimizer steps, 0.38 of all candidates in full" in said

    def planted(row):
        apart = math.log10(float(row["train.lr"]) / stub_search.BEST_LR)
        return apart**2 + 0.1 / int(row["method.r"])

    (winner,) = (row for row in rows if row["state"] == "finished")
    assert winner == min(rows, key=planted)
    expected = 3 + planted(winner) + 2 * math.exp(-16 / 4)
    assert float(winner["nll_at_16"]) == pytest.approx(expected, abs=1e-6)
    assert f"train.lr={float(winner['train.lr']):.4g}" in said


def test_the_best_is_a_file_that_runs_as_it_is(undisturbed, monkeypatch):
    folder, said = undisturbed
    monkeypatch.chdir(folder)
    assert "harness run --config-dir outputs/x/search experiment=best" in said
    search = f"hydra.searchpath=[file://{folder}/outputs/x/search]"
    (best,) = compose(search, "experiment=best")
    assert best.evaluate.test and best.experiment_name == "x_best"
    (without_test,) = compose(search, "experiment=best", "evaluate.test=false")
    (winner,) = (row["run"] for row in trials(folder) if row["state"] == "finished")
    record = run_record.read(folder / "outputs/x" / winner)
    assert naming.identity(without_test) == record["run"]["identity"]
    (seeds,) = {len(compose(search, "experiment=best", "seed=1,2,3"))}
    assert seeds == 3


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_another_is_refused(undisturbed):
    folder, _ = undisturbed
    before = taken(folder)
    more = [text for text in SEARCH if "trials" not in text]
    again, other, fixed, further = several(
        folder, SEARCH, [*SEARCH, "search.eta=2"], [*SEARCH, "train.warmup=0.5"],
        [*more, "search.trials=15"],
    )  # fmt: skip
    assert again[0] == 0 and "0.38 of all candidates" in again[2]
    assert other[0] == 2 and "eta: 3 then, 2 now" in other[1] and other[1].count("\n") == 1
    assert fixed[0] == 2 and "another search" in fixed[1]
    assert further[0] == 0
    rows = trials(folder)
    assert [row["bracket"] for row in rows] == ["0"] * 12 + ["1"] * 3
    assert before.items() <= taken(folder).items()
    assert Counter(row["state"] for row in rows)["finished"] == 2  # one a bracket


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(8))
def test_a_kill_of_the_controller_loses_no_candidate_and_repeats_none(tmp_path, seed):
    expected = tmp_path / "expected"
    finish(start(expected, *SEARCH))
    chance, folder, cuts = random.Random(seed), tmp_path / "cut", 0
    for _ in range(20):
        process = start(folder, *SEARCH, seconds=0.02)
        try:
            process.communicate(timeout=chance.uniform(1.0, 7.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            cuts += 1
        if process.returncode == 0:
            break
    else:
        finish(start(folder, *SEARCH))
    assert cuts
    assert trials(folder) == trials(expected)
    for row in trials(folder):  # none is missing, none there twice
        rows = run_record.read_metrics(folder / "outputs/x" / row["run"])
        steps = [r["step"] for r in rows if "train/nll" in r]
        assert steps == list(range(1, int(row["steps"]) + 1))
    # Only what came after a checkpoint is taken again, which is at most a step for each kill.
    assert sum(taken(folder).values()) <= 72 + 2 * cuts


@pytest.mark.faults
def test_two_controllers_on_one_study_divide_its_runs(tmp_path, undisturbed):
    folder = tmp_path / "both"
    both = [start(folder, *SEARCH, seconds=0.05, together=2) for _ in range(2)]
    for process in both:
        finish(process)
    found = {row["run"]: row for row in trials(folder)}
    first = trials(undisturbed[0])[:12]
    assert found == {row["run"]: row for row in first}
    assert set(taken(folder).values()) == {1} and len(taken(folder)) == 72
    workers = {json.loads((folder / "outputs/x" / name / ".claim").read_text())["pid"]
               for name in found}  # fmt: skip
    assert len(workers) == 2


def test_what_diverges_is_an_answer_and_the_next_best_goes_on(tmp_path):
    finish(
        start(
            tmp_path, "search", "train.lr=6e-1,7e-1,1e-4,2e-4", "search.rungs=[4]",
            "search.sampler=grid", "train.steps=8", "evaluate.interval=4", "experiment_name=x",
        )
    )  # fmt: skip
    found = {row["train.lr"]: row["state"] for row in trials(tmp_path)}
    # Above 0.5 the stub diverges after step 5: at 4 it is the best, and then there is none.
    assert found == {
        "0.6": "diverged",
        "0.7": "diverged",
        "0.0001": "stopped",
        "0.0002": "finished",
    }
    tuned = yaml.safe_load((tmp_path / "outputs/x/search/rates.yaml").read_text())["tuned"]
    grid = tuned[0]["validation_nll"]
    assert [rate for rate, nll in grid.items() if nll is not None] == [0.0002]
    assert set(tuned[0]["stopped"]) == {0.0001} and "at_edge" not in tuned[0]
    assert rates.read(str(tmp_path / "outputs/x/search/rates.yaml")).tuned[0].lr == 2e-4


def test_several_spaces_each_with_its_own_best_and_rates(tmp_path):
    grids = ("hydra.sweeper.grids=[{method: full, train.lr: '1e-3,1e-2,1e-1'},"
             "{method: lora, method.r: 8, train.lr: '1e-3,1e-2,1e-1'}]")  # fmt: skip
    said = finish(
        start(
            tmp_path, "search", grids, "search.sampler=grid", "search.rungs=[4]", "train.steps=8",
            "evaluate.interval=4", "experiment_name=x", f"search.file={tmp_path}/own.yaml",
        )
    )  # fmt: skip
    assert {row["study"] for row in trials(tmp_path)} == {
        "x method=full",
        "x method=lora method.r=8",
    }
    found = rates.read(str(tmp_path / "own.yaml"))
    assert [(t.family, t.lr) for t in found.tuned] == [("full", 0.01), ("lora", 0.01)]
    assert found.setting["train.steps"] == 8 and "6 candidates in 2 spaces" in said
    names = sorted(p.name for p in (tmp_path / "outputs/x/search/experiment").iterdir())
    assert names == ["best_1.yaml", "best_2.yaml"]


@pytest.mark.slow
def test_conditional_keys_several_objectives_limits_and_edges(tmp_path):
    objectives, limits, edge, none = several(
        tmp_path,
        ["search", "method=lora,full", "method.r=1,8", "train.lr=1e-2,1e-3", "search.sampler=grid",
         "search.objectives=[validation.nll,parameters.trainable]", "train.steps=8",
         "evaluate.interval=4", "experiment_name=x"],
        ["search", "method.r=1,8,64", "train.lr=1e-2", "search.sampler=grid",
         "search.constraints=['parameters.trainable<=150000']", "train.steps=8",
         "evaluate.interval=4", "experiment_name=y"],
        ["search", "train.lr=tag(log,interval(1e-5,1e-4))", "search.sampler=tpe",
         "search.trials=6", "train.steps=8", "evaluate.interval=4", "experiment_name=z"],
        ["search", "method.r=1,8", "search.sampler=grid", "experiment_name=n",
         "search.constraints=['parameters.total<=1000']"],
    )  # fmt: skip
    assert none[0] == 2 and "none of 2 proposals can be a candidate: parameters.total" in none[1]
    assert objectives[0] == 0, objectives
    rows = trials(tmp_path)
    assert len(rows) == 6 and sum(row["method.r"] == "" for row in rows) == 2
    front = {(row["method"], row["method.r"]) for row in rows if row["pareto"]}
    assert front == {("lora", "1"), ("lora", "8")}  # full needs more, and is worse here
    assert limits[0] == 0 and "parameters.trainable=1,048,576 is above 150,000" in limits[2]
    assert len(list((tmp_path / "outputs/y").glob("lora*"))) == 2  # the third cost nothing
    assert edge[0] == 0, edge
    (said,) = (
        line for line in edge[2].splitlines() if line.startswith("warning: the best train.lr")
    )
    assert "the highest of the 6 tried in 1e-05 to 0.0001 (log): a better one may lie" in said


BAD = [
    (["train.lr=interval(2,1)"], "train.lr: interval 2 to 1 is empty"),
    (["train.lr=tag(log,interval(0,1))"], "on a log scale: expected numbers above 0"),
    (["train.lr=1e-3"], "no key has several values"),
    (["train.learning_rate=1e-3,1e-2"], "did you mean 'train.lr'"),
    (["method.rr=1,8"], "unknown key 'method.rr': did you mean 'method.r'"),
    (["method=full", "method.r=1,8"], "method.r"),
    (["method.r=0,8"], "method.r=0: expected a rank of 1 or more"),
    (["seed=0,1"], "seed=0,1 cannot be searched"),
    (["method.r=1,8", "search.objectives=[validation.nll,memory.peek_bytes]"],
     "did you mean 'memory.peak_bytes'"),
    (["method.r=1,8", "search.objectives=[quality.test.nll]"], "quality.test.nll"),
    (["method.r=1,8", "search.objectives=[memory.peak_bytes]"], "validation.nll first"),
    (["method.r=1,8", "search.storage=sqlite:////nowhere/x.db"], "unable to open database file"),
    (["method.r=1,8", "search.storage=nowhere"], "expected a URL"),
    (["method.r=1,8", "search.sampler=tpr"], "did you mean 'tpe'"),
    (["train.lr=interval(1,2)", "search.sampler=grid"], "has no step"),
    (["method.r=1,8", "search.rungs=[3]"], "not after step 3"),
    (["method.r=1,8", "search.rungs=[8]"], "expected steps below train.steps=8"),
    (["method.r=1,8", "search.rungs=[4,2]"], "each above the one before"),
    (["method.r=1,8", "search.eta=1"], "search.eta=1".replace("search", "hydra.sweeper")),
    (["method.r=1,8", "search.trials=0"], "hydra.sweeper.trials=0"),
    (["train.steps=8,16", "search.rungs=[4]"], "train.steps is searched"),
    (["method.r=1,8", "evaluate.test=true"], "no run of a search reads the test text"),
    (["method.r=1,8", "rerun=true"], "would begin every rung anew"),
    (["method.r=1,8", "launch.pause_at=4"], "set hydra.sweeper.rungs"),
    (["method.r=1,8", "search.constraints=['memory<=8GiB']"], "memory.peak_bytes"),
    (["method.r=1,8", "search.rungs=[4]",
      "search.objectives=[validation.nll,parameters.trainable]"], "with several objectives"),
    (["method.r=1,8", "search.samplr=tpe"], "samplr"),
    (["method.r=1,8", "search.seeds=[3,0]"], "seed=0 is the search's own"),
    (["method.r=1,8", "search=halfing"], "did you mean 'halving'"),
    (["method.r=1,8", "search.points=5", "search.params={train.lr: 1}"], "set grids"),
    (["method.r=1,8", "search.sampler=cmaes"], "pip install cmaes"),
]  # fmt: skip


def test_bad_input_is_one_line_before_anything_starts(tmp_path):
    basic = ["search", "train.steps=8", "evaluate.interval=4"]
    commands = [
        [*[b for b in basic if b.split("=")[0] not in {t.split("=")[0] for t in own}], *own]
        for own, _ in BAD
    ]
    for (own, said), (status, errors, _) in zip(BAD, several(tmp_path, *commands), strict=True):
        assert status == 2, (own, errors)
        assert said in errors and errors.count("\n") == 1 and "Traceback" not in errors, (
            own,
            errors,
        )
    assert not (tmp_path / "outputs").exists()


# --------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_a_search_of_real_runs(harness, tmp_path):
    options = [o for o in SHORT if not o.startswith(("train.steps", "evaluate.interval"))]
    options += ["train.steps=4", "evaluate.interval=2", "method=lora", "experiment_name=x"]
    command = ["search", *options, "train.lr=1e-4,1e-3,1e-2", "method.r=1,4", "search.rungs=[2]"]
    command += ["search.sampler=grid"]
    done = harness(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = trials(tmp_path)
    assert Counter(row["state"] for row in rows) == {"finished": 2, "stopped": 4}
    for row in rows:
        run_dir = tmp_path / "outputs/x" / row["run"]
        record = run_record.read(run_dir)
        assert not list(run_dir.glob("documents-test*"))
        if row["state"] == "finished":
            assert record["run"]["resumed_at"] == [2]
            found = record["quality"]["validation"]
            nll = found["nll_nats"] / found["num_tokens"]
            assert float(row["nll_at_4"]) == pytest.approx(nll, abs=2e-6)
        else:
            assert record["status"] == "paused" and record["run"]["paused_at"] == 2
    at_rung = sorted(rows, key=lambda row: float(row["nll_at_2"]))
    assert {row["state"] for row in at_rung[:2]} == {"finished"}
    report = harness("report", "outputs/x")  # a table of what has finished, and of nothing else
    assert report.returncode == 0, report.stdout + report.stderr
    with (tmp_path / "outputs/x/results.csv").open() as stream:
        shown = {name for row in csv.DictReader(stream) for name in row.values()}
    for row in rows:
        assert (row["run"] in shown) == (row["state"] == "finished")
    files = [path for row in rows for path in (tmp_path / "outputs/x" / row["run"]).rglob("*")]
    before = [path.stat().st_mtime_ns for path in files]
    assert harness(*command).returncode == 0
    assert [path.stat().st_mtime_ns for path in files] == before  # no run was gone on with
    assert trials(tmp_path) == rows
    best = harness("run", "--config-dir", "outputs/x/search", "experiment=best")
    assert best.returncode == 0 and "test perplexity" in best.stdout, best.stdout + best.stderr
