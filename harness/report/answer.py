"""What an experiment asks, and what its runs answer, in plain words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.config.paths import CONF_DIR
from harness.report import columns
from harness.report import evidence as ev
from harness.report.evidence import Evidence
from harness.report.ranking import ENOUGH_SEEDS
from harness.report.table import ALPHA, LR, RANK, SHARED, Row, headings
from harness.results import numbers

FEW_PERCENT = 5  # of the parameters: what counts as little
NAMED = 3  # ties that are named


def question(experiment: str, rows: Sequence[Row] = ()) -> str | None:
    """What the header of conf/experiment/<experiment>.yaml asks, or what the rows vary."""
    path = CONF_DIR / "experiment" / f"{experiment}.yaml"
    try:
        header = path.read_text("utf-8")
    except OSError:
        return _asked_by(rows)
    match = re.search(r"# Question:(.*?)# Command:", header, re.DOTALL)
    if match is None:
        return _asked_by(rows)
    sentence = " ".join(match[1].replace("#", " ").split())
    return sentence[:1].upper() + sentence[1:]


def _asked_by(rows: Sequence[Row]) -> str | None:
    """The question of a sweep that nobody has written down."""
    names = {
        "method.label": "the method", "method.targets": "the targets", RANK: "the rank",
        ALPHA: "alpha", LR: "the learning rate",
    }  # fmt: skip
    # Alpha and the rate follow the rank by default: they are asked of where they vary beside it.
    own = columns.telling_of(rows)
    varied = [
        name
        for key, name in names.items()
        if len({row.values[key] for row in rows}) > 1 and (key not in (ALPHA, LR) or key in own)
    ]
    varied += headings(rows).values()
    if not varied:
        return None
    listed = varied[0] if len(varied) == 1 else f"{', '.join(varied[:-1])} and {varied[-1]}"
    return f"How does test perplexity depend on {listed}?"


def answer(rows: Sequence[Row], test: Evidence | None) -> str | None:
    """The best row, what cannot be told from it, and what little training saves and costs."""
    if test is None:
        return None
    best = test.ordered[0]
    value, low, high = test.intervals[best].perplexity
    why = test.intervals[best].missing
    between = f"no interval: {why}" if why else f"{numbers.short(low)} to {numbers.short(high)}"
    if len(test.intervals) == 1:
        statement = f"{best} reaches a test perplexity of {numbers.perplexity(value)} ({between})"
    else:
        alike = f"Of the {len(test.intervals)} rows that were evaluated alike, " * bool(test.apart)
        value_text = numbers.perplexity(value)
        statement = f"{alike}{best} reaches the lowest test perplexity, {value_text} ({between})"
    if not test.comparisons:
        return statement + "."
    compared = [ev.reversed_(c, best) for c in test.comparisons if best in (c.a, c.b)]
    ties = [c.b for c in compared if c.better is None]
    single = bool(test.alone)  # then no difference is one between seeds
    if ties:
        more = " and more" if len(ties) > NAMED else ""
        statement += f", and cannot be told from {', '.join(ties[:NAMED])}{more}"
    else:
        statement += (
            ", lower than every other's" if single else ", significantly lower than every other's"
        )
    sentences = [f"{statement}.", _of_seeds(test), _savings(rows, test)]
    return " ".join(sentence for sentence in sentences if sentence)


def _of_seeds(test: Evidence) -> str | None:
    """What so few seeds do not tell."""
    if test.alone:
        return "It is one seed: another may change the order."
    if test.num_seeds[0] == 2:
        return f"With 2 seeds hardly any difference can be shown; take {ENOUGH_SEEDS}."
    return None


def _savings(rows: Sequence[Row], test: Evidence) -> str | None:
    """What the best of the rows that train little saves beside the best of all, and costs."""
    named = {row.name: row for row in rows}
    best = named[test.ordered[0]]
    if not best.trained:
        return None
    count = {name: float(row.values["parameters.trainable"] or 0) for name, row in named.items()}
    trained = [named[name] for name in test.ordered if named[name].trained]
    few = [r for r in trained if r.values["parameters.trainable_percent"] <= FEW_PERCENT]
    few = few or [r for r in trained if 2 * count[r.name] <= count[best.name]]
    if not few or few[0] is best or not count[few[0].name] < count[best.name]:
        return None
    small = few[0]
    share = small.values["parameters.trainable_percent"]
    savings = [
        f"{small.name} ({numbers.percent(share)} % of the parameters) trains "
        f"{_times(count[best.name] / count[small.name])} fewer parameters than {best.name}"
    ]
    if memory := _memory(small, best):
        savings.append(memory)
    ratio = test.intervals[small.name].perplexity[0] / test.intervals[best.name].perplexity[0]
    savings.append(f"ends at {numbers.perplexity(ratio)} times its perplexity")
    return f"{', '.join(savings[:-1])} and {savings[-1]}."


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _memory(small: Row, best: Row) -> str | None:
    """How much less memory it needs, where both were measured alone."""
    small_peak, best_peak = (row.values["memory.peak_bytes"] for row in (small, best))
    if not small_peak or not best_peak or small.values[SHARED] or best.values[SHARED]:
        return None
    change = 100 * (small_peak / best_peak - 1)
    if abs(change) < 0.5:
        return "needs as much memory"
    return f"needs {abs(change):.0f} % {'less' if change < 0 else 'more'} memory"
