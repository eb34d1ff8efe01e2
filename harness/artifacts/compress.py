"""How much of what a run added is needed: perplexity of W + [dW]_k against the rank k.

    harness compress outputs/main_seeds/RUN --ranks 1,2,4,8,full
    harness compress outputs/main_seeds/full-*-s[0-2]-* --ranks 8,64   # a seed each
    harness compress outputs/main_seeds/RUN --energy 0.5,0.9 --save adapters

Nothing is trained. [dW]_k is the nearest matrix of rank k to what a run added, for every matrix in
the layers. Embeddings, head, positions, norms and biases that moved as well are kept as the run has
them in one column and put back to the base's in the other. Perplexities are of the validation split
and of the run's further texts, or of those of --texts; --test reads the test split too, for a
record whose ranks are chosen. Beside them stand the runs of the same experiment that trained a LoRA
of rank k on the same text and base. --save writes a PEFT LoRA of every rank, which holds the
matrices alone. Numbers go to RUN/compress.csv and, by document, RUN/compress.parquet. Exit status 2
for what cannot be compressed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from harness.artifacts import export
from harness.artifacts.anatomy import curve, lowrank, texts, updates
from harness.artifacts.anatomy.lowrank import Direction
from harness.artifacts.anatomy.texts import NEW, Evaluator, Texts, perplexity
from harness.config.errors import ConfigError
from harness.models import weights
from harness.report import table
from harness.report.compression import perplexities
from harness.results import numbers, run_record
from harness.results.record_types import Record
from harness.runs import finished_run
from harness.runs.finished_run import Saved
from harness.system import atomic
from harness.system.console import quiet_command

RANKS = "1,2,4,8,16,32,64,full"
WITH, WITHOUT = "with", "without"  # the weights beside the matrices
CSV, PARQUET = "compress.csv", "compress.parquet"


@dataclass(frozen=True)
class Asked:
    """One approximation: its label, and the rank of every matrix."""

    label: str
    ranks: dict[str, int]


@dataclass(frozen=True)
class Compressed:
    """What was measured: a row for every approximation, text and treatment of other weights."""

    points: pd.DataFrame
    documents: pd.DataFrame
    beside: dict[str, int]  # number of elements, by kind, of the other weights that moved
    matrices: int
    recorded: dict[str, float]  # the run's own perplexity, by text
    trained: pd.DataFrame  # LoRA runs of the experiment
    folders: list[Path]


def compress(
    run_dir: Path,
    ranks: list[int | str],
    energies: list[float],
    *,
    test: bool = False,
    save: Path | None = None,
    only_texts: Sequence[str] = (),
) -> Compressed:
    """Measure every approximation of a finished run, and write adapters into `save`.

    `only_texts` are those that are evaluated, by default all that the run has.

    Raises:
        ConfigError: a run without a change of matrices, a rank above one, a share that is none, or
            adapters that the published base cannot take.
    """
    run = finished_run.load(run_dir)
    pair = updates.load(run)
    directions, beside = lowrank.decompose(pair)
    if not directions:
        raise ConfigError(f"{run.name} changed no matrix in the layers: there is no rank to choose")
    choices = [Asked(str(rank), lowrank.by_rank(directions, rank)) for rank in ranks]
    choices += [Asked(f"energy {e:g}", lowrank.by_energy(directions, e)) for e in energies]
    if save is not None:
        _check_can_save(run, pair, save)
    kept = {name: pair.adapted.get_parameter(name).detach().clone() for name in beside}
    kinds: dict[str, int] = {}
    for name, weight in kept.items():
        module = pair.adapted.get_submodule(name.rpartition(".")[0])
        kind = updates.kind_of(name, module, pair.adapted)
        kinds[kind] = kinds.get(kind, 0) + weight.numel()
    folders = (
        [_save(run, pair, directions, choice, save) for choice in choices]
        if save is not None
        else []
    )
    read = texts.read(run, test=test, only=only_texts)
    points, documents = _measure(run, pair, directions, choices, kept, read)
    names = list(read.by_name)
    beside_it = trained(run, list(dict.fromkeys([NEW, *names])))
    own = recorded(run, names)
    return Compressed(points, documents, kinds, len(directions), own, beside_it, folders)


def _measure(
    run: Saved,
    pair: updates.Pair,
    directions: Mapping[str, Direction],
    choices: list[Asked],
    kept: Mapping[str, torch.Tensor],
    read: Texts,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    evaluator = Evaluator(run, pair.adapted, read)  # the model that is written into from here on
    points, documents = [], []
    for choice in choices:
        for others in (WITH, WITHOUT) if kept else (WITH,):
            own = kept if others == WITH else {}
            lowrank.write_into(pair.adapted, pair, directions, choice.ranks, own)
            for text in read.by_name:
                nll, num_tokens = evaluator.nats(text)
                points.append({
                    "rank": choice.label, "beside": others, "text": text,
                    "parameters": sum(
                        directions[n].num_parameters(k) for n, k in choice.ranks.items()
                    ),
                    "mean_rank": float(np.mean(list(choice.ranks.values()))),
                    "perplexity": perplexity((nll, num_tokens)),
                    "nll_nats": float(nll.sum()), "num_tokens": int(num_tokens.sum()),
                })  # fmt: skip
                documents.append(pd.DataFrame({
                    "rank": choice.label, "beside": others, "text": text,
                    "id": read.by_name[text]["id"], "nll_nats": nll, "num_tokens": num_tokens,
                }))  # fmt: skip
    return pd.DataFrame(points), pd.concat(documents, ignore_index=True)


def recorded(run: Saved, names: list[str]) -> dict[str, float]:
    """The perplexities that the run itself measured, of the texts there are."""
    values = {name: quality_of(run.record, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def quality_of(record: Record, text: str, when: str = "after") -> float | None:
    """A run's own perplexity on validation, test or a further text."""
    path = f"quality.{text}" if text in (NEW, "test") else f"quality.also.{text}.{when}"
    value: float | None = run_record.get(record, f"{path}.perplexity")
    return value


