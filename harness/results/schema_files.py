"""What is made of the keys of result.json: a page, a JSON schema, and types for those who read it.

    python -m harness.results.schema_files

writes conf/RESULT.md, conf/result.schema.json and harness/results/record_types.py.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.config.paths import CONF_DIR
from harness.results.run_record import FILE_NAME, SCHEMA_VERSION
from harness.results.schema import PARTS, STATUSES, Key, every_key, expanded

PAGE, SCHEMA = CONF_DIR / "RESULT.md", CONF_DIR / "result.schema.json"
TYPES = Path(__file__).with_name("record_types.py")
PYTHON_TYPES = {
    "string": "str", "integer": "int", "number": "float", "boolean": "bool",
    "array": "list[Any]", "object": "dict[str, Any]", "any": "Any",
}  # fmt: skip
PART_NAMES = {
    "QUALITY": "TextQuality", "CATEGORIES": "Categories", "PEAK": "Peak", "LATENCY": "Latency",
    "ACCURACY": "Accuracy",
}  # fmt: skip
Made = dict[str, tuple[str, str]]


def json_schema() -> dict[str, Any]:
    """KEYS as a JSON schema (draft 2020-12); what a run did not come to is left out of a record."""
    root: dict[str, Any] = {"properties": {}}
    for key in every_key():
        *parents, last = key.path.split(".")
        node = root
        for parent in parents:
            node = _child(node, parent)
            node.setdefault("properties", {})
            if "type" not in node:
                node["type"] = "object"
        _child(node, last).update(_described(key))
    _close(root)
    root["properties"]["schema_version"]["const"] = SCHEMA_VERSION
    root["properties"]["status"]["enum"] = list(STATUSES)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FILE_NAME,
        "description": "The result of a run of peft-harness.",
        "type": "object",
        "required": ["schema_version", "status"],
        "properties": root["properties"],
        "additionalProperties": False,
    }


def _close(node: dict[str, Any]) -> None:
    """Refuse other names wherever names are listed and no `*` is among them."""
    if "properties" in node:
        node.setdefault("additionalProperties", False)
    for child in [*node.get("properties", {}).values(), node.get("additionalProperties")]:
        if isinstance(child, dict):
            _close(child)


def _child(node: dict[str, Any], name: str) -> dict[str, Any]:
    if name == "*":
        child = node.setdefault("additionalProperties", {})
    else:
        child = node.setdefault("properties", {}).setdefault(name, {})
    assert isinstance(child, dict)
    return child


def _described(key: Key) -> dict[str, Any]:
    description = "; ".join(filter(None, [key.what, key.unit and f"in {key.unit}"]))
    schema: dict[str, Any] = {"description": description} if description else {}
    if key.type != "any":
        schema["type"] = [key.type, "null"] if key.nullable else key.type
    return schema


def reference() -> str:
    """Return conf/RESULT.md: a table of keys for each first part of their paths."""
    lines = [
        "# Every key of result.json", "",
        f"Schema version {SCHEMA_VERSION}. `*` stands for any name, ? for what may be null. What a",
        "run did not reach is not there. [result.schema.json](result.schema.json) is the same for",
        "programs. Both are made by `python -m harness.results.schema_files`.",
    ]  # fmt: skip
    for title in dict.fromkeys(["", *(key.path.partition(".")[0] for key in every_key())]):
        own = [key for key in every_key() if _group(key) == title]
        if own:
            lines += ["", f"## {title or 'The run as a whole'}", ""]
            lines += ["| key | type | unit | what it says |", "| --- | --- | --- | --- |"]
        for key in own:
            kind = key.type + "?" * key.nullable
            lines.append(f"| `{key.path}` | {kind} | {key.unit} | {key.what} |")
    return "\n".join(lines) + "\n"


def _group(key: Key) -> str:
    return key.path.partition(".")[0] if "." in key.path else ""


# ------------------------------------------------------------------------------ types


def types() -> str:
    """Return the source of harness/results/record_types.py: a TypedDict for each mapping."""
    known: dict[str, tuple[str, str]] = {}  # fields -> name, path: equal mappings are one class
    for part, name in PART_NAMES.items():
        _class_of(_tree(expanded(PARTS[part])), name, "", known)
    _class_of(_tree(every_key()), "Record", "", known)
    head = (
        '"""Types of result.json, made by `python -m harness.results.schema_files`.\n\n'
        "What a run did not come to is not there. A mapping that also has free names, as `method`\n"
        'has, is read at these by `run_record.get`.\n"""\n\n'
        "from __future__ import annotations\n\nfrom typing import Any, TypedDict\n"
    )
    classes = (_source(name, path, fields) for fields, (name, path) in known.items())
    return "\n\n".join([head, *classes])


def _tree(keys: Iterable[Key]) -> dict[str, Any]:
    """Keys by the parts of their paths; a key is under "" of what is below its path."""
    tree: dict[str, Any] = {}
    for key in keys:
        node = tree
        for part in key.path.split("."):
            node = node.setdefault(part, {})
        node[""] = key
    return tree


def _annotation(node: dict[str, Any], name: str, path: str, known: Made) -> str:
    """The type of a value: of its own where nothing is listed below it."""
    key = node.get("")
    below = {part: inner for part, inner in node.items() if part}
    if below:
        kind = _class_of(below, name, path, known)
        return f"{kind} | None" if key is not None and key.nullable else kind
    assert key is not None
    kind = PYTHON_TYPES[key.type]
    return f"{kind} | None" if key.nullable and kind != "Any" else kind


def _class_of(tree: dict[str, Any], name: str, path: str, known: Made) -> str:
    """The type of a mapping; a class is added to `known` unless an equal one is there."""
    if list(tree) == ["*"]:
        return f"dict[str, {_annotation(tree['*'], name, f'{path}.*', known)}]"
    fields = "".join(
        f"    {part}: {_annotation(node, _name(name, part), f'{path}.{part}'.lstrip('.'), known)}\n"
        for part, node in tree.items()
        if part != "*"
    )
    return known.setdefault(fields, (name, path))[0]


def _name(parent: str, part: str) -> str:
    """The name of a class for the mapping `part` of another."""
    own = "".join(word.capitalize() for word in part.split("_"))
    return own if parent == "Record" else f"{parent}{own}"


def _source(name: str, path: str, fields: str) -> str:
    what = f"`{path}` of result.json." if path else "The whole of result.json."
    what = what if name not in PART_NAMES.values() else "The same in several places of result.json."
    names = [line.strip().partition(":") for line in fields.splitlines()]
    if not any(keyword.iskeyword(key) for key, _, _ in names):
        return f'class {name}(TypedDict, total=False):\n    """{what}"""\n\n{fields}'
    pairs = ", ".join(f'"{key}": {kind.strip()}' for key, _, kind in names)
    return f'# {what}\n{name} = TypedDict(\n    "{name}",\n    {{{pairs}}},\n    total=False,\n)\n'


def main() -> None:
    """Write the page, the schema and the types from the keys in `harness.results.schema`."""
    PAGE.write_text(reference(), "utf-8")
    SCHEMA.write_text(json.dumps(json_schema(), indent=2) + "\n", "utf-8")
    TYPES.write_text(types(), "utf-8")


if __name__ == "__main__":
    main()
