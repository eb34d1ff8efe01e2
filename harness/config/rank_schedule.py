"""When AdaLoRA cuts ranks: `method.tinit`, `tfinal` and `deltaT` as steps of a run.

Of N optimizer steps, counted from 0 as PEFT's example counts them, ranks are cut after step t for
tinit < t < N - tfinal where deltaT divides t, and for good after step N - tfinal. With tfinal of 1
or more that is a step of the run, so that its budget is always reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.config.errors import ConfigError, require
from harness.config.method_schema import AdaloraMethod


@dataclass(frozen=True)
class RankSchedule:
    """Holds AdaLoRA's schedule in optimizer steps."""

    total_step: int
    tinit: int
    tfinal: int
    deltaT: int  # noqa: N815 - PEFT's name

    @property
    def last_cut(self) -> int:
        """Return the step, from 0, after which ranks stay as they are."""
        return self.total_step - self.tfinal


def schedule_of(method: AdaloraMethod, steps: int) -> RankSchedule:
    """The schedule of a run of `steps` optimizer steps.

    Raises:
        ConfigError: a value that is no number of steps, or no step is left for the cuts.
    """
    tinit, tfinal, every = (
        _steps(key, getattr(method, key), steps, least)
        for key, least in (("tinit", 0), ("tfinal", 1), ("deltaT", 1))
    )
    if tinit >= steps - tfinal:
        raise ConfigError(
            f"method.tinit={method.tinit} and method.tfinal={method.tfinal} are {tinit} and "
            f"{tfinal} of {steps} steps, and leave none for cutting ranks: expected a sum below "
            f"{steps}"
        )
    return RankSchedule(steps, tinit, tfinal, every)


def _steps(key: str, value: Any, steps: int, least: int) -> int:
    """A number of steps, or of a share of all steps; a share is never less than `least`."""
    expected = f"{least} or more steps, or a share of train.steps in (0, 1)"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 < value < 1:
        return max(least, round(value * steps))
    require(number and value == int(value) and value >= least, f"method.{key}", value, expected)
    return int(value)


def check(method: AdaloraMethod) -> None:
    """Refuse ranks and weights that AdaLoRA cannot have.

    Raises:
        ConfigError: naming the key.
    """
    require(method.target_r >= 1, "method.target_r", method.target_r, "a rank of 1 or more")
    require(
        method.first_rank > method.target_r,
        "method.init_r",
        method.init_r,
        f"more than method.target_r={method.target_r}, which ranks are cut to: 1.5 times as null",
    )
    for key in ("beta1", "beta2"):
        value = getattr(method, key)
        require(0 < value < 1, f"method.{key}", value, "a value in (0, 1)")
    weight = method.orth_reg_weight
    require(0 <= weight < float("inf"), "method.orth_reg_weight", weight, "0 or more")
    require(0 <= method.dropout < 1, "method.dropout", method.dropout, "in [0, 1)")
    require(0 < method.lora_alpha < float("inf"), "method.alpha", method.alpha, "a number above 0")
