"""Every finished run of an experiment, one after another: tables of its weights, layers and pairs.

FOLDER/anatomy/weights.parquet    a row for every weight of every run that changed
FOLDER/anatomy/layers.parquet     a row for every layer, text and run
FOLDER/anatomy/overlap.parquet    phi(i, j) of every matrix for every pair of runs on one base
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from harness.artifacts.anatomy import functions, spectra, texts, updates
from harness.artifacts.anatomy.settings import Settings
from harness.artifacts.anatomy.texts import Texts
from harness.config.errors import ConfigError
from harness.methods.svd import CACHE_ENV
from harness.results import run_record
from harness.runs import finished_run
from harness.runs.finished_run import Saved
from harness.system import atomic

FOLDER = "anatomy"
SIDES = ("out", "in")  # left and right singular vectors of dW
Directions = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by matrix: U (m, r) and V (n, r)


@dataclass(frozen=True)
class Survey:
    """What was found, a table each; `left_out` says of which runs nothing, and why."""

    weights: pd.DataFrame
    layers: pd.DataFrame
    overlap: pd.DataFrame
    run_dirs: list[Path]
    left_out: dict[str, str]


def find(folder: Path) -> tuple[list[Path], bool]:
    """The finished runs of a run's or an experiment's folder, and whether it is a run's.

    Raises:
        ConfigError: there is none; names the runs there are.
    """
    if folder.is_dir() and not (folder / run_record.FILE_NAME).exists():
        run_dirs = [path for path, r in run_record.collect(folder) if r["status"] == "finished"]
        if run_dirs:
            return run_dirs, False
    finished_run.finished(folder)
    return [folder], True


def survey(folder: Path, settings: Settings, log: Callable[[str], None] = print) -> Survey:
    """Measure every finished run of `folder`; writes nothing.

    Raises:
        ConfigError: there is no run with a change of weights; of a single run, why it has none.
    """
    run_dirs, alone = find(folder)
    weights: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    directions: dict[Path, tuple[str, Directions]] = {}
    left_out: dict[str, str] = {}
    read: dict[str, Texts] = {}
    for count, run_dir in enumerate(run_dirs, 1):
        try:
            run = finished_run.load(run_dir)
            os.environ.setdefault(CACHE_ENV, run.run.data.cache_dir)
            pair = updates.load(run)
            rows, own = measure(pair, settings)
            if settings.function_tokens:
                if (key := texts.key(run)) not in read:
                    read[key] = texts.read(run)
                layers += _layers(run_dir.name, pair, read[key], settings.function_tokens)
        except ConfigError as error:
            if alone:
                raise
            left_out[run_dir.name] = " ".join(str(error).split())
            continue
        weights += [{"run": run_dir.name} | row for row in rows]
        directions[run_dir] = (_base(run), own)
        del pair
        gc.collect()
        log(f"{count}/{len(run_dirs)} {run_dir.name}")
    if not weights:
        why = "; ".join(dict.fromkeys(left_out.values())) or "no weight has changed"
        raise ConfigError(f"{folder}: no run with a change of weights ({why})")
    return Survey(
        pd.DataFrame(weights),
        pd.DataFrame(layers),
        pd.DataFrame(list(overlaps(directions))),
        list(directions),
        left_out,
    )


def measure(pair: updates.Pair, settings: Settings) -> tuple[list[dict[str, Any]], Directions]:
    """A row for every weight that changed, and the first directions of every matrix's dW."""
    rows: list[dict[str, Any]] = []
    directions: Directions = {}
    for update in updates.changed(pair):
        row, own = _weight(update, settings)
        rows.append(row)
        if own is not None:
            directions[update.name] = own
    total = sum(row["change"] ** 2 for row in rows)
    for row in rows:
        row["share"] = row["change"] ** 2 / total
    return rows, directions


def _weight(
    update: updates.Update, settings: Settings
) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor] | None]:
    delta, before = update.delta, update.before
    norm, change = float(before.double().norm()), float(delta.norm())
    row: dict[str, Any] = {
        "weight": update.name, "kind": update.kind, "layer": update.layer,
        "is_matrix": update.is_matrix, "shape": "x".join(map(str, before.shape)),
        "num_elements": before.numel(), "size": norm, "change": change,
        "relative_change": change / norm if norm else float("inf"),
        "rounding": update.rounding / norm if norm else 0.0,
    }  # fmt: skip
    if not update.is_matrix:
        return row, None
    factors = spectra.factors(delta, min(settings.directions, *delta.shape))
    shape = (int(delta.shape[0]), int(delta.shape[1]))
    spectrum = spectra.spectrum(factors.s, shape, update.error)
    r = min(settings.directions, spectrum.rank)
    base_u = spectra.base_left(before, update.stored_in_out)
    row |= dataclasses.asdict(spectrum) | {
        "intruders": spectra.intruders(
            base_u, update.after, settings.intruder_k, settings.intruder_epsilon
        ),
        "amplification": spectra.amplification(before, factors, r),
    }
    return row, (factors.u[:, :r].clone(), factors.v[:, :r].clone())


def _layers(run: str, pair: updates.Pair, read: Texts, tokens: int) -> Iterator[dict[str, Any]]:
    for name in read.by_name:
        distances = functions.distances(pair.base, pair.adapted, texts.batches(read, name, tokens))
        for distance in distances:
            yield {"run": run, "text": name} | dataclasses.asdict(distance)


def _base(run: Saved) -> str:
    """Tells runs on the same weights from others: directions of other bases do not compare."""
    model = {
        key: value
        for key, value in run.record["config"]["model"].items()
        if key not in ("unfuse_qkv", "linear", "frozen_dtype", "dropout", "gelu", "cache_dir")
    }
    seed = run.run.seed if run.run.model.architecture else None  # whose base is drawn
    return repr((model, run.run.contents.get("model"), seed))


def overlaps(directions: dict[Path, tuple[str, Directions]]) -> Iterator[dict[str, Any]]:
    """Phi(i, j) for i and j of 1, 2, 4, …, of every matrix that both runs of a pair changed."""
    for (a, (base, own)), (b, (other, theirs)) in itertools.combinations(directions.items(), 2):
        if base != other:
            continue
        for weight in (name for name in own if name in theirs):
            for side, x, y in zip(SIDES, own[weight], theirs[weight], strict=True):
                table = spectra.phi(x, y).tolist()
                for i, j in itertools.product(_doubling(len(table)), _doubling(len(table[0]))):
                    yield {
                        "run_a": a.name, "run_b": b.name, "weight": weight, "side": side,
                        "i": i, "j": j, "phi": table[i - 1][j - 1], "chance": max(i, j) / len(x),
                    }  # fmt: skip


def _doubling(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length())]


def write(surveyed: Survey, folder: Path) -> Path:
    """Write the three tables to FOLDER/anatomy; returns that folder."""
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    for name in ("weights", "layers", "overlap"):
        table: pd.DataFrame = getattr(surveyed, name)
        atomic.write_atomically(out / f"{name}.parquet", partial(table.to_parquet, index=False))
    return out


def progress(line: str) -> None:
    """Print a line of progress on standard error, apart from the tables."""
    print(line, file=sys.stderr, flush=True)
