"""Learning rates by search: a grid for each configuration, grown until every best is inside.

    make tune        (harness run experiment=tune, a search with points of each configuration)

What it finds is a file of conf/rates with its evidence; `rate_lookup` says which rate of them a run
gets. Workers of a search get no test set (`evaluate.test=false`): it is dropped before anything is
tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from harness.config import renamed, schema
from harness.config.errors import ConfigError, nearest
from harness.config.method_schema import METHODS, AdaloraMethod, LoraMethod, MethodConfig
from harness.config.naming import label
from harness.config.optimizers import ADAMW, OPTIMIZERS, OptimizerConfig
from harness.config.paths import CONF_DIR, INSTALLED
from harness.config.schema import DataConfig, ModelConfig, TrainConfig

# Peak rate -> validation nll, nats per token; None: it diverged, or was never below its start.
Grid = Mapping[float, float | None]
Setting = Mapping[str, Any]  # of `setting_of`
NOT_USED = 1e-3, "not used"  # by what does not train
# What moves no best rate: that itself, and how the same steps are computed.
NOT_SETTING = (
    "lr", "rates", "lr_from", "threads", "on_oom", "checkpoint_interval", "micro_batch", "compile",
    "checkpointing", "epochs",
)  # fmt: skip
COLUMNS = ("name", "label", "r", "alpha", "rank", "energy")  # of a method, which have their own


@dataclass(frozen=True)
class Tuned:
    """One configuration of a family, and the nll of every learning rate of its grid."""

    family: str  # what tables call the method
    targets: str | None
    rank: str | None  # r or k, as tables show it
    scale: float | None  # alpha / r of LoRA
    grid: Grid
    variant: Mapping[str, Any] = field(default_factory=dict)  # other fields, where not the default
    made: str = ""  # commit, hardware and date
    # What it was found with: {} is AdamW, or else the name, and fields that are not the default.
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    # Rates whose runs a search has stopped, which are None in the grid: nll by optimizer step.
    stopped: Mapping[float, Mapping[int, float]] = field(default_factory=dict)

    @property
    def lr(self) -> float:
        """Return the rate of the grid at which the validation nll is lowest."""
        return best(self.grid)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what tells this entry from others: family, targets, rank, scale, fields."""
        return self.family, self.targets, self.rank, self.scale, repr(sorted(self.fields.items()))

    @property
    def fields(self) -> dict[str, Any]:
        """Further fields of the method and the optimizer, by their keys, where not the default."""
        fields = {f"method.{key}": value for key, value in self.variant.items()}
        return fields | {f"optimizer.{key}": value for key, value in self.optimizer.items()}

    def __str__(self) -> str:
        scale = f"alpha={self.scale:g}r" if self.scale else ""
        other = " ".join(f"{k}={v}" for k, v in self.variant.items())
        if self.optimizer:
            own = [f"{k}={v}" for k, v in self.optimizer.items() if k != "name"]
            other = " ".join(filter(None, [other, f"with {self.optimizer['name']}", *own]))
        return " ".join(filter(None, [self.family, self.targets, self.rank_said, scale, other]))

    @property
    def rank_said(self) -> str:
        """Return the rank in words, as tables have it: r=8 of LoRA, k=64 of U D V^T."""
        return f"{'k' if self.scale is None else 'r'}={self.rank}" if self.rank else ""


@dataclass(frozen=True)
class Rates:
    """Holds a file of conf/rates: the setting of its search, and its entries."""

    path: Path
    setting: dict[str, Any]  # see `setting_of`; and the seed
    tuned: tuple[Tuned, ...]


# ---------------------------------------------------------------------------------- the search