def trained(run: Saved, names: list[str]) -> pd.DataFrame:
    """Finished LoRA runs beside this one, on the same base, text and evaluation.

    Columns: name, r, targets, seed, parameters, and a perplexity for every text.
    """
    sections = ("model", "data", "evaluate")
    own = [run.record["config"][section] for section in sections]
    rows = []
    for path, record in run_record.collect(run.run_dir.resolve().parent):
        same = [record["config"][section] for section in sections] == own
        if record["status"] == "finished" and record["method"]["name"] == "lora" and same:
            contents = [run_record.get(r, "run.contents") for r in (record, run.record)]
            if contents[0] == contents[1]:
                row: dict[str, Any] = {
                    "name": path.name, "r": record["method"]["r"],
                    "targets": record["method"]["targets"], "seed": record["run"]["seed"],
                    "parameters": record["parameters"]["trainable"],
                }  # fmt: skip
                rows.append(row | {name: quality_of(record, name) for name in names})
    columns = ["name", "r", "targets", "seed", "parameters", *names]
    return pd.DataFrame(rows, columns=columns)  # also where there is none


# --------------------------------------------------------------------------- adapters


def _check_can_save(run: Saved, pair: updates.Pair, folder: Path) -> None:
    """Raise ConfigError where no adapter can be written, before anything is measured."""
    if run.run.model.architecture:
        raise ConfigError(
            f"--save: {run.name} drew its base at random, and no adapter loads onto a published one"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--save: {folder} is not an empty folder: name a new one")


def _save(
    run: Saved, pair: updates.Pair, directions: Mapping[str, Direction], choice: Asked, out: Path
) -> Path:
    """Write one adapter, load it onto the published base again and compare its logits."""
    folder = out / choice.label.replace(" ", "-")
    folder.mkdir(parents=True)
    source, options = finished_run.source(run.run), export.base_options(run)

    def base() -> PreTrainedModel:
        return weights.load(source, **options)[0].eval()

    lowrank.save(base(), directions, choice.ranks, folder, source, run.run.model.revision)
    gc.collect()
    reloaded = weights.load_adapter(base(), folder)
    merged = base().float()
    with torch.no_grad():
        for name, direction in directions.items():
            merged.get_parameter(name).add_(direction.delta(choice.ranks[name]))
    logits, expected = export.probe(reloaded.float()), export.probe(merged)
    apart = float((logits - expected).abs().max())
    if not apart <= export.ROUNDING * float(expected.abs().max()):
        raise ConfigError(f"{folder}: the adapter, loaded again, differs by {apart:.3g} in logits")
    return folder


# --------------------------------------------------------------------------- the command


def show(results: Sequence[Compressed], seeds: Sequence[int], runs: Sequence[str]) -> None:
    """Print the curve: with and without the weights beside the matrices, beside trained LoRA."""
    first = results[0]
    points = pd.concat([result.points for result in results], ignore_index=True)
    names, columns = list(dict.fromkeys(points["text"])), list(dict.fromkeys(points["beside"]))
    headings = ["parameters", "mean rank"]
    for name in names:
        label = {NEW: "validation"}.get(name, name)
        headings += [f"{label}{', matrices alone' * (c == WITHOUT)}" for c in columns]
    headings += ["LoRA trained at r=k"] * (len(first.trained) > 0)
    shown = table.plain(["rank of dW"], headings)
    rows = perplexities([result.documents for result in results], seeds, ["rank", "beside", "text"])
    cells = {(r["rank"], r["beside"], r["text"]): curve.told(r) for _, r in rows.iterrows()}
    for label, group in points.groupby("rank", sort=False):
        line = [
            str(label),
            f"{group['parameters'].mean():,.0f}",
            f"{group['mean_rank'].mean():.1f}",
        ]
        line += [cells[label, column, name] for name in names for column in columns]
        line += [_trained_at(first, str(label))] * (len(first.trained) > 0)
        shown.add_row(*line)
    table.show(shown)
    over = "documents" if len(results) == 1 else f"{len(results)} seeds and documents"
    print(f"perplexity per token, in brackets its 95 % interval over {over}")
    for result, run in zip(results, runs, strict=True):
        own = ", ".join(
            f"{name} {numbers.perplexity(value)}" for name, value in result.recorded.items()
        )
        print(f"{run} itself: {own}")
    if first.beside:
        kinds = ", ".join(f"{kind} ({number:,})" for kind, number in first.beside.items())
        print(
            f"beside {first.matrices} matrices these moved too, and are whole: {kinds}.\n"
            "matrices alone: these as in the base"
        )
    for folder in (folder for result in results for folder in result.folders):
        print(f"saved: {folder}, a PEFT LoRA of the matrices alone")


def _trained_at(result: Compressed, label: str) -> str:
    """Validation perplexity of the best kind of LoRA trained at this rank, mean over its seeds."""
    if not label.isdigit():
        return "-"
    rows = result.trained[result.trained["r"] == int(label)]
    rows = rows[rows[NEW].notna()]
    if rows.empty:
        return "-"
    best = min(
        (float(np.exp(np.log(group[NEW]).mean())), f"{targets}, {parameters:,}")
        for (targets, parameters), group in rows.groupby(["targets", "parameters"])
    )
    return f"{numbers.perplexity(best[0])} ({best[1]})"


def write(result: Compressed, run_dir: Path) -> None:
    """Write the points and their documents into the run's folder."""
    text = result.points.to_csv(index=False)
    atomic.write_atomically(run_dir / CSV, str(text))
    atomic.write_atomically(run_dir / PARQUET, partial(result.documents.to_parquet, index=False))


def parse_ranks(text: str) -> Iterator[int | str]:
    """The ranks of "1,2,full".

    Raises:
        ConfigError: one is neither a whole number from 1 on nor full.
    """
    for part in filter(None, (p.strip() for p in text.split(","))):
        if part != "full" and (not part.isdigit() or int(part) < 1):
            raise ConfigError(
                f"--ranks: {part!r} is no rank: expected whole numbers from 1, or full"
            )
        yield part if part == "full" else int(part)


def parse_shares(text: str) -> Iterator[float]:
    """The shares of "0.5,0.9".

    Raises:
        ConfigError: one is not above 0 and at most 1.
    """
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ConfigError(f"--energy: {part!r} is no share: expected above 0 and at most 1")
        yield share


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="harness compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="a seed each")
    parser.add_argument("--ranks", help=f"ranks of dW, or full (default: {RANKS})")
    parser.add_argument("--energy", default="", help="shares of ||dW||^2, each matrix to its rank")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write PEFT LoRA adapters")
    parser.add_argument("--test", action="store_true", help="the test split, too")
    parser.add_argument("--texts", default="", help="of these texts alone, as in validation,test")
    args = parser.parse_args(arguments)
    energies = list(parse_shares(args.energy))
    default = "" if energies else RANKS
    ranks = list(parse_ranks(default if args.ranks is None else args.ranks))
    if not ranks and not energies:
        raise ConfigError("--ranks: name at least one, as in 1,2,4,full")
    chosen = [name for name in args.texts.split(",") if name]
    seeds = curve.seeds_of(args.run_dirs)
    results = []
    for run_dir in args.run_dirs:
        own = args.save / run_dir.name if args.save and len(seeds) > 1 else args.save
        results.append(
            compress(run_dir, ranks, energies, test=args.test, save=own, only_texts=chosen)
        )
        write(results[-1], run_dir)
    show(results, seeds, [run_dir.name for run_dir in args.run_dirs])
    for run_dir in args.run_dirs:
        print(f"saved in {run_dir}: {CSV}, {PARQUET}")
    return 0
