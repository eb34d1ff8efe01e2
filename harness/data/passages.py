"""One long text as several documents: at blank lines, a few thousand characters each.

Paragraphs are what blank lines divide. They are grouped until there are PASSAGE_CHARS characters.
Where no blank line comes for four times as long, the text is cut at a line end, or else at a space.
Of a text with fewer than PASSAGES passages of this length, passages are shorter, down to
LEAST_CHARS: so that a short text can be split into train, validation and test, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PASSAGE_CHARS = 3000
PASSAGES = 100  # so that the held-out shares are several documents each
LEAST_CHARS = 200
_LEADING = re.compile(r"\A(?:[^\S\n]*\n)+")
_BLANK = re.compile(r"\n[^\S\n]*\n")


def cut(pieces: Iterable[str]) -> Iterator[str]:
    """The passages of a text that comes in pieces; what they are does not depend on the pieces.

    Line ends around a passage are left out. Memory is that of a piece and a few passages.
    """
    coming = iter(pieces)
    text = ""
    for piece in coming:
        text += piece
        if len(text) >= PASSAGES * PASSAGE_CHARS:
            break
    chars = max(LEAST_CHARS, min(PASSAGE_CHARS, len(text) // PASSAGES))
    start = 0
    while True:
        while len(text) - start > 4 * chars:
            end = _end(text, start, chars)
            yield _bare(text[start:end])
            start = end
        text, start = text[start:], 0
        following = next(coming, None)
        if following is None:
            break
        text += following
    while len(text) - start > chars and (end := _end(text, start, chars)) < len(text):
        yield _bare(text[start:end])
        start = end
    if last := _bare(text[start:]):
        yield last


def _bare(passage: str) -> str:
    """A passage without the blank lines around it; its first line keeps its indentation."""
    return _LEADING.sub("", passage).rstrip()


def _end(text: str, start: int, chars: int) -> int:
    """Where the passage ends that begins at `start`."""
    low, high = start + chars, start + 4 * chars
    if blank := _BLANK.search(text, low, high):
        return blank.end()
    if len(text) <= high:  # the rest
        return len(text)
    if (line := text.rfind("\n", low, high)) > 0 or (line := text.rfind(" ", low, high)) > 0:
        return line + 1
    return high
