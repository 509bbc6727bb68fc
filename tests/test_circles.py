"""No file imports itself through others, lazy and type-only imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSIDE = ("training", "sim", "ros_nodes")  # install as ceed_vla.training, ...
FOLDERS = ("ceed_vla", *INSIDE, "benchmarks")


def imported(text: str, modules: set[str]) -> Iterator[str]:
    """Those of `modules` that a file imports anywhere.

    ``from a import b`` imports a.b if that is a module, else a.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ({name if name in modules else str(node.module) for name in names} & modules)


def circles(sources: dict[str, str]) -> list[tuple[str, ...]]:
    """Circles of modules (name -> text) that import each other."""
    reach = {name: set(imported(text, set(sources))) for name, text in sources.items()}
    for middle in reach:
        for found in reach.values():
            found |= reach[middle] if middle in found else set()
    return sorted(
        {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in reach if a in reach[a]}
    )


def module_of(path: Path) -> str:
    """The import name of a file in the repository."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"ceed_vla.{name}" if name.split(".")[0] in INSIDE else name


def test_no_file_is_in_a_circle() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found = circles({module_of(path): path.read_text() for path in paths})
    assert not found, "\n".join(" <-> ".join(circle) for circle in found)


def test_circles_are_found() -> None:
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.c import C"
    lazy = "def f():\n    from p import a"
    ring = {
        "p": "from p.a import A",
        "p.a": "import p.b",
        "p.b": typed,
        "p.c": lazy,
        "p.d": "from p import A",
    }
    assert circles(ring) == [("p.a", "p.b", "p.c")]
    assert circles({"p": "from p.a import A", "p.a": "from p import B"}) == [("p", "p.a")]
    assert circles({"p": "import p.a", "p.a": "import os", "q": "import p"}) == []
