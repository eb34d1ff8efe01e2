"""The shape of the code in numbers: python experiments/structure.py [REVISION ...]

Counts the packages harness and hydra_plugins of the working tree, or of revisions of git. Imports
under TYPE_CHECKING do not count; an import inside a function does.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("harness", "hydra_plugins")


def measured(root: Path) -> dict[str, int]:
    """Return every figure of a checkout, by what it counts."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in files.items()}
    graph = {name: set(_imports(name, tree, set(files))) for name, tree in trees.items()}
    circles = _circles(graph)
    top = root / "harness"
    docstrings = [text for name, tree in trees.items() for text in _docstrings(tree)]
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in files.items()}
    return {
        "files at the top of harness/": len(list(top.glob("*.py"))),
        "packages at the top of harness/": len(list(top.glob("*/__init__.py"))),
        "modules": len(files),
        "lines": sum(lines.values()),
        "lines of the longest module": max(lines.values()),
        "imports of one module by another": sum(map(len, graph.values())),
        "circles of modules": len(circles),
        "modules in a circle": sum(map(len, circles)),
        "public docstrings": len(docstrings),
        "public docstrings under 60 letters": sum(len(text) < 60 for text in docstrings),
        "uses of a name `found`": sum(isinstance(n, ast.Name) and n.id == "found" for n in nodes),
        "uses of `Any`": sum(isinstance(n, ast.Name) and n.id == "Any" for n in nodes),
        "hand-written mains": sum(_is_main(n) for n in nodes),
    }


def _imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of ours that a module imports."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name in known - {name})
        if isinstance(node, ast.ImportFrom) and node.module:
            for one in node.names:
                inner = f"{node.module}.{one.name}"
                yield from {inner if inner in known else node.module} & (known - {name})


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules of which each reaches each other (Tarjan's components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(component) > 1:
                circles.append(component)

    for name in graph:
        if name not in index:
            visit(name)
    return circles


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """First paragraphs of the docstrings of public functions and classes; "" for none."""
    for node in ast.walk(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            yield (ast.get_docstring(node) or "").split("\n\n")[0]


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def of_revision(revision: str) -> dict[str, int]:
    """Return the figures of a revision of git."""
    command = ["git", "-C", str(REPOSITORY), "archive", revision, *PACKAGES]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=io.BytesIO(packed)) as archive,
    ):
        archive.extractall(folder, filter="data")
        return measured(Path(folder))


def main() -> int:
    """Print a column of figures for each revision, and for the working tree."""
    columns = {revision: of_revision(revision) for revision in sys.argv[1:]}
    columns["working tree"] = measured(REPOSITORY)
    table = Table("", *columns)
    for what in columns["working tree"]:
        table.add_row(what, *(f"{figures[what]:,}" for figures in columns.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
