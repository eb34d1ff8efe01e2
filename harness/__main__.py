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

from harness import config, launch
from harness.config import CONF_DIR, ConfigError

_outcomes: list[launch.Outcome] = []  # of this process's runs, in order


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _run(cfg: DictConfig) -> None:
    run = config.from_hydra(cfg)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        arguments = [*hydra_config.overrides.task, f"experiment_name={run.experiment_name}"]
        print(f"[{hydra_config.job.num + 1}] {config.run_name(run)}", flush=True)
    else:
        arguments = sys.argv[1:]
    _outcomes.append(launch.launch(run, launch.command_line(list(dict.fromkeys(arguments)))))


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to Hydra's printer
    try:
        _run()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {config.explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if not _outcomes:  # --help, --cfg and the like
        return 0
    from harness import report

    report.print_table(_outcomes[0].run_dir.parent, [o.run_dir for o in _outcomes])
    for outcome in _outcomes:
        if outcome.status == "failed":
            print(f"failed: {outcome.run_dir}: {outcome.message}", file=sys.stderr)
    return max((min(abs(o.exit_code), 2) for o in _outcomes), default=0)


if __name__ == "__main__":
    sys.exit(main())
