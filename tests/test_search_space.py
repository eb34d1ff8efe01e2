"""The space of a search, who goes on in it, and what Optuna proposes, without any run."""

import itertools
import math
import random

import optuna
import pytest

from harness.config import search_space
from harness.config.errors import ConfigError
from harness.config.method_schema import METHODS
from harness.config.optimizers import OPTIMIZERS
from harness.config.search_space import Dimension
from harness.runs import halving, search_limits, study
from harness.runs.search_results import pareto
from harness.runs.search_state import end_of, lowest, outermost


def method_of(overrides):
    names = [text.partition("=")[2] for text in overrides if text.startswith("method=")]
    return METHODS[names[-1] if names else "lora"], OPTIMIZERS["adamw"]


# --------------------------------------------------------------------------- spaces


@pytest.mark.parametrize(
    ("as_override", "as_mapping", "expected"),
    [
        ("tag(log,interval(1e-4,1e-1))", {"low": 1e-4, "high": 0.1, "log": True},
         Dimension("k", (), 1e-4, 0.1, log=True)),
        ("interval(0,1)", {"low": 0.0, "high": 1.0}, Dimension("k", (), 0.0, 1.0)),
        ("tag(log,int(interval(1,64)))", {"low": 1, "high": 64, "log": True, "integer": True},
         Dimension("k", (), 1, 64, log=True, integer=True)),
        ("range(8,65,8)", {"low": 8, "high": 64, "step": 8, "integer": True},
         Dimension("k", (), 8, 64, step=8, integer=True)),
        ("range(0,1,0.25)", {"low": 0.0, "high": 0.75, "step": 0.25},
         Dimension("k", (), 0.0, 0.75, step=0.25)),
        ("1r,2r", {"choices": ["1r", "2r"]}, Dimension("k", ("1r", "2r"))),
        ("choice(1,8,8)", {"choices": [1, 8]}, Dimension("k", ("1", "8"))),
        ("[a,b],[c]", None, Dimension("k", ("[a,b]", "[c]"))),
        ("null,x", {"choices": [None, "x"]}, Dimension("k", ("null", "x"))),
    ],
)  # fmt: skip
def test_both_ways_to_write_a_dimension_are_one(as_override, as_mapping, expected):
    ways = [{"k": as_override}, [f"k={as_override}"], *([{"k": as_mapping}] if as_mapping else [])]
    for given in ways:
        assert search_space.read(given).dimensions == (expected,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train.lr": "interval(2,1)"}, "train.lr: interval 2 to 1 is empty"),
        ({"train.lr": "interval(1,1)"}, "is empty"),
        ({"train.lr": "tag(log,interval(0,1))"}, "on a log scale: expected numbers above 0"),
        ({"train.lr": {"low": -1, "high": 1, "log": True}}, "on a log scale"),
        ({"train.lr": {"low": 1, "high": 2, "step": 3}}, "step 3: expected a step above 0"),
        ({"train.lr": {"low": 1, "high": 2, "step": 0}}, "expected a step above 0"),
        ({"train.lr": {"low": 1, "high": 2, "step": 0.5, "log": True}}, "a log scale has no step"),
        ({"train.lr": {"low": 1, "hihg": 2}}, "did you mean 'high'"),
        ({"train.lr": {"low": 1}}, "has low and high"),
        ({"train.lr": {"low": "a", "high": 2}}, "low=a: expected a number"),
        ({"train.lr": {"low": 1, "high": math.inf}}, "finite"),
        ({"method.r": {"low": 1, "high": 2.5, "integer": True}}, "whole numbers"),
        ({"train.lr": {"choices": []}}, "expected choices alone"),
        ({"train.lr": {"choices": [1], "log": True}}, "expected choices alone"),
        ({"train.lr": "tag(log,choice(1,2))"}, "tag log goes with an interval"),
        ({"train.lr": "tag(lgo,interval(1,2))"}, "the only tag is log"),
        ({"seed": "0,1", "train.lr": "1,2"}, "seed=0,1 cannot be searched: the luckiest"),
        ({"train.lr": "1e-3"}, "no key has several values"),
        ({}, "a search of nothing"),
    ],
)
def test_a_space_that_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        search_space.read(given)


SPACE = search_space.read(
    {"method": "lora,full,none", "method.r": "1,8", "train.lr": "1e-3,1e-2,1e-1"},
    ["targets=all", "data=kjv"],
)


