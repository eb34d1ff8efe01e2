"""The harness from Python, for scripts and notebooks: compose, plan, run, sweep, report, collect.

In a notebook `run` and `sweep` show in the cell how far they are (`harness.runs.notebook`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness.config.errors import ConfigError, nearest
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.runs import launcher, notebook, tracking
from harness.runs.overrides import compose
from harness.system.console import quiet

if TYPE_CHECKING:
    from harness.runs.estimate import Prediction

COMMAND = "harness.run() of Python; config.yaml has all of it"
UNITS = {
    "_bytes": "bytes",
    "_seconds": "seconds",
    "_percent": "%",
    "tokens_per_second": "tokens/second",
    "bits_per_byte": "bits/byte",
    "log_loss": "nats/example",
    "accuracy": "share",
    "majority_accuracy": "share",
    "accuracy_low": "share",
    "accuracy_high": "share",
    "word_perplexity": "per word",
    "perplexity": "per token",
    "perplexity_low": "per token",
    "perplexity_high": "per token",
    "trainable": "parameters",
    "num_tokens": "tokens",
    "num_examples": "examples",
    "seeds": "runs",
    "runs_beside": "runs",
}  # by the end of a column's name
COUNTS = ("trainable", "num_tokens", "num_examples", "seeds", "runs_beside")  # whole numbers
TEXTS = ("name", "label", "targets", "lr_from", "also", "runs", "no_interval", "varies_over",
         "rank")  # fmt: skip


class RunFailedError(RuntimeError):
    """A run that did not finish: class and message of the failure, and the path of its log."""


def plan(run: RunConfig) -> Prediction | None:
    """Parameters, memory by category and FLOPs of `run`, before it runs; needs no weights.

    Held-out text that is on this machine is read for the size of its batches.

    None where only a run can tell (`harness.runs.estimate.predict`). torch's threads and
    Accelerate's state are left as they were.

    Raises:
        ConfigError: a target that is not there, a rank that is too large, too long a context.
    """
    from harness.runs import estimate, evaluation_batches  # which need torch

    with quiet(), _as_they_were():
        plain, model_config, accelerator = estimate.setting(run)
        evaluated = evaluation_batches.largest_batch(run, model_config)
        return estimate.predict(plain, model_config, accelerator, evaluated)


@contextmanager
def _as_they_were() -> Iterator[None]:
    """A notebook's own threads and Accelerate's state, which a prediction replaces for a while."""
    import torch

    from harness.system.internals import accelerate_states_kept

    threads = torch.get_num_threads()
    try:
        with accelerate_states_kept():
            yield
    finally:
        torch.set_num_threads(threads)


def run(run: RunConfig) -> dict[str, Any]:
    """Do a run in a process of its own, as the command line does; returns its result.json.

    What is finished is not done again, and what was cut goes on.

    Raises:
        ConfigError: its directory cannot be written, or holds another configuration's run.
        RunFailedError: it did not finish.
    """
    with tracking.TrackerProcesses([run], sweep=False), notebook.shown([run], alone=True):
        outcome = launcher.launch(run, COMMAND, quiet=notebook.has_cell())
    record = run_record.read(outcome.run_dir)
    if outcome.exit_code or record is None:
        raise RunFailedError(outcome.summary())
    return notebook.Result(record)


def sweep(*overrides: str) -> notebook.Report:
    """Do every run that `harness sweep` would make of these arguments, one after another.

    What is finished is not done again; a run that fails stops no other, and the report names it.

    Raises:
        ConfigError: as `compose` does, before the first run; also for runs of several experiments.
    """
    runs = compose(*overrides)
    folders = {run.run_dir.parent: None for run in runs}
    if len(folders) > 1:
        raise ConfigError(
            f"a sweep is one experiment, and these runs are of {', '.join(map(str, folders))}: "
            "give one experiment_name and one outputs_dir"
        )
    (folder,) = folders
    messages = {run.run_dir.name: "" for run in runs}
    run_record.write_sweep(folder, messages)
    with tracking.TrackerProcesses(runs, sweep=True), notebook.shown(runs, alone=False):
        for config in runs:
            try:
                launcher.launch(config, COMMAND, sweep=True)
            except ConfigError as error:
                messages[config.run_dir.name] = str(error)
    if any(messages.values()):
        run_record.write_sweep(folder, messages)
    return notebook.report(folder, [run.run_dir for run in runs])


def report(folder: str | Path) -> notebook.Report:
    """The table and figures of an experiment, to be shown in a notebook, and its page.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        folders = [p.name for p in path.parent.glob("*") if p.is_dir()]
        raise ConfigError(f"no folder {path}; {nearest(path.name, folders)}")
    return notebook.report(path)


def collect(folder: str | Path) -> pd.DataFrame:
    """A row a configuration with a finished run in `folder`: the columns of its results.csv.

    Types depend on the column and not on what is in it: text is `string`, counts are `Int64`, other
    numbers `float64`, and what is not there is NA. Only method.rank, which is text in a result
    ("8", "full"), is a count where every row has a number. `frame.attrs["units"]` has the unit of
    every column that has one.

    Raises:
        ConfigError: there is no such folder, or no finished run in it.
    """
    from harness.report import evidence, summary

    found = evidence.find(Path(folder).expanduser())
    if not found.rows:
        raise ConfigError(f"{folder}: no finished run; outputs/<experiment_name> has an experiment")
    names, lines = summary.results_lines(found)
    frame = pd.DataFrame(dict(zip(names, map(list, zip(*lines, strict=True)), strict=True)))
    for name in names:
        frame[name] = _typed(frame[name])
    with suppress(ValueError, TypeError):
        frame["method.rank"] = pd.to_numeric(frame["method.rank"]).astype("Int64")
    frame.attrs["units"] = {name: unit for name in names if (unit := _unit(name))}
    return frame


def _typed(column: pd.Series[Any]) -> pd.Series[Any]:
    """A column of results.csv by what it is; of counts, means over seeds may be no whole number."""
    last = str(column.name).rpartition(".")[2]
    known = [value for value in column if value is not None and value == value]
    if last in TEXTS or any(isinstance(value, str) for value in known):
        return column.astype("string")
    numbers = column.astype("float64")
    whole = all(value == int(value) for value in known)
    return numbers.astype("Int64") if last in COUNTS and whole else numbers


def _unit(name: str) -> str | None:
    last = name.rpartition(".")[2]
    ends = sorted(UNITS, key=len, reverse=True)
    return next(
        (UNITS[end] for end in ends if last == end or (end[0] == "_" and last.endswith(end))), None
    )
