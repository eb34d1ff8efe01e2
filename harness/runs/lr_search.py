"""Hydra's sweeper for a search of learning rates: grids that grow until every best is inside."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.config import rates
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.report import lr_table as shown_grids
from harness.results import run_record
from harness.runs import composition, launcher
from harness.runs.grids import GridSweeper, check
from harness.system import atomic


class RateSweeper(GridSweeper):
    """For every configuration of its grids, whose `train.lr` is the centre, `points` rates that are
    `factor` apart; then one more beyond an edge that the best is at, up to `most`.

    The best rates are written to a file of conf/rates, in the place of those for the same
    configurations. Workers get no test set.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        grids: Sequence[dict[str, Any]] = (),
        points: int = 5,
        factor: float = 2.0,
        most: int = 12,
        file: str | None = None,
    ) -> None:
        super().__init__(max_batch_size, params, grids)
        if not (3 <= points <= most and factor > 1):
            raise ConfigError(
                f"hydra.sweeper: points={points}, factor={factor}, most={most}: expected "
                "3 <= points <= most and a factor above 1"
            )
        self.points, self.factor, self.most = points, factor, most
        self.file = composition.expanded(file, "hydra.sweeper.file")

    def _do(self, jobs: list[list[str]], runs: list[RunConfig]) -> list[launcher.Outcome]:
        """Rounds of runs, until no best is at the edge of its grid."""
        assert self.config is not None and self.hydra_context is not None
        load = partial(self.hydra_context.config_loader.load_sweep_config, self.config)
        path, setting, kept = self._target(runs)
        grids: list[dict[float, float | None]] = [{} for _ in runs]
        todo = [rates.grid_around(run.train.lr, self.points, self.factor) for run in runs]
        done: list[launcher.Outcome] = []
        while any(todo):
            asked = [(i, lr) for i, further in enumerate(todo) for lr in further]
            # Every round reads what the first one was planned with.
            texts = [[*jobs[i], launcher.planned(runs[i]), f"train.lr={lr}"] for i, lr in asked]
            texts, now, _ = check(texts, load)
            print(f"{len(now)} runs, validation only -> {runs[0].run_dir.parent}", flush=True)
            outcomes = {
                run.run_dir: o for run, o in zip(now, self._launch(texts, now), strict=True)
            }
            done += outcomes.values()
            for i, lr in asked:
                run = replace(runs[i], train=replace(runs[i].train, lr=lr))
                outcome = outcomes[run.run_dir]
                if outcome.status in ("finished", "skipped"):
                    grids[i][lr] = rates.found_by(run_record.read(run.run_dir) or {})
                elif outcome.failure_class == "nan":
                    grids[i][lr] = None  # a rate at which it diverges is an answer
                else:
                    return self._give_up(done, "not every run finished")
            todo = [
                rates.further(grid, self.factor) if len(grid) < self.most else [] for grid in grids
            ]
        for run, grid in zip(runs, grids, strict=True):
            if all(nll is None for nll in grid.values()):
                what = rates.tuned_of(run.method, "", {}, "", run.optimizer)
                return self._give_up(done, f"{what} always diverges")
        made = made_by(run_record.read(outcome.run_dir) or {} for outcome in done)
        tuned = [
            rates.tuned_of(run.method, run.targets.name, grid, made, run.optimizer)
            for run, grid in zip(runs, grids, strict=True)
        ]
        new = {t.key for t in tuned}
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = [t for t in kept if t.key not in new] + tuned
        atomic.write_atomically(path, rates.text(setting, everything))
        shown_grids.show(tuned)
        print(f"saved: {path}; train.lr=tuned train.rates={self.file or path.stem} reads it")
        return done

    def _give_up(self, done: list[launcher.Outcome], reason: str) -> list[launcher.Outcome]:
        launcher.OUTCOMES.extend(done)  # so that the table and the exit status say what happened
        print(f"no rates were chosen: {reason}", flush=True)
        return done

    def _target(
        self, runs: list[RunConfig]
    ) -> tuple[Path, dict[str, Any], tuple[rates.Tuned, ...]]:
        """The file to write, what holds of all of its rates, and those there are; ConfigError."""
        settings = [
            rates.setting_of(run.model, run.data, vars(run.train)) | {"seed": run.seed}
            for run in runs
        ]
        keys: set[tuple[Any, ...]] = set()
        for run, setting in zip(runs, settings, strict=True):
            if run.evaluate.test:
                raise ConfigError(
                    "evaluate.test=true: rates are chosen on validation, and workers of a search "
                    "get no test set; leave evaluate.test=false"
                )
            if apart := _difference(settings[0], setting):
                raise ConfigError(f"one file of rates is for one setting: {apart}")
            tuned = rates.tuned_of(run.method, run.targets.name, {}, "", run.optimizer)
            if tuned.key in keys:
                raise ConfigError(f"two grids are for the same configuration, {tuned}")
            keys.add(tuned.key)
        setting = settings[0]
        own, kept = target(self.file or f"{setting['model.name']}_{setting['data.name']}", setting)
        return own, setting, kept


def made_by(records: Iterable[dict[str, Any]]) -> str:
    """Return the commits and the hardware of runs, and today's date, in words."""
    found = list(records)
    said = []
    for path in ("environment.commit", "environment.hardware.cpu"):
        values = dict.fromkeys(str(run_record.get(record, path)) for record in found)
        said.append(" and ".join(value for value in values if value != "None") or "unknown")
    return f"{said[0]} on {said[1]}, {time.strftime('%Y-%m-%d')}"


def target(name: str, setting: dict[str, Any]) -> tuple[Path, tuple[rates.Tuned, ...]]:
    """The file that a search of rates writes, and the rates that are there already.

    Raises:
        ConfigError: they are for another setting.
    """
    path, own = rates.path_of(name), rates.own_path(name)
    if not path.exists():
        return own, ()
    there = rates.read(str(path))
    if apart := _difference(there.setting, setting):
        raise ConfigError(
            f"{path} holds rates for another setting ({apart}): choose another file, "
            "hydra.sweeper.file=NAME"
        )
    return own, there.tuned


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [k for k in sorted(one.keys() | other.keys()) if one.get(k) != other.get(k)]
    return ", ".join(f"{k} {one.get(k)} and {other.get(k)}" for k in keys)
