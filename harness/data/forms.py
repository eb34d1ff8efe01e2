"""The forms that the records of a task have, and what of a record is given and what is predicted.

    pair           {"prompt": …, "completion": …}, or as data.prompt_field, completion_field say
    instruction    {"instruction": …, "input": …, "output": …}; input may be empty or left out
    question       {"question": …, "answer": …}
    messages       {"messages": [{"role": …, "content": …}, …]}
    sharegpt       {"conversations": [{"from": …, "value": …}, …]}

The first record says which form a data set has (`found`), unless `data.record_form` does; a record
of another form is refused by its place. The last two are conversations of several turns. Needs the
standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig
from harness.data import records

Record = dict[str, Any]
Turn = tuple[str, str]  # (role, content)

FIELDS = {  # what tells a form from others, and what must be there
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
FORMS = ("pair", *FIELDS)
WORDS = {
    "pair": "prompt and completion",
    "instruction": "instruction, input and output",
    "question": "question and answer",
    "messages": "conversation: messages with role and content",
    "sharegpt": "conversation: conversations with from and value",
    "lines": "line of prompt and completion",
}
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
# What would make a conversation another one, and is not read.
UNREAD_OF_A_RECORD = {
    "instruction": ("system", "history"),
    "messages": ("tools", "functions"),
    "sharegpt": ("tools", "functions"),
}
UNREAD_OF_A_MESSAGE = (
    "tool_calls", "tool_call_id", "function_call", "weight", "train", "thinking",
    "reasoning_content", "reasoning",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Holds one record: a prompt, or turns, and the completions that may follow."""

    prompt: str  # of a conversation, its turns as text, for people
    completions: list[str]
    turns: tuple[Turn, ...] = ()  # of a conversation: what comes before the assistant's last turn
    left_out: int = 0  # turns after the assistant's last one, in which nothing is predicted
    form: str = "lines"  # that of the record
    separated_again: bool = False  # whether the completion of a line has the separator in it


def rows(
    coming: Iterable[tuple[str, Record]], cfg: DataConfig, form: str | None
) -> Iterator[tuple[str, Row]]:
    """(where, row) of every record; without a `form` that of the first record.

    Raises:
        ConfigError: a record of another form, or one that is not whole.
    """
    read: Callable[[Record, str], Row] | None = None
    for where, record in coming:
        form = form or found(record, cfg, where)
        read = read or _reader(form, cfg)
        _check_fields(record, form, cfg, where)
        yield where, replace(read(record, where), form=form)


def found(record: Record, cfg: DataConfig, where: str) -> str:
    """The form that a record has by its fields.

    Raises:
        ConfigError: none or several.
    """
    if cfg.record_form != "auto":
        return cfg.record_form
    of_pair = DataConfig("")
    named = (cfg.prompt_field, cfg.completion_field)
    if named != (of_pair.prompt_field, of_pair.completion_field):
        return "pair"
    matching = _forms_of(record, cfg)
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ConfigError(
            f"{where} has the fields of several forms, {' and '.join(matching)}: say which is "
            f"meant, data.record_form={matching[0]}"
        )
    fields = ", ".join(map(str, record)) or "none"
    if cfg.text_field in record:
        raise ConfigError(
            f"{where} is a record of text ({fields}), with nothing that is given and nothing that "
            "is to follow: use data=text_files"
        )
    if "prompt" in record or "completion" in record:  # one of them
        return "pair"
    known = "; ".join(f"{form}: {', '.join(names)}" for form, names in FIELDS.items())
    raise ConfigError(
        f"{where} has the fields {fields}, and no form of record that is known (pair: prompt, "
        f"completion; {known}): name your own with data.prompt_field and data.completion_field"
    )


def of_text(record: Record) -> str | None:
    """The form of a record that has no text, for a message; None where it is not known."""
    matching = _forms_of(record, DataConfig(""))
    return matching[0] if matching else None


def _forms_of(record: Record, cfg: DataConfig) -> list[str]:
    """The forms whose fields are all in a record and not null."""
    configured = cfg.completion_field
    either = [configured] if isinstance(configured, str) else list(configured)
    matching = [
        form for form, names in FIELDS.items() if all(record.get(n) is not None for n in names)
    ]
    if cfg.prompt_field in record and any(name in record for name in either):
        matching.insert(0, "pair")
    return matching


def _check_fields(record: Record, form: str, cfg: DataConfig, where: str) -> None:
    """Refuse a record without its form's fields, or with what would change it and is not read."""
    missing = [name for name in FIELDS.get(form, ()) if name not in record]
    if missing:
        others = [other for other in _forms_of(record, cfg) if other != form]
        why = f", the form {others[0]}: a data set has records of one form" if others else ""
        shown = ", ".join(map(str, record)) or "none"
        raise ConfigError(
            f"{where} has no field {missing[0]}, which the form {form} has "
            f"(data.record_form={cfg.record_form}); it has the fields {shown}{why}"
        )
    for name in UNREAD_OF_A_RECORD.get(form, ()):
        if record.get(name):
            raise ConfigError(
                f"{where}: {name} is not read in records of the form {form}, and would be lost: "
                "give the record as messages, with all that the model is to see"
            )


