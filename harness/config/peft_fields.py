"""Fields of PEFT's configuration classes, read from its source: importing PEFT takes seconds."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.config.method_schema import AdaloraMethod, LoraMethod, MethodConfig, PeftMethod

# These train modules that are no matrices: norms, rows of the embeddings, whole blocks.
OTHER_MODULES = ("LN_TUNING", "TRAINABLE_TOKENS", "SHADOW")
INSTEAD = {  # what those train that take no matrices; the others are prompts
    "LN_TUNING": "trains the normalisation layers",
    "TRAINABLE_TOKENS": "trains rows of the token embeddings, which method.fields.token_indices "
    "lists",
    "SHADOW": "trains a small model beside the blocks, whose states it corrects",
    "ADAPTION_PROMPT": "puts prompts into the attention modules of the last "
    "method.fields.adapter_layers layers",
}
# PEFT's layers for these take nn.Linear, and no Conv1D as GPT-2 has them (a test asks PEFT).
LINEAR_ONLY = (
    "ADAMSS", "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LILY", "LOHA", "LOKR", "MISS",
    "OFT", "OSF", "PEANUT", "PSOFT", "ROAD", "SHIRA", "SUPERTUNING",
)  # fmt: skip
TURN = "write model.linear=auto, which turns Conv1D into nn.Linear of the same function"
REGISTERED = re.compile(r"register_peft_method\((.*?)\)", re.DOTALL)


def check(method: MethodConfig) -> None:
    """A PEFT method's name, and the names of `method.fields`.

    Raises:
        ConfigError: as `harness.methods` says it with PEFT itself.
    """
    if isinstance(method, LoraMethod) and method.fields:
        kind = "LORA"
    elif isinstance(method, AdaloraMethod) and method.fields:
        kind = "ADALORA"
    elif isinstance(method, PeftMethod):
        kind = method.peft_type.upper()
        if classes() and kind not in classes():
            raise ConfigError(f"method.peft_type={method.peft_type}: {nearest(kind, classes())}")
    else:
        return
    known = fields(kind)
    for name in method.fields if known else ():
        if name not in known:
            raise ConfigError(
                f"method.fields.{name}: {classes()[kind]} has no such field; "
                f"{nearest(name, known, limit=60)}"
            )


@cache
def classes() -> dict[str, str]:
    """PEFT's methods and the class that configures each; empty where its source is elsewhere."""
    config_classes: dict[str, str] = {}
    for file in _folder().glob("tuners/*/__init__.py"):
        for call in REGISTERED.findall(file.read_text("utf-8")):
            name = re.search(r"name=\"(\w+)\"", call)
            configured = re.search(r"config_cls=(\w+)", call)
            if name and configured:
                config_classes[name[1].upper()] = configured[1]
    return config_classes


@cache
def fields(kind: str) -> dict[str, str]:
    """Fields of a method's configuration with their types; empty where not all can be told."""
    return _of_class(classes().get(kind, "")) or {}


def takes_matrices(peft_type: str) -> bool:
    """Whether a PEFT method adapts matrices that can be named; True where that cannot be told."""
    kind = peft_type.upper()
    known = fields(kind)
    if kind in OTHER_MODULES:
        return False
    return not known or "list[" in known.get("target_modules", "").lower()


def trains_instead(method: PeftMethod) -> str:
    """What a PEFT method that adapts no matrices trains, as the end of a sentence."""
    kind = method.peft_type.upper()
    return INSTEAD.get(kind, "puts virtual tokens before the text (method.fields says how many)")


def needs_linear(method: MethodConfig) -> str:
    """Why a method needs `nn.Linear` in place of `Conv1D`, as a clause; empty where it does not."""
    if isinstance(method, LoraMethod):
        return why_linear("LORA", method.init, method.fields.get("kasa_config"))
    if isinstance(method, PeftMethod):
        given = method.fields
        init, kasa = given.get("init_lora_weights"), given.get("kasa_config")
        return why_linear(method.peft_type.upper(), init, kasa)
    return ""


def why_linear(kind: str, init: Any, kasa: Any) -> str:
    """The same of PEFT's method `kind`, with its start `init` and its `kasa_config`."""
    if kind in LINEAR_ONLY:
        return f"PEFT's {kind} takes nn.Linear and no Conv1D"
    if kind == "LORA" and init == "olora":
        return "OLoRA takes a weight as (out, in), and Conv1D stores it (in, out)"
    return "PEFT's KaSA takes nn.Linear and no Conv1D" if kind == "LORA" and kasa else ""


def _of_class(name: str) -> dict[str, str] | None:
    """Fields of a class and of those it extends; None where one is not PEFT's."""
    if name in ("PushToHubMixin", "object"):
        return {}
    described = _sources().get(name)
    if described is None:
        return None
    bases, own = described
    from_bases: dict[str, str] = {}
    for base in reversed(bases):
        inherited = _of_class(base)
        if inherited is None:
            return None
        from_bases |= inherited
    return from_bases | own


@cache
def _sources() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Class -> (what it extends, its own fields with types), of every file of configurations."""
    files = [_folder() / "config.py", *sorted(_folder().glob("tuners/**/*config.py"))]
    files += [_folder() / "tuners" / "lycoris_utils.py"]
    by_class: dict[str, tuple[list[str], dict[str, str]]] = {}
    for file in files:
        for node in ast.parse(file.read_text("utf-8")).body if file.is_file() else ():
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                own = {
                    item.target.id: ast.unparse(item.annotation)
                    for item in node.body
                    if isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and "ClassVar" not in ast.unparse(item.annotation)
                }
                by_class[node.name] = (bases, own)
    return by_class


def _folder() -> Path:
    spec = importlib.util.find_spec("peft")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else Path("peft-is-not-installed")
