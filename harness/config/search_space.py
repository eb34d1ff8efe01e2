"""The space of a search: which values its keys may have, as Hydra writes them or as a mapping.

    train.lr: tag(log, interval(1e-4, 1e-1))     or   {low: 1e-4, high: 1e-1, log: true}
    method.r: tag(log, int(interval(1, 64)))     or   {low: 1, high: 64, log: true, integer: true}
    method.r: range(8, 65, 8)                    or   {low: 8, high: 64, step: 8, integer: true}
    train.lr:                                         {low: 1e-3, high: 1.6e-2, factor: 2}
    targets: attn,mlp                            or   {choices: [attn, mlp]}

A key with one value is fixed. A key that only some methods have is searched only with these: keys
that decide on the method are chosen first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from harness.config import unused_keys
from harness.config.errors import ConfigError, nearest

FIELDS = ("choices", "low", "high", "log", "step", "integer", "factor")  # of a mapping
NOT_SEARCHED = {
    "seed": "the luckiest would win; search under one seed, and run the best under several",
    "experiment_name": "all runs of a search are in one folder",
    "outputs_dir": "all runs of a search are in one folder",
    "run_name": "every candidate has a name of its own",
}
MethodOf = Callable[[Sequence[str]], unused_keys.Chosen | None]
Value = str | int | float


@dataclass(frozen=True)
class Dimension:
    """A key and its values: choices, as an override writes them, or an interval with both ends."""

    key: str  # as an override has it, with a + where the key is added
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None  # between values of an interval
    integer: bool = False
    factor: float | None = None  # between values of an interval, in place of a step
    listed: tuple[float, ...] = ()  # the values of an interval with a factor, lowest first

    @property
    def name(self) -> str:
        """Return the key without the + that marks it as added to the configuration."""
        return unused_keys.key_of(self.key)

    def override(self, value: Value) -> str:
        """Return the override that gives the key one of its values, as Hydra takes it."""
        return f"{self.key}={self.rounded(value)}"

    def rounded(self, value: Value) -> Value:
        """A number of an interval in six digits, as a run has it; anything else as it is."""
        if self.choices or not isinstance(value, float):
            return value
        return min(max(float(f"{value:.6g}"), self.low), self.high)

    def values(self) -> list[Value] | None:
        """All values there are, lowest first; None of an interval without a step."""
        if self.choices or self.listed:
            return list(self.choices or self.listed)
        if self.step is None:
            return None
        number = math.floor((self.high - self.low) / self.step * (1 + 1e-12)) + 1
        points = [self.low + index * self.step for index in range(number)]
        return [int(value) if self.integer else float(f"{value:.12g}") for value in points]

    def ends(self) -> list[Value]:
        """Return values that stand for all of them when the key is checked."""
        low, high = (int(v) if self.integer else v for v in (self.low, self.high))
        return list(self.choices) or [low, high]

    def text(self) -> str:
        """Return the values in words, as a study records them and compares spaces."""
        if self.choices:
            return ",".join(self.choices)
        if self.factor:
            return f"{self.low:g} to {self.high:g} by factors of {self.factor:g}"
        kind = "whole numbers " if self.integer else ""
        step = f", step {self.step:g}" if self.step else ""
        return f"{kind}{self.low:g} to {self.high:g}{step}{' (log)' if self.log else ''}"

    def beyond(self, end: str) -> Dimension | None:
        """What lies beyond the "lower" or the "upper" end; None where there is nothing.

        One more value of what has a step or a factor; of any other interval half as much again, on
        its own scale.
        """
        if self.choices:
            return None
        low, high, up = self.low, self.high, end == "upper"
        if self.factor:
            value = rounded(high * self.factor if up else low / self.factor)
            return replace(self, low=value, high=value, listed=(value,))
        if self.step:
            value = high + self.step if up else low - self.step
            value = float(f"{value:.12g}")
            return replace(self, low=value, high=value)
        if self.log:
            root = math.sqrt(high / low)
            first, last = (high, high * root) if up else (low / root, low)
        else:
            half = (high - low) / 2
            first, last = (high, high + half) if up else (low - half, low)
        if self.integer:
            ends = (high + 1, math.ceil(last)) if up else (math.floor(first), low - 1)
            first, last = ends
        else:
            first, last = (first, rounded(last)) if up else (rounded(first), last)
        positive = not self.log or first > 0
        return replace(self, low=first, high=last) if positive and first <= last else None

    def with_part(self, part: Dimension) -> Dimension:
        """The interval together with a part that is beyond one of its ends."""
        low, high = min(self.low, part.low), max(self.high, part.high)
        return replace(self, low=low, high=high, listed=tuple(sorted(self.listed + part.listed)))


def rounded(number: float) -> float:
    """A number in the six digits that a run has of it."""
    return float(f"{number:.6g}")


@dataclass(frozen=True)
class Space:
    """What is searched, and what is fixed for all of its candidates."""

    fixed: tuple[str, ...]  # overrides
    dimensions: tuple[Dimension, ...]

    def with_dimension(self, other: Dimension) -> Space:
        """The space with another dimension in place of that of the same key."""
        dimensions = tuple(other if d.name == other.name else d for d in self.dimensions)
        return replace(self, dimensions=dimensions)

    def assemble(self, choose: Callable[[Dimension], Value], method_of: MethodOf) -> list[str]:
        """The overrides of a candidate; `choose` is asked for the keys that its method has.

        Keys that decide on the method come first.
        """
        chosen: dict[str, str] = {}
        for dimension in self._deciding():
            chosen[dimension.key] = dimension.override(choose(dimension))
        fixed = [text for text in self.fixed if unused_keys.key_of(text) in unused_keys.DECIDES]
        method = method_of([*fixed, *chosen.values()])
        others = self.methods(method_of)

        def anothers(text: str) -> bool:  # a key of no method is a mistake, which composing tells
            if method is None or not unused_keys.of_method([text], *method):
                return False
            return any(not unused_keys.of_method([text], *other) for other in others)

        for dimension in self.dimensions:
            if dimension.key not in chosen and not anothers(f"{dimension.key}="):
                chosen[dimension.key] = dimension.override(choose(dimension))
        kept = [text for text in self.fixed if not anothers(text)]
        return [*kept, *(chosen[d.key] for d in self.dimensions if d.key in chosen)]

    def methods(self, method_of: MethodOf) -> list[unused_keys.Chosen]:
        """Return the names of the methods that candidates of this space may have."""
        fixed = [text for text in self.fixed if unused_keys.key_of(text) in unused_keys.DECIDES]
        deciding = self._deciding()
        methods: dict[unused_keys.Chosen, None] = {}
        for values in itertools.product(*(d.ends() for d in deciding)):
            texts = [d.override(value) for d, value in zip(deciding, values, strict=True)]
            if method := method_of([*fixed, *texts]):
                methods[method] = None
        return list(methods)

    def with_steps(self) -> Space:
        """The space with a step of 1 in intervals of whole numbers that have none."""
        return replace(self, dimensions=tuple(
            replace(d, step=1.0) if d.integer and d.values() is None else d
            for d in self.dimensions))  # fmt: skip

    def size(self) -> float:
        """How many combinations of values there are; infinite with an interval without a step."""
        numbers = (d.values() for d in self.dimensions)
        return math.prod(math.inf if values is None else len(values) for values in numbers)

    def points(self, method_of: MethodOf) -> Iterator[dict[str, Value]]:
        """Every candidate of a grid once, by the names of its keys; the last key moves fastest.

        Raises:
            ConfigError: an interval without a step.
        """
        values: dict[str, list[Value]] = {}
        for dimension in self.dimensions:
            choices = dimension.values()
            if choices is None:
                raise ConfigError(
                    f"hydra.sweeper.sampler=grid: {dimension.name}={dimension.text()} has no "
                    "step; give it choices or a step, or another sampler"
                )
            values[dimension.name] = choices
        seen: dict[tuple[tuple[str, Value], ...], None] = {}
        for combination in itertools.product(*values.values()):
            given = dict(zip(values, combination, strict=True))
            used: dict[str, Value] = {}

            def choose(d: Dimension, given: Any = given, used: Any = used) -> Value:
                used[d.name] = given[d.name]
                return cast("Value", given[d.name])

            self.assemble(choose, method_of)
            seen[tuple(sorted(used.items()))] = None
        for point in seen:
            yield dict(point)

    def corners(self, method_of: MethodOf) -> Iterator[list[str]]:
        """Candidates in which every method and every value, or end of an interval, is met once."""
        seen: dict[tuple[str, ...], None] = {}
        deciding = self._deciding()
        for values in itertools.product(*(d.ends() for d in deciding)):
            first = {d.key: d.ends()[0] for d in self.dimensions}
            first |= {d.key: value for d, value in zip(deciding, values, strict=True)}
            for dimension in self.dimensions:
                for end in (
                    dimension.ends() if dimension not in deciding else [first[dimension.key]]
                ):
                    given = first | {dimension.key: end}
                    # mypy does not infer the type of a lambda with a default.
                    texts = self.assemble(lambda d, given=given: given[d.key], method_of)  # type: ignore[misc]
                    seen[tuple(texts)] = None
        yield from map(list, seen)

    def _deciding(self) -> list[Dimension]:
        return [d for d in self.dimensions if d.name in unused_keys.DECIDES]


def read(*parts: Mapping[str, Any] | Sequence[str], loader: Any = None) -> Space:
    """The space of several mappings and lists of overrides; a later value replaces an earlier one.

    Raises:
        ConfigError: an interval that is empty, or not positive on a log scale; a mapping that is
            neither choices nor an interval; a key that no search may move; nothing to search.
    """
    parser = OverridesParser.create(config_loader=loader)
    by_key: dict[str, str | Dimension] = {}
    for part in parts:
        if isinstance(part, Mapping):
            for key, value in part.items():
                by_key[unused_keys.key_of(str(key))] = _value(str(key), value, parser)
        else:
            for text in part:
                override = parser.parse_override(text)
                several = override.is_sweep_override()
                value = _of_override(text.partition("=")[0], override) if several else text
                by_key[unused_keys.key_of(text)] = value
    dimensions = tuple(value for value in by_key.values() if isinstance(value, Dimension))
    for dimension in dimensions:
        if why := NOT_SEARCHED.get(dimension.name):
            raise ConfigError(f"{dimension.key}={dimension.text()} cannot be searched: {why}")
    fixed = tuple(value for value in by_key.values() if isinstance(value, str))
    if not dimensions:
        raise ConfigError(
            f"a search of {' '.join(fixed) or 'nothing'}: no key has several values; give some, as "
            "in train.lr='tag(log,interval(1e-4,1e-1))' or method.r=1,8"
        )
    return Space(fixed, dimensions)


def _value(key: str, value: Any, parser: OverridesParser) -> str | Dimension:
    """A whole override of a fixed key, or what is searched of it."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping) and {"choices", "low", "high"} & value.keys():
        return _of_mapping(key, value)
    text = "null" if value is None else str(value)
    override = parser.parse_override(f"{key}={text}")
    if not override.is_sweep_override():
        return f"{key}={text}"
    return _of_override(key, override)


