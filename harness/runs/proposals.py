"""Optuna's samplers for a search's space: values of a key, given points, and Sobol's sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from harness.config.search_space import Dimension, Value


class Given(BaseSampler):
    """Values that are known beforehand, by the names of the keys."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return nothing: every key by itself."""
        return {}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return nothing: every key by itself."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the value that was given for a key."""
        return self._values[param_name]


class Sobol(optuna.samplers.QMCSampler):
    """Optuna's quasi-random sampler over a space that is known before its first proposal."""

    def __init__(self, space: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(qmc_type="sobol", scramble=True, seed=seed)
        self._space = space

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the whole space, of which Optuna knows none before the first trial."""
        return self._space


def distribution(dimension: Dimension) -> BaseDistribution:
    """Return the values of a key as Optuna has them."""
    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.integer:
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Value:
    """Return the value that the sampler of a trial proposes for a key."""
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.choices:
        return cast("Value", trial.suggest_categorical(dimension.name, dimension.choices))
    if dimension.integer:
        step = int(step or 1)
        return trial.suggest_int(dimension.name, int(low), int(high), step=step, log=dimension.log)
    return trial.suggest_float(dimension.name, low, high, step=step, log=dimension.log)
