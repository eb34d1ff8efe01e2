"""Which learning rate a run gets: searched for it, borrowed from the nearest, or a default.

`train.lr=tuned` reads one file of conf/rates (`resolve`). `train.lr=auto` looks through all of them
for the run's own model and text (`automatic`), and takes a default (`harness.config.default_rates`)
where none has the method. `method.lr_from` of result.json says which it was.
"""

from __future__ import annotations

import math
from dataclasses import replace

from harness.config.default_rates import default_rate, from_adamw
from harness.config.errors import ConfigError
from harness.config.method_schema import MethodConfig
from harness.config.optimizers import ADAMW, OptimizerConfig
from harness.config.paths import CONF_DIR
from harness.config.rates import (
    NOT_USED,
    Rates,
    Setting,
    Tuned,
    edge,
    own_path,
    read,
    tuned_of,
)
from harness.config.schema import ModelConfig

# How much of a text, and how it is cut: the same text still.
SAME_TEXT = (
    "data.validation_share", "data.test_share", "data.train_share", "data.document_chars",
    "data.context_length",
)  # fmt: skip
BESIDE = 0.5  # of the best rate for something similar: a grid often diverges at twice its best


def automatic(
    name: str | None,
    method: MethodConfig,
    targets: str,
    model: ModelConfig,
    setting: Setting,
    optimizer: OptimizerConfig = ADAMW,
) -> tuple[float, str]:
    """The rate of train.lr=auto for a method on `targets`, and where it is from.

    What a search found for this model, text and configuration, or between two ranks; half of what
    it found for a similar configuration or on another text; or else the method's default for the
    model. Only rates that were found with the same optimizer are taken; without any, half of
    AdamW's on an optimizer of the same scale. `name` is the file of conf/rates that is looked at
    first.

    Raises:
        ConfigError: a file of conf/rates that cannot be read, or an optimizer without a default.
    """
    if not method.trains:
        return NOT_USED
    requested = tuned_of(replace(method, label=None), targets, {}, "", optimizer)
    candidates = []
    for rates in all_files(name):
        family = [
            t
            for t in rates.tuned
            if t.family == requested.family
            and (t.scale is None) == (requested.scale is None)
            and _same_optimizer(t, requested)
        ]
        apart = _apart_in(setting, rates.setting)
        if family and not any(key.startswith("model.") for key in apart):
            other_text = any(key.startswith("data.") and key not in SAME_TEXT for key in apart)
            lr, origin = _of_family(family, requested)
            between_ranks = origin.startswith("interpolated") and " with " not in origin
            similar = origin != "tuned" and not between_ranks
            candidates.append((other_text, similar, len(apart), lr, origin, rates.setting))
    if not candidates and requested.optimizer:
        return from_adamw(*automatic(name, method, targets, model, setting), optimizer)
    if not candidates:
        return default_rate(method, model)
    other_text, similar, _, lr, origin, tuned_for = min(candidates, key=lambda c: c[:3])
    if other_text or similar:
        on = f" on {tuned_for['data.name']}" if other_text else ""
        return float(f"{BESIDE * lr:.3g}"), f"default: half of the rate {origin}{on}"
    return lr, _with_setting(origin, setting, tuned_for)


def _same_optimizer(first: Tuned, second: Tuned) -> bool:
    return first.optimizer.get("name") == second.optimizer.get("name")


def all_files(first: str | None = None) -> list[Rates]:
    """Every file of conf/rates, ours and what ships, `first` in front."""
    folders = dict.fromkeys([own_path("").parent, CONF_DIR / "rates"])
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    return [read(name) for name in dict.fromkeys([*([first] if first else []), *names])]


def _apart_in(first: Setting, second: Setting) -> list[str]:
    keys = sorted((first.keys() | second.keys()) - {"seed"})
    return [key for key in keys if first.get(key) != second.get(key)]


