"""The tables of `harness.artifacts.anatomy` over seeds: on the terminal, and in summary.csv.

A number is the mean over the seeds of a configuration, with the lowest and the highest behind it.
Of a run it is, over its matrices in the layers: sizes by sums of squares, everything else the mean.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from harness.artifacts.anatomy.settings import Settings
from harness.artifacts.anatomy.survey import FOLDER, Survey
from harness.artifacts.anatomy.texts import NEW
from harness.artifacts.anatomy.updates import BESIDE
from harness.report import table
from harness.report.anatomy import ALL, FILE_NAME, QUANTITIES
from harness.system import atomic

Frame = pd.DataFrame


def mean_of(column: str) -> Callable[[Frame], float]:
    """Return the function that takes the mean of a column over matrices."""
    return lambda rows: float(rows[column].mean())


def _relative(rows: Frame) -> float:
    return math.sqrt((rows["change"] ** 2).sum() / (rows["size"] ** 2).sum())


def _measures(quantity: str) -> Callable[[Frame], float]:
    """What of the rows of one kind in one run is a quantity of the report's table."""
    own: dict[str, Callable[[Frame], float]] = {
        "relative_change": _relative,
        "share": lambda rows: float(rows["share"].sum()),
    }
    return own.get(quantity) or mean_of(quantity)


OF_MATRICES = ("rank", "full_rank", "effective_rank", "stable_rank", "r90", "intruders",
               "amplification")  # fmt: skip


def summarise(survey: Survey, folder: Path) -> Frame:
    """A row for every configuration, kind or text or other configuration, and quantity.

    Columns: name (of the configuration), of (a kind of weight, ALL, a text, or another name),
    quantity, mean, low, high (over `count` runs or pairs of runs), count.
    """
    names = named(survey, folder)
    by_run = pd.concat([_weights(survey.weights), _layers(survey.layers)], ignore_index=True)
    by_run["name"] = by_run["run"].map(names)
    over = by_run.groupby(["name", "of", "quantity"], sort=False)["value"]
    summary = over.agg(mean="mean", low="min", high="max", count="count").reset_index()
    order = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    summary = summary.sort_values("name", key=lambda column: column.map(order), kind="stable")
    return pd.concat([summary, _overlap(survey.overlap, names)], ignore_index=True)


def named(survey: Survey, folder: Path) -> dict[str, str]:
    """Configuration by run, named and in the order of the experiment's own table."""
    runs = {path.name for path in survey.run_dirs}
    if folder in survey.run_dirs:
        return {folder.name: folder.name}
    rows = table.rows(folder)
    names = {path.name: row.name for row in rows for path in row.run_dirs}
    return {run: name for run, name in names.items() if run in runs} | {
        run: run for run in sorted(runs - names.keys())
    }


def _weights(weights: Frame) -> Frame:
    """Quantities by run and kind; the matrices in the layers also together."""
    inner = weights["is_matrix"] & ~weights["kind"].isin(BESIDE)
    parts = pd.concat([weights[inner].assign(kind=ALL), weights], ignore_index=True)
    lines = []
    for (run, kind), rows in parts.groupby(["run", "kind"], sort=False):
        for quantity in QUANTITIES:
            if quantity not in OF_MATRICES or rows["is_matrix"].all():
                lines.append((run, kind, quantity, _measures(quantity)(rows)))
    return pd.DataFrame(lines, columns=["run", "of", "quantity", "value"])


def _layers(layers: Frame) -> Frame:
    """Relative change and CKA by run and text, of the last layer and as the mean over layers."""
    lines = []
    for (run, text), rows in layers.groupby(["run", "text"], sort=False) if len(layers) else ():
        last = rows[rows["layer"] == rows["layer"].max()]
        for column in ("relative_change", "cka"):
            lines.append((run, text, f"last_layer_{column}", float(last[column].iloc[0])))
            lines.append((run, text, f"layers_{column}", float(rows[column].mean())))
    return pd.DataFrame(lines, columns=["run", "of", "quantity", "value"])


def _overlap(overlap: Frame, names: dict[str, str]) -> Frame:
    """Phi(i, i), less and beside what chance gives, by pair of configurations, over matrices."""
    columns = ["name", "of", "quantity", "mean", "low", "high", "count"]
    if overlap.empty:
        return pd.DataFrame(columns=columns)
    rows = overlap[overlap["i"] == overlap["j"]]
    by_pair = rows.groupby(["run_a", "run_b", "side", "i"], sort=False)[["phi", "chance"]].mean()
    by_pair = by_pair.reset_index()
    place = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
    pairs = [
        sorted((names[a], names[b]), key=place.__getitem__)
        for a, b in zip(by_pair["run_a"], by_pair["run_b"], strict=True)
    ]
    by_pair["name"], by_pair["of"] = zip(*pairs, strict=True)
    lines = []
    for (name, other, side, i), group in by_pair.groupby(["name", "of", "side", "i"], sort=False):
        for column in ("phi", "chance"):
            value = group[column]
            numbers = (value.mean(), value.min(), value.max(), len(value))
            lines.append((name, other, f"{column}_{side}_{i}", *numbers))
    return pd.DataFrame(lines, columns=columns)