def _reader(form: str, cfg: DataConfig) -> Callable[[Record, str], Row]:
    def pair(record: Record, where: str) -> Row:
        return Row(*_pair(record, cfg, where))

    return {
        "pair": pair,
        "instruction": _instruction,
        "question": _question,
        "messages": _messages,
        "sharegpt": _sharegpt,
    }[form]


# --------------------------------------------------------------------------- one form each


def _pair(record: Record, cfg: DataConfig, where: str) -> tuple[str, list[str]]:
    """Prompt and completions of a record; lists of strings are slots, and references."""
    configured = cfg.completion_field
    either = [configured] if isinstance(configured, str) else list(configured)
    for key, name in [("prompt", cfg.prompt_field), *(("completion", name) for name in either)]:
        if name not in record:
            others = [form for form in _forms_of(record, cfg) if form != "pair"]
            why = (
                f"; it has the form {others[0]}: a data set has records of one form"
                if others
                else ""
            )
            raise ConfigError(
                f"data.{key}_field={name}: {where} has no such field; {nearest(name, record)}{why}"
            )
    slots = record[cfg.prompt_field]
    if isinstance(slots, list):  # of texts, or of triples
        slots = " | ".join(
            " : ".join(_texts(slot, where, cfg.prompt_field)) if isinstance(slot, list) else slot
            for slot in _texts(slots, where, cfg.prompt_field, nested=True)
        )
    (prompt,) = _texts([slots], where, cfg.prompt_field)
    name = next((name for name in either if record[name] not in (None, "", [])), either[0])
    return prompt, _several(record[name], where, name)


def _instruction(record: Record, where: str) -> Row:
    prompt = records.checked(record["instruction"], where, "instruction")
    more = record.get("input")
    more = "" if more is None else records.checked(more, where, "input")
    if more.strip():
        prompt = f"{prompt.strip()}\n\n{more.strip()}"
    return Row(prompt, _several(record["output"], where, "output"))


def _question(record: Record, where: str) -> Row:
    question = records.checked(record["question"], where, "question")
    return Row(question, _several(record["answer"], where, "answer"))


def _several(value: Any, where: str, name: str) -> list[str]:
    """One completion, or a list of them."""
    return _texts(value if isinstance(value, list) else [value], where, name)


def _texts(values: list[Any], where: str, name: str, *, nested: bool = False) -> list[Any]:
    """Texts with their line ends unified; with `nested`, lists among them stay as they are.

    Raises:
        ConfigError: one is neither.
    """
    for value in values:
        if isinstance(value, dict):
            chat = {"role", "content"} <= set(value)
            why = "; chat messages are read as messages: [{role, content}, …]" * chat
            raise ConfigError(
                f"{where}: {name}: expected text or a list of texts, found {str(value)[:60]}{why}"
            )
    return [
        value if nested and isinstance(value, list) else records.checked(value, where, name)
        for value in values
    ]


# --------------------------------------------------------------------------- conversations


def _messages(record: Record, where: str) -> Row:
    return _conversation(_turns(record["messages"], where, "messages", "role", "content"), where)


def _sharegpt(record: Record, where: str) -> Row:
    turns = _turns(record["conversations"], where, "conversations", "from", "value")
    system = record.get("system")
    if system is not None and (text := records.checked(system, where, "system").strip()):
        if turns[0][0] == "system":
            raise ConfigError(f"{where}: system is said twice, as a field and as the first message")
        turns.insert(0, ("system", text))
    return _conversation(turns, where)


def _turns(value: Any, where: str, name: str, of_role: str, of_content: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {name}: expected a list of messages, found {str(value)[:60]}")
    turns: list[Turn] = []
    for number, message in enumerate(value, 1):
        location = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise ConfigError(
                f"{location}: expected {of_role} and {of_content}, found {str(message)[:60]}"
            )
        for key in (of_role, of_content):
            if key not in message:
                fields = ", ".join(map(str, message)) or "none"
                raise ConfigError(f"{location} has no field {key}; it has the fields {fields}")
        if unread := [key for key in UNREAD_OF_A_MESSAGE if message.get(key) is not None]:
            raise ConfigError(
                f"{location}: {unread[0]} is not read, and would be lost: leave it out"
            )
        role = message[of_role]
        if not isinstance(role, str) or role not in ROLES:
            raise ConfigError(
                f"{location}: the role {role!r} is not known; {nearest(str(role), ROLES)}"
            )
        content = records.checked(message[of_content], location, of_content).strip()
        if not content and ROLES[role] != "system":
            raise ConfigError(
                f"{location}: the {role} says nothing; leave the record out of the file"
            )
        if content:
            turns.append((ROLES[role], content))
    return turns


def _conversation(turns: list[Turn], where: str) -> Row:
    """The row of a conversation: the assistant's last turn is what completes the others."""
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    if last < 0:
        raise ConfigError(
            f"{where}: no turn is the assistant's, and there is nothing to learn; leave the record "
            "out of the file"
        )
    before = tuple(turns[:last])
    return Row(as_text(before), [turns[last][1]], before, len(turns) - 1 - last)


def as_text(turns: Iterable[Turn]) -> str:
    """Return turns for people to read: `role: content`, one line for each turn."""
    return "\n".join(f"{role}: {content}" for role, content in turns)
