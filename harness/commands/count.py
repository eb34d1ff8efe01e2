"""Exact parameter counts of a configuration, from the model's modules on the meta device.

    harness count model=gpt2_medium method=lora method.r=4 targets=qv
    harness count method=none,full,lora method.r=4,8
    harness count --all method=lora method.r=4 targets=qv

No weights and no network: the sizes of the hub's GPT-2 models stand in conf/model. Several
configurations have a row each; `--all` is each of the four sizes. Exit status 2 for a mistake in
the configuration.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.method_schema import AdaloraMethod, LoraMethod, NoMethod, SvdMethod
from harness.config.run_config import RunConfig
from harness.results import numbers
from harness.runs.overrides import compose, without_flag
from harness.system.console import quiet_command

if TYPE_CHECKING:  # what needs torch is imported after the mistakes that are found without it
    from torch import nn

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
    return run, _built(run)


def _built(run: RunConfig) -> nn.Module:
    from harness import methods
    from harness.models import pretrained

    if getattr(run.method, "energy", None) is not None:
        raise ConfigError("method.energy: a count needs a rank, which only the weights can tell")
    base = pretrained.on_meta(run, pretrained.load_config(pretrained.without_files(run).model))
    return methods.check(base, run)


def by_kind(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(total, trainable) elements by kind of module: the layers' numbers are left out."""
    total: Counter[str] = Counter()
    trainable: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kind = re.sub(r"(^|\.)\d+\.", r"\1*.", name.removeprefix("base_model.model."))
        total[kind] += parameter.numel()
        trainable[kind] += parameter.numel() * parameter.requires_grad
    return {kind: (total[kind], trainable[kind]) for kind in total}


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    overrides = [argument for argument in arguments if argument != "--all"]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    sizes = [[f"model={size}"] for size in SIZES] if "--all" in arguments else [[]]
    runs = [run for size in sizes for run in compose(*without_flag(overrides), *size)]
    built = [_built(run) for run in runs]
    if len(runs) == 1:
        _show(runs[0], built[0])
    else:
        _show_rows(runs, built)
    return 0


def _show_rows(runs: list[RunConfig], built: list[nn.Module]) -> None:
    """A row for each configuration; seeds and rates count alike, and are one."""
    from harness.models import model_size
    from harness.report.table import plain, show

    columns = ["r, k", "total", "base", "trainable", "% of total"]
    table = plain(["model", "method", "targets"], columns)
    rows: dict[tuple[str, ...], None] = {}
    bases: dict[str, str] = {}
    for run, model in zip(runs, built, strict=True):
        counted, method = model_size.count_parameters(model), run.method
        key = repr(run.model)
        if key not in bases:
            base = _built(replace(run, method=NoMethod("none")))
            bases[key] = f"{model_size.count_parameters(base).total:,}"
        rank = method.kept if isinstance(method, SvdMethod) else "-"
        if isinstance(method, AdaloraMethod):
            rank = f"{method.first_rank} to {method.r}"
        row: tuple[str, ...] = (
            run.model.name, naming.label(method),
            run.targets.name if method.takes_targets else "-",
            naming.with_pattern(method) if isinstance(method, LoraMethod) else rank,
            f"{counted.total:,}", bases[key], f"{counted.trainable:,}",
            numbers.percent(counted.trainable_percent),
        )  # fmt: skip
        rows[row] = None
    for row in rows:
        table.add_row(*row)
    show(table)


def _show(run: RunConfig, model: nn.Module) -> None:
    """One configuration, by kind of module."""
    from harness.methods import model_facts
    from harness.models import model_size
    from harness.report.table import plain, show

    table = plain([f"{run.model.name}, {naming.label(run.method)}"], ["elements", "trainable"])
    for kind, (total, trainable) in by_kind(model).items():
        table.add_row(kind, f"{total:,}", f"{trainable:,}")
    show(table)
    counted = model_size.count_parameters(model)
    print(f"total      {counted.total:,}")
    if (factored := model_facts.factored_total(model)) is not None:
        print(f"factored   {factored:,} (U, D and V in place of each W)")
    print(f"trainable  {counted.trainable:,} ({numbers.percent(counted.trainable_percent, 4)} %)")
    for sentence in model_facts.trained_alone(model, run).get("tied", ()):
        print(f"tied       {sentence}")
