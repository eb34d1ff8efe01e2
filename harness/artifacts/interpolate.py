"""Between a base and what a run made of it: perplexity of W + lambda dW on new and old text.

    harness interpolate outputs/main_seeds/RUN --scales 0,0.25,0.5,0.75,1,1.25
    harness interpolate outputs/main_seeds/RUN --only q,k,v     # dW of these kinds alone

lambda = 0 is the base and 1 the run's model (WiSE-FT, arXiv 2109.01903); every weight that the run
changed is scaled, whatever the method, or only those of --only, the others staying as in the base.
The new text is the run's validation split, and the test split with --test; the old ones are its
further texts (evaluate.also), of which --texts names those that are wanted. Nothing is trained.
Numbers go to RUN/interpolate.csv and, by document, RUN/interpolate.parquet. Exit status 2 for what
cannot be scaled.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from harness.artifacts.anatomy import curve, texts, updates
from harness.artifacts.anatomy.texts import NEW, Evaluator, perplexity
from harness.config.errors import ConfigError, nearest
from harness.report import table
from harness.report.compression import perplexities
from harness.runs import finished_run
from harness.system import atomic
from harness.system.console import quiet_command

SCALES = "0,0.25,0.5,0.75,1,1.25"
CSV, PARQUET = "interpolate.csv", "interpolate.parquet"


def interpolate(
    run_dir: Path,
    scales: list[float],
    only: list[str],
    *,
    test: bool = False,
    only_texts: Sequence[str] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for every scale and text, and the same by document.

    Raises:
        ConfigError: a run without a change of weights, or a kind that did not change.
    """
    run = finished_run.load(run_dir)
    pair = updates.load(run)
    changes = list(updates.kept(pair))
    kinds = list(dict.fromkeys(update.kind for update in changes))
    for kind in only:
        if kind not in kinds:
            raise ConfigError(f"--only: no weight of kind '{kind}' changed; {nearest(kind, kinds)}")
    chosen = [update for update in changes if not only or update.kind in only]
    read = texts.read(run, test=test, only=only_texts)
    evaluator = Evaluator(run, pair.adapted, read)
    points, documents = [], []
    for scale in scales:
        write_into(pair, chosen, scale)
        for text in read.by_name:
            nll, num_tokens = evaluator.nats(text)
            row = {"scale": scale, "kinds": ",".join(only) or "all", "text": text}
            points.append(
                row
                | {
                    "perplexity": perplexity((nll, num_tokens)),
                    "nll_nats": float(nll.sum()),
                    "num_tokens": int(num_tokens.sum()),
                }
            )
            ids = read.by_name[text]["id"]
            documents.append(
                pd.DataFrame(row | {"id": ids, "nll_nats": nll, "num_tokens": num_tokens})
            )
    return pd.DataFrame(points), pd.concat(documents, ignore_index=True)


@torch.no_grad()
def write_into(pair: updates.Pair, chosen: list[updates.Update], scale: float) -> None:
    """Make the adapted model the base plus `scale` times the updates that are chosen, in place.

    At a scale of 1 a weight is the run's own, bit for bit.
    """
    for name, weight in pair.adapted.named_parameters():
        before = updates.parameter(pair.base, name)
        assert before is not None  # as `updates.changed` has seen
        weight.copy_(before)
    for update in chosen:
        moved = torch.lerp(update.before, update.after, scale)
        update.write(pair.adapted, moved)


def show(documents: Sequence[pd.DataFrame], seeds: Sequence[int]) -> None:
    """Print a line for every scale."""
    rows = perplexities(documents, seeds, ["scale", "kinds", "text"])
    names = list(dict.fromkeys(rows["text"]))
    shown = table.plain(
        ["lambda"], [f"new text ({name})" if name in (NEW, "test") else name for name in names]
    )
    for scale, group in rows.groupby("scale", sort=False):
        cells = {row["text"]: curve.told(row) for _, row in group.iterrows()}
        shown.add_row(f"{scale:g}", *(cells[name] for name in names))
    table.show(shown)
    kinds = rows["kinds"].iloc[0]
    what = "every weight that changed" if kinds == "all" else f"of {kinds} alone"
    over = "documents" if len(documents) == 1 else f"{len(documents)} seeds and documents"
    print(
        f"perplexity per token of W + lambda dW, {what}, in brackets its 95 % interval over {over}"
    )


def parse_scales(text: str) -> Iterator[float]:
    """The numbers of "0,0.5,1".

    Raises:
        ConfigError: one is not a finite number.
    """
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            scale = float(part)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ConfigError(f"--scales: {part!r} is not a number")
        yield scale


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="harness interpolate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="a seed each")
    parser.add_argument("--scales", default=SCALES, help=f"values of lambda (default: {SCALES})")
    parser.add_argument("--only", default="", help="kinds of weights, as in q,v,mlp_in,embeddings")
    parser.add_argument("--test", action="store_true", help="the test split, too")
    parser.add_argument("--texts", default="", help="of these texts alone, as in validation,test")
    args = parser.parse_args(arguments)
    scales = list(dict.fromkeys(parse_scales(args.scales)))
    if not scales:
        raise ConfigError(f"--scales: name at least one, as in {SCALES}")
    only = [kind for kind in args.only.split(",") if kind]
    chosen = [name for name in args.texts.split(",") if name]
    seeds = curve.seeds_of(args.run_dirs)
    tables = []
    for run_dir in args.run_dirs:
        points, documents = interpolate(run_dir, scales, only, test=args.test, only_texts=chosen)
        atomic.write_atomically(run_dir / CSV, str(points.to_csv(index=False)))
        atomic.write_atomically(run_dir / PARQUET, partial(documents.to_parquet, index=False))
        tables.append(documents)
    show(tables, seeds)
    for run_dir in args.run_dirs:
        print(f"saved in {run_dir}: {CSV}, {PARQUET}")
    return 0
