"""What W + lambda dW has learnt and forgotten, of the runs on a hundredth of the text.

    harness interpolate RUN... --texts validation,docstrings_held_out   (a configuration's seeds)
    python experiments/claims_control/interpolations.py outputs/claims_control

Every lambda is compared with 1, the run itself, paired by seed and document: nats per token of the
new text (validation), and of the old one. Holm's adjustment is over all of these. Prints the table
and writes interpolations.csv beside this file.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from harness.config.errors import ConfigError
from harness.report import compression, ranking, stats
from harness.report.table import plain, rows, show

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where `recording` and the other experiments are
from recording import NUMBERS, evaluate, evaluation, numbers, tables, told, write_csv  # noqa: E402 - their folder is on the path now

TEXTS = ("validation", "docstrings_held_out")  # new and old


def perplexity(found: stats.Evaluation) -> float:
    """Return exp of the mean log-perplexity over seeds."""
    return math.exp(float((found.nll.sum(axis=1) / found.tokens.sum()).mean()))


def judge(folder: Path) -> None:
    """Print and write the perplexities along lambda, and their differences to the run's own.

    Raises:
        ConfigError: no run was interpolated.
    """
    made: list[tuple[str, float, str, float, stats.Comparison | None]] = []
    for row in rows(folder):
        if not any((run_dir / compression.INTERPOLATED).is_file() for run_dir in row.run_dirs):
            continue
        found, seeds = tables(row, compression.INTERPOLATED)
        for scale in dict.fromkeys(found[0]["scale"]):
            for text in TEXTS:
                own = evaluation(found, seeds, scale=scale, text=text, kinds="all")
                whole = evaluation(found, seeds, scale=1.0, text=text, kinds="all")
                compared = None if scale == 1 else stats.compare(own, whole)
                made.append((row.name, float(scale), text, perplexity(own), compared))
    if not made:
        raise ConfigError(f"{folder}: no run has {compression.INTERPOLATED} (harness interpolate)")
    tested = [compared for *_, compared in made if compared is not None]
    adjusted = iter(ranking.holm([compared.p for compared in tested]).tolist())
    shown = plain(["configuration", "lambda", "text"], ["perplexity", "minus lambda=1", "p (Holm)"])
    lines = []
    for name, scale, text, value, compared in made:
        cells: list[object] = [name, scale, text, value]
        if compared is None:
            lines.append([*cells, *[""] * (len(NUMBERS) + 2)])
            shown.add_row(name, f"{scale:g}", text, f"{value:.2f}", "", "")
            continue
        p = next(adjusted)
        lines.append([*cells, *numbers(compared), p])
        shown.add_row(name, f"{scale:g}", text, f"{value:.2f}", told(compared), f"{p:.2g}")
    columns = ["name", "scale", "text", "perplexity", "nats", *NUMBERS, "adjusted_p"]
    write_csv(HERE / "interpolations.csv", columns, lines)
    show(shown)


if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:], __doc__, judge))