def _of_mapping(key: str, value: Mapping[str, Any]) -> str | Dimension:
    for name in value:
        if name not in FIELDS:
            raise ConfigError(f"{key}: {name}={value[name]}: {nearest(str(name), FIELDS)}")
    if "choices" in value:
        listed = value["choices"]
        if len(value) > 1 or not isinstance(listed, list | tuple) or not listed:
            raise ConfigError(f"{key}: expected choices alone, as in {{choices: [1, 8]}}")
        return _choices(key, [_text(choice) for choice in listed])
    if not {"low", "high"} <= value.keys():
        raise ConfigError(f"{key}: an interval has low and high, as in {{low: 1, high: 8}}")
    for name in ("low", "high", "step", "factor"):
        number = value.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise ConfigError(f"{key}: {name}={number}: expected a number")
    if "factor" in value:
        return _by_factors(key, value)
    return _interval(
        key,
        value["low"],
        value["high"],
        log=bool(value.get("log")),
        step=value.get("step"),
        integer=bool(value.get("integer")),
    )


def _by_factors(key: str, value: Mapping[str, Any]) -> Dimension:
    low, high, factor = float(value["low"]), float(value["high"]), value["factor"]
    shown = f"{key}: interval {low:g} to {high:g} by factors of {factor}"
    if other := {"step", "integer"} & value.keys():
        raise ConfigError(f"{shown}: a factor has no {min(other)} beside it")
    if not (0 < low < high < math.inf and factor is not None and 1 < factor <= high / low * 1.01):
        raise ConfigError(f"{shown}: expected 0 < low < high, and a factor above 1 between them")
    number = math.floor(math.log(high / low) / math.log(factor) + 1e-6) + 1
    return by_factors(key, [rounded(low * factor**index) for index in range(number)], factor)


