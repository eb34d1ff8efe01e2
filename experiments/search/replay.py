"""Searches replayed over a recorded grid: what a sampler finds in how many optimizer steps.

    python experiments/search/replay.py                         # conf/rates/gpt2_mini_kjv.yaml
    python experiments/search/replay.py outputs/search_joint    # a folder of runs, with rungs
    python experiments/search/replay.py experiments/search/search_joint.csv    # the same, recorded
    python experiments/search/replay.py … --to=replay-again.csv

No run is trained: a candidate's validation nll is looked up, so that a search can be repeated under
many seeds of its own. The seed of training is the grid's one, so that nothing here is said of how
the optimum moves with it. A proposal that was tried before is free. Halving needs rungs, which
a folder of runs has, and a file of rates has not. Of a file of rates what is searched is one of its
LoRA configurations and one of that configuration's own five rates, about which more was known
beforehand than a search would know.

Writes replay.csv, replay-FOLDER.csv or what --to names beside this file, and prints it with
paired comparisons. Of a folder it also writes FOLDER.csv, the grid by which the replay can be
repeated without the runs.
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from scipy.stats import wilcoxon

from harness.config import rates
from harness.config.method_schema import METHODS
from harness.config.optimizers import OPTIMIZERS
from harness.config.search_space import Dimension, Space
from harness.results import run_record
from harness.runs import halving, study
from harness.runs.search_settings import hyperband_size

SEEDS = 100  # of the search itself
SAMPLERS = ("random", "quasi_random", "tpe")
ETA = 3
Point = tuple[str, ...]  # a value for each key; the last one is the place of the rate
HERE = Path(__file__).parent
NLL = "nll_at_"  # and a rung: a column of a recorded grid


@dataclass(frozen=True)
class Table:
    """A recorded grid: validation nll, nats per token, by rung; infinite where it diverged."""

    name: str
    keys: tuple[str, ...]
    found: Mapping[Point, Mapping[int, float]]
    rungs: tuple[int, ...]  # the last is the end
    shown: Mapping[Point, float]  # the rate of each point

    @property
    def end(self) -> Mapping[Point, float]:
        """Return the nll at the end."""
        return {point: at[self.rungs[-1]] for point, at in self.found.items()}


def of_rates(name: str) -> Table:
    """LoRA's entries of a file of conf/rates; a rate without an nll is infinite."""
    tuned = [t for t in rates.read(name).tuned if t.family == "lora" and not t.variant]
    steps = int(rates.read(name).setting["train.steps"])
    found: dict[Point, dict[int, float]] = {}
    shown: dict[Point, float] = {}
    for t in tuned:
        for place, (lr, nll) in enumerate(sorted(t.grid.items())):
            point = (str(t), str(place))
            found[point] = {steps: math.inf if nll is None else nll}
            shown[point] = lr
    return Table(name, ("configuration", "train.lr"), found, (steps,), shown)


def of_runs(folder: Path) -> Table:
    """The finished and diverged runs of a folder, with every validation as a possible rung."""
    read: dict[tuple[str, str, str, float], dict[int, float]] = {}
    last = 0
    for run_dir, record in run_record.collect(folder):
        config = record["config"]
        method, train = config["method"], config["train"]
        key = (config["targets"]["name"], str(method["r"]), str(method["alpha"]), train["lr"])
        rows = run_record.read_metrics(run_dir)
        read[key] = {
            row["step"]: row["eval/validation/nll"] or math.inf
            for row in rows
            if row["step"] and "eval/validation/nll" in row
        }
        last = max(last, train["steps"])
    every = sorted({key[-1] for key in read})
    rungs = sorted({step for at in read.values() for step in at} | {last})
    found, shown = {}, {}
    for (*others, lr), at in read.items():
        lowest, so_far = {}, math.inf
        for rung in rungs:
            so_far = min(so_far, at[rung]) if rung in at else math.inf
            lowest[rung] = so_far
        point = (*others, str(every.index(lr)))
        found[point], shown[point] = lowest, lr
    keys = ("targets", "method.r", "method.alpha", "train.lr")
    if len(found) < math.prod(len({point[i] for point in found}) for i in range(len(keys))):
        raise SystemExit(f"{folder} has {len(found)} runs, and not every point of its grid")
    return Table(folder.name, keys, found, tuple(rungs), shown)


