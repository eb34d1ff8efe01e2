"""Learning rates that a search found, as a file of conf/rates has them, with the evidence.

A configuration, without its rate, is an entry: validation nll by rate, and where halving has
stopped a rate, what it had at its rungs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from harness.config import rates
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.report import lr_table
from harness.results import run_record
from harness.results.record_types import Record
from harness.runs.search_settings import AUTO
from harness.runs.search_state import Search
from harness.runs.study import Candidate
from harness.system import atomic

FEWEST = 3  # rates of a configuration, for a file of them


def write(searches: Sequence[Search], folder: Path, file: str | None) -> None:
    """Write and show the rates by configuration, where train.lr was searched."""
    if not any(d.name == "train.lr" for s in searches for d in s.study.space.dimensions):
        return
    tuned, settings, records = tuned_rates(searches)
    if not tuned:
        print(f"no rates were written: no configuration has {FEWEST} rates and a best")
        return
    if any(setting != settings[0] for setting in settings):
        print("no rates were written: a file of rates is for one setting, and these are several")
        return
    origin = made_by(records)
    if seeds := searches[0].seeds:
        own = ", ".join(map(str, (settings[0]["seed"], *seeds)))
        origin += f", nll the mean over seeds {own}"
    tuned = [replace(entry, made=origin) for entry in tuned]
    kept: tuple[rates.Tuned, ...] = ()
    path = folder / "rates.yaml"
    name = None if file is None else name_of(file, settings[0])
    if name is not None:
        path, kept = target(name, settings[0])
    new = {entry.key for entry in tuned}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = rates.text(settings[0], [t for t in kept if t.key not in new] + tuned)
    atomic.write_atomically(path, text)
    lr_table.show(tuned)
    print(f"saved: {path}; train.lr=tuned train.rates={name or path} reads it")


def check_file(file: str, first: Sequence[RunConfig]) -> None:
    """Refuse a file whose rates would not be of one setting; `first` is a run of each space.

    Raises:
        ConfigError: the spaces, or the file that is there, have different settings.
    """
    setting = setting_of(first[0])
    for run in first:
        if apart := _difference(setting, setting_of(run)):
            raise ConfigError(f"one file of rates is for one setting: {apart}")
    target(name_of(file, setting), setting)


def name_of(file: str, setting: dict[str, Any]) -> str:
    """The name of a file of conf/rates: as given, or of `auto` the model's and the text's."""
    return f"{setting['model.name']}_{setting['data.name']}" if file == AUTO else file


def tuned_rates(
    searches: Sequence[Search],
) -> tuple[list[rates.Tuned], list[dict[str, Any]], list[Record]]:
    """Rates of every configuration that has enough of them and a best; their settings, records."""
    grids: dict[tuple[Any, ...], tuple[RunConfig, dict[float, float | None]]] = {}
    stopped: dict[tuple[Any, ...], dict[float, dict[int, float]]] = {}
    settings, records = [], []
    for search in searches:
        for candidate in search.study.candidates():
            _, run = search.run_of(candidate)
            if not run.method.trains:
                continue
            key = rates.tuned_of(run.method, run.targets.name, {}, "", run.optimizer).key
            _, grid = grids.setdefault(key, (run, {}))
            record = run_record.read(search.folder / candidate.name) or {}
            records.append(record)
            settings.append(setting_of(run))
            losses = search.found(candidate)
            grid[run.train.lr] = _nll(search, candidate) if candidate.values else None
            if not candidate.values and all(math.isfinite(nll) for nll in losses.values()):
                stopped.setdefault(key, {})[run.train.lr] = losses
    tuned = []
    for key, (run, grid) in grids.items():
        if len(grid) >= FEWEST and all(nll is None for nll in grid.values()):
            what = rates.tuned_of(run.method, run.targets.name, {}, "", run.optimizer)
            print(f"no rate of {what}: every one diverged, or never was below its start")
        elif len(grid) >= FEWEST:
            entry = rates.tuned_of(run.method, run.targets.name, grid, "", run.optimizer)
            tuned.append(replace(entry, stopped=stopped.get(key, {})))
    return tuned, settings, records


def _nll(search: Search, candidate: Candidate) -> float | None:
    """Validation nll of a candidate's best checkpoint, the mean over its seeds; None without one
    that is below its start.
    """
    losses = [
        rates.found_by(run_record.read(run_dir) or {}) for run_dir in search.run_dirs(candidate)
    ]
    known = [nll for nll in losses if nll is not None]
    return mean(known) if len(known) == len(losses) else None


def setting_of(run: RunConfig) -> dict[str, Any]:
    """What holds of all rates of a file: model, text, training and the seed of a search's runs."""
    return rates.setting_of(run.model, run.data, vars(run.train)) | {"seed": run.seed}


def made_by(records: Iterable[Record]) -> str:
    """Return the commits and the hardware of runs, and today's date, in words."""
    all_records = list(records)
    parts = []
    for path in ("environment.commit", "environment.hardware.cpu"):
        values = dict.fromkeys(str(run_record.get(record, path)) for record in all_records)
        parts.append(" and ".join(value for value in values if value != "None") or "unknown")
    return f"{parts[0]} on {parts[1]}, {time.strftime('%Y-%m-%d')}"


def target(name: str, setting: dict[str, Any]) -> tuple[Path, tuple[rates.Tuned, ...]]:
    """The file that a search of rates writes, and the rates that are there already.

    Raises:
        ConfigError: they are for another setting.
    """
    path, own = rates.path_of(name), rates.own_path(name)
    if not path.exists():
        return own, ()
    existing = rates.read(str(path))
    if apart := _difference(existing.setting, setting):
        raise ConfigError(
            f"{path} holds rates for another setting ({apart}): choose another file, "
            "hydra.sweeper.file=NAME"
        )
    return own, existing.tuned


def _difference(setting: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [k for k in sorted(setting.keys() | other.keys()) if setting.get(k) != other.get(k)]
    return ", ".join(f"{k} {setting.get(k)} and {other.get(k)}" for k in keys)
