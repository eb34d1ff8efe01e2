"""Hydra's sweeper for a search of learning rates: grids that grow until every best is inside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import config, launch, rates, results
from harness.config import ConfigError, RunConfig
from harness.report import table
from hydra_plugins.harness_grids import GridSweeper, check


class RateSweeper(GridSweeper):
    """For every configuration of its grids, whose `train.lr` is the centre, `points` rates that are
    `factor` apart; then one more beyond an edge that the best is at, up to `most`.

    The best rates are written to a file of conf/rates. Runs must not read the test set.
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
        self.points, self.factor, self.most, self.file = points, factor, most, file

    def _do(
        self, jobs: list[list[str]], runs: list[RunConfig], folder: Path
    ) -> list[launch.Outcome]:
        """Rounds of runs, until no best is at the edge of its grid."""
        assert self.hydra_context is not None
        path, setting = self._target(runs)
        grids: list[dict[float, float | None]] = [{} for _ in runs]
        todo = [rates.grid_around(run.train.lr, self.points, self.factor) for run in runs]
        done: list[launch.Outcome] = []
        while any(todo):
            asked = [(i, lr) for i, further in enumerate(todo) for lr in further]
            texts = [[*jobs[i], f"train.lr={lr}"] for i, lr in asked]
            texts, now, _ = check(texts, self.config, self.hydra_context)
            print(f"{len(now)} runs, validation only -> {folder}", flush=True)
            found = self._launch(texts, now)
            done += found
            for (i, lr), outcome in zip(asked, found, strict=True):
                if outcome.status == "finished" or outcome.status == "skipped":
                    quality = results.get(results.read(outcome.run_dir) or {}, "quality.validation")
                    grids[i][lr] = quality["nll_nats"] / quality["num_tokens"]
                elif outcome.failure_class == "nan":
                    grids[i][lr] = None  # a rate at which it diverges is an answer
                else:
                    launch.OUTCOMES.extend(done)
                    print("no rates were chosen, since not every run finished", flush=True)
                    return done
            todo = [
                rates.further(grid, self.factor) if len(grid) < self.most else [] for grid in grids
            ]
        record = results.read(next(o.run_dir for o in done if o.exit_code == 0)) or {}
        setting |= {
            "commit": results.get(record, "environment.commit"),
            "hardware": results.get(record, "environment.hardware.cpu"),
            "date": time.strftime("%Y-%m-%d"),
        }
        tuned = [
            rates.Tuned(
                config.label(run.method), results.describe_method(run)["targets"],
                results.describe_method(run)["rank"], rates.scale_of(run.method), grid,
            )
            for run, grid in zip(runs, grids, strict=True)
        ]  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_atomically(path, rates.text(setting, tuned))
        show(tuned)
        print(f"saved: {path}; train.lr=tuned train.rates={self.file or path.stem} reads it")
        return done

    def _target(self, runs: list[RunConfig]) -> tuple[Path, dict[str, Any]]:
        """The file to write, and what holds of all of its rates; raises ConfigError."""
        settings = [
            {
                "model": run.model.name,
                "data": run.data.name,
                "steps": run.train.steps,
                "batch_tokens": run.train.batch_tokens,
                "seed": run.seed,
            }
            for run in runs
        ]
        for run, setting in zip(runs, settings, strict=True):
            if run.evaluate.test:
                raise ConfigError(
                    "evaluate.test=true: rates are chosen on validation, and runs of a search do "
                    "not load the test set; leave evaluate.test=false"
                )
            if setting != settings[0]:
                raise ConfigError(
                    f"one file of rates is for one setting, not for {settings[0]} and {setting}"
                )
        setting = settings[0]
        path = rates.path_of(self.file or f"{setting['model']}_{setting['data']}")
        if path.exists():
            before = rates.read(str(path)).setting
            if apart := [k for k, v in setting.items() if before.get(k) != v]:
                key = apart[0]
                raise ConfigError(
                    f"{path} holds rates for {key} {before.get(key)}, not {setting[key]}: choose "
                    "another file, hydra.sweeper.file=NAME"
                )
        return path, setting


def show(tuned: Sequence[rates.Tuned]) -> None:
    """Print the grids: validation nll by rate, the best, and its ratio to full fine-tuning's."""
    full = next((t for t in tuned if t.family == "full"), None)
    shown = table.plain(
        {"tuned": "left", "validation nll by rate": "left"}
        | dict.fromkeys(["best", "fitted", "times full's"], "right")
    )
    for t in tuned:
        cells = []
        for rate, nll in sorted(t.grid.items()):
            value = "diverged" if nll is None else f"{nll:.3f}"
            cells.append(f"{rate:g}: {value}" + ("*" if rate == t.lr else ""))
        where = rates.edge(t.grid)
        ratio = "-"
        if full is not None:
            ratio = f"{t.lr / full.lr:g} ({rates.fitted(t.grid) / rates.fitted(full.grid):.1f})"
        shown.add_row(
            str(t), "  ".join(cells), f"{t.lr:g}" + (f" ({where})" if where else ""),
            f"{rates.fitted(t.grid):.2g}", ratio,
        )  # fmt: skip
    print()
    table.show(shown)
    print(
        "best: the rate with the lowest validation nll (*). fitted: vertex of a parabola through\n"
        "it and its neighbours. times full's: best by full fine-tuning's best, and in brackets\n"
        "fitted by fitted (published for LoRA: about 10)."
    )
    for t in tuned:
        if where := rates.edge(t.grid):
            print(f"warning: the best rate of {t} is the {where} of its grid")