# --------------------------------------------------------------------------- what is printed


def show(summary: Frame, survey: Survey, settings: Settings) -> None:
    """Print the tables: sizes and ranks, kinds of weights, layers, and overlap over seeds."""
    names = list(dict.fromkeys(summary["name"]))
    known = {
        (row.name, row.of, row.quantity): row
        for row in (_Row(values) for values in summary.to_dict("records"))
    }

    def cell(name: str, other: str, quantity: str, form: str) -> str:
        row = known.get((name, other, quantity))
        return "-" if row is None else row.text(form)

    _print(
        ["configuration", *(heading for heading, _, _ in QUANTITIES.values())],
        [[name, *(cell(name, ALL, q, form) for q, (_, form, _) in QUANTITIES.items())]
         for name in names if (name, ALL, "share") in known],
    )  # fmt: skip
    print(
        "Of the matrices in the layers (q, k, v apart): size of what was added, its share of the\n"
        "whole squared change, ranks of dW as means over matrices beside the rank they could have\n"
        f"had, intruders among the {settings.intruder_k} first directions, amplification of the "
        f"{settings.directions} first\ndirections of dW. In brackets: lowest to highest seed."
    )
    kinds = [
        k
        for k in dict.fromkeys(summary["of"])
        if (summary["of"] == k).any() and k in set(survey.weights["kind"])
    ]
    print("\nShare of the squared change, and size beside the weight's own (in brackets), by kind")
    lines = []
    for name in names:
        shares = [known.get((name, kind, "share")) for kind in kinds]
        sizes = [known.get((name, kind, "relative_change")) for kind in kinds]
        cells = [
            "-" if a is None or b is None else f"{a.mean:.3f} ({b.mean:.3g})"
            for a, b in zip(shares, sizes, strict=True)
        ]
        lines.append([name, *cells])
    _print(["configuration", *kinds], [line for line in lines if set(line[1:]) != {"-"}])
    texts = list(dict.fromkeys(survey.layers["text"])) if len(survey.layers) else []
    if texts:
        print(
            "\nWhat layers put out, beside the base, on held-out text: relative change and CKA "
            "of the last layer"
        )
        _print(
            ["configuration", *(f"{'new text' if t == NEW else t}{what}" for t in texts
                                for what in ("", ", CKA"))],
            [[name, *(cell(name, t, f"last_layer_{what}", form) for t in texts
                      for what, form in (("relative_change", ".3f"), ("cka", ".4f")))]
             for name in names if (name, texts[0], "last_layer_cka") in known],
        )  # fmt: skip
    _show_overlap(known, names, settings)
    _show_rounding(survey.weights)


def _show_overlap(
    known: dict[tuple[str, str, str], _Row], names: list[str], settings: Settings
) -> None:
    """Phi between seeds of one configuration, at i = j = 1 and the largest there is."""
    lines = []
    for name in names:
        own = [q for n, other, q in known if n == name == other and q.startswith("phi_out_")]
        for i in sorted({int(q.rpartition("_")[2]) for q in own})[-1:]:
            cells = []
            for side in ("out", "in"):
                for index in dict.fromkeys((1, i)):
                    phi = known[name, name, f"phi_{side}_{index}"]
                    chance = known[name, name, f"chance_{side}_{index}"]
                    cells.append(f"{phi.mean:.3f} ({chance.mean:.3f})")
                if i == 1:
                    cells.append("-")
            lines.append([name, str(i), *cells])
    if lines:
        print("\nphi(i, i) of two seeds' dW, mean over matrices; in brackets: by chance")
        _print(["configuration", "i", "out, 1", "out, i", "in, 1", "in, i"], lines)
        print("Other pairs of configurations are in summary.csv, all i and j in overlap.parquet.")


def _show_rounding(weights: Frame) -> None:
    near = weights[weights["relative_change"] < 10 * weights["rounding"]]
    if len(near):
        examples = ", ".join(dict.fromkeys(near["weight"].head(3)))
        print(
            f"\n{len(near)} weights changed by less than 10 times what rounding to the base's "
            f"dtype does ({examples}{', …' if len(near) > 3 else ''}): such a dW is partly noise, "
            "and merging it in that dtype loses some of it."
        )


class _Row:
    """A number of the summary with its spread."""

    def __init__(self, values: Mapping[Hashable, object]) -> None:
        self.name, self.of, self.quantity = (str(values[k]) for k in ("name", "of", "quantity"))
        self.mean, self.low, self.high = (float(str(values[k])) for k in ("mean", "low", "high"))
        self.count = int(str(values["count"]))

    def text(self, form: str) -> str:
        """The mean, and where they differ the lowest and highest."""
        if math.isnan(self.mean):
            return "-"
        mean, low, high = (format(v, form) for v in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low}-{high})"


def _print(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    shown = table.plain(headings[:1], headings[1:])
    for line in lines:
        shown.add_row(*line)
    table.show(shown)


def write(summary: Frame, folder: Path) -> Path:
    """Write FOLDER/anatomy/summary.csv."""
    path = folder / FOLDER / FILE_NAME
    stream = io.StringIO(newline="")
    summary.to_csv(stream, index=False)
    atomic.write_atomically(path, stream.getvalue())
    return path
