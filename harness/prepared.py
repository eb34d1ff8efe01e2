"""What was made of a text, found again by the text's digest: without reading the text.

A manifest in `data.cache_dir` names the tables of tokens, and holds what was found out on the way.
It is found by the content of the files (`harness.contents`, which looks at sizes and times of files
that it knows), and by all that the tables depend on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.config import DataConfig
from harness.naming import PATHS
from harness.results import write_atomically

FORMAT = "1"  # part of every key; raise it when what is made of a text changes
KNOWN_BY_CONTENT = ("sha256:", "commit:")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What was made of the splits of a text."""

    tables: dict[str, str]  # by split: the name of its folder
    num_documents: dict[str, int]
    facts: dict[str, Any]  # for result.json
    warnings: list[str]


def key_of(
    cfg: DataConfig, content: str, tokenizer: str, begins: tuple[int, ...], splits: Sequence[str]
) -> str:
    """What tells the tables of `splits` from others; `tokenizer` is a fingerprint."""
    fields = {k: v for k, v in vars(cfg).items() if k not in (*PATHS, "cache_dir")}
    values = [FORMAT, content, tokenizer, list(begins), list(splits), fields]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def find(cfg: DataConfig, content: str, key: str) -> Manifest | None:
    """The manifest of `key`; None where there is none, or where `content` says nothing certain."""
    if not content.startswith(KNOWN_BY_CONTENT):
        return None
    with suppress(OSError, ValueError, TypeError):
        return Manifest(**json.loads(_file(cfg, key).read_text("utf-8")))
    return None


def keep(cfg: DataConfig, content: str, key: str, made: Manifest) -> None:
    """Write the manifest of `key`; a cache that is for reading only keeps none."""
    if not content.startswith(KNOWN_BY_CONTENT):
        return
    with suppress(OSError):
        _file(cfg, key).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(cfg, key), json.dumps(asdict(made)))


def _file(cfg: DataConfig, key: str) -> Path:
    return Path(cfg.cache_dir) / "prepared" / f"{key}.json"


@contextmanager
def alone(cfg: DataConfig, key: str) -> Iterator[None]:
    """Hold what belongs to `key`, so that several runs do not prepare the same text at once.

    Another run that holds it is waited for. The kernel gives it up when its holder is gone.
    """
    try:
        folder = Path(cfg.cache_dir) / "prepared"
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / f".{key}.lock").open("w")
    except OSError:  # what cannot be written is told of where the tables are
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another run prepares data={cfg.name}: waiting for it"
            log.info(said)
            print(said, file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a disk without locks: then each prepares it, to the same result
            pass
        yield
