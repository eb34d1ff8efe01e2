"""What comes out of a search: a table of its candidates, the best one as a file, rates, importance.

All of it is in the experiment's folder, search/: trials.csv with the rungs of every candidate,
experiment/best.yaml, which `harness run` takes, importance.csv, and rates.yaml as conf/rates has
them. Losing candidates stay paused where they are.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import yaml
from omegaconf import OmegaConf

from harness.config import run_config
from harness.config.run_config import RunConfig
from harness.report import table
from harness.results import run_record
from harness.runs import search_rates, study
from harness.runs.search_state import Search, end_of, outermost
from harness.runs.study import Candidate
from harness.system import atomic

SHOWN = 10  # candidates on the terminal
GROUPS = ("model", "data", "targets", "method", "train", "evaluate")


class Results:
    """The files of a search, and what it prints in the end."""

    def __init__(self, folder: Path, settings: Any, first: Sequence[RunConfig]) -> None:
        """`first` is a run of each space.

        Raises:
            ConfigError: the file of rates that was asked for has rates for another setting.
        """
        self.folder, self.settings = folder, settings
        self._shares: list[dict[str, tuple[float, float]]] = []  # of each search
        if settings.file is not None:
            search_rates.check_file(settings.file, first)

    def write(self, searches: Sequence[Search], *, over: bool) -> None:
        """Write down where the candidates are; when all is over also what was found."""
        rows = [row for search in searches for row in table_rows(search)]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        stream = io.StringIO()
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic.write_atomically(self.folder / "trials.csv", stream.getvalue())
        if not over:
            return
        for name, search in zip(self._names(searches), searches, strict=True):
            if (best := search.best()) is not None:
                path = self.folder / "experiment" / f"{name}.yaml"
                path.parent.mkdir(exist_ok=True)
                atomic.write_atomically(path, best_file(search, best, self.folder, name))
        self._write_importance(searches)

    @staticmethod
    def _names(searches: Sequence[Search]) -> list[str]:
        several = len(searches) > 1
        return [f"best_{n + 1}" if several else "best" for n in range(len(searches))]

    def _write_importance(self, searches: Sequence[Search]) -> None:
        lines = ["study,key,share,spread"]
        self._shares = [importance(search) for search in searches]
        for search, shares in zip(searches, self._shares, strict=True):
            for key, (share, spread) in shares.items():
                lines.append(f'"{search.study.name}",{key},{share:.4f},{spread:.4f}')
        if len(lines) > 1:
            atomic.write_atomically(self.folder / "importance.csv", "\n".join(lines) + "\n")

    def show(self, searches: Sequence[Search]) -> None:
        """Print the best candidates, what is to be said of them, and where the files are."""
        for name, search in zip(self._names(searches), searches, strict=True):
            best = search.best()
            rows = table_rows(search)
            if len(searches) == 1:
                _print_rows(rows, search)
            if best is None:
                print(f"{search.study.name}: no candidate came to the end")
                continue
            over = f", mean over {len(search.seeds) + 1} seeds" if search.seeds else ""
            print(
                f"best of {search.study.name}: {_params(best)}, validation nll "
                f"{best.values[0]:.4f} after {search.rungs[-1]} steps{over}"
            )
            for growth in search.study.growths():
                print(f"{growth.key} has grown: {_short(growth.low)} to {_short(growth.high)}")
            for warning in edges(search, best):
                print(f"warning: {warning}")
            command = f"harness run --config-dir {shlex.quote(str(self.folder))} experiment={name}"
            print(f"  {command}")
            if len(searches) == 1:
                _print_importance(search, self._shares[0])
            if rejected := search.study.rejected():
                print(f"{len(rejected)} proposals were no candidates: {rejected[0]}, …")
        search_rates.write(searches, self.folder, self.settings.file)
        spent = sum(row["steps"] for search in searches for row in table_rows(search))
        full = sum(len(search.study.candidates()) * search.rungs[-1] for search in searches)
        share = f", {spent / full:.2f} of all candidates in full" if full else ""
        print(f"{spent:,} optimizer steps{share}; every candidate: {self.folder / 'trials.csv'}")


# ------------------------------------------------------------------------------- the candidates


def table_rows(search: Search) -> list[dict[str, Any]]:
    """A row of trials.csv for every candidate, in the order of proposal."""
    rows: list[dict[str, Any]] = []
    candidates = search.study.candidates()
    front = pareto([c.values for c in candidates if c.values])
    for place, candidate in enumerate(candidates):
        losses = search.found(candidate)
        row: dict[str, Any] = {
            "study": search.study.name,
            "candidate": place,
            "bracket": candidate.bracket,
            "state": _state(candidate, losses),
            "steps": sum(map(_steps, search.run_dirs(candidate, so_far=True))),
        }
        for rung in search.rungs:
            nll = losses.get(rung)
            row[f"nll_at_{rung}"] = "" if nll is None or math.isinf(nll) else f"{nll:.6f}"
        if search.seeds:
            finite = bool(candidate.values) and math.isfinite(candidate.values[0])
            own_nll = (
                [nll for nll in search.by_seed(candidate) if nll is not None] if finite else []
            )
            row["spread"] = f"{stdev(own_nll):.6f}" if finite else ""
        for key, value in zip(search.objectives[1:], candidate.values[1:], strict=False):
            row[key] = value
        if len(search.objectives) > 1:
            row["pareto"] = "yes" if candidate.values in front else ""
        for dimension in search.study.space.dimensions:
            own = candidate.params.get(dimension.name)
            grown = search.study.grown(dimension)
            row[dimension.name] = "" if own is None else grown.rounded(own)
        rows.append(row | {"run": candidate.name})
    return rows


def _state(candidate: Candidate, losses: dict[int, float]) -> str:
    if candidate.state == "complete":
        return "finished"
    if any(math.isinf(nll) for nll in losses.values()):
        return "diverged"
    return "going on" if candidate.state == "running" else "stopped"


def _steps(run_dir: Path) -> int:
    """Optimizer steps that a run has taken."""
    rows = run_record.read_metrics(run_dir)
    return max((int(row["step"]) for row in rows if "train/nll" in row), default=0)


def pareto(values: Sequence[tuple[float, ...]]) -> set[tuple[float, ...]]:
    """Those of which no other is as low in everything and lower in something."""
    return {
        point
        for point in values
        if not any(
            other != point and all(b <= a for a, b in zip(point, other, strict=True))
            for other in values
        )
    }


def edges(search: Search, best: Candidate) -> list[str]:
    """Keys whose best value is at an end of what was searched or tried, in words."""
    messages = []
    candidates = search.study.candidates()
    for own in search.study.space.dimensions:
        if (value := best.params.get(own.name)) is None:
            continue
        dimension = search.study.grown(own)
        tried = {c.params[dimension.name] for c in candidates if dimension.name in c.params}
        shown = f"the best {dimension.name}={_short(value)}"
        if end := end_of(dimension, value):
            messages.append(f"{shown} is at the {end} end of {dimension.text()}")
        elif end := outermost(dimension, value, candidates):
            end = {"lower": "lowest", "upper": "highest"}[end]
            messages.append(f"{shown} is the {end} of the {len(tried)} tried in {dimension.text()}")
    return [f"{text}: a better one may lie beyond it" for text in messages]


def importance(search: Search) -> dict[str, tuple[float, float]]:
    """Each key's share of the variance of nll at the first rung, where all candidates are.

    What diverged there counts as the worst that did not.
    """
    candidates = search.study.candidates()
    losses = {c.number: search.found(c).get(search.rungs[0], math.inf) for c in candidates}
    finite = [nll for nll in losses.values() if math.isfinite(nll)]
    if not finite:
        return {}
    values = [min(losses[c.number], max(finite)) for c in candidates]
    space = search.study.space
    for dimension in space.dimensions:
        space = space.with_dimension(search.study.grown(dimension))
    return study.importance(space, [c.params for c in candidates], values)


def _params(candidate: Candidate) -> str:
    return " ".join(f"{key}={_short(value)}" for key, value in candidate.params.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_rows(rows: list[dict[str, Any]], search: Search) -> None:
    """The best candidates, those that came furthest first."""
    rungs = [f"nll_at_{rung}" for rung in search.rungs]

    def order(row: dict[str, Any]) -> tuple[float, ...]:
        came = [key for key in rungs if row[key]]
        return (-len(came), float(row[came[-1]]) if came else math.inf)

    keys = [dimension.name for dimension in search.study.space.dimensions]
    more = list(search.objectives[1:])
    shown = table.plain(["", "state", *keys], ["steps", *rungs, *more])
    for row in sorted(rows, key=order)[:SHOWN]:
        cells = [_short(row[key]) for key in keys]
        numbers = [row[key][:6] for key in rungs] + [_short(row.get(key, "")) for key in more]
        shown.add_row(str(row["candidate"]), row["state"], *cells, str(row["steps"]), *numbers)
    print()
    table.show(shown)


def _print_importance(search: Search, by_key: dict[str, tuple[float, float]]) -> None:
    if by_key:
        shares = ", ".join(f"{k} {share:.2f} ± {error:.2f}" for k, (share, error) in by_key.items())
        print(
            f"share of the variance at step {search.rungs[0]} that each key explains (fANOVA; "
            f"± over forests): {shares}"
        )


# --------------------------------------------------------------------------- files to go on with


def best_file(search: Search, best: Candidate, folder: Path, name: str) -> str:
    """The best candidate as a file of conf/experiment, which reads the test text, too."""
    overrides, run = search.run_of(best)
    choices = OmegaConf.select(search.compose(overrides), "hydra.runtime.choices")
    values = run_config.to_dict(run)
    train = values["train"] | {"epochs": None}  # which are steps now
    del train["lr_from"]  # the harness's own
    body: dict[str, Any] = {
        "defaults": [{f"override /{group}": choices[group]} for group in GROUPS],
        "experiment_name": f"{run.experiment_name}_{name}",
        "seed": run.seed,
        "save_merged": run.save_merged,
        **{group: values[group] for group in GROUPS},
        "train": train,
        "evaluate": values["evaluate"] | {"test": True},
    }
    rungs = ", ".join(map(str, search.rungs))
    lines = [
        "# @package _global_",
        f"# Question: what does the best of the {len(search.study.candidates())} candidates of "
        f"{search.study.name} come to on the test text?",
        f"# Command:  harness run --config-dir {shlex.quote(str(folder))} experiment={name}",
        f"# Found:    {_params(best)}; validation nll {best.values[0]:.5f} nats per token after "
        f"{search.rungs[-1]} steps; rungs {rungs}, eta {search.eta}",
    ]
    dumped = yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, dumped])
