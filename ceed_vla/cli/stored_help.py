"""Write the stored pages of `--help`, after a change of a configuration.

    python -m ceed_vla.cli.stored_help

With `--check`, the pages are only compared, as a test does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ceed_vla.cli import commands, help

REGENERATE = "python -m ceed_vla.cli.stored_help"


def main(words: Sequence[str]) -> int:
    """Write the pages of all commands; with `--check`, only return 1 if one is not up to date."""
    # Commands with a simulator's flags come last: their modules register an environment, which the
    # pages of other commands must not list.
    rows = sorted(commands.COMMANDS.items(), key=lambda item: bool(item[1].simulator))
    pages = {name: help.Page.of(commands.config_of(row), row.renamed).text() for name, row in rows}
    known = {file.stem: file.read_text(encoding="utf-8") for file in help.PAGES.glob("*.json")}
    stale = sorted(name for name in {*pages, *known} if pages.get(name) != known.get(name))
    if "--check" in words:
        found = ", ".join(stale) or "none"
        print(f"pages of --help that are not up to date: {found}; `{REGENERATE}` writes them")
        return int(bool(stale))
    help.PAGES.mkdir(exist_ok=True)
    for name in stale:
        file = help.PAGES / f"{name}.json"
        if name in pages:
            file.write_text(pages[name], encoding="utf-8")
        else:
            file.unlink()
    print(f"{len(pages)} pages of --help; changed: {', '.join(stale) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
