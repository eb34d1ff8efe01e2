"""Data sets of the Hugging Face hub, and folders in a form that `datasets` knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig
from harness.data import records
from harness.data.sources import SPLITS, Document, Source
from harness.system import files
from harness.system.files import find_files


def _load_hub(cfg: DataConfig) -> Any:
    """The data set of a hub id, or of a folder in a form that `datasets` knows, by split."""
    import datasets

    from harness.system import network

    if Path(str(cfg.id)).is_dir():  # `datasets` takes what is broken for something else
        records.check_folder(Path(str(cfg.id)))
    try:
        if files.saved(Path(str(cfg.id))):
            loaded = datasets.load_from_disk(str(cfg.id))
            loaded = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        else:
            loaded = datasets.load_dataset(
                cfg.id, cfg.config_name, revision=cfg.revision, streaming=cfg.streaming
            )
        return {name: _first(rows, cfg.max_rows) for name, rows in loaded.items()}
    except (OSError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        cached = ", ".join(network.cached("datasets")) or "none"
        raise ConfigError(
            f"data.id={cfg.id}: could not be loaded ({reason}). In the local hub cache: {cached}. "
            "Without a network use data=kjv, or data=text_files data.path=… for a local copy"
        ) from error


def _first(rows: Any, limit: int | None) -> Any:
    """The first `limit` rows of a data set; a streamed one has no length."""
    if limit is None:
        return rows
    return (
        rows.select(range(min(limit, len(rows)))) if hasattr(rows, "__len__") else rows.take(limit)
    )


def _columns(rows: Any) -> list[str]:
    """The columns of a data set; a streamed one may say them with its first row only."""
    return list(rows.column_names or next(iter(rows), {}))


def hub_splits(cfg: DataConfig) -> dict[str, tuple[str, Any]]:
    """Split -> (its name on the hub, its data set); validation and test only where they are."""
    loaded = _load_hub(cfg)
    splits = {}
    for name in SPLITS:
        source = cfg.split_names.get(name, name)
        if source in loaded:
            splits[name] = (source, loaded[source])
        elif name in cfg.split_names or name == "train":
            raise ConfigError(
                f"data.split_names.{name}={source}: {cfg.id} has no such split; "
                f"{nearest(source, loaded.keys())}"
            )
    return splits


def hub(cfg: DataConfig) -> Source:
    """Any text data set of `datasets`, by id and config; a missing split is cut from train."""
    parts: dict[str, Callable[[], Iterator[Document]]] = {}
    blank: dict[str, int] = {}
    for name, (source, rows) in hub_splits(cfg).items():
        if cfg.text_field not in (names := _columns(rows)):
            raise ConfigError(f"data.text_field={cfg.text_field}: {nearest(cfg.text_field, names)}")
        parts[name] = partial(_rows, cfg, source, rows, name, blank)
    return Source(parts, "row", blank)


def _rows(
    cfg: DataConfig, source: str, rows: Any, name: str, blank: dict[str, int]
) -> Iterator[Document]:
    """The rows that have text; how many have none is in `blank` by `name` when all were read."""
    count = 0
    for i, text in enumerate(_column(cfg, source, rows)):
        if text.strip():
            yield f"{source}/{i}", text
        else:
            count += 1
    blank[name] = count


def _column(cfg: DataConfig, split: str, rows: Any) -> Iterator[str]:
    """The texts of the rows, "" where it holds null; of a folder's files with their ends unified.

    A data set of the hub is what it says it is: published figures are of its text as it is.
    """
    own = Path(str(cfg.id)).is_dir()
    for number, row in enumerate(fetched(cfg, split, rows.select_columns([cfg.text_field])), 1):
        value = row[cfg.text_field]
        if value is None:
            yield ""
            continue
        text = records.checked(value, f"{cfg.id}, {split} record {number}", str(cfg.text_field))
        yield text if own else value


def fetched(cfg: DataConfig, split: str, rows: Any) -> Iterator[dict[str, Any]]:
    """The rows as they come; raises ConfigError where a streamed one cannot be fetched or read."""
    import datasets

    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except (OSError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        if not cfg.streaming:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"data.id={cfg.id}: row {count + 1} of {split} could not be read ({reason}); the same "
            "command again starts over, and without data.streaming all of it is fetched first"
        ) from error


def raw_rows(cfg: DataConfig, split: str) -> list[str]:
    """The rows of a split as `datasets` gives WikiText: lines with their ends, or "" where blank.

    Of a hub data set, of a folder of .txt files by split (data=hub data.id=FOLDER), or of the one
    .txt file of data=text_files, which is then the split.

    Raises:
        ConfigError: no such split.
    """
    if cfg.source == "text_files":
        file = find_files(cfg.path, encoding=cfg.encoding)[0]
        lines = records.text(file, cfg.encoding).split("\n")
        rows = [f"{line}\n" for line in lines[:-1]] + [lines[-1]]
        return [row if row.strip() else "" for row in rows if row]
    source = cfg.split_names.get(split, split)
    loaded = _load_hub(cfg)
    if source not in loaded:
        raise ConfigError(
            f"data={cfg.name}: {cfg.id} has no split {source}; {nearest(source, loaded.keys())}"
        )
    names = _columns(loaded[source])
    if cfg.text_field not in names:
        raise ConfigError(f"data.text_field={cfg.text_field}: {nearest(cfg.text_field, names)}")
    rows = list(_column(cfg, source, loaded[source]))
    if Path(str(cfg.id)).is_dir():  # lines of text files come without their ends
        rows = [f"{row.removesuffix(chr(10))}\n" if row.strip() else "" for row in rows]
    return rows
