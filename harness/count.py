"""Exact parameter counts of a configuration, from the model's modules on the meta device.

    python -m harness.count model=gpt2_medium method=lora method.r=4 targets=qv
    python -m harness.count --all method=lora method.r=4 targets=qv

No weights and no network: the sizes of the hub's GPT-2 models stand in conf/model. `--all` is a
table of the four sizes. Exit status 2 for a mistake in the configuration.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections import Counter

from torch import nn

from harness import methods, models, naming
from harness.api import compose
from harness.config import ConfigError, RunConfig
from harness.console import ended
from harness.report.table import plain, show

SIZES = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")


def adapted(overrides: list[str]) -> tuple[RunConfig, nn.Module]:
    """The configuration of `overrides` and its adapted model, on the meta device.

    Raises:
        ConfigError: several runs, a rank by energy, which only the weights can tell, or what
            `adapt` refuses.
    """
    run, *others = compose(*overrides)
    if others:
        raise ConfigError(f"a count is of one configuration, and these are {1 + len(others)}")
    if getattr(run.method, "energy", None) is not None:
        raise ConfigError("method.energy: a count needs a rank, which only the weights can tell")
    base = models.on_meta(run, models.load_config(models.without_files(run).model))
    return run, methods.check(base, run)


def by_kind(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(total, trainable) elements by kind of module: the layers' numbers are left out."""
    total: Counter[str] = Counter()
    trainable: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kind = re.sub(r"(^|\.)\d+\.", r"\1*.", name.removeprefix("base_model.model."))
        total[kind] += parameter.numel()
        trainable[kind] += parameter.numel() * parameter.requires_grad
    return {kind: (total[kind], trainable[kind]) for kind in total}


def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    overrides = [argument for argument in arguments if argument != "--all"]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    try:
        if "--all" in arguments:
            table = plain(["model"], ["method", "total", "base", "trainable", "% of total"])
            for size in SIZES:
                run, model = adapted([*overrides, f"model={size}"])
                counted = models.count_parameters(model)
                base = models.count_parameters(adapted([f"model={size}", "method=none"])[1]).total
                table.add_row(
                    size, naming.label(run.method), f"{counted.total:,}", f"{base:,}",
                    f"{counted.trainable:,}", f"{counted.trainable_percent:.4f}",
                )  # fmt: skip
            show(table)
            return 0
        run, model = adapted(overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = plain([f"{run.model.name}, {naming.label(run.method)}"], ["elements", "trainable"])
    for kind, (total, trainable) in by_kind(model).items():
        table.add_row(kind, f"{total:,}", f"{trainable:,}")
    show(table)
    counted = models.count_parameters(model)
    print(f"total      {counted.total:,}")
    if (factored := methods.factored_total(model)) is not None:
        print(f"factored   {factored:,} (U, D and V in place of each W)")
    print(f"trainable  {counted.trainable:,} ({counted.trainable_percent:.4f} %)")
    for sentence in methods.trained_alone(model, run).get("tied", ()):
        print(f"tied       {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(ended(lambda: main(sys.argv[1:])))
