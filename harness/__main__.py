"""The controller: compose a config, validate it, start a worker for each run, print the table.

    python -m harness method=lora method.r=8 targets=all
    python -m harness -m method.r=1,4,16 seed=0,1
    python -m harness experiment=main

Imports no torch, so that help and a typo's error answer at once. Exit status: 0 all runs finished,
1 a run failed, 2 the configuration is wrong.
"""

from __future__ import annotations

import os
import signal
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness import config, launch, report
from harness.config import CONF_DIR, ConfigError

_outcomes: list[launch.Outcome] = []  # of this process's runs, in order
_refused: list[ConfigError] = []


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _run(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    try:
        run = config.from_hydra(cfg)
    except ConfigError as error:  # kept from Hydra, which would print its own line about it
        _refused.append(error)
        return
    arguments = list(sys.argv[1:])
    if hydra_config.mode == RunMode.MULTIRUN:  # the command that makes this run alone
        arguments = [*hydra_config.overrides.task, "hydra.mode=RUN"]
        print(f"[{hydra_config.job.num + 1}] {config.run_name(run)} ", end="", flush=True)
    try:
        outcome = launch.launch(run, launch.command_line(arguments))
    except ConfigError as error:
        _refused.append(error)
        print("refused", flush=True)
        return
    _outcomes.append(outcome)
    print(outcome.summary(), flush=True)


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to Hydra's printer
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no worker is left behind
    try:
        _run()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {config.explain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'outputs_dir'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is not finished", file=sys.stderr)
        return 130
    for refused in _refused:
        print(f"error: {refused}", file=sys.stderr)
    # A run by itself that failed has said why, and has nothing for a table.
    if len(_outcomes) > 1 or any(o.status != "failed" for o in _outcomes):
        report.print_table(_outcomes[0].run_dir.parent, [o.run_dir for o in _outcomes])
    codes = {outcome.exit_code for outcome in _outcomes} | ({2} if _refused else {0})
    codes -= {0}
    return 0 if not codes else 2 if codes == {2} else 1


if __name__ == "__main__":
    sys.exit(main())
