"""The pages: links, sizes, command lines, and that generated reference is that of the code."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pages import RUN
from script_modules import load_script

from ceed_vla.cli.commands import COMMANDS
from ceed_vla.cli.help import COMMON, Page

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {  # whole pages, or most of a page
    "docs/reference/commands.md",
    "docs/reference/policy-node.md",
    "docs/reference/sim-node.md",
}
NOT_RUN = re.compile(r"<!-- not run: .{8,} -->")
LONGEST = 300  # lines of a page
WIDEST = 7  # columns of a table


def all_pages() -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


PAGES = all_pages()
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
INSTRUCTIONS = [name for name in PAGES if name.startswith(("docs/tutorials/", "docs/how-to/"))]


@lru_cache
def tokens_of(name: str) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse((ROOT / name).read_text("utf-8"))


@lru_cache
def anchors_of(name: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    tokens = tokens_of(name)
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(part.content for part in inline.children or ())
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = sum(one == anchor or one.startswith(f"{anchor}-") for one in found)
            found.add(f"{anchor}-{count}" if anchor in found else anchor)
    return found


def links_of(name: str) -> list[str]:
    links = []
    for token in tokens_of(name):
        for part in token.children or ():
            target = part.attrs.get("href" if part.type == "link_open" else "src")
            if isinstance(target, str):
                links.append(target)
    return links


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_lead_somewhere(name: str) -> None:
    for link in links_of(name):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor and target.suffix == ".md":
            found = anchors_of(str(target.resolve().relative_to(ROOT)))
            assert anchor in found, f"{name} links to {link}; the page has {sorted(found)}"


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short_and_tables_narrow(name: str) -> None:
    if name not in GENERATED and name.startswith("docs/"):
        assert len((ROOT / name).read_text("utf-8").splitlines()) <= LONGEST
    if name == "README.md":
        assert len((ROOT / name).read_text("utf-8").splitlines()) <= 150
    columns = 0
    for token in tokens_of(name):
        columns = 0 if token.type == "tr_open" else columns + (token.type in ("th_open", "td_open"))
        assert columns <= WIDEST, f"{name}, line {(token.map or [0])[0]}"


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_command_is_run_or_says_why_not(name: str) -> None:
    tokens = tokens_of(name)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "fence" and token.info.strip() in ("bash", "sh", "console"):
            reason = before is not None and before.type == "html_block" and before.content
            known = name.removeprefix("docs/") in RUN or (reason and NOT_RUN.search(reason))
            assert known, f"{name}, line {(token.map or [0])[0] + 1}: {token.content[:80]}"


def commands_in(text: str) -> list[list[str]]:
    """Words of every `ceed-vla` call in a block of shell code."""
    calls = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for part in re.split(r"\s(?:&&|\|\||;|\|)\s", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            if "ceed-vla" in words[:4]:
                calls.append(words[words.index("ceed-vla") + 1 :])
    return calls


def check_flags(text: str, name: str) -> int:
    """Check that all flags in a block of shell code exist; return the number of its calls."""
    calls = [w for w in commands_in(text) if w and not w[0].startswith(("-", "$", "COMMAND"))]
    for words in calls:
        if len(words) > 1 and f"{words[0]}-{words[1]}" in COMMANDS:
            words = [f"{words[0]}-{words[1]}", *words[2:]]
        assert words[0] in COMMANDS, f"{name}: ceed-vla {words[0]}"
        page = Page.stored(words[0])
        assert page is not None
        known = {flag[0] for flag in (*page.flags, *COMMON)} | {"help"}
        for flag in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
            free = flag.startswith(("env.", "policy.backbone.", "policy.action_tokens."))
            assert free or flag.replace("-", "_") in known, f"{name}: {words[0]} --{flag}"
    return len(calls)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_in_a_command_exists(name: str) -> None:
    for token in tokens_of(name):
        if token.type == "fence" and name != "CHANGELOG.md":
            check_flags(token.content, name)


def test_every_flag_in_a_recipe_exists() -> None:
    calls = {}
    for file in RECIPES:
        text = re.sub(r'"\$\(\[ .*? echo false\)"', "true", file.read_text())
        calls[file.name] = check_flags(text, file.name)
    assert calls["smollm2.sh"] == 8
    assert sum(calls.values()) >= 40


def test_generated_reference_is_that_of_the_code() -> None:
    for path, text in load_script("reference_pages").pages().items():
        written = path.read_text("utf-8")
        assert written == text, f"run python scripts/reference_pages.py: {path.name}"
