"""`harness list`: the options of conf/, each with the sentence that opens its file.

harness list                 every kind
harness list methods         one kind: methods, models, data, targets, experiments, trackers
"""

from __future__ import annotations

from harness.commands.arguments import sentence_of
from harness.config.errors import ConfigError, nearest
from harness.config.paths import options
from harness.system.console import command

# What is listed -> the group of conf/, and what its options are called on the command line.
KINDS = {
    "methods": "method",
    "models": "model",
    "data": "data",
    "targets": "targets",
    "experiments": "experiment",
    "trackers": "tracker",
}


@command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    print("\n\n".join(listing(kind) for kind in map(_kind, arguments or KINDS)))
    return 0


def listing(kind: str) -> str:
    """The options of one of KINDS, a line each, under a line that says how to choose one."""
    group = KINDS[kind]
    lines = [f"{kind} ({group}=NAME):"]
    for option in sorted(options(group)):
        if (group, option) != ("data", "source"):  # what the other data sets share
            lines.append(f"  {option:24} {sentence_of(group, option)}".rstrip())
    return "\n".join(lines)


def _kind(word: str) -> str:
    """One of KINDS, by its name or by the name of its group.

    Raises:
        ConfigError: it is neither.
    """
    by_group = {group: kind for kind, group in KINDS.items()}
    chosen = word if word in KINDS else by_group.get(word)
    if chosen is None:
        raise ConfigError(f"harness list {word}: {nearest(word, KINDS)}")
    return chosen
