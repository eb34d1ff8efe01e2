"""What Hydra calls for every run, of one alone or of a sweep."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness.config import unused_keys
from harness.config.errors import ConfigError
from harness.results.run_record import command_line
from harness.runs import composition, progress, tracking
from harness.runs.launcher import launch, rank
from harness.runs.outcomes import OUTCOMES, Outcome
from harness.runs.own_overrides import without_own
from harness.system import machine
from harness.system.console import reason

TYPED: list[str] = []  # after the program's name, before it became Hydra's arguments in sys.argv


def task(cfg: DictConfig) -> Outcome:
    """What Hydra calls for every run, in this process or in a launcher's."""
    hydra_config = HydraConfig.get()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a rank does not outlive accelerate launch
        machine.die_with_parent(signal.SIGKILL)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    own = [*without_own(hydra_config.overrides.task), "hydra.mode=RUN"]
    command = command_line(["run", *own]) if sweep else typed()  # which makes this run alone
    try:
        _go_to(hydra_config.runtime.cwd)
        run = composition.from_hydra(cfg, hydra_config.overrides.task)
        unused_keys.refuse_targets(hydra_config.overrides.task, run)
        cores = run.launch.cores or _cores_left_by(hydra_config.launcher)
        run = replace(run, launch=replace(run.launch, cores=cores))
        # Ranks have no bar of their own: their output goes to a file.
        viewed = not sweep and run.launch.num_processes > 1 and sys.stdout.isatty()
        followed = (
            nullcontext() if sweep or rank() else tracking.TrackerProcesses([run], sweep=False)
        )
        with followed, progress.View([run]) if viewed else nullcontext():
            outcome = launch(run, command, sweep=sweep)
    except ConfigError as error:
        outcome = Outcome(Path(str(cfg.outputs_dir)), "refused", str(error))
    if not sweep:
        OUTCOMES.append(outcome)
        if outcome.exit_code == 0 and not rank():
            print(outcome.summary(), flush=True)
    return outcome


def _go_to(folder: str) -> None:
    """Work where the program was started, also in a launcher's process that began elsewhere."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}, where the sweep was started, is not on {socket.gethostname()} "
            f"({reason(error)}): start it in a folder that all machines share"
        ) from error


def _cores_left_by(launcher: Any) -> int | None:
    """The cores that Hydra's launcher leaves a run: joblib's, Ray's, submitit's word for it."""
    if n_jobs := OmegaConf.select(launcher, "n_jobs"):  # negative: counted from all cores down
        number = n_jobs if n_jobs > 0 else machine.usable_cores() + 1 + n_jobs
        return max(1, machine.usable_cores() // max(1, number))
    for key in ("ray.remote.num_cpus", "cpus_per_task"):
        if cores := OmegaConf.select(launcher, key):
            return max(1, int(cores))
    return 1 if OmegaConf.select(launcher, "ray") else None  # Ray's own default


def typed() -> str:
    """The command that the user typed, to be typed again."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = ["python", "-m", "harness"] if as_module else ["harness"]
    return shlex.join([*program, *(TYPED or sys.argv[1:])])
