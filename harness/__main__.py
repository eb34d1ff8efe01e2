"""The controller: compose a config, validate it, start a worker for each run, print the table.

    python -m harness method=lora method.r=8 targets=all
    python -m harness -m method.r=1,4,16 seed=0,1
    python -m harness experiment=main

Imports no torch, so that help and a typo's error answer at once. Exit status: 0 all runs finished,
1 a run failed, 2 the configuration is wrong.
"""

from __future__ import annotations

import os
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
    try:
        _one(config.from_hydra(cfg))
    except ConfigError as error:  # kept from Hydra, which would print its own line about it
        _refused.append(error)


def _one(run: config.RunConfig) -> None:
    hydra_config = HydraConfig.get()
    arguments = list(sys.argv[1:])
    if hydra_config.mode == RunMode.MULTIRUN:  # the command that makes this run alone
        arguments = [*hydra_config.overrides.task, "hydra.mode=RUN"]
        print(f"[{hydra_config.job.num + 1}] {config.run_name(run)} ", end="", flush=True)
    outcome = launch.launch(run, launch.command_line(arguments))
    _outcomes.append(outcome)
    print(outcome.summary(), flush=True)


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to Hydra's printer
    try:
        _run()
        if _refused:
            raise _refused[0]
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {config.explain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'outputs_dir'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if not _outcomes:  # --help, --cfg and the like
        return 0
    report.print_table(_outcomes[0].run_dir.parent, [o.run_dir for o in _outcomes])
    codes = {outcome.exit_code for outcome in _outcomes}
    return 0 if codes == {0} else 2 if codes <= {0, 2} else 1


if __name__ == "__main__":
    sys.exit(main())
