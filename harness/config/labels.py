"""What tables call a model, a text and a set of targets, and labels that would say something else.

The `name` of an option of conf/model, conf/data and conf/targets is its label. Where an option
stands for anything of its kind (local, hub, text_files), or other values were put in its place, the
label is made from what is used instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from harness.config.errors import ConfigError
from harness.config.matrix_roles import model_type, modules_of
from harness.config.method_schema import METHODS, LoraMethod, MethodConfig
from harness.config.paths import CONF_DIR, options
from harness.config.schema import DataConfig, ModelConfig, TargetsConfig

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig

# What an option stands for; the other fields are choices about it.
CONTENT = {
    "model": ("asset", "path", "id", "package", "gguf", "architecture"),
    "data": ("source", "path", "id", "config_name", "packages"),
    "targets": ("roles", "modules"),
}
OF_ANY = {"model": ("local", "hub"), "data": ("text_files", "hub", "pairs"), "targets": ()}


def of_model(cfg: ModelConfig) -> str:
    """The label of a model: its option's, or that of its folder, hub id, file or architecture."""
    if cfg.name not in options("model") or _is("model", cfg.name, vars(cfg)):
        return cfg.name
    if cfg.id:
        return cfg.id
    if cfg.architecture:
        return str(cfg.architecture.get("model_type", "gpt2"))
    if cfg.path and not cfg.gguf:
        return _of_path(cfg.path)
    return cfg.gguf or cfg.asset or cfg.name


def of_text(cfg: DataConfig) -> str:
    """The label of a text: its option's, or that of its file, folder, pattern or hub id.

    Of a mixture the parts with their weights.
    """
    if cfg.parts:
        return " + ".join(f"{name} {part['weight']:g}" for name, part in cfg.parts.items())
    if cfg.name not in options("data") or _is("data", cfg.name, vars(cfg)):
        return cfg.name
    if cfg.name not in OF_ANY["data"] and cfg.source == _described("data", cfg.name).get("source"):
        return cfg.name  # read from a place of one's own, as the tasks are
    return _of_path(cfg.path) if cfg.path else cfg.id or cfg.name


def of_targets(run: RunConfig) -> str:
    """The label of a run's targets: their option's, or the modules or roles themselves."""
    cfg = run.targets
    if cfg.name not in options("targets") or _are_targets(run, cfg.name):
        return cfg.name
    if same := [option for option in sorted(options("targets")) if _are_targets(run, option)]:
        return same[0]
    return "+".join(cfg.modules or cfg.roles)


def check(run: RunConfig) -> None:
    """Refuse a label that is the name of something else.

    Raises:
        ConfigError: `model.name`, `data.name`, `targets.name` or `method.label` is another option
            of its group.
    """
    used: dict[str, Callable[[str], bool]] = {
        "model": lambda option: _is("model", option, vars(run.model)),
        "data": lambda option: _is("data", option, vars(run.data)),
        # Modules of one's own are their own label.
        "targets": lambda option: bool(run.targets.modules) or _are_targets(run, option),
    }
    for group, is_option in used.items():
        name = getattr(run, group).name
        if name not in options(group) or name in OF_ANY[group] or is_option(name):
            continue
        if same := [option for option in sorted(options(group)) if is_option(option)]:
            raise ConfigError(
                f"{group}.name={name} is the label of {group}={name}, and this is "
                f"{group}={same[0]}: did you mean {group}={name}? A label of your own is none of "
                f"the options of conf/{group}"
            )
    _check_method(run.method)


def _check_method(method: MethodConfig) -> None:
    label = method.label
    if not label or label not in {*options("method"), *METHODS}:
        return
    if label in options("method"):
        described = _described("method", label)
        described |= described.pop("method", {})
    else:
        described = {"name": label}
    same = described.get("name", label) == method.name
    if isinstance(method, LoraMethod):
        same = same and described.get("init", True) == method.init
    if not same:
        raise ConfigError(
            f"method.label={label} is another method, and this is method={method.name}: did you "
            f"mean method={label}? A label of your own is none of the options of conf/method"
        )


def _is(group: str, option: str, values: dict[str, Any]) -> bool:
    """Whether values have the content of an option of conf/."""
    described = _described(group, option)
    return all((described.get(key) or None) == (values.get(key) or None) for key in CONTENT[group])


def _are_targets(run: RunConfig, option: str) -> bool:
    """Whether a run's targets, which may be modules by now, are those of an option."""
    cfg, described = run.targets, _described("targets", option)
    roles, modules = described.get("roles") or [], described.get("modules") or []
    if [cfg.roles, cfg.modules] == [roles, modules]:
        return True
    kind = model_type(run.model)
    if kind is None:
        return False
    try:
        return cfg.modules == modules_of(TargetsConfig(option, modules, roles), kind)
    except ConfigError:  # roles that this architecture does not have
        return False


@cache
def _read(group: str, option: str) -> dict[str, Any]:
    """An option's file of conf/, with the files of its folder that it starts from."""
    loaded = OmegaConf.to_container(OmegaConf.load(CONF_DIR / group / f"{option}.yaml"))
    assert isinstance(loaded, dict)
    own = {str(key): value for key, value in loaded.items()}
    merged: dict[str, Any] = {}
    for other in own.pop("defaults", ["_self_"]):
        if other == "_self_":
            merged |= own
        elif isinstance(other, str):
            merged |= _read(group, other.partition("@")[0])
    return merged


def _described(group: str, option: str) -> dict[str, Any]:
    return dict(_read(group, option))


def _of_path(path: Any) -> str:
    if not isinstance(path, str):
        return "+".join(_of_path(entry) for entry in path)
    return Path(path).expanduser().name or path
