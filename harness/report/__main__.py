"""harness report OUTPUTS/EXPERIMENT: everything there is to say of its finished runs.

harness report outputs/main            tables here, and outputs/main/report/index.html
harness report --wide outputs/main     every column, however wide the lines become
harness report --page outputs/main     the page alone
harness report --last outputs/scratch  the last sweep alone, of those into one folder
harness report --columns adapter_bytes,latency outputs/main
                                       with these columns beside; --columns help lists them
harness report --watch outputs/main    the page, again and again while runs go on
harness report outputs --index         outputs/index.html, one page over all experiments
harness report --peft-results FOLDER   results of PEFT's method_comparison (its *.json), and which
                                       rows they can tell apart; --items N: size of their test set
harness report --as-peft-results outputs/main   our runs as such *.json, for their app
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.config.errors import ConfigError, nearest
from harness.report import (
    evidence,
    files,
    index,
    peft_export,
    peft_page,
    peft_results,
    requested,
    setting,
    sheet,
    summary,
)
from harness.results import run_record
from harness.system import lock
from harness.system.console import command

PERIOD_SECONDS = 10
OPTIONS = ("--wide", "--page", "--last", "--watch", "--index", "--as-peft-results")


@command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status: 2 for no such folder, and runs not to compare."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if "--peft-results" in arguments:
        return peft(arguments)
    arguments, wanted = _columns(arguments)
    if wanted == ["help"]:
        print(requested.listing())
        return 0
    requested.check(wanted)
    flags = set(OPTIONS) & set(arguments)
    folders = [Path(a) for a in arguments if a not in OPTIONS]
    alone = {"--index", "--as-peft-results"} & flags and (len(flags) > 1 or bool(wanted))
    if len(folders) != 1 or str(folders[0]).startswith("-") or alone:
        options = " ".join(f"[{option}]" for option in OPTIONS if option != "--index")
        options += " [--columns NAME,NAME]"
        print(
            f"usage: harness report {options} OUTPUTS/EXPERIMENT, or OUTPUTS --index",
            file=sys.stderr,
        )
        return 2
    folder = folders[0]
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.glob("[!.]*") if p.is_dir()]
        print(f"error: no folder {folder}; {nearest(folder.name, siblings)}", file=sys.stderr)
        return 2
    if "--index" in flags:
        print(f"page: {index.write(folder)}")
        return 0
    if "--as-peft-results" in flags:
        for path in peft_export.write(folder):
            print(f"saved: {path}")
        return 0
    run_dirs = setting.last_sweep(folder) if "--last" in flags else None
    if run_dirs == []:
        print(f"error: no sweep into {folder} is recorded; without --last all is", file=sys.stderr)
        return 2
    if "--watch" in flags:
        watch(folder, run_dirs, wanted)
    findings = evidence.find(folder, run_dirs, wanted)
    if "--page" not in flags:
        summary.tell(findings, full=True, wide="--wide" in flags)
    if findings.rows:
        print(f"page: {files.write(findings)}, with figures and tables for papers beside it")
    return 2 if findings.refused else 0


def peft(arguments: list[str]) -> int:
    """Tell of a folder of PEFT's results, and write their page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="harness report", allow_abbrev=False)
    parser.add_argument("--peft-results", type=Path, metavar="FOLDER", help="with their *.json")
    parser.add_argument("--items", metavar="N", help="size of their test set")
    parser.add_argument("--wide", action="store_true", help="every column")
    options = parser.parse_args(arguments)
    if options.items is not None and not (options.items.isdecimal() and int(options.items)):
        raise ConfigError(f"--items {options.items}: expected a positive whole number")
    comparison = peft_results.read(
        options.peft_results, int(options.items) if options.items else None
    )
    table = peft_page.sheet(comparison)
    print(peft_results.answer(comparison))
    left = sheet.show(table, wide=options.wide)
    for note in table.notes:
        print(note)
    if left:
        print(f"not shown: {', '.join(left)} (--wide shows them)")
    page = peft_page.write(comparison, options.peft_results)
    print(f"page: {page}, with results.csv above it")
    return 0


def _columns(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without --columns, and the names that it asks for.

    Raises:
        ConfigError: it asks for none.
    """
    rest: list[str] = []
    wanted: list[str] = []
    todo = iter(arguments)
    for argument in todo:
        option, sign, value = argument.partition("=")
        if option != "--columns":
            rest.append(argument)
            continue
        names = [name.strip() for name in (value if sign else next(todo, "")).split(",")]
        if not all(names) or names[0].startswith("-"):
            raise ConfigError(
                f"--columns {','.join(names)}: expected names, as in --columns "
                "adapter_bytes,latency; --columns help lists them"
            )
        wanted += names
    return rest, list(dict.fromkeys(wanted))


def watch(folder: Path, run_dirs: Sequence[Path] | None = None, wanted: Sequence[str] = ()) -> None:
    """Write the page again whenever a run has come further, until no run is under way."""
    before, announced = None, False
    while True:
        began = time.monotonic()
        names = (run_record.FILE_NAME, run_record.METRICS_NAME)
        paths = [path for name in names for path in folder.glob(f"*/{name}")]
        state = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
        if state != before:
            path = files.write_page(evidence.find(folder, run_dirs, wanted), refresh=PERIOD_SECONDS)
            if not announced:
                print(f"watching: {path} (Ctrl-C ends it)", flush=True)
            before, announced = state, True
        if not any(lock.is_claimed(run_dir) for run_dir in {path.parent for path in state}):
            return
        time.sleep(max(PERIOD_SECONDS, 4 * (time.monotonic() - began)))  # the runs need the cores


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
