"""Write the generated pages of docs/reference: `python scripts/reference_pages.py`.

`commands.md` is made of the command table and the stored help pages. `decoder-names.md` is written
by hand except for its tables, which are made of the registries. `--check` only compares, as a test
does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import mdformat

import ceed_vla.axes as axes  # registers their decoders
from ceed_vla.cli.commands import COMMANDS
from ceed_vla.cli.help import COMMON, Page
from ceed_vla.decoding.registry import DECODERS, EXITS, Decoder, ExitKind

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
COMMANDS_PAGE = FOLDER / "commands.md"
NAMES_PAGE = FOLDER / "decoder-names.md"
_FORMAT = {"wrap": 100, "compact_tables": True}  # as .mdformat.toml
_INTRODUCTION = """\
# Commands and flags

For everybody who runs `ceed-vla`: every command with all its flags, generated from the code by
`python scripts/reference_pages.py`. `ceed-vla COMMAND --help` prints the flags that matter most,
`--help=all` every flag. Flags in **bold** are required or usually set. Every command also takes
these flags:
"""


def commands_page() -> str:
    """The page of all commands."""
    parts = [_INTRODUCTION, table(("flag", "type", "meaning", "default"), flag_rows(COMMON))]
    parts.append(
        table(
            ("command", "purpose"),
            ((f"[`{name}`](#{name})", row.summary) for name, row in COMMANDS.items()),
        )
    )
    for name, row in COMMANDS.items():
        page = Page.stored(name)
        assert page is not None, name
        usual = {*row.must.split(), *row.may.split()}
        parts.append(f"## {name}\n\n{row.summary[:1].upper()}{row.summary[1:]}.\n")
        if row.positional:
            parts.append(f"`ceed-vla {name} X` is short for `--{row.positional} X`.\n")
        parts.append(
            table(("flag", "type", "meaning", "default"), flag_rows(page.flags, usual))
            if page.flags
            else "It has no flags of its own.\n"
        )
    return "\n".join(parts)


def flag_rows(flags: Iterable[Sequence[str]], usual: Iterable[str] = ()) -> list[tuple[str, ...]]:
    """Rows of a table of flags; `usual` ones are in bold."""
    rows = []
    for name, kind, meaning, default in flags:
        flag = f"`--{name}`"
        if name in usual or default == "(required)":
            flag = f"**{flag}**"
        shown = default.removeprefix("[").removesuffix("]")
        rows.append((flag, kind, meaning, f"`{shown}`" if shown != default else default))
    return rows


def names_tables() -> dict[str, str]:
    """Marker in the page of decoder names -> table."""
    assert axes.AXES
    return {
        "decoders": table(
            (
                "name",
                "meaning",
                "needs of the backbone",
                "compiled",
                "names that calibration tries",
            ),
            map(decoder_row, DECODERS.values()),
        ),
        "exit rules": table(
            ("name", "meaning", "reason in results", "tried by calibration"),
            (exit_row(kind) for kind in EXITS.values() if kind.meaning),
        ),
    }


def decoder_row(decoder: Decoder) -> tuple[str, ...]:
    """A row of the table of decoders."""
    needs = ", ".join(f"`{need.__name__}`" for need in decoder.needs)
    compiled = "yes" if decoder.compiles else "no"
    return f"`{decoder.shown}`", decoder.meaning, needs, compiled, ladder(decoder)


def exit_row(kind: ExitKind) -> tuple[str, ...]:
    """A row of the table of exit rules."""
    return f"`{kind.shown}`", kind.meaning, f"`{kind.rule.reason}`", ladder(kind)


def ladder(entry: Decoder | ExitKind) -> str:
    """The names that calibration and search try, of an exit behind K layers where it needs one."""
    return ", ".join(f"`{name.format(exit='K')}`" for name in entry.ladder)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, as mdformat leaves it."""
    escaped = [tuple(escape(cell) for cell in row) for row in rows]
    lines = [head, ["--"] * len(head), *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape(cell: str) -> str:
    """A cell in which no character ends it or begins a tag."""
    return re.sub(r"<(?=[A-Za-z/])(?![^`]*`)", r"\\<", cell.replace("|", "\\|"))


def filled(page: str) -> str:
    """The page of decoder names with the tables between its markers."""
    for name, found in names_tables().items():
        start = f"<!-- {name} -->\n"
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{found}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def formatted(text: str) -> str:
    """`text` as mdformat writes it."""
    return mdformat.text(text, options=_FORMAT, extensions={"gfm"})


def pages() -> dict[Path, str]:
    """Every generated page and its content."""
    names = NAMES_PAGE.read_text(encoding="utf-8")
    return {COMMANDS_PAGE: formatted(commands_page()), NAMES_PAGE: formatted(filled(names))}


def main(words: Sequence[str]) -> int:
    """Write the pages, or with `--check` return 1 if one of them is out of date."""
    stale = [path for path, text in pages().items() if not _is(path, text)]
    if "--check" not in words:
        for path, text in pages().items():
            path.write_text(text, encoding="utf-8")
    print(f"reference pages out of date: {', '.join(path.name for path in stale) or 'none'}")
    return int(bool(stale) and "--check" in words)


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
