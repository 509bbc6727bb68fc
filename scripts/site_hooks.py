"""Hooks of mkdocs: pages of the repository outside ``docs``, their links, navigation, and the API.

Links of all pages are written for the repository. A link to a file that the site has becomes a link
within the site; the site has all Markdown pages, pictures, examples and recipes.
"""

from __future__ import annotations

import ast
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")
FOLDERS = ("recipes", "weights", "examples")  # outside docs, with pages or files that pages name
SUFFIXES = (".md", ".py", ".sh", ".yaml")
API = "reference/api.md"
# kinds of pages, in the order of the tabs
KINDS = {
    "Tutorials": "tutorials",
    "How-to": "how-to",
    "Explanation": "explanation",
    "Reference": "reference",
    "Reports": "reports",
}
LINK = re.compile(r"(?<!\\)(\]\()([^)\s]+)(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files outside ``docs``, and the page of the API."""
    for path in outside():
        files.append(
            File.generated(config, place(path), content=(ROOT / path).read_text(encoding="utf-8"))
        )
    files.append(File.generated(config, API, content=api_page()))
    return files


def outside() -> list[str]:
    """Files of the repository outside ``docs`` that the site has."""
    found = [HOME, *PROJECT, "LICENSE"]
    for folder in FOLDERS:
        found += [
            path.relative_to(ROOT).as_posix()
            for path in sorted((ROOT / folder).rglob("*"))
            if path.suffix in SUFFIXES
        ]
    return found


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path == HOME:
        return "index.md"
    if path == "LICENSE":
        return "LICENSE.txt"
    return path.removeprefix("docs/")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page from the repository's files to the site's."""
    here = next((path for path in outside() if place(path) == page.file.src_uri), None)
    folder = posixpath.dirname(here if here is not None else f"docs/{page.file.src_uri}")
    known = {file.src_uri for file in files}
    start = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        target, hash_, anchor = link.partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if (ROOT / path).is_dir():
            readme = f"{path}/README.md"
            path = readme if place(readme) in known else _first_page(path, known)
        return f"{before}{posixpath.relpath(place(path), start or '.')}{hash_}{anchor}{after}"

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in parts)


def _first_page(folder: str, known: set[str]) -> str:
    """A page of a folder, for links to folders."""
    inside = sorted(name for name in known if name.startswith(f"{place(folder + '/')}"))
    return next((name for name in inside if name.endswith(".md")), folder)


def on_config(config: Any) -> Any:
    """Make the navigation from the folders."""
    nav: list[Any] = [{"Home": "index.md"}]
    for title, folder in KINDS.items():
        pages = sorted((ROOT / "docs" / folder).glob("*.md"), key=_title)
        entries: list[Any] = [{_title(page): f"{folder}/{page.name}"} for page in pages]
        if folder == "reference":
            entries.insert(0, {"Python API": API})
        nav.append({title: entries})
    project = [*PROJECT, "recipes/README.md", "recipes/MODEL_CARD.md", "recipes/metaworld_mt10.md"]
    project += sorted(f"weights/{page.parent.name}/README.md" for page in _cards())
    nav.append({"Project": [{_title(ROOT / path): path} for path in project]})
    config.nav = nav
    return config


def _cards() -> list[Path]:
    return list((ROOT / "weights").glob("*/README.md"))


def _title(page: Path) -> str:
    """The first heading of a page."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ").strip()
    raise ValueError(f"{page} has no heading")


# ---- the Python API ------------------------------------------------------------------------------


def public_names() -> dict[str, set[str]]:
    """Module -> public names, of tests/test_public_names.py."""
    tree = ast.parse((ROOT / "tests" / "test_public_names.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PUBLIC":
            assert node.value is not None
            found: dict[str, set[str]] = ast.literal_eval(node.value)
            return found
    raise ValueError("tests/test_public_names.py has no PUBLIC")


def api_page() -> str:
    """The page of all public classes and functions, each where it is defined."""
    lines = [
        "# Python API",
        "",
        "For developers. This page lists the public classes and functions with the module to "
        "import them from; [Contributing](../CONTRIBUTING.md#names-and-versions) says how long "
        "they keep their names. Constants are not shown.",
        "",
    ]
    shown: set[str] = set()
    for module, names in public_names().items():
        defined = {name: _definition(module, name) for name in sorted(names)}
        found = {name: where for name, where in defined.items() if where and where not in shown}
        if not found:
            continue
        lines += [f"## `{module}`", ""]
        for where in found.values():
            shown.add(where)
            lines += [f"::: {where}", ""]
    return "\n".join(lines)


def _definition(module: str, name: str) -> str:
    """Module and name of a class or a function where it is defined; "" for other values."""
    value = getattr(importlib.import_module(module), name)
    if not callable(value) or not hasattr(value, "__qualname__"):
        return ""
    return f"{value.__module__}.{value.__qualname__}"
