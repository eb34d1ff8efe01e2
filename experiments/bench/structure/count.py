"""Figures of the code's structure: where a reader has to look, and what the names and types say.

    python experiments/bench/structure/count.py [FOLDER]     a checkout; this one by default

Counted from the sources alone. An arrow is an import of one module by another, wherever it stands,
except for type checking. A circle is a set of modules that reach one another. The level of a module
is the longest chain of imports below it, circles taken as one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("harness", "hydra_plugins")
SHORT = 60  # letters of a docstring that says too little


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for root in ROOTS:
        for path in sorted((folder / root).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports."""
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found & known.keys()


def components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components, those below first (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            found.append(stack[at:])
            del stack[at:]

    for name in graph:
        if name not in order:
            visit(name)
    return found


def levels(graph: dict[str, set[str]], parts: list[list[str]]) -> int:
    """The number of levels."""
    of: dict[str, int] = {}
    for part in parts:
        below = [of[other] for name in part for other in graph[name] if other not in part]
        for name in part:
            of[name] = max(below, default=-1) + 1
    return max(of.values()) + 1


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of what is public."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if text := ast.get_docstring(node):
            yield text


def count(folder: Path) -> dict[str, int]:
    """What is counted, by its name."""
    known = modules(folder)
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in known.items()}
    graph = {name: imports(tree, known) - {name} for name, tree in trees.items()}
    parts = components(graph)
    text = "\n".join(path.read_text("utf-8") for path in known.values())
    said = [text for tree in trees.values() for text in docstrings(tree)]
    top = list((folder / "harness").glob("*.py"))
    return {
        "modules": len(known),
        "lines": text.count("\n") + 1,
        "longest module, lines": max(len(p.read_text().splitlines()) for p in known.values()),
        "files at the top of harness/": len(top),
        "packages of harness/": len(list((folder / "harness").glob("*/__init__.py"))),
        "arrows": sum(map(len, graph.values())),
        "levels": levels(graph, parts),
        "circles": sum(len(part) > 1 for part in parts),
        "modules in circles": sum(len(part) for part in parts if len(part) > 1),
        "Any": len(re.findall(r"\bAny\b", text)),
        "public docstrings": len(said),
        f"of them under {SHORT} letters": sum(len(one) < SHORT for one in said),
        "local name `found`": len(re.findall(r"\bfound\b", text)),
        "blocks `if __name__ == '__main__'`": len(re.findall(r"^if __name__ ==", text, re.M)),
    }


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[3]
    for name, number in count(where).items():
        print(f"{name:36} {number:7,}")
