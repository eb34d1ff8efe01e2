"""Learning rates by search: a grid for each configuration, grown until every best is inside.

    make tune        (python -m harness experiment=tune; the sweeper is hydra_plugins' RateSweeper)

What it finds is a file of conf/rates with its evidence, and `train.lr=tuned` reads it. A rate for a
rank or for targets that were not tuned is interpolated or borrowed, and the result says so
(`method.lr_from`). Runs of a search do not load the test set: `evaluate.test` must be false.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.config import (
    CONF_DIR,
    ConfigError,
    LoraMethod,
    MethodConfig,
    SvdMethod,
    label,
    nearest,
)

Grid = Mapping[float, float | None]  # peak rate -> validation nll, nats per token; None: diverged
NOT_TRAINED = ("none", "truncate")


@dataclass(frozen=True)
class Tuned:
    """One configuration of a family and what its grid found."""

    family: str  # what tables call the method
    targets: str | None
    rank: str | None  # r or k, as tables show it
    scale: float | None  # alpha / r of LoRA
    grid: Grid

    @property
    def lr(self) -> float:
        """The rate with the lowest validation nll."""
        return best(self.grid)

    def __str__(self) -> str:
        parts = [self.targets or "", _rank_said(self), _scale_said(self)]
        return " ".join([self.family, *filter(None, parts)])


@dataclass(frozen=True)
class Rates:
    """A file of conf/rates."""

    path: Path
    setting: dict[str, Any]  # model, data, steps, batch_tokens, and how it was measured
    tuned: tuple[Tuned, ...]


# ---------------------------------------------------------------------------------- the search


def grid_around(centre: float, points: int, factor: float) -> list[float]:
    """`points` rates, neighbours `factor` apart, about `centre`."""
    return [_round(centre * factor ** (i - points // 2)) for i in range(points)]


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")


def _value(nll: float | None) -> float:
    return math.inf if nll is None or math.isnan(nll) else nll


def best(grid: Grid) -> float:
    """The rate with the lowest nll; of equals the lowest rate."""
    return min(sorted(grid), key=lambda rate: _value(grid[rate]))


def edge(grid: Grid) -> str | None:
    """Whether the best rate is the "lowest" or the "highest" of its grid; None if inside."""
    rates, found = sorted(grid), best(grid)
    return "lowest" if found == rates[0] else "highest" if found == rates[-1] else None


def further(grid: Grid, factor: float) -> list[float]:
    """The rate to try next: beyond the edge that the best is at, none where it is inside."""
    where, found = edge(grid), best(grid)
    return [_round(found / factor if where == "lowest" else found * factor)] if where else []


def fitted(grid: Grid) -> float:
    """Vertex of the parabola through the best and its neighbours, nll over log rate.

    The best itself where it is at an edge or a neighbour diverged.
    """
    rates = sorted(grid)
    at = rates.index(best(grid))
    three = [(math.log(rate), _value(grid[rate])) for rate in rates[max(0, at - 1) : at + 2]]
    if len(three) < 3 or not all(math.isfinite(nll) for _, nll in three):
        return rates[at]
    (x0, y0), (x1, y1), (x2, y2) = three
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature)) if curvature > 0 else rates[at]


# ------------------------------------------------------------------------------------ the file


def path_of(name: str) -> Path:
    """The file of `name`: one of conf/rates, or a path that ends in .yaml."""
    return Path(name) if name.endswith((".yaml", ".yml")) else CONF_DIR / "rates" / f"{name}.yaml"


def read(name: str) -> Rates:
    """The rates of a file of conf/rates, or of a path; raises ConfigError."""
    path = path_of(name)
    try:
        loaded = yaml.safe_load(path.read_text("utf-8"))
        tuned = tuple(
            Tuned(t["family"], t["targets"], t["rank"], t["scale"], dict(t["validation_nll"]))
            for t in loaded.pop("tuned")
        )
    except FileNotFoundError:
        there = [found.stem for found in (CONF_DIR / "rates").glob("*.yaml")]
        raise ConfigError(f"train.rates={name}: no file {path}; {nearest(name, there)}") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"train.rates={name}: {path} is no file of rates ({error})") from error
    return Rates(path, loaded, tuned)


def text(setting: Mapping[str, Any], tuned: Sequence[Tuned]) -> str:
    """What `read` reads, for people too."""
    lines = [
        "# Learning rates that `make tune` (python -m harness experiment=tune) found on validation",
        "# with the evidence: validation nll, nats per token, by peak rate (null: diverged).",
        "# fitted: vertex of a parabola through best and neighbours. train.lr=tuned reads it.",
        yaml.safe_dump(dict(setting), sort_keys=False).rstrip(),
        "tuned:",
    ]
    for t in tuned:
        nll = ", ".join(
            f"{_decimal(rate)}: {'null' if value is None else f'{value:.5f}'}"
            for rate, value in sorted(t.grid.items())
        )
        lines += [
            f"  - family: {t.family}",
            f"    targets: {t.targets or 'null'}",
            f"    rank: {repr(t.rank) if t.rank else 'null'}",
            f"    scale: {'null' if t.scale is None else f'{t.scale:g}'}",
            f"    lr: {_decimal(t.lr)}"
            + (f" # the {edge(t.grid)} of its grid" if edge(t.grid) else ""),
            f"    fitted: {fitted(t.grid):.3g}",
            f"    validation_nll: {{{nll}}}",
        ]
    return "\n".join(lines) + "\n"


def _decimal(rate: float) -> str:
    """A number that YAML 1.1 reads as one (it takes 1e-05 for a string)."""
    return f"{rate:.10f}".rstrip("0") if rate < 1 else f"{rate:g}"


# ------------------------------------------------------------------------------------- its use


def resolve(
    name: str | None, method: MethodConfig, targets: str, setting: Mapping[str, Any]
) -> tuple[float, str]:
    """The rate for a method on `targets`, and where it is from; `setting` is what runs would have.

    Raises:
        ConfigError: no such file, or nothing tuned for a method of this kind.
    """
    if method.name in NOT_TRAINED:
        return 1e-3, "not used"
    if name is None:
        raise ConfigError("train.lr=tuned needs train.rates, a file of conf/rates")
    rates = read(name)
    family = [t for t in rates.tuned if t.family == label(method)]
    if not family:
        there = ", ".join(dict.fromkeys(t.family for t in rates.tuned))
        raise ConfigError(
            f"train.lr=tuned: {rates.path.name} has no rate for {label(method)}, but for {there}: "
            "give train.lr=…, or tune it (conf/experiment/tune.yaml)"
        )
    lr, said = _of_family(family, method, targets)
    apart = [
        f"{key} {rates.setting.get(key)}"
        for key, value in setting.items()
        if rates.setting.get(key) != value
    ]
    return lr, f"{said}, for {', '.join(apart)}" if apart else said


def _of_family(family: list[Tuned], method: MethodConfig, targets: str) -> tuple[float, str]:
    borrowed = ""
    if not any(t.targets in (None, targets) for t in family):
        targets = family[0].targets or targets
        borrowed = f" on targets={targets}"
    alike = [t for t in family if t.targets in (None, targets)]
    scale = scale_of(method)
    if scale is not None and not any(t.scale == scale for t in alike):
        near = sorted((abs(math.log(t.scale / scale)), t.scale) for t in alike if t.scale)
        scale = near[0][1]
        borrowed += f" at alpha={scale:g}r"
    alike = [t for t in alike if t.scale == scale]
    asked = _rank(method)
    exact = [t for t in alike if t.rank == asked]
    if exact:
        at_edge = edge(exact[0].grid)
        said = f"tuned{borrowed}" + (f", at the {at_edge} of its grid" if at_edge else "")
        return exact[0].lr, said
    k = _number(asked)
    ordered = sorted(alike, key=lambda t: _number(t.rank))
    below = [t for t in ordered if _number(t.rank) < k]
    above = [t for t in ordered if _number(t.rank) > k]
    if below and above and math.isfinite(_number(above[0].rank)):
        one, other = below[-1], above[0]
        share = math.log(k / _number(one.rank)) / math.log(_number(other.rank) / _number(one.rank))
        lr = one.lr ** (1 - share) * other.lr**share
        between = f"{_rank_said(one)} and {_rank_said(other)}"
        return float(f"{lr:.3g}"), f"interpolated between {between}{borrowed}"
    nearest_rank = below[-1] if below else above[0]
    return nearest_rank.lr, f"as tuned for {_rank_said(nearest_rank)}{borrowed}"


def scale_of(method: MethodConfig) -> float | None:
    """alpha / r of LoRA."""
    return method.lora_alpha / method.r if isinstance(method, LoraMethod) else None


def _rank(method: MethodConfig) -> str | None:
    if isinstance(method, LoraMethod):
        return str(method.r)
    return method.kept if isinstance(method, SvdMethod) else None


def _rank_said(tuned: Tuned) -> str:
    key = "r" if tuned.family == "lora" else "k"
    return f"{key}={tuned.rank}" if tuned.rank else ""


def _scale_said(tuned: Tuned) -> str:
    return f"alpha={tuned.scale:g}r" if tuned.scale else ""


def _number(rank: str | None) -> float:
    """A rank to compare by; a share or an energy, whose rank only the model knows, as full."""
    try:
        value = float(rank or "inf")
    except ValueError:
        return math.inf
    return value if value >= 1 and value == int(value) else math.inf
