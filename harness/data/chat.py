"""Conversations as tokens: by the tokenizer's own chat template, or by a plain one.

The plain template, for tokenizers without one such as GPT-2's, and with data.chat_template=plain:

    System: Be brief.
    User: Hello
    Assistant: Hi<|endoftext|>User: Bye
    Assistant: Goodbye<|endoftext|>

What the assistant says, and the token that ends its turn, are the assistant's: in the plain
template `" Hi<|endoftext|>"`. A template of the tokenizer's own marks it by `{% generation %}`
(transformers), or else it is found from what the template writes for a prompt
(`add_generation_prompt`) and for the prompt with its answer; white space after the end of a turn
is not the assistant's.

A text is cut into tokens where generation cuts it: the tokens of a prompt are those of its text by
itself, and an answer follows them, also where the tokenizer would join the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from harness.config.errors import ConfigError
from harness.data.forms import Turn, as_text

PLAIN = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Assistant:"
    "{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template that writes today's date would make another run of every day.
DATED, ONE_DATE = "strftime_now", "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Template:
    """Holds the chat template by which a conversation is written as text."""

    text: str  # Jinja
    own: bool  # the tokenizer's, which also writes what a text begins with

    @property
    def marked(self) -> bool:
        """Tell whether the template marks the assistant's turns itself."""
        return bool(MARK.search(self.text))

    def described(self) -> str:
        """Describe the template in words, for the log and result.json."""
        if not self.own:
            return "plain: System:, User:, Assistant: (harness/data/chat.py)"
        how = "marked by {% generation %}" if self.marked else "found from its prompts"
        return f"the tokenizer's own; the assistant's turns are {how}"


@dataclass(frozen=True)
class Piece:
    """Holds a part of a written conversation, and whether it is the assistant's."""

    text: str
    assistant: bool  # whether the assistant writes it


def template_of(tokenizer: PreTrainedTokenizerBase, requested: str = "auto") -> Template:
    """The tokenizer's own template, or the plain one where it has none or that is `requested`.

    Raises:
        ConfigError: the tokenizer has several templates and none is its default.
    """
    if requested == "plain" or not tokenizer.chat_template:
        return Template(PLAIN, False)
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(f"data.chat_template={requested}: {error}; set it to plain") from error
    return Template((ONE_DATE if DATED in text else "") + text, True)


def written(
    turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Piece]:
    """A conversation in pieces, of which every other one is the assistant's.

    Raises:
        ConfigError: the template refuses it, or what of it is the assistant's cannot be told.
    """
    _refuse_special(turns, tokenizer, where)
    whole, spans = _rendered(turns, template, tokenizer, where, marked=template.marked)
    if not template.marked:
        spans = _spans(turns, whole, template, tokenizer, where)
    if len(spans) != (answers := sum(role == "assistant" for role, _ in turns)):
        raise ConfigError(
            f"{where}: the chat template marks {len(spans)} turns of the assistant's {answers}; "
            "set data.chat_template=plain, or use a template that marks each of them"
        )
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        pieces += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
        done = end
    return [*pieces, Piece(whole[done:], False)]


def _rendered(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    prompt: bool = False,
    marked: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of `turns`, with a `prompt` for the assistant's next one, and what is marked."""
    messages = [{"role": role, "content": content} for role, content in turns]
    fields: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=template.text,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **fields,
        )
    except TemplateError as error:
        raise ConfigError(
            f"{where}: the tokenizer's chat template refuses it ({error}): "
            f"{as_text(turns)[:60]!r}; data.chat_template=plain takes any order of turns"
        ) from error
    (text,), spans = rendered
    return text, [(start, end) for start, end in spans[0]] if marked else []


def _spans(
    turns: Sequence[Turn],
    whole: str,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> list[tuple[int, int]]:
    """Where the assistant's turns begin and end in `whole`."""
    spans = []
    for i, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        before, _ = _rendered(turns[:i], template, tokenizer, where, prompt=True)
        after, _ = _rendered(turns[: i + 1], template, tokenizer, where)
        end = len(after.rstrip())
        if not after.startswith(before) or whole[:end] != after[:end]:
            raise ConfigError(
                f"{where}: the chat template writes a turn of the assistant otherwise once it has "
                "been said than it begins it or with more turns after it, so that a prompt of "
                "generation is not what training sees: set data.chat_template=plain, or use a "
                "template with {% generation %}"
            )
        lead, matched, rest = after[len(before) : end].partition(content)
        if not matched or lead.strip() or not rest:
            raise ConfigError(
                f"{where}: the chat template does not write a turn of the assistant as it is, with "
                f"an end: {content[:40]!r} becomes {after[len(before) : end][:60]!r}; set "
                "data.chat_template=plain, or use a template with {% generation %}"
            )
        spans.append((len(before), end))
    return spans


def _refuse_special(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a text that holds a special token, which would end a turn or begin one."""
    for _, content in turns:
        for token in tokenizer.all_special_tokens:
            if token in content:
                raise ConfigError(
                    f"{where}: a message holds {token!r}, a special token of the tokenizer, and "
                    "would be read as one; leave it out of the text"
                )


def to_ids(
    conversations: Sequence[Sequence[Piece]], encode: Encode
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of every conversation, and of each id whether it is the assistant's.

    Each piece goes on from the ids of those before it: as the text as a whole is cut into tokens if
    that leaves these ids as they are, or else by itself.
    """
    texts = [
        "".join(p.text for p in conversation[: i + 1])
        for conversation in conversations
        for i in range(len(conversation))
    ]
    wholes = iter(encode(texts))
    encoded = []
    for conversation in conversations:
        ids: list[int] = []
        marks: list[bool] = []
        for piece in conversation:
            whole = next(wholes)
            new = whole[len(ids) :] if whole[: len(ids)] == ids else encode([piece.text])[0]
            ids = [*ids, *new]
            marks += [piece.assistant] * len(new)
        encoded.append((ids, marks))
    return encoded


def ends(template: Template, tokenizer: PreTrainedTokenizerBase, encode: Encode) -> tuple[int, ...]:
    """Ids after which a turn of the assistant is over: the end-of-text token, the template's."""
    turns: list[Turn] = [("user", "a"), ("assistant", "b")]
    pieces = written(turns, template, tokenizer, "data.chat_template")
    last = next(piece.text for piece in reversed(pieces) if piece.assistant)
    closing = last.partition("b")[2].strip()
    (ids,) = encode([closing]) if closing else ([],)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    return tuple(dict.fromkeys([end, *ids])) if len(ids) == 1 else (end,)
