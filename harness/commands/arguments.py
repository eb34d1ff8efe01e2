"""The arguments of `harness run` that are no overrides, and its help."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from harness.config import keys
from harness.config.errors import ConfigError, nearest
from harness.config.paths import CONF_DIR, options
from harness.system.internals import internal

FLAGS = {
    "-m, --multirun": "as harness sweep: key=1,2 runs both",
    "--cfg job": "show the configuration, run nothing",
    "--info defaults": "which files of conf/ it is made of",
    "--config-dir FOLDER": "options of your own, in a folder like conf/",
    "--hydra-help": "further flags, such as completion with tab",
}
USAGE = """\
usage: harness run|sweep [GROUP=OPTION ...] [KEY=VALUE ...] [FLAG ...]

  harness run method=lora method.r=8 targets=all   one run
  harness sweep method.r=1,4 seed=0,1,2,3,4        a sweep: every combination
  harness run experiment=main                      a published experiment
  harness run method=lora --cfg job                show the config, run nothing
"""
# What a first run needs; `--help all` has the rest. Of a key the default is read from conf/.
MOST_USED = {
    "method": "full, lora, udv, peft ...: harness list methods",
    "model": "gpt2, local, hub ...: harness list models",
    "data": "kjv, text_files, pairs ...: harness list data",
    "targets": "the matrices that are adapted: harness list targets",
    "experiment": "a file of conf/experiment: harness list experiments",
    "method.r": "LoRA's rank; of udv it is method.rank",
    "train.lr": "auto: from a search, or else the method's default",
    "train.steps": "optimizer steps (null: 100); or train.epochs",
    "train.batch_tokens": "tokens of a step",
    "data.context_length": "tokens of a sequence",
    "seed": "of the start, the order of the text and dropout",
    "experiment_name": "the folder of the runs, in outputs/",
}
MORE = """\
More: harness run --help all (every option and key), --help train (of one
group), --help method=udv (of one option); harness list; conf/README.md."""
SEARCH_USAGE = """\
harness search: the best of many configurations on validation, by successive halving

  harness search method.r=1,8 'train.lr=tag(log,interval(1e-3,1e-1))' search.rungs=[50]

A key with several values or an interval is searched, any other is fixed; harness run --help all
lists the keys of a configuration. The same command goes on after a stop. The search's own keys:
"""


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments as Hydra reads them.

    Raises:
        ConfigError: a flag that there is not, or flags that do not go together.
    """
    parser = internal("get_args_parser")()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(_refused(message, arguments))

    parser.error = refuse  # argparse would print usage and exit
    flags = [flag for action in parser._actions for flag in action.option_strings]
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(_unknown(unknown[0], flags))
    shows = "--cfg" if given.cfg else "--info" if given.info else ""
    if shows and given.multirun:
        raise ConfigError(
            f"{shows} shows one configuration, and -m asks for several: harness plan "
            f"{shlex.join(given.overrides)} lists them; without -m one is shown".replace("  ", " ")
        )
    if given.resolve and not given.cfg:
        raise ConfigError("--resolve goes with --cfg: --cfg job --resolve")
    modes = [given.run, bool(given.cfg), given.multirun, given.shell_completion, bool(given.info)]
    if sum(modes) > 1:
        raise ConfigError("of --run, --multirun, --cfg, --info and --shell-completion give one")
    return given


def _refused(message: str, arguments: Sequence[str]) -> str:
    """What argparse refused, in our words: a flag's value is missing, or is none of its choices."""
    if match := re.match(r"argument ([\w/-]+): ", message):
        flag = match[1].partition("/")[0]
        choices = re.findall(r"'?([\w-]+)'?(?:, |\)$)", message.partition("choose from ")[2])
        given = re.search(r"invalid choice: '([^']*)'", message)
        if given:
            return f"{flag} {given[1]}: {nearest(given[1], choices)}"
        return f"{flag}: expected a value" + " (job, hydra or all)" * (flag == "--cfg")
    return f"{shlex.join(arguments)}: {message}"


def _unknown(flag: str, flags: Sequence[str]) -> str:
    """A flag that there is not: a key with dashes, or nearly one of the flags."""
    name, equals, value = flag.lstrip("-").partition("=")
    key = name.replace("-", "_")
    meant = f"{key}{equals or '='}{value or '…'}"
    if key in keys.every():
        return f"{flag}: keys have no dashes; did you mean {meant}?"
    if hint := keys.elsewhere(key):
        return f"{flag}: no such flag, and keys have no dashes; {hint}"
    if flag.lstrip("-").startswith(("dry", "print")):
        return f"{flag}: no such flag; harness plan says what would run, --cfg job what is set"
    hint = nearest(flag, flags)
    hint = hint if hint.startswith("did you mean") else "harness run --help all lists them"
    return f"{flag}: no such flag; {hint}"


def version_line() -> str:
    """The version of the harness and of what composes its configuration."""
    try:
        own = version("peft-harness")
    except PackageNotFoundError:  # run from a checkout that was not installed
        own = "of a checkout that is not installed"
    return f"harness {own} (Hydra {version('hydra-core')})"


# --------------------------------------------------------------------------- help


