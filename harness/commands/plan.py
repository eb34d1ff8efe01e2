"""What runs will need, before they run: parameters, memory by category, FLOPs and time.

    harness plan experiment=main
    harness plan model=gpt2_medium method=lora method.r=4,8,16 targets=attn,all
    harness plan experiment=main plan.limit=8GiB      # marks what will not fit
    harness plan search=halving method.r=1,8,64 train.lr=1e-3,1e-2      # a search, with its budget

`harness.runs.estimate` predicts; neither weights nor a network are needed, and held-out text that
is on this machine is read for the size of its batches. Time is an estimate: the FLOPs of training
over the rate of matrix products on this machine, measured for two seconds as it is now, busy or
idle. Exit status 2 for a mistake in the configuration, 1 if a run is over the limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.config import ending, naming
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.config.sizes import parse_bytes
from harness.results import numbers
from harness.runs import search_plan
from harness.runs.overrides import compose, without_flag
from harness.runs.search_settings import short_forms
from harness.system.console import busy, quiet_command, tracked

if TYPE_CHECKING:
    from rich.table import Table

    from harness.runs.estimate import Prediction

LEAST_BYTES = 1_000_000  # of a limit without a unit


def _limit(text: str) -> int:
    """Bytes of plan.limit; a small number without a unit was hardly meant as bytes."""
    limit = parse_bytes(text)
    if text.strip().isdecimal() and limit < LEAST_BYTES:
        raise ConfigError(f"plan.limit={text}: {text} of what? Expected a size, e.g. 8GiB or 500MB")
    return limit


def _table(rows: list[list[str]]) -> Table:
    from harness.report.table import plain

    numbers = (
        "parameters", "trainable", "frozen", "trained", "gradients", "optimizer", "activations",
        "peak", "evaluation", "MFLOP/token", "estimate", "",
    )  # fmt: skip
    table = plain(["run"], numbers)
    for row in rows:
        table.add_row(*row)
    return table


def _row(
    name: str, run: RunConfig, prediction: Prediction | None, rate: float, limit: int | None
) -> list[str]:
    from harness.training import memory

    if prediction is None:
        return [name, *["-"] * 11, "only a run can tell"]
    main = prediction.train or prediction.evaluate
    parts = dict(main["by_category"])
    run = ending.within_flops(run, prediction.train_flops_per_token)
    seconds = prediction.train_flops_per_token * run.train.batch_tokens * run.train.steps / rate
    padded = run.data.source == "pairs" and run.data.packing == "padded"
    over = limit is not None and prediction.needed_bytes > limit
    sizes = [*(parts[category] for category in memory.CATEGORIES), main["peak_bytes"]]
    sizes.append(prediction.evaluate["peak_bytes"])
    return [
        name,
        f"{prediction.parameters.total:,}",
        f"{prediction.parameters.trainable:,}",
        *(numbers.mib(size) for size in sizes),
        f"{(prediction.train_flops_per_token or prediction.evaluate_flops_per_token) / 1e6:,.1f}",
        # A padded block is as long as its sequence: sizes are then a bound, and time is unknown.
        "-" if not prediction.train or padded else f"{numbers.seconds(seconds)} s",
        ("may not fit" if padded else "does not fit") if over else "",
    ]


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    own = [text for text in arguments if text.startswith("plan.")]
    rows, rates, batches, fits, step_seconds, unknown_peaks = [], {}, {}, True, 0.0, 0
    unknown = [text for text in own if not text.startswith("plan.limit=")]
    if unknown:
        raise ConfigError(f"{unknown[0]}: did you mean 'plan.limit' (plan.limit=SIZE, e.g. 8GiB)?")
    limit = _limit(own[-1].partition("=")[2]) if own else None
    given = [text for text in arguments if text not in own]
    searches = any(text.startswith("search.") for text in given)
    asked_for, _ = short_forms(given, always=searches)
    with busy("composing the runs"):
        search = search_plan.plan(without_flag(asked_for))
        runs = search.runs if search else compose(*without_flag(asked_for))
        # torch, after the mistakes that are found without it
        from harness.report.table import show as show_table
        from harness.results import environment
        from harness.runs.estimate import predict, setting
        from harness.runs.evaluation_batches import largest_batch
        from harness.runs.flops import gemm_rate

    for composed in tracked(runs, "planning"):
        run, model_config, accelerator = setting(composed)
        precision = environment.precision_of(run)
        texts = repr((composed.model, composed.data, composed.evaluate))
        if texts not in batches:
            batches[texts] = largest_batch(composed, model_config)
        prediction = predict(run, model_config, accelerator, batches[texts])
        shape = (
            run.train.micro_batch * run.data.context_length,
            model_config.hidden_size,
            precision,
        )
        if shape not in rates:
            rates[shape] = gemm_rate(run, model_config.hidden_size, precision)
        unknown_peaks += prediction is None
        fits &= prediction is None or limit is None or prediction.needed_bytes <= limit
        if prediction is not None:
            of_step = prediction.train_flops_per_token * run.train.batch_tokens / rates[shape]
            step_seconds = max(step_seconds, of_step)
        rows.append(_row(naming.run_name(composed), run, prediction, rates[shape], limit))
    show_table(_table(rows))
    if limit is not None:
        kept = "every run fits into" if fits else "the marked runs do not fit into"
        untold = f"; of {unknown_peaks} only a run can tell" if unknown_peaks else ""
        print(f"{kept} plan.limit={own[-1].partition('=')[2]}{untold}")
    print(
        "MiB of live tensors at the peak of a training step (of evaluation where nothing trains):\n"
        "frozen and trained weights, gradients, optimizer state and activations are its parts.\n"
        "estimate: of training alone, if all its FLOPs went at the speed of this machine's matrix\n"
        "products at this moment. Other work on it now makes the estimate too long; what training\n"
        "does beside products, evaluation and set-up make a run longer. Measured just now:"
    )
    for (tokens, width, precision), rate in rates.items():
        print(f"{rate / 1e9:,.0f} GFLOP/s of {precision} products, {tokens} x {width}.")
    if search:
        print(f"the search: {search}")
        print(
            f"Training would take {numbers.seconds(search.steps * step_seconds)} s at most by the "
            "estimate, if every candidate\nwere the dearest of these, which are the ends of its "
            "space. Evaluation is not in it."
        )
    return 0 if fits else 1
