"""Text to tables of tokens, a part at a time: training blocks, and held-out documents.

Memory is that of a few batches of text and of 50 bytes a document, whatever the text's size; a
single document is in memory as a whole. Tokens are stored as the narrowest integer that fits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data.documents import Corpus, Document
from harness.data.token_tables import Writer

BATCH_CHARS = 2**20  # of text that is tokenised at a time: about 50 MB of ids and offsets
BATCH_DOCUMENTS = 1000
SHOWN_AFTER_SECONDS = 5.0
Encode = Callable[[list[str]], list[list[int]]]


def write(
    cfg: DataConfig,
    corpus: Corpus,
    folders: dict[str, Path],
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    begins: tuple[int, ...],
) -> None:
    """Write the tables of splits of `corpus` into `folders`, all of them or none.

    Raises:
        ConfigError: the training text is shorter than a block.
    """
    kind = narrowest(tokenizer)
    tables: dict[str, _Blocks | _Documents] = {}
    bar = tqdm(
        total=sum(int(corpus.index(name).num_bytes.sum()) for name in folders),
        desc=f"tokenise {cfg.name}",
        unit="B",
        unit_scale=True,
        delay=SHOWN_AFTER_SECONDS,
        leave=False,
        disable=None,  # where nobody is looking
    )
    try:
        for name, folder in folders.items():
            if name == "train":
                end = tokenizer.eos_token_id
                assert isinstance(end, int)
                tables[name] = _Blocks(
                    Writer(folder), encode, kind, cfg.context_length, begins, end
                )
            else:
                tables[name] = _Documents(Writer(folder), encode, kind)
        with bar:
            for name, rank, document in corpus.walk(list(folders)):
                tables[name].add(rank, document)
                bar.update(len(document[1].encode()))
            for table in tables.values():
                table.flush()
        for table in tables.values():
            table.finish()
    except BaseException:
        for table in tables.values():
            table.writer.discard()
        raise


def narrowest(tokenizer: PreTrainedTokenizerBase) -> pa.DataType:
    """The narrowest integer that has every id of a vocabulary: uint16 or int32."""
    highest = max([*tokenizer.get_vocab().values(), tokenizer.eos_token_id or 0])
    return pa.uint16() if highest < 2**16 else pa.int32()


class _Batches(ABC):
    """Documents of one split, tokenised BATCH_CHARS at a time."""

    def __init__(self, writer: Writer, encode: Encode, kind: pa.DataType) -> None:
        self.writer = writer
        self.encode = encode
        self.kind = kind
        self.dtype = kind.to_pandas_dtype()
        self.ranks: list[int] = []
        self._waiting: list[Document] = []
        self._chars = 0

    def add(self, rank: int, document: Document) -> None:
        """Add a document, whose place in the order of its split is `rank`."""
        self.ranks.append(rank)
        self._waiting.append(document)
        self._chars += len(document[1])
        if self._chars >= BATCH_CHARS or len(self._waiting) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Tokenise the documents that are waiting, and write their tokens."""
        if self._waiting:
            self.write(self._waiting, self.encode([text for _, text in self._waiting]))
        self._waiting, self._chars = [], 0

    @abstractmethod
    def write(self, documents: list[Document], ids: list[list[int]]) -> None:
        """Write the tokens `ids` of documents to the tables of their split."""

    @abstractmethod
    def finish(self) -> None:
        """Write the documents that are left, and close the tables."""


class _Blocks(_Batches):
    """Documents joined by the end-of-text token, cut into blocks of context + 1 ids.

    With `begins` every document is these ids, its text and the end-of-text token.

    Neighbouring blocks share one id, so that every id of the stream but the first is predicted
    once; a tail shorter than a block is left out.
    """

    def __init__(
        self,
        writer: Writer,
        encode: Encode,
        kind: pa.DataType,
        context: int,
        begins: tuple[int, ...],
        end: int,
    ) -> None:
        super().__init__(writer, encode, kind)
        self.context = context
        self.begins = begins
        self.end = end
        self._rest: NDArray[np.integer] = np.empty(0, self.dtype)
        self._num_tokens = 0

    def add(self, rank: int, document: Document) -> None:
        super().add(rank, document)
        self.ranks.clear()  # training keeps the order of the source

    def write(self, documents: list[Document], ids: list[list[int]]) -> None:
        if self.begins:
            self._extend([[*self.begins, *document_ids, self.end] for document_ids in ids])
        else:
            self._extend([[self.end, *document_ids] for document_ids in ids])

    def finish(self) -> None:
        if not self.begins:
            self._extend([[self.end]])
        if self._num_tokens <= self.context:
            raise ConfigError(
                f"the training split of {self._num_tokens} tokens is shorter than one block of "
                f"data.context_length={self.context}: lower data.context_length or give more text"
            )
        self.writer.finish()

    def _extend(self, parts: list[list[int]]) -> None:
        new = [np.array(ids, dtype=self.dtype) for ids in parts]
        stream = np.concatenate([self._rest, *new])
        self._num_tokens += sum(map(len, new))
        count = max(0, len(stream) - 1) // self.context
        if count:
            starts = np.arange(count)[:, None] * self.context
            values = stream[starts + np.arange(self.context + 1)].reshape(-1)
            blocks = pa.FixedSizeListArray.from_arrays(pa.array(values), self.context + 1)
            self.writer.write(pa.table({"tokens": blocks}))
        self._rest = stream[count * self.context :].copy()


class _Documents(_Batches):
    """One row a document, in the order of the split."""

    def write(self, documents: list[Document], ids: list[list[int]]) -> None:
        self.writer.write(rows(documents, ids, self.kind))

    def finish(self) -> None:
        self.writer.finish(np.array(self.ranks, np.int64))


def rows(documents: list[Document], ids: list[list[int]], kind: pa.DataType) -> pa.Table:
    """One row a document, with the counts that word perplexity and bits per byte divide by."""
    return pa.table(
        {
            "id": [name for name, _ in documents],
            "tokens": pa.array(ids, type=pa.list_(kind)),
            "num_words": [len(text.split()) for _, text in documents],
            "num_bytes": [len(text.encode()) for _, text in documents],
        }
    )