def help_text(overrides: Sequence[str] = ()) -> str:
    """What can be run and asked for: one screen, or what the words after --help ask for.

    `all` is everything, a group its options and keys, and group=option the keys of that option.

    Raises:
        ConfigError: a word that is none of these.
    """
    if not overrides:
        return _screen()
    groups, given = (*keys.GROUPS, "scale"), {}
    for text in overrides:
        group, equals, option = text.partition("=")
        if text != "all" and group not in groups:
            if equals:  # a key of the command line that was being typed
                continue
            raise ConfigError(f"--help {text}: {nearest(text, ['all', *groups])}")
        if equals and option not in options(group):
            raise ConfigError(f"{text}: {nearest(option, options(group))}")
        given[group] = option
    if "all" in given:
        parts = [USAGE, _flags(), "\nGroups, and the options of each (group=option):"]
        parts += [line for group in groups for line in _options(group)]
        parts.append("\nKeys (key=value), with their defaults:\n")
        parts += _keys(_body("config").partition("hydra:")[0].partition("experiment_name:"), "")
        shown = {group: given.get(group) or option for group, option in _defaults().items()}
    else:
        parts = [line for group, option in given.items() if not option for line in _options(group)]
        shown = {group: option or _defaults().get(group, "") for group, option in given.items()}
    for group, option in shown.items():
        if group not in ("tracker", "experiment", "scale") and option in options(group):
            parts.append(f"\n  {group}={option}, its keys:")
            parts += _keys(("", "", _with_bases(group, option)), f"{group}.")
    return "\n".join(parts).strip("\n") or _screen()


def _screen() -> str:
    """What people need first, on one screen."""
    defaults = _defaults()
    parts = [USAGE, "Most used, with their defaults:\n"]
    for key, what in MOST_USED.items():
        group, _, name = key.rpartition(".")
        body = _with_bases(group, defaults[group]) if group else _body("config")
        match = re.search(rf"^{name}:\s*([^#\n]*)", body, re.M)
        default = match[1].strip() if match else defaults.get(key, "")
        default = "NAME" if key == "experiment" else default
        parts.append(f"  {f'{key}={default}':26} {what}")
    return "\n".join([*parts, "", _flags(), "", MORE])


def _flags() -> str:
    return "\n".join(["Flags:\n", *(f"  {flag:26} {what}" for flag, what in FLAGS.items())])


def _options(group: str) -> list[str]:
    """The options of a group, a line each."""
    lines = [f"\n  {group}="]
    for option in sorted(options(group)):
        if (group, option) != ("data", "source"):  # what the others share
            lines.append(f"    {option:22} {sentence_of(group, option)}")
    return lines


def search_help() -> str:
    """What `harness search` takes beyond a configuration: the keys of its sweeper."""
    body = _body("hydra/sweeper/search").partition("max_batch_size: null\n")[2]
    return "\n".join([SEARCH_USAGE, *_keys(("", "", body), "search.")])


def _defaults() -> dict[str, str]:
    """Group -> option of conf/config.yaml."""
    pairs = re.findall(r"^  - (\w+): (\w+)", _body("config"), re.M)
    return {group: option for group, option in pairs if group != "override"}


def _body(name: str) -> str:
    return (CONF_DIR / f"{name}.yaml").read_text("utf-8")


def sentence_of(group: str, option: str) -> str:
    """The first sentence of an option's file, or the question of an experiment, on one line."""
    lines = []
    for line in _body(f"{group}/{option}").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    text = " ".join(lines)
    if match := re.search(r"Question:\s*(.*?)(?: Command:|$)", text):
        text = match[1]
    sentence = re.split(r"(?<!et al\.)(?<=[.?])\s", text, maxsplit=1)[0].rstrip(".:")
    return sentence if len(sentence) <= 100 else f"{sentence[:98].rsplit(' ', 1)[0]} …"


def _with_bases(group: str, option: str) -> str:
    """An option's keys after those of the files of its folder that it starts from."""
    body = _body(f"{group}/{option}")
    bases = re.findall(r"^  - (?!_self_|override)(\w+)", body, re.M)
    own = re.sub(r"^defaults:\n(?:  - .*\n)+", "", body, flags=re.M)
    own = re.sub(r"\A(?:#.*\n)+", "", own)  # what the option is stands above
    return "".join(_with_bases(group, base) for base in bases if base in options(group)) + own


def _keys(parts: tuple[str, str, str], prefix: str) -> list[str]:
    """Lines `key=default  what it is` of a file's body; a later value replaces an earlier."""
    entries: dict[str, list[str]] = {}
    key = ""
    for line in (parts[1] + parts[2]).splitlines():
        if match := re.match(r"(\w+):\s*(.*)", line):
            key = match[1]
            value, _, comment = match[2].partition("#")
            comment = comment.strip() or _comment(entries.get(key))
            shown = f"    {prefix}{key}={value.strip()}"
            entries[key] = [f"{shown:40} {comment}".rstrip()]
        elif line.startswith("#") and key and entries.get(key):
            entries[key].append(f"{'':40} {line.lstrip('# ')}")
        elif match := re.match(r"  (\w+):\s*(.*)", line):
            value, _, comment = match[2].partition("#")
            shown = f"    {prefix}{key}.{match[1]}={value.strip()}"
            entries[f"{key}.{match[1]}"] = [f"{shown:40} {comment.strip()}".rstrip()]
            entries.pop(key, None)
    return [line for lines in entries.values() for line in lines]


def _comment(lines: list[str] | None) -> str:
    return lines[0][40:].strip() if lines else ""
