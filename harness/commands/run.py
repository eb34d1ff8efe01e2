"""`harness run` and `harness sweep`: compose a configuration, validate it, start a worker for each
run, print the table.

    harness run method=lora method.r=8 targets=all
    harness sweep method.r=1,4 seed=0,1,2,3,4
    harness run experiment=main

Imports no torch, so that help and a typo's error answer at once. Exit status: 0 all runs finished,
1 a run failed, 2 the configuration is wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from harness.commands import arguments
from harness.config import renamed
from harness.config.errors import ConfigError
from harness.config.paths import CONF_DIR
from harness.runs import hydra_task, launcher, mistakes
from harness.runs.outcomes import OUTCOMES
from harness.system.console import ended, reason


def main(overrides: list[str], *, typed: list[str], listens: bool = True) -> int:
    """Do the runs that the overrides ask for; returns the exit status.

    `typed`: the program's arguments, as records and pages show the command.
    `listens`: Ctrl-C interrupts, which it does not in a process that a shell put in the background.
    """
    hydra_task.TYPED[:] = typed
    return ended(lambda: _main(overrides, listens))


def _main(overrides: list[str], listens: bool) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to Hydra's printer
    outcomes = OUTCOMES
    overrides = renamed.in_overrides(overrides)
    sys.argv[1:] = overrides  # which Hydra reads
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # no worker is left behind
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        args = arguments.read(overrides)
        if args.help:
            print(arguments.help_text(args.overrides))
            return 0
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(
            hydra_task.task
        )()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {mistakes.explain(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        if "Config group override" not in str(error):  # Hydra's own answer to method=null
            raise
        print(f"error: {mistakes.of_groups(args.overrides)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is not finished", file=sys.stderr)
        return 130
    several = len(outcomes) > 1
    codes = {outcome.exit_code for outcome in outcomes} - {0}
    status = 0 if not codes else 2 if codes == {2} else 1
    if launcher.rank():
        return status
    # A run by itself that failed has nothing for a table.
    run_dirs = [o.run_dir for o in outcomes if o.status not in ("refused", "busy")]
    if run_dirs and (several or any(o.status in ("finished", "skipped") for o in outcomes)):
        from harness.report import summary  # which needs pandas and scipy: not before the runs

        for folder in dict.fromkeys(run_dir.parent for run_dir in run_dirs):  # an experiment each
            summary.show(folder, [run_dir for run_dir in run_dirs if run_dir.parent == folder])
    for outcome in outcomes:  # the table has told of what failed in a sweep
        wrong = outcome.status == "refused" or outcome.failure_class == "config"
        if wrong or (outcome.exit_code and not several):
            print(f"error: {outcome.summary()}", file=sys.stderr)
    failed = sum(o.status == "failed" and o.failure_class != "config" for o in outcomes)
    if failed and several:
        print(f"{failed} of {len(outcomes)} runs failed; retry=1 tries them again", file=sys.stderr)
    return status