def _with_setting(origin: str, setting: Setting, tuned_for: Setting) -> str:
    apart = _apart_in(setting, tuned_for)
    differences = [f"{key}={tuned_for.get(key, 'the default')}" for key in apart]
    return f"{origin}, for {', '.join(differences)}" if differences else origin


def resolve(
    name: str | None,
    method: MethodConfig,
    targets: str,
    setting: Setting,
    optimizer: OptimizerConfig = ADAMW,
) -> tuple[float, str]:
    """The rate for a method on `targets`, and where it is from; `setting` is what runs would have.

    Raises:
        ConfigError: no such file, or nothing tuned for a method of this kind and this optimizer.
    """
    if not method.trains:
        return NOT_USED
    if name is None:
        raise ConfigError("train.lr=tuned needs train.rates, a file of conf/rates")
    rates = read(name)
    requested = tuned_of(method, targets, {}, "", optimizer)
    family = [
        t for t in rates.tuned if t.family == requested.family and _same_optimizer(t, requested)
    ]
    if not family:
        known = ", ".join(dict.fromkeys(_with_optimizer(t) for t in rates.tuned))
        raise ConfigError(
            f"train.lr=tuned: {rates.path.name} has no rate for {_with_optimizer(requested)}, but "
            f"for {known}: give train.lr=…, or tune it (conf/experiment/tune.yaml)"
        )
    lr, origin = _of_family(family, requested)
    return lr, _with_setting(origin, setting, rates.setting)


def _with_optimizer(t: Tuned) -> str:
    return t.family + (f" with optimizer={t.optimizer['name']}" if t.optimizer else "")


def _of_family(family: list[Tuned], requested: Tuned) -> tuple[float, str]:
    alike, borrowed = family, ""
    same = [t for t in alike if t.fields == requested.fields]
    if not same:
        alike = [t for t in alike if t.fields == alike[0].fields]
        other = alike[0].fields
        apart = sorted(
            k
            for k in other.keys() | requested.fields.keys()
            if other.get(k) != requested.fields.get(k)
        )
        borrowed += f" with another {', '.join(apart)}"
    else:
        alike = same
    if not any(t.targets in (None, requested.targets) for t in alike):
        borrowed += f" on targets={alike[0].targets}"
        alike = [t for t in alike if t.targets == alike[0].targets]
    else:
        alike = [t for t in alike if t.targets in (None, requested.targets)]
    if requested.scale is not None:
        scales = sorted(
            {t.scale for t in alike if t.scale}, key=lambda s: _apart(s, requested.scale)
        )
        alike = [t for t in alike if t.scale == scales[0]]
        if not math.isclose(scales[0], requested.scale):
            borrowed += f" at alpha={scales[0]:g}r"
    if exact := [t for t in alike if t.rank == requested.rank]:
        where = edge(exact[0].grid)
        return exact[0].lr, f"tuned{borrowed}" + (f", at the {where} of its grid" if where else "")
    k = _number(requested.rank)
    below = [t for t in alike if _number(t.rank) < k]
    above = [t for t in alike if _number(t.rank) > k]
    lower = max(below, key=lambda t: _number(t.rank), default=None)
    upper = min(above, key=lambda t: _number(t.rank), default=None)
    if lower and upper and math.isfinite(_number(upper.rank)):
        low, high = _number(lower.rank), _number(upper.rank)
        share = math.log(k / low) / math.log(high / low)
        lr = lower.lr ** (1 - share) * upper.lr**share
        between = f"{lower.rank_said} and {upper.rank_said}"
        return float(f"{lr:.3g}"), f"interpolated between {between}{borrowed}"
    near = lower or upper or alike[0]
    return near.lr, f"as tuned for {near.rank_said}{borrowed}"


def _apart(first: float, second: float | None) -> float:
    return abs(math.log(first / second)) if second else 0.0


def _number(rank: str | None) -> float:
    """A rank to compare by; a share or an energy, whose rank only the model knows, as full."""
    try:
        value = float(rank or "inf")
    except ValueError:
        return math.inf
    return value if math.isfinite(value) and value >= 1 and value == int(value) else math.inf
