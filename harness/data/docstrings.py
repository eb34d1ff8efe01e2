"""The docstrings of installed packages, parsed out of their sources once."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data.sources import Document, Source


def docstrings(cfg: DataConfig) -> Source:
    """The docstrings of installed packages: a document is one file's, in the order of the source.

    A docstring that was seen before, in the order of `cfg.packages` and then of path, is left out.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    sources: list[tuple[str, str]] = []
    for package in cfg.packages:
        try:
            installed = distribution(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"data.packages: {package} is not installed; install what constraints.txt pins"
            ) from None
        names = sorted(str(f) for f in installed.files or () if str(f).endswith(".py"))
        sources += [(f"{package}/{name}", str(installed.locate_file(name))) for name in names]
    # Parsing 30 MB of docstrings out of their sources takes a minute: once per set of versions.
    versions = [f"{package} {distribution(package).version}" for package in cfg.packages]
    key = hashlib.sha256("\n".join([*versions, sys.version]).encode()).hexdigest()[:32]
    cached = Path(cfg.cache_dir) / "docstrings" / f"{key}.json"
    if cached.is_file():
        documents = [(name, text) for name, text in json.loads(cached.read_text("utf-8"))]
    else:
        documents = _parse(sources)
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(documents), "utf-8")
        scratch.replace(cached)
    return Source({"train": lambda: iter(documents)}, "source file's docstrings")


def _parse(sources: list[tuple[str, str]]) -> list[Document]:
    """(name, path) of source files -> a document each, of the docstrings not seen before."""
    seen: set[str] = set()
    documents = []
    with ProcessPoolExecutor() as pool:  # one process a core
        for (name, _), texts in zip(
            sources,
            pool.map(_docstrings_of, [path for _, path in sources], chunksize=64),
            strict=True,
        ):
            fresh = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(fresh)
            if fresh:
                documents.append((name, "\n\n".join(fresh)))
    return documents


def _docstrings_of(path: str) -> list[str]:
    """Docstrings of module, classes and functions of a source file, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(Path(path).read_text("utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= 20]
