"""The program `harness`: its sub-commands, their help on one screen, and which one was asked for.

Imports nothing that takes long: a command's module is imported when it is run.
"""

from __future__ import annotations

import importlib
import sys

from harness.config.errors import ConfigError, nearest

# Command -> module with main(arguments) -> exit status, and what it does.
COMMANDS = {
    "run": ("harness.commands.run", "one run, or the runs of a published experiment"),
    "sweep": ("harness.commands.run", "every combination of several values (key=1,2)"),
    "search": ("harness.commands.run", "the best of many, by successive halving"),
    "plan": ("harness.commands.plan", "memory, FLOPs and time of runs, before they run"),
    "count": ("harness.commands.count", "exact parameter counts; needs no weights"),
    "list": (
        "harness.commands.listing",
        "methods, models, data, targets, experiments, trackers",
    ),
    "report": ("harness.report.__main__", "tables, figures and the page of finished runs"),
    "serve": ("harness.commands.serve", "all experiments of a folder, in the browser"),
    "dashboard": ("harness.report.dashboard", "a W&B workspace and report, as code"),
    "export": ("harness.artifacts.export", "a finished run for transformers or PEFT, with a card"),
    "generate": ("harness.artifacts.sample", "what a run's model writes, beside its base"),
    "score": ("harness.evaluation.text_metrics", "BLEU, NIST, METEOR, ROUGE-L, CIDEr of two files"),
    "anatomy": ("harness.artifacts.anatomy.__main__", "what training added to every weight"),
    "compress": ("harness.artifacts.compress", "perplexity against the rank of what was added"),
    "interpolate": ("harness.artifacts.interpolate", "perplexity between a base and its run"),
    "verify": ("harness.commands.verify_published", "published perplexities beside ours"),
    "doctor": ("harness.commands.doctor", "what this machine has, and what would be slow on it"),
}
EXAMPLES = """\
  harness run method=lora method.r=8 targets=all     one run
  harness sweep method.r=1,4,16 seed=0,1,2,3,4       a sweep
  harness report outputs/scratch                     its table and page
"""


def help_text() -> str:
    """All commands, on one screen."""
    lines = [f"  {name:12} {what}" for name, (_, what) in COMMANDS.items()]
    return (
        "usage: harness COMMAND [ARGUMENT ...]\n\n"
        "What do LoRA and its relatives save and cost, against full fine-tuning?\n\n"
        + "\n".join(lines)
        + "\n\nExamples:\n"
        + EXAMPLES
        + "\nharness COMMAND --help says more; harness run --help all lists every key.\n"
        "Without a command, arguments are those of run, and with -m those of sweep."
    )


def main(arguments: list[str], *, listens: bool = True) -> int:
    """Run the command that the arguments begin with; returns its exit status.

    `listens`: Ctrl-C interrupts, which it does not in a process that a shell put in the background.
    """
    first = arguments[0] if arguments else ""
    if arguments in ([], ["--help"], ["-h"], ["help"]):
        print(help_text())
        return 0
    if arguments == ["--version"]:
        from harness.commands import arguments as own

        print(own.version_line())
        return 0
    if first.isidentifier() and first not in COMMANDS:
        print(f"error: no command {first}; {nearest(first, COMMANDS)}", file=sys.stderr)
        return 2
    if first in COMMANDS and first not in ("run", "sweep", "search"):
        status: int = importlib.import_module(COMMANDS[first][0]).main(arguments[1:])
        return status
    from harness.commands import run

    overrides = arguments[1:] if first in COMMANDS else arguments
    asks_help = bool({"-h", "--help"} & set(overrides))
    if first == "search" and asks_help:
        from harness.commands import arguments as own

        print(own.search_help())
        return 0
    from harness.runs.search_settings import short_forms

    try:
        overrides, searches = short_forms(overrides, always=first == "search")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if (first == "sweep" or searches) and not asks_help:  # in front, where the parser takes it
        overrides = ["-m", *(text for text in overrides if text not in ("-m", "--multirun"))]
    return run.main(overrides, typed=arguments, listens=listens)


def program_formerly(module: str, name: str) -> int:
    """The program `python -m harness.MODULE`, which is `harness NAME` now."""
    print(f"python -m harness.{module} is now: harness {name}", file=sys.stderr)
    return main([name, *sys.argv[1:]])
