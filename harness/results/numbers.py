"""How a quantity is written, one rule for each kind: on terminals, pages, figures and cards.

CSV and JSON files have every digit. What a page's own code writes follows the same rules
(harness/report/page.js).
"""

from __future__ import annotations

MIB = 2**20
LEAST_P = 0.0001  # below which a p-value is no more than that


def perplexity(value: float) -> str:
    """Perplexity, with two decimals; also what is in the same unit, and a ratio of two."""
    return f"{value:,.2f}"


def short(value: float) -> str:
    """An end of an interval, or perplexity where room is short: three digits."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}" if value else "0"


def place(value: float) -> str:
    """Write a place on an axis, such as a rank: a whole number, or three digits of another."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"


def rate(value: float) -> str:
    """Write a learning rate in three digits, without zeros at its end."""
    return f"{value:.3g}"


def count(value: float) -> str:
    """Write a whole count (parameters, tokens, tokens a second), with commas by thousands."""
    return f"{value:,.0f}"


def mib(size: float) -> str:
    """Write memory of so many bytes in whole MiB, without the unit."""
    return f"{size / MIB:,.0f}"


def percent(value: float, decimals: int = 2) -> str:
    """Write a percentage of parameters with so many decimals, without its sign."""
    return f"{value:.{decimals}f}"


def share(value: float) -> str:
    """A share, such as accuracy, as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """Seconds, and FLOPs in their unit: three digits, and every digit before the point."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def nats(value: float) -> str:
    """Write a difference in nats per token, or nats themselves, with four decimals."""
    return f"{value:.4f}"


def p(value: float) -> str:
    """Write a p-value in two digits, the least that the test can give as a bound."""
    return f"<{LEAST_P}" if value < LEAST_P else f"{value:.2g}"