def test_a_key_goes_only_to_the_methods_that_have_it():
    points = list(SPACE.points(method_of))
    assert len(points) == 2 * 3 + 3 + 3  # none has a rate that moves nothing, and the same run
    for point in points:
        assert ("method.r" in point) == (point["method"] == "lora")
    full = SPACE.assemble(
        lambda d: {"method": "full", "train.lr": "0.1"}[d.name], method_of
    )  # r is not asked for, and the fixed targets are LoRA's
    assert full == ["data=kjv", "method=full", "train.lr=0.1"]
    # What no method of the space has is no condition, and stays for composing to refuse.
    wrong = search_space.read({"method": "lora,full", "method.rr": "1,2"})
    assert "method.rr=1" in wrong.assemble(lambda d: d.choices[-1 if d.name == "method" else 0],
                                           method_of)  # fmt: skip


def test_corners_meet_every_choice_and_both_ends_of_an_interval():
    space = search_space.read(
        {"method": "lora,full", "method.r": "1,8,64", "train.lr": "interval(1,2)"}
    )
    texts = list(space.corners(method_of))
    met = {text for one in texts for text in one}
    assert met == {
        "method=lora", "method=full", "method.r=1", "method.r=8", "method.r=64", "train.lr=1.0",
        "train.lr=2.0",
    }  # fmt: skip
    assert ["method=full", "train.lr=2.0"] in texts and len(texts) == 6


def test_the_command_line_replaces_a_spaces_value():
    space = search_space.read({"train.lr": "1,2", "method.r": 8}, ["train.lr=3,4", "+method.r=9"])
    assert space.dimensions == (Dimension("train.lr", ("3", "4")),)
    assert space.fixed == ("+method.r=9",)


# --------------------------------------------------------------------------- halving


def simulate(curves, rungs, eta):
    """Train as `halving.todo` says; returns what was found, and the steps of every candidate."""
    found, steps = {candidate: {} for candidate in curves}, dict.fromkeys(curves, 0)
    while going := halving.todo(found, rungs, eta):
        for candidate, rung in going.items():
            assert steps[candidate] < rung  # no step twice
            steps[candidate] = rung
            found[candidate][rung] = curves[candidate][rung]
    return found, steps