def write_grid(table: Table, path: Path) -> None:
    """Record a table: a line for each point, with its rate and its nll at every rung."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*table.keys, *(f"{NLL}{rung}" for rung in table.rungs)])
        for point in sorted(table.found, key=lambda point: (*point[:-1], table.shown[point])):
            nlls = [f"{table.found[point][rung]:.6f}" for rung in table.rungs]
            writer.writerow([*point[:-1], f"{table.shown[point]:g}", *nlls])


def of_grid(path: Path) -> Table:
    """The table that `write_grid` has recorded."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    keys = tuple(key for key in rows[0] if not key.startswith(NLL))
    rungs = tuple(int(key.removeprefix(NLL)) for key in rows[0] if key.startswith(NLL))
    every = sorted({float(row[keys[-1]]) for row in rows})
    found, shown = {}, {}
    for row in rows:
        lr = float(row[keys[-1]])
        point = (*(row[key] for key in keys[:-1]), str(every.index(lr)))
        found[point] = {rung: float(row[f"{NLL}{rung}"]) for rung in rungs}
        shown[point] = lr
    return Table(path.stem, keys, found, rungs, shown)


def read(arguments: Sequence[str]) -> Table:
    """The table that the command line names; a folder's is recorded beside this file."""
    if not arguments:
        return of_rates("gpt2_mini_kjv")
    path = Path(arguments[0])
    if path.suffix == ".csv":
        return of_grid(path)
    recorded = HERE / f"{path.name}.csv"
    write_grid(of_runs(path), recorded)
    return of_grid(recorded)  # which gives the same replay as the record does later


def space_of(table: Table) -> Space:
    """Every key of the table with its values; a rate is its place, so that order is known."""
    dimensions = []
    for place, key in enumerate(table.keys[:-1]):
        values = tuple(dict.fromkeys(point[place] for point in table.found))
        if len(values) > 1:
            dimensions.append(Dimension(key, values))
    places = len({point[-1] for point in table.found})
    dimensions.append(Dimension(table.keys[-1], (), 0, places - 1, integer=True))
    return Space((), tuple(dimensions))


def search(
    table: Table, sampler: str, seed: int, rungs: Sequence[int], batch: int, most_steps: int
) -> list[tuple[int, float]]:
    """Optimizer steps so far and the lowest nll at the end so far, after every bracket.

    `batch` candidates are proposed at a time and halved at `rungs`, until `most_steps` are spent or
    the grid is exhausted.
    """
    space = space_of(table)
    lora = METHODS["lora"], OPTIMIZERS["adamw"], ""
    own = study.Study(
        optuna.storages.InMemoryStorage(), "replay", space, lambda _: lora, sampler=sampler,
        seed=seed, objectives=1, batch=batch, rules={},
    )  # fmt: skip
    fixed = dict(zip(table.keys, next(iter(table.found)), strict=True))
    tried: dict[str, Point] = {}

    def judge(overrides: list[str]) -> tuple[str, str | None]:
        values = fixed | dict(text.split("=", 1) for text in overrides)
        point = tuple(values[key] for key in table.keys)
        name = " ".join(point)
        if name in tried:
            return name, "tried before"
        tried[name] = point
        return name, None

    spent, best = 0, math.inf
    path: list[tuple[int, float]] = []
    for bracket in itertools.count():
        for _ in range(batch):
            if not own.ask(judge, bracket=bracket, size=batch):
                break
        going = [c for c in own.candidates() if c.bracket == bracket]
        if not going:
            return path
        found: dict[int, dict[int, float]] = {c.number: {} for c in going}
        while todo := halving.todo(found, rungs, ETA):
            for number, step in todo.items():
                (candidate,) = (c for c in going if c.number == number)
                spent += step - max(found[number], default=0)
                found[number][step] = table.found[tried[candidate.name]][step]
        for candidate in going:
            for step, nll in found[candidate.number].items():
                if math.isfinite(nll):
                    own.report(candidate, step, nll)
            end = found[candidate.number].get(rungs[-1], math.inf)
            own.tell(candidate, [end] if math.isfinite(end) else None)
            best = min(best, end)
        path.append((spent, best))
        if spent >= most_steps:
            return path
    return path


