"""Keys that a method or an optimizer has not: refused in a run of its own, left out in a sweep.

harness run method=full targets=attn               refused: full trains every weight
harness sweep method=none,lora method.r=8,16      none runs once, without method.r
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from omegaconf import DictConfig, OmegaConf

from harness.config import matrix_roles, peft_fields
from harness.config.errors import ConfigError
from harness.config.method_schema import METHODS, MethodConfig, PeftMethod
from harness.config.optimizers import OPTIMIZERS, OptimizerConfig, keys_of
from harness.config.paths import CONF_DIR
from harness.config.run_config import RunConfig

# Which method and which optimizer a run has.
DECIDES = (
    "method", "experiment", "scale", "method.name", "method.peft_type", "optimizer",
    "optimizer.name",
)  # fmt: skip


def key_of(override: str) -> str:
    """The key of an override, without what marks it as added or deleted and without its package."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0].strip()


def of_method(
    overrides: Iterable[str],
    method: type[MethodConfig],
    optimizer: type[OptimizerConfig] | None = None,
    untargeted: str = "",
) -> list[str]:
    """The overrides whose keys a method does not have, or an optimizer does not have.

    `untargeted` names a PEFT method that adapts no matrices, if it is one.
    """
    fields = {field.name for field in dataclasses.fields(method)}
    unused = []
    for override in overrides:
        group, _, rest = key_of(override).partition(".")
        if group == "targets" and (untargeted or not method.takes_targets):
            unused.append(override)
        if group == "method" and rest and rest.partition(".")[0] not in fields:
            unused.append(override)
        if group == "optimizer" and rest and optimizer and rest not in keys_of(optimizer):
            unused.append(override)
    return unused


def refuse_targets(overrides: Iterable[str], run: RunConfig) -> None:
    """Raise ConfigError where targets were asked for and the method adapts none.

    A key of `method` that it does not have is refused by the schema.
    """
    requested = [text for text in overrides if key_of(text).partition(".")[0] == "targets"]
    method, shown = run.method, " ".join(requested)
    if (
        requested
        and isinstance(method, PeftMethod)
        and not peft_fields.takes_matrices(method.peft_type)
    ):
        raise ConfigError(
            f"{shown}: {method.peft_type} adapts no matrices of the model, and has no targets: it "
            f"{peft_fields.trains_instead(method)}; leave it out"
        )
    if method.takes_targets or not requested:
        return
    if method.name == "full":
        raise ConfigError(
            f"{shown}: method=full trains every weight, and targets do not limit it: leave it out, "
            f"or train some weights only, method.train_only=[{','.join(_roles(requested, run))}]"
        )
    raise ConfigError(
        f"{shown}: method={method.name} leaves every weight of the base as it is, and has no "
        "targets: leave it out"
    )


def _roles(requested: Iterable[str], run: RunConfig) -> list[str]:
    """What `method.train_only` would say in place of the targets that were asked for."""
    for override in requested:
        key, value = key_of(override), override.partition("=")[2].strip("'\"[] ")
        file = CONF_DIR / "targets" / f"{value}.yaml"
        if key == "targets" and file.is_file():
            described = OmegaConf.to_container(OmegaConf.load(file))
            assert isinstance(described, dict)
            table = matrix_roles.SUFFIXES.get(
                matrix_roles.model_type(run.model) or "", matrix_roles.ROLES
            )
            named = [role for role in described.get("roles") or [] if role in table]
            return ["matrices"] if value == "all" else named or list(described["modules"] or [])
        if key in ("targets.roles", "targets.modules") and value:
            return [name.strip() for name in value.split(",")]
    return ["matrices"]


def left_out(
    jobs: Sequence[list[str]], compose: Callable[[list[str]], DictConfig]
) -> tuple[list[list[str]], str]:
    """The jobs of a sweep, each without the keys that its method (or optimizer) does not have, and
    a line of them.

    A key is left out if another method of the sweep has it, or else it is a mistake, which
    composing the job will find. The line is empty where nothing was left out.
    """
    every = [tuple(text for text in job if key_of(text) in DECIDES) for job in jobs]
    if len(set(every)) < 2:  # there is no other method that could have the key
        return list(jobs), ""
    known = {deciding: chosen_by(deciding, compose) for deciding in dict.fromkeys(every)}
    chosen = [known[deciding] for deciding in every]
    checked: list[tuple[list[str], Chosen | None, list[str]]] = [
        (job, both, of_method(job, *both) if both else [])
        for job, both in zip(jobs, chosen, strict=True)
    ]
    used = {key_of(text) for job, _, not_its in checked for text in job if text not in not_its}
    kept: list[list[str]] = []
    omitted: dict[str, dict[str, None]] = {}
    for job, both, not_its in checked:
        going = [text for text in not_its if key_of(text) in used]
        kept.append([text for text in job if text not in going])
        for text in going:
            assert both is not None
            omitted.setdefault(key_of(text), {})[_name(both, key_of(text))] = None
    if not omitted:
        return kept, ""
    keys = (f"{key} ({', '.join(names)})" for key, names in sorted(omitted.items()))
    return kept, f"left out for methods that have no such key: {'; '.join(keys)}"


Chosen = tuple[type[MethodConfig], type[OptimizerConfig], str]  # the last as in `of_method`


def _name(both: Chosen, key: str) -> str:
    method, optimizer, untargeted = both
    if untargeted and key.partition(".")[0] == "targets":
        return untargeted
    if key.startswith("optimizer."):
        return next(name for name, schema in OPTIMIZERS.items() if schema is optimizer)
    return next(name for name, schema in METHODS.items() if schema is method)


def chosen_by(deciding: Sequence[str], compose: Callable[[list[str]], DictConfig]) -> Chosen | None:
    """The method and the optimizer that the overrides of DECIDES choose, as `of_method` takes them.

    None where they cannot be composed.
    """
    try:
        composed = compose(list(deciding))
        names = [OmegaConf.select(composed, f"{group}.name") for group in ("method", "optimizer")]
    except Exception:  # composing the whole job will say what is wrong
        return None
    method, optimizer = METHODS.get(str(names[0])), OPTIMIZERS.get(str(names[1]))
    if not (method and optimizer):
        return None
    kind = str(OmegaConf.select(composed, "method.peft_type", throw_on_missing=False) or "")
    if method is not PeftMethod or not kind or peft_fields.takes_matrices(kind):
        return method, optimizer, ""
    return method, optimizer, kind.lower()