def by_factors(key: str, values: Sequence[float], factor: float) -> Dimension:
    """Numbers that are `factor` apart, lowest first, to which a search may add more."""
    low, high = values[0], values[-1]
    return Dimension(key, (), low, high, log=True, factor=factor, listed=tuple(values))


def _of_override(key: str, override: Override) -> str | Dimension:
    swept: Any = override.value()
    tags = set(swept.tags or ())
    if unknown := tags - {"log"}:
        raise ConfigError(f"{key}: tag {sorted(unknown)[0]}: the only tag is log")
    if override.is_interval_sweep():
        integer = isinstance(swept.start, int) and isinstance(swept.end, int)
        return _interval(key, swept.start, swept.end, log="log" in tags, step=None, integer=integer)
    texts = list(override.sweep_string_iterator())
    if tags:
        raise ConfigError(f"{key}: tag log goes with an interval")
    if override.is_range_sweep() and len(texts) > 1:
        integer = all(isinstance(number, int) for number in (swept.start, swept.stop, swept.step))
        low, high = sorted((float(texts[0]), float(texts[-1])))
        return _interval(key, low, high, log=False, step=abs(swept.step), integer=integer)
    return _choices(key, texts)


def _text(value: Any) -> str:
    """A value of a mapping as an override writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _choices(key: str, texts: list[str]) -> str | Dimension:
    distinct = tuple(dict.fromkeys(texts))
    return Dimension(key, distinct) if len(distinct) > 1 else f"{key}={distinct[0]}"


def _interval(
    key: str, low: float, high: float, *, log: bool, step: float | None, integer: bool
) -> str | Dimension:
    shown = f"{key}: interval {low:g} to {high:g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{shown}: expected finite numbers")
    if low >= high:
        raise ConfigError(f"{shown} is empty: expected low < high")
    if log and low <= 0:
        raise ConfigError(f"{shown} on a log scale: expected numbers above 0")
    if step is not None and (not 0 < step <= high - low):
        raise ConfigError(f"{shown}, step {step:g}: expected a step above 0, and in the interval")
    if step is not None and log:
        raise ConfigError(f"{shown}, step {step:g}: a log scale has no step; leave one out")
    if integer and any(number != int(number) for number in (low, high, step or 0)):
        raise ConfigError(f"{shown}: expected whole numbers")
    return Dimension(key, (), low, high, log, step, integer)
