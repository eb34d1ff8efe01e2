"""The controller: compose a config, validate it, start a worker for each run, print the table.

    python -m harness method=lora method.r=8 targets=all
    python -m harness -m method.r=1,4 seed=0,1,2,3,4
    python -m harness experiment=main

Imports no torch, so that help and a typo's error answer at once. Exit status: 0 all runs finished,
1 a run failed, 2 the configuration is wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys

listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if listens:  # a Ctrl-C during the imports is no traceback either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra  # noqa: E402 - after the signal's handler
from hydra.errors import HydraException  # noqa: E402 - after the signal's handler
from omegaconf.errors import OmegaConfBaseException  # noqa: E402 - after the signal's handler

from harness import arguments, launch, mistakes  # noqa: E402 - after the signal's handler
from harness.config import CONF_DIR, ConfigError  # noqa: E402 - after the signal's handler
from harness.console import ended, reason  # noqa: E402 - after the signal's handler


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to Hydra's printer
    outcomes = launch.OUTCOMES
    if "--version" in sys.argv[1:]:
        print(arguments.version_line())
        return 0
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # no worker is left behind
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        asked = arguments.read(sys.argv[1:])
        if asked.help:
            print(arguments.help_text(asked.overrides))
            return 0
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(
            launch.task
        )()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {mistakes.explain(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        if "Config group override" not in str(error):  # Hydra's own answer to method=null
            raise
        print(f"error: {mistakes.of_groups(asked.overrides)}", file=sys.stderr)
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
    if launch.rank():
        return status
    # A run by itself that failed has nothing for a table.
    there = [o.run_dir for o in outcomes if o.status not in ("refused", "busy")]
    if there and (several or any(o.status in ("finished", "skipped") for o in outcomes)):
        from harness.report import summary  # which needs pandas and scipy: not before the runs

        for folder in dict.fromkeys(run_dir.parent for run_dir in there):  # an experiment each
            summary.show(folder, [run_dir for run_dir in there if run_dir.parent == folder])
    for outcome in outcomes:  # the table has told of what failed in a sweep
        wrong = outcome.status == "refused" or outcome.failure_class == "config"
        if wrong or (outcome.exit_code and not several):
            print(f"error: {outcome.summary()}", file=sys.stderr)
    failed = sum(o.status == "failed" and o.failure_class != "config" for o in outcomes)
    if failed and several:
        print(f"{failed} of {len(outcomes)} runs failed; retry=1 tries them again", file=sys.stderr)
    return status


def program() -> int:
    """The console script `harness`; returns the exit status. `harness serve` is harness.serve."""
    if sys.argv[1:2] == ["serve"]:
        from harness import serve

        return ended(lambda: serve.main(sys.argv[2:]))
    return ended(main)


if __name__ == "__main__":
    sys.exit(program())