def at_steps(path: Sequence[tuple[int, float]], steps: int) -> float:
    """The lowest nll of what was finished within so many steps."""
    return min((best for spent, best in path if spent <= steps), default=math.inf)


def plans(table: Table) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """What is compared: name -> sampler, rungs and candidates of a bracket."""
    found = {sampler: (sampler, table.rungs[-1:], 1) for sampler in SAMPLERS}
    if len(table.rungs) > 1:
        rungs = [r for r in table.rungs[:-1] if r * ETA <= table.rungs[-1]][-1:]
        halved = (*rungs, table.rungs[-1])
        size = hyperband_size(len(halved), len(halved) - 1, ETA)
        found |= {f"{s} + halving": (s, halved, size) for s in SAMPLERS}
    return found


def main(arguments: Sequence[str]) -> None:
    """Replay every plan under every seed, and write what it found at equal steps."""
    named = [a.removeprefix("--to=") for a in arguments if a.startswith("--to=")]
    arguments = [a for a in arguments if not a.startswith("--to=")]
    table = read(arguments)
    end, last = table.end, table.rungs[-1]
    whole, lowest = len(end) * last, min(end.values())
    finite = sorted(nll for nll in end.values() if math.isfinite(nll))
    budgets = [round(share * whole / last) * last for share in (0.1, 0.2, 0.3, 0.5)]
    best = min(end, key=lambda point: end[point])
    shown = dict(zip(table.keys, best, strict=True)) | {"train.lr": table.shown[best]}
    lost = len(end) - len(finite)
    print(f"{table.name}: {len(end)} points, {lost} without an nll; {whole} steps")
    print(f"best of the grid: {shown}, {lowest:.4f}; next {finite[1]:.4f}, median "
          f"{finite[len(finite) // 2]:.4f}")  # fmt: skip
    worst = finite[-1]
    found: dict[tuple[str, int], np.ndarray] = {}
    rows = []
    for name, (sampler, rungs, batch) in plans(table).items():
        paths = [search(table, sampler, s, rungs, batch, max(budgets)) for s in range(SEEDS)]
        for steps in budgets:
            regret = np.array([min(at_steps(path, steps), worst) - lowest for path in paths])
            found[name, steps] = regret
            error = regret.std(ddof=1) / math.sqrt(SEEDS)
            rows.append({
                "plan": name, "steps": steps, "share": f"{steps / whole:.2f}",
                "regret": f"{regret.mean():.4f}", "standard_error": f"{error:.4f}",
                "median": f"{np.median(regret):.4f}", "found_best": f"{(regret == 0).mean():.2f}",
            })  # fmt: skip
    usual = "replay.csv" if not arguments else f"replay-{table.name}.csv"
    target = HERE / (named[-1] if named else usual)
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print("paired over seeds of the search, against random; Holm over all:")
    others = [key for key in found if key[0] != "random"]
    tests = []
    for name, steps in others:
        apart = found[name, steps] - found["random", steps]
        p = 1.0 if not apart.any() else float(wilcoxon(apart).pvalue)
        tests.append((p, name, steps, apart.mean(), apart.std(ddof=1) / math.sqrt(SEEDS)))
    held = 0.0
    for place, (p, name, steps, mean, error) in enumerate(sorted(tests)):
        held = min(1.0, max(held, p * (len(tests) - place)))
        print(f"{name} at {steps}: {mean:+.4f} ± {1.96 * error:.4f} nats, p {held:.2g}")
    print(f"saved: {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