def grid_around(centre: float, points: int, factor: float) -> list[float]:
    """Return `points` learning rates about `centre`, each `factor` times the one before."""
    return [_round(centre * factor ** (i - points // 2)) for i in range(points)]


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")


def _value(nll: float | None) -> float:
    return math.inf if nll is None or math.isnan(nll) else nll


def found_by(record: Mapping[str, Any]) -> float | None:
    """Return the evidence that a finished run gives on its rate, for a grid."""
    quality = record["quality"]
    if not quality["best_step"]:
        return None
    return float(quality["validation"]["nll_nats"] / quality["validation"]["num_tokens"])


def best(grid: Grid) -> float:
    """Return the rate with the lowest validation nll; of equals the lowest rate."""
    return min(sorted(grid), key=lambda rate: _value(grid[rate]))


def edge(grid: Grid) -> str | None:
    """Whether the best rate is the "lowest" or the "highest" of its grid; None if inside."""
    rates, rate = sorted(grid), best(grid)
    return "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None


def further(grid: Grid, factor: float) -> list[float]:
    """The rate to try next: beyond the edge that the best is at, none where it is inside."""
    where, rate = edge(grid), best(grid)
    return [_round(rate / factor if where == "lowest" else rate * factor)] if where else []


def fitted(grid: Grid) -> float:
    """Vertex of the parabola through the best and its neighbours, nll over log rate.

    The best itself where it is at an edge or a neighbour has no nll.
    """
    rates = sorted(grid)
    index = rates.index(best(grid))
    three = [(math.log(rate), _value(grid[rate])) for rate in rates[max(0, index - 1) : index + 2]]
    if len(three) < 3 or not all(math.isfinite(nll) for _, nll in three):
        return rates[index]
    (x0, y0), (x1, y1), (x2, y2) = three
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature)) if curvature > 0 else rates[index]


# ------------------------------------------------------------------------------- what it is for


def setting_of(model: ModelConfig, data: DataConfig, train: Mapping[str, Any]) -> dict[str, Any]:
    """What a best rate may depend on besides the method: model, text and training, as dotted keys.

    Fields that have their schema's default are left out.
    """
    setting: dict[str, Any] = {}
    sections = {"model": vars(model), "data": vars(data), "train": train}
    schemas: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    same = ("shape", "cache_dir", "linear")  # which move no best rate
    left_out = {"model": same, "data": ("cache_dir",), "train": NOT_SETTING}
    for section, values in sections.items():
        defaults = schema.defaults(schemas[section])
        for key, value in values.items():
            value = schema.plain(value)
            if key not in left_out[section] and value != defaults.get(key, "???"):
                setting[f"{section}.{key}"] = value
    for key in ("data.context_length", "train.steps", "train.batch_tokens"):  # always there to read
        section, name = key.split(".")
        setting[key] = sections[section].get(name)
    return setting


def tuned_of(
    method: MethodConfig,
    targets: str,
    grid: Grid,
    provenance: str = "",
    optimizer: OptimizerConfig = ADAMW,
) -> Tuned:
    """The entry for a method on `targets`, with an optimizer."""
    defaults = schema.defaults(METHODS[method.name])
    variant = {
        key: value
        for key, value in vars(method).items()
        if key not in COLUMNS and value != defaults.get(key)
    }
    for key in ("train", *([] if method.label else ["train_only"])):
        variant.pop(key, None)  # which the label says
    scale = rank = None
    if isinstance(method, LoraMethod | AdaloraMethod):
        first = method.r if isinstance(method, LoraMethod) else method.first_rank
        scale, rank = method.lora_alpha / first, str(method.r)
        variant.pop("target_r", None)
    rank = getattr(method, "kept", rank)
    targeted = targets if method.takes_targets else None
    found_with: dict[str, Any] = {}
    if optimizer.name != ADAMW.name:
        usual = schema.defaults(OPTIMIZERS[optimizer.name])
        found_with = {k: v for k, v in vars(optimizer).items() if v != usual.get(k)}
    return Tuned(label(method), targeted, rank, scale, grid, variant, provenance, found_with)


# ------------------------------------------------------------------------------------ the file


def own_path(name: str) -> Path:
    """Where a search writes `name`: a path that ends in .yaml, or a file of conf/rates.

    A package that was installed is not ours to write to: conf/rates is then where the program runs.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return (Path("conf") if INSTALLED else CONF_DIR) / "rates" / f"{name}.yaml"


def path_of(name: str) -> Path:
    """The file of `name` to read: what a search would write, or else what ships."""
    own, shipped = own_path(name), CONF_DIR / "rates" / f"{name}.yaml"
    return shipped if shipped.exists() and not own.exists() else own


@lru_cache(maxsize=16)
def _parsed(content: str) -> Any:
    """A file's YAML by its text: parsing it takes longer than all else that a look-up does."""
    return yaml.safe_load(content)


def read(name: str) -> Rates:
    """The rates of a file of conf/rates, or of a path; raises ConfigError."""
    path = path_of(name)
    try:
        loaded = deepcopy(_parsed(path.read_text("utf-8")))
        tuned = tuple(
            Tuned(
                t["family"], t["targets"], t["rank"], t["scale"], dict(t["validation_nll"]),
                dict(t["variant"]), t["made"], dict(t.get("optimizer") or {}),
                dict(t.get("stopped") or {}),
            )
            for t in loaded["tuned"]
        )  # fmt: skip
        setting = renamed.in_setting(loaded["setting"])
    except FileNotFoundError:
        existing = [file.stem for file in (CONF_DIR / "rates").glob("*.yaml")]
        raise ConfigError(
            f"train.rates={name}: no file {path}; {nearest(name, existing)}"
        ) from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"train.rates={name}: {path} is no file of rates ({error})") from error
    return Rates(path, setting, tuned)


def text(setting: Mapping[str, Any], tuned: Sequence[Tuned]) -> str:
    """Return the file's text, which `read` reads and people do, too."""
    lines = [
        "# Learning rates that a search (experiment=tune and its like) found on validation, with",
        "# the evidence: validation nll, nats per token, by peak rate (null: diverged, or not once",
        "# below its start). fitted: vertex of a parabola through best and neighbours.",
        "# train.lr=tuned reads this.",
    ]
    if any(t.stopped for t in tuned):
        lines.insert(3, "# stopped: rates that a search left, null above, with their nll by step.")
    entries = []
    for t in tuned:
        stopped = {
            rate: {step: round(nll, 5) for step, nll in sorted(by_step.items())}
            for rate, by_step in sorted(t.stopped.items())
        }
        grid = {
            rate: None if nll is None else round(nll, 5) for rate, nll in sorted(t.grid.items())
        }
        at_edge = {"at_edge": edge(t.grid)} if edge(t.grid) else {}
        entries.append(
            {
                "family": t.family, "targets": t.targets, "rank": t.rank, "scale": t.scale,
                "variant": dict(t.variant),
                **({"optimizer": dict(t.optimizer)} if t.optimizer else {}), "lr": t.lr, **at_edge,
                "fitted": float(f"{fitted(t.grid):.3g}"), "validation_nll": grid,
                **({"stopped": stopped} if stopped else {}), "made": t.made,
            }
        )  # fmt: skip
    document = {"setting": dict(setting), "tuned": entries}
    dumped = yaml.safe_dump(
        document, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
    return "\n".join([*lines, dumped])


# ------------------------------------------------------------------------------------- its use
