"""Which files a path names: a file, a folder, a glob, a list of them, or a saved data set."""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError
from harness.system import encodings, lfs
from harness.system.encodings import COMPRESSED, opened

NOTES = (".md", ".rst")  # text, or what is written about the records beside them
TEXTS = (".txt", *NOTES)
TABLES = (".parquet", ".arrow")
KINDS = (*TEXTS, ".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TABLES)
OF_PAIRS = tuple(kind for kind in KINDS if kind not in NOTES)
KNOWN = f"{', '.join(KINDS)} (also with {', '.join(COMPRESSED)})"


def kind(file: Path) -> str:
    """The one of KINDS that a file's name says, in any case and compressed or not; "" for none."""
    name = file.name.lower()
    for end in COMPRESSED:
        if name.endswith(end):
            name = name.removesuffix(end)
            break
    return Path(name).suffix if Path(name).suffix in KINDS else ""


def stem(file: Path) -> str:
    """The name of a file without the ends that say its kind, in lower case."""
    name = file.name.lower()
    for end in COMPRESSED:
        name = name.removesuffix(end)
    return name.removesuffix(kind(file))


def find_files(
    path: Any, *, encoding: str | None = None, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Files that `path` (a file, a folder, a glob or a list of them) names, each real file once.

    Those of a folder or a glob are sorted, and those of a list in its order. Of a folder, files of
    `kinds`, in linked folders too (`left_out` has the others); of a folder that `save_to_disk` of
    `datasets` wrote, its tables.

    Raises:
        ConfigError: there is none, or one is empty, binary, of another kind or cannot be read.
    """
    if not path:
        raise ConfigError("data=text_files needs data.path: a file, a folder, a glob or a list")
    if not isinstance(path, str):
        return _once(
            file
            for entry in path
            for file in find_files(str(entry), encoding=encoding, kinds=kinds)
        )
    root = Path(path).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = [file for tables in saved(root).values() for file in tables] or _chosen(root, kinds)
        if not files:
            raise ConfigError(f"data.path={path}: no {KNOWN} files in this folder")
    else:
        files = _once(Path(f) for f in sorted(glob.glob(str(root), recursive=True)))
        files = sorted(file for file in files if file.is_file())
        if not files:
            beside = [f.name for f in root.parent.glob("*")] if root.parent.is_dir() else []
            close = [  # alike in more than their suffix
                name
                for name in difflib.get_close_matches(root.name, beside, n=1)
                if difflib.get_close_matches(root.stem, [Path(name).stem])
            ]
            hint = f"; did you mean '{root.parent / close[0]}'?" if close else ""
            raise ConfigError(f"data.path={path}: no such file or folder{hint}")
    for file in files:
        if kind(file) not in kinds:
            known = KNOWN if kinds == KINDS else ", ".join(kinds)
            raise ConfigError(f"data.path: {file} is not one of {known}")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"data.path: {file} cannot be read (permission)")
        lfs.refuse_pointers([file])
        with opened(file) as stream:
            beginning = stream.read(8192)
        if not beginning:
            raise ConfigError(f"data.path: {file} is empty")
        _refuse_binary(file, beginning, encoding)
    return files


def _refuse_binary(file: Path, beginning: bytes, encoding: str | None) -> None:
    if kind(file) in TABLES or b"\0" not in beginning or encodings.marked(beginning):
        return
    if encoding and 0 in "a".encode(encoding):  # one that has NUL bytes in plain letters
        return
    guess = encodings.likely(beginning)
    seen = beginning[: len(beginning) // 2 * 2].decode(guess, "ignore")
    if guess.startswith("utf-16") and all(c.isprintable() or c.isspace() for c in seen):
        raise ConfigError(
            f"data.path: {file} looks like {guess} without a byte-order mark: if it is, set "
            f"data.encoding={guess}"
        )
    position = beginning.index(0)
    raise ConfigError(f"data.path: {file} is binary, not text (a NUL byte at offset {position})")


def _chosen(root: Path, kinds: Sequence[str]) -> list[Path]:
    """The files of a folder that are its text: beside records, notes (.md, .rst) are none."""
    files = [file for file in walk(root) if kind(file) in kinds and file.is_file()]
    if any(kind(file) not in TEXTS for file in files):
        files = [file for file in files if kind(file) not in NOTES]
    return files


def left_out(path: Any, kinds: Sequence[str] = KINDS) -> list[Path]:
    """The files of the folders in `path` that `find_files` does not read, without hidden ones."""
    unread: list[Path] = []
    for entry in [path] if isinstance(path, str) else path or []:
        root = Path(entry).expanduser()
        if root.is_dir() and not saved(root):
            read = set(_chosen(root, kinds))
            unread += [file for file in walk(root) if file not in read]
    return unread


def saved(folder: Path) -> dict[str, list[Path]]:
    """The tables by split of a folder that `datasets` saved; a data set without splits is train.

    Empty for other folders.

    Raises:
        ConfigError: a table is missing.
    """

    def tables(part: Path) -> list[Path]:
        state = json.loads((part / "state.json").read_text("utf-8"))
        return [part / str(file["filename"]) for file in state["_data_files"]]

    try:
        if (folder / "dataset_dict.json").is_file():
            known = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
            by_split = {str(name): tables(folder / str(name)) for name in known}
        elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            by_split = {"train": tables(folder)}
        else:
            return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.path: {folder} is a data set that was saved in part ({error}); save it again"
        ) from error
    for file in (file for files in by_split.values() for file in files):
        if not file.is_file():
            raise ConfigError(f"data.path: {file} is missing, which {folder} lists; save it again")
    return by_split


def names(files: Sequence[Path], path: Any) -> list[str]:
    """What documents are called by: each file's place below the folder that all are in.

    It is that of the real file, or of the link where the real file is outside of `path`: it does
    not depend on where the folder is, or on how `path` is spelled.
    """
    entries = [path] if isinstance(path, str) else path or []
    folders = [root for entry in entries if (root := Path(entry).expanduser()).is_dir()]
    places = []
    for file in files:
        place = file.resolve()
        for root in folders:
            if file.is_relative_to(root) and not place.is_relative_to(root.resolve()):
                place = root.resolve() / file.relative_to(root)
                break
        places.append(place)
    top = Path(os.path.commonpath([place.parent for place in places]))
    return [place.relative_to(top).as_posix() for place in places]


def walk(root: Path) -> list[Path]:
    """All files in a folder and in the folders that are linked in it, sorted, each real one once.

    What is hidden, such as a cache, is no text of the folder.

    Raises:
        ConfigError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"data.path: {error.filename} cannot be read ({error.strerror})")

    paths: list[Path] = []
    links: list[Path] = []
    walked: set[str] = set()
    waiting = [root]
    while waiting:  # a folder's own files first, then what is linked: the real name is kept
        for folder, inner, files in os.walk(waiting.pop(0), onerror=refuse):
            real = os.path.realpath(folder)
            if real in walked:
                inner.clear()
                continue
            walked.add(real)
            inner[:] = [name for name in inner if not name.startswith(".")]
            waiting += [Path(folder, name) for name in sorted(inner) if _is_link(folder, name)]
            for name in sorted(name for name in files if not name.startswith(".")):
                (links if _is_link(folder, name) else paths).append(Path(folder, name))
    return sorted(_once([*paths, *sorted(links)]))


def _is_link(folder: str, name: str) -> bool:
    return Path(folder, name).is_symlink()


def _once(files: Iterable[Path]) -> list[Path]:
    """Of several names of a real file, the first."""
    by_realpath: dict[str, Path] = {}
    for file in files:
        by_realpath.setdefault(os.path.realpath(file), file)
    return list(by_realpath.values())
