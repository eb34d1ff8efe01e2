"""One line for a mistake in the arguments or the configuration: the value, what was expected, and
the nearest valid choice."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from harness.config import keys, matrix_roles
from harness.config.errors import ConfigError, nearest
from harness.config.optimizers import OPTIMIZERS, keys_of
from harness.config.paths import LAUNCHERS, options
from harness.system import files


def explain(
    error: Exception, where: str = "", known: Iterable[str] = (), schema: type | None = None
) -> str:
    """The line for an error of Hydra or OmegaConf.

    `where` is the section that values were checked for, `known` its keys and `schema` their types.
    """
    if isinstance(error, ConfigError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException | _Unparsed):
        cause = cause.__cause__
    if isinstance(cause, _Unparsed):
        return unparsed(cause.override)
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return _of_hydra(str(error))
    key = f"{where}.{cause.full_key}" if where else str(cause.full_key)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is missing: give it a value, {key}=…"
    if isinstance(cause, InterpolationKeyError | InterpolationResolutionError):
        return f"{key}: {str(cause).splitlines()[0]}; write ${{key}} with a key that there is"
    names = list(known)
    if not names and isinstance(cause.parent_node, DictConfig):
        names = [str(name) for name in cause.parent_node]
    last = str(cause.full_key).rsplit(".", 1)[-1]
    if not names and isinstance(cause.parent_node, DictConfig):  # a free mapping, such as fields
        return f"'{key}' is not there yet: write +{key}=… to add it"
    if names and last not in names and last == str(cause.key):
        section = "optimizer" if key.startswith("optimizer.") else "method"
        return f"unknown key '{key}': {_nearest_key(key, last, names, _name_of(cause, section))}"
    if schema is not None:
        name = re.sub(r"[.\[].*", "", str(cause.full_key))
        if wanted := keys.expected(schema, name, where):
            shown = "null" if cause.value is None else cause.value
            shown = OmegaConf.to_container(shown) if _is_container(shown) else shown
            return f"{key}={shown}: expected {_own_example(wanted, key, shown)}"
    return f"{key}: {str(cause).splitlines()[0]}"


_Unparsed = OverrideParseException


def _own_example(wanted: str, key: str, value: object) -> str:
    """What was expected, with the whole number or the list that a value was meant as."""
    if not wanted.startswith("a whole number"):
        return wanted
    if isinstance(value, float) and value.is_integer():
        return f"a whole number, as in {key}={int(value)}"
    if isinstance(value, str) and (meant := re.fullmatch(r"(\d+)(?:\.\.\.?|-|:)(\d+)", value)):
        first, last = map(int, meant.groups())
        if first < last:
            return f"a whole number, or for several runs -m '{key}=range({first},{last + 1})'"
    return wanted


def _is_container(value: object) -> bool:
    return isinstance(value, DictConfig | ListConfig)


def _name_of(cause: OmegaConfBaseException, section: str) -> str:
    """The method (or optimizer) of the configuration in which a key was looked for; or ""."""
    node = cause.parent_node
    if node is None:
        return ""
    root = node._get_root()
    name = OmegaConf.select(root, f"{section}.name", default=None) if _is_container(root) else None
    return str(name or OmegaConf.select(root, "name", default=None) or "")


def _nearest_key(key: str, last: str, names: list[str], method: str) -> str:
    owners = keys.leaves().get(last, {}).get(key, ())
    if key.startswith("optimizer."):
        owners = tuple(name for name, schema in OPTIMIZERS.items() if last in keys_of(schema))
        if owners and method and method not in owners:
            return f"optimizer={method} has no such key; optimizer={' and '.join(owners)} has"
    if owners and method and method not in owners:
        alike = "; for method=lora it is method.r" * (method == "lora" and last in ("rank", "k"))
        have = "do" if len(owners) > 1 else "does"
        return f"method={method} does not have it; method={' and '.join(owners)} {have}{alike}"
    section = key.rpartition(".")[0]
    inside = nearest(last, names)
    if section and inside.startswith("did you mean '"):
        inside = inside.replace("did you mean '", f"did you mean '{section}.", 1)
    return (
        keys.elsewhere(key, method)
        or (inside if inside.startswith("did you mean") else keys.close(key))
        or inside
    )


# --------------------------------------------------------------------------- Hydra's own


def _of_hydra(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    first = lines[0] if lines else message
    if match := re.match(r"Ambiguous value for argument '(.*)'$", first):
        return several(match[1])
    if match := re.search(r"Could not (?:find|load) '(hydra/\w+|\w+)/(.*?)'", message):
        return no_option(*match.groups())
    if match := re.match(r"Could not override '([^']*)'", first):
        key = match[1].partition("@")[0]
        return f"unknown key '{key}': {keys.elsewhere(key) or keys.close(key) or _all_groups()}"
    return " ".join(lines)


def _all_groups() -> str:
    return f"the groups are {', '.join(keys.GROUPS)}"


def no_option(group: str, option: str) -> str:
    """A group has no such option; a path, or a hub id, is told where it goes."""
    if group == "hydra/launcher" and option in LAUNCHERS:
        return f"{group}={option} is not installed: pip install -e '.[{LAUNCHERS[option]}]'"
    hint = nearest(option, options(group))
    if group == "targets" and (meant := matrix_roles.OF_OTHER_MODELS.get(option)):
        hint = f"did you mean {group}={meant}?"
    if not hint.startswith("did you mean"):
        hint = _of_a_path(group, option) or hint
    return f"{group}={option}: no such option; {hint}"


def _of_a_path(group: str, value: str) -> str:
    """What to write for a file or folder, or an id of the hub, in place of an option."""
    path = Path(value).expanduser()
    looks = value.startswith(("/", "~", ".", "$")) or "*" in value or path.exists()
    if group == "data" and (looks or files.kind(path)):
        return f"did you mean data=text_files data.path={_quoted(value)}?"
    if group == "model" and looks:
        return f"did you mean model=local model.path={_quoted(value)}?"
    if group in ("model", "data") and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        other = "model=local model.path=" if group == "model" else "data=text_files data.path="
        return f"did you mean {group}=hub {group}.id={value} (on the hub), or {other}{value}?"
    return ""


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./~+-]+", value) else f"'\"{value}\"'"


def several(override: str) -> str:
    """Values with commas and no -m: a sweep was meant, or a list."""
    key, _, value = override.partition("=")
    if key.lstrip("+") in _LISTS:
        return f"{override}: expected a list, {key}=[{value}]"
    both = matrix_roles.combined(value.split(",")) if key == "targets" else ""
    return f"{override}: several values are a sweep: harness sweep {override}" + (
        f"; for all of them at once, {both}" if both else ""
    )


_LISTS = ("data.packages", "targets.modules", "targets.roles", "method.train_only", "evaluate.also")


def unparsed(override: str) -> str:
    """An argument that is no override: without `=`, or with characters that need quotes."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        choices = [f"{group}={key}" for group in keys.GROUPS if key in options(group)]
        own = f"as in {key}={min(options(key))}" if key in keys.GROUPS else "as in method.r=8"
        hint = f"did you mean {' or '.join(choices)}?" if choices and key else own
        return f"{override}: expected key=value, {hint}"
    if value[:1] in ("[", "{") and not value.endswith("]" if value[0] == "[" else "}"):
        return f"{override}: the value begins with {value[0]} and does not end with its other half"
    if key in ("data", "model") and (meant := _of_a_path(key, value)):
        return f"{override}: no such option; {meant}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    try:
        OverridesParser.create().parse_override(f'{key}="{escaped}"')
    except HydraException:
        return f"{override}: expected key=value, without spaces, as in method.r=8"
    return f"{override}: quote a value with special characters: '{key}=\"{escaped}\"'"


def of_groups(arguments: Iterable[str]) -> str:
    """The line for groups that were given what is no name: null, or a number."""
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            return unparsed(text)
        if options(key) and value not in options(key):
            wanted = "" if value == "null" else value  # which is near to nothing
            return f"{text}: expected an option of conf/{key}; {nearest(wanted, options(key))}"
    return f"{' '.join(arguments)}: expected the name of an option for each group"