def by_hand(curves, rungs, eta):
    """Successive halving as a loop, for candidates that do not diverge: who comes to each rung."""
    going, came = list(curves), []
    for rung in rungs:
        came.append(set(going))
        going = sorted(going, key=lambda c: (curves[c][rung], c))[: max(1, len(going) // eta)]
    return came


@pytest.mark.parametrize("seed", range(30))
def test_halving_is_the_loop_of_the_paper(seed):
    chance = random.Random(seed)
    rungs = sorted(chance.sample(range(1, 100), chance.randint(1, 4)))
    eta, number = chance.randint(2, 4), chance.randint(1, 40)
    curves = {c: {rung: chance.choice([1.0, 2.0, chance.random()]) for rung in rungs}
              for c in range(number)}  # fmt: skip
    found, steps = simulate(curves, rungs, eta)
    for rung, came in zip(rungs, by_hand(curves, rungs, eta), strict=True):
        assert {c for c in curves if rung in found[c]} == came
    assert sum(steps.values()) == halving.most_steps(number, rungs, eta)


def test_halving_of_27_by_3_is_the_textbooks():
    curves = {c: dict.fromkeys((1, 3, 9, 27), float(c)) for c in range(27)}
    found, steps = simulate(curves, (1, 3, 9, 27), 3)
    assert sorted(steps.values(), reverse=True) == [27, 9, 9, *[3] * 6, *[1] * 18]
    assert found[0][27] == 0.0


@pytest.mark.parametrize("seed", range(30))
def test_what_diverges_never_goes_on_and_the_next_best_take_its_place(seed):
    chance = random.Random(seed)
    rungs, number = (2, 4, 8), chance.randint(1, 12)
    curves = {}
    for candidate in range(number):
        dies = chance.choice([2, 4, 8, None, 4, 8])
        curves[candidate] = {
            rung: math.inf if dies and rung >= dies else chance.random() for rung in rungs
        }
    found, _ = simulate(curves, rungs, 2)
    for candidate in curves:
        reached = list(found[candidate].values())
        assert math.inf not in reached[:-1]
    survivors = [c for c in curves if math.isfinite(curves[c][8])]
    finished = [c for c in curves if math.isfinite(found[c].get(8, math.inf))]
    assert bool(finished) == bool(survivors)  # one that can come to the end does


# --------------------------------------------------------------------------- proposals


def opened(tmp_path, space, sampler, **more):
    storage = study.open_storage(more.pop("storage", None), tmp_path)
    settings = {"seed": 0, "objectives": 1, "batch": 4, "rules": {"a": "1"}} | more
    return study.Study(storage, "s", space, method_of, sampler=sampler, **settings)


def asked(found, number, bracket=0):
    for _ in range(number):
        found.ask(lambda texts: (" ".join(texts), None), bracket=bracket, size=number)
    return [candidate.overrides for candidate in found.candidates()]


WIDE = search_space.read(
    {
        "method": "lora,full",
        "method.r": "tag(log,int(interval(1,64)))",
        "train.lr": "tag(log,interval(1e-4,1e-1))",
    }
)


@pytest.mark.parametrize("sampler", ["random", "quasi_random", "tpe", "gp", "nsga2"])
def test_a_search_that_is_opened_again_proposes_what_it_would_have_proposed(tmp_path, sampler):
    (tmp_path / "a").mkdir()
    whole = opened(tmp_path / "a", WIDE, sampler)
    expected = []
    for bracket in range(3):
        expected = asked(whole, 4, bracket)
        for candidate in whole.candidates()[-4:]:
            whole.report(candidate, 2, candidate.params["train.lr"])
            whole.tell(candidate, [candidate.params["train.lr"]])
    for bracket in range(3):
        for number in range(4):
            again = opened(tmp_path / "b", WIDE, sampler)
            if number == 2:  # a kill between a proposal and its becoming a candidate
                with pytest.raises(KeyboardInterrupt):
                    again.ask(interrupted, bracket=bracket, size=4)
                again._study.ask()
                again = opened(tmp_path / "b", WIDE, sampler)
                again.drop_unfinished()
            asked(again, 1, bracket)
        for candidate in again.candidates()[-4:]:
            again.report(candidate, 2, candidate.params["train.lr"])
            again.tell(candidate, [candidate.params["train.lr"]])
    found = [candidate.overrides for candidate in again.candidates()]
    assert found == expected and len(set(found)) > 6
    for candidate in again.candidates():
        assert 1e-4 <= candidate.params["train.lr"] <= 0.1
        assert ("method.r" in candidate.params) == ("method=lora" in candidate.overrides)
        assert candidate.at == {2: candidate.params["train.lr"]} and candidate.state == "complete"


def interrupted(texts):
    raise KeyboardInterrupt


def test_a_grid_is_every_point_once(tmp_path):
    found = opened(tmp_path, SPACE, "grid")
    overrides = asked(found, 12)
    assert len(set(overrides)) == 12 == found.grid_size
    assert not found.ask(lambda texts: ("x", None), bracket=0, size=1)
    endless = search_space.read({"train.lr": "interval(1,2)"})
    with pytest.raises(ConfigError, match=r"train.lr=1 to 2 has no step"):
        opened(tmp_path / "other", endless, "grid")


def test_quasi_random_points_are_a_sobol_sequence(tmp_path):
    space = search_space.read({"a": "interval(0,1)", "b": "tag(log,interval(1,256))"})
    found = opened(tmp_path, space, "quasi_random")
    asked(found, 16)
    for key, scaled in (("a", lambda x: x), ("b", lambda x: math.log(x, 256))):
        places = [int(16 * scaled(c.params[key])) for c in found.candidates()]
        assert sorted(places) == list(range(16))  # a point in each sixteenth of every key


def test_proposals_that_are_no_candidates_are_told_of_and_not_counted(tmp_path):
    found = opened(tmp_path, WIDE, "random")

    def judge(texts):
        return " ".join(texts), "too large" if "method=lora" in texts else None

    for _ in range(3):
        assert found.ask(judge, bracket=0, size=3)
    assert [c.params["method"] for c in found.candidates()] == ["full"] * 3
    assert set(found.rejected()) == {"too large"}
    assert not found.ask(lambda texts: ("x", "never"), bracket=0, size=1)


@pytest.mark.parametrize("sampler", ["random", "quasi_random", "tpe", "gp", "nsga2"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_space_is_exhausted_when_its_points_were_proposed(tmp_path, monkeypatch, sampler, listed):
    if not listed:  # as a space with too many points to list them, or with an interval
        monkeypatch.setattr(study, "COUNTABLE", 1)
    choices = {
        "method.r": "int(interval(1,6))",
        "method.alpha": "1,2,4",
        "train.max_grad_norm": "0.5,1",
    }
    found = opened(tmp_path, search_space.read(choices), sampler)
    names: set[str] = set()

    def judge(texts):
        name = " ".join(texts)
        if name in names:
            return name, "tried before"
        names.add(name)
        return name, None

    while found.ask(judge, bracket=len(names), size=1):
        candidate = found.candidates()[-1]
        found.tell(candidate, [abs(candidate.params["method.r"] - 3)])
    points = 6 * 3 * 2
    assert len(found.candidates()) == len(names) <= points
    assert len(names) == points if listed else len(names) > 0.8 * points


def test_a_study_of_another_search_is_refused_with_the_difference(tmp_path):
    opened(tmp_path, WIDE, "random")
    opened(tmp_path, WIDE, "random")
    with pytest.raises(ConfigError, match=r"a: 1 then, 2 now\): choose another experiment_name"):
        opened(tmp_path, WIDE, "random", rules={"a": "2"})


def test_a_study_from_before_keys_were_renamed_is_the_same(tmp_path):
    opened(tmp_path, WIDE, "random", rules={"fixed": "evaluate.every=20 seed=1"})
    opened(tmp_path, WIDE, "random", rules={"fixed": "evaluate.interval=20 seed=1"})
    with pytest.raises(ConfigError, match=r"fixed: evaluate\.every=20 seed=1 then, "):
        opened(tmp_path, WIDE, "random", rules={"fixed": "evaluate.interval=30 seed=1"})


def test_a_journal_that_a_crash_has_cut_goes_on(tmp_path):
    before = asked(opened(tmp_path, WIDE, "random"), 3)
    with (tmp_path / "journal.log").open("a") as stream:
        stream.write('{"op_code": 4, "wor')
    again = opened(tmp_path, WIDE, "random")
    assert asked(again, 1)[:3] == before and len(again.candidates()) == 4


def test_storage_by_url_and_what_cannot_be_reached(tmp_path):
    url = f"sqlite:///{tmp_path}/search.db"
    before = asked(opened(tmp_path, WIDE, "random", storage=url), 3)
    assert asked(opened(tmp_path, WIDE, "random", storage=url), 0) == before
    assert not (tmp_path / "journal.log").exists()
    for wrong, said in [
        ("sqlite:////nowhere/at/all/x.db", "cannot be opened .*unable to open database file"),
        ("nonsense://x", "cannot be opened"),
        ("search.db", "expected a URL, as sqlite:///search.db"),
    ]:
        with pytest.raises(ConfigError, match=said):
            opened(tmp_path, WIDE, "random", storage=wrong)


def test_tpe_finds_a_planted_optimum_sooner_than_random(tmp_path):
    space = search_space.read(
        {
            "train.lr": "tag(log,interval(1e-6,1))",
            "method.r": "1,2,4,8",
            "train.max_grad_norm": "0.5,1,2",
        }
    )

    def loss(params):
        apart = math.log10(params["train.lr"] / 3e-4)
        return apart**2 + (params["method.r"] != "4") + (params["train.max_grad_norm"] != "1")

    best = {}
    for sampler, seed in itertools.product(("random", "tpe"), range(3)):
        found = opened(tmp_path / f"{sampler}{seed}", space, sampler, seed=seed)
        for number in range(50):
            asked(found, 1, number)
            candidate = found.candidates()[-1]
            found.tell(candidate, [loss(candidate.params)])
        best[sampler, seed] = min(c.values[0] for c in found.candidates())
    assert all(best["tpe", seed] < 0.1 for seed in range(3)), best
    assert sum(best["tpe", s] for s in range(3)) < sum(best["random", s] for s in range(3))


# --------------------------------------------------------------------------- what comes out


@pytest.mark.slow
def test_importance_is_of_the_key_that_matters():
    space = search_space.read({"a": "interval(0,1)", "b": "interval(0,1)", "c": "x,y"})
    chance = random.Random(0)
    params = [
        {"a": chance.random(), "b": chance.random(), "c": chance.choice("xy")} for _ in range(60)
    ]
    found = study.importance(space, params, [10 * one["a"] + 0.1 * one["b"] for one in params])
    assert next(iter(found)) == "a" and found["a"][0] > 0.9
    assert sum(share for share, _ in found.values()) <= 1 + 1e-9
    assert all(0 <= spread < 0.1 for _, spread in found.values())
    trial = [optuna.trial.create_trial(params=p, value=10 * p["a"] + 0.1 * p["b"], distributions={
        "a": optuna.distributions.FloatDistribution(0, 1),
        "b": optuna.distributions.FloatDistribution(0, 1),
        "c": optuna.distributions.CategoricalDistribution(("x", "y")),
    }) for p in params]  # fmt: skip
    own = optuna.create_study()
    own.add_trials(trial)
    shares = [
        optuna.importance.FanovaImportanceEvaluator(seed=seed).evaluate(own)["a"]
        for seed in range(10)
    ]
    assert found["a"][0] == pytest.approx(sum(shares) / 10)
    # A key that some candidates have not is left out.
    params[0] = {"a": 0.5, "c": "x"}
    assert set(study.importance(space, params, list(range(60)))) == {"a", "c"}


@pytest.mark.parametrize(
    ("dimension", "value", "end"),
    [
        (Dimension("k", (), 1e-4, 1e-1, log=True), 1.2e-4, "lower"),
        (Dimension("k", (), 1e-4, 1e-1, log=True), 9e-2, "upper"),
        (Dimension("k", (), 1e-4, 1e-1, log=True), 1e-3, None),
        (Dimension("k", (), 1e-4, 1e-1), 1e-3, "lower"),
        (Dimension("k", (), 1, 64, integer=True), 64, "upper"),
        (Dimension("k", ("1", "8", "64")), "64", "upper"),
        (Dimension("k", ("64", "8", "1")), "8", None),
        (Dimension("k", ("1", "8")), "8", None),
        (Dimension("k", ("a", "b", "c")), "c", None),
    ],
)
def test_a_best_at_an_end_is_seen(dimension, value, end):
    assert end_of(dimension, value) == end


@pytest.mark.parametrize(
    ("text", "best", "end"),
    [
        ("interval(0,10)", 8.0, "upper"), ("interval(0,10)", 2.0, "lower"),
        ("interval(0,10)", 5.0, None), ("lora,full,udv", "full", None), ("1,8,64", "64", None),
    ],
)  # fmt: skip
def test_the_outermost_that_was_tried_is_of_an_interval(text, best, end):
    space = search_space.read({"k": text})
    values: tuple[str | float, ...] = space.dimensions[0].choices or (2.0, 5.0, 8.0)
    candidates = [
        study.Candidate(n, (), str(n), 0, 3, {"k": value}, "complete", {}, ())
        for n, value in enumerate(values)
    ]
    assert outermost(space.dimensions[0], best, candidates) == end


def test_the_pareto_front_is_what_nothing_beats():
    values = [(1.0, 5.0), (2.0, 4.0), (2.0, 5.0), (3.0, 1.0), (3.0, 1.0), (4.0, 1.0)]
    assert pareto(values) == {(1.0, 5.0), (2.0, 4.0), (3.0, 1.0)}


def test_the_lowest_nll_is_of_what_was_trained():
    rows = [{"step": s, "eval/validation/nll": v} for s, v in [(0, 1.0), (2, 3.0), (4, 2.0)]]
    rows += [{"step": 6, "eval/validation/nll": None}, {"step": 1, "train/nll": 0.0}]
    assert [lowest(rows, step) for step in (2, 4, 6)] == [3.0, 2.0, 2.0]
    assert lowest(rows[:1], 8) == 1.0 and lowest([], 8) == math.inf


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory.peak_bytes<8GiB", "expected KEY<=NUMBER"),
        ("memory.peak_bytes=8GiB", "expected KEY<=NUMBER"),
        ("memory.peek_bytes<=8GiB", "did you mean 'memory.peak_bytes'"),
        ("parameters.trainable<=many", "expected a size"),
    ],
)
def test_a_constraint_that_no_plan_decides_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        search_limits.read(text)


def test_a_constraint_is_decided_by_the_plan(make_run):
    run = make_run("method=lora", "method.r=8", "targets=all", "train.steps=4")
    limit = search_limits.read
    assert search_limits.why_not(run, [limit("parameters.trainable <= 131072")]) is None
    said = search_limits.why_not(run, [limit("parameters.trainable<=131071")])
    assert said == "parameters.trainable=131,072 is above 131,071"
    assert "memory.peak_bytes" in search_limits.why_not(run, [limit("memory.peak_bytes<=1MiB")])
    assert search_limits.why_not(run, [limit("memory.peak_bytes<=8GiB")]) is None
