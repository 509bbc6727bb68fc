"""`--help`: render the flags of a command, from its configuration dataclass or a stored page.

Importing a command's configuration imports torch and LeRobot, which takes seconds. Therefore the
package contains the page of each command in ``help_pages/``, from which `--help` is rendered.
`ceed_vla.cli.stored_help` writes the pages from docstrings and types.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ceed_vla.choices import Choice
from ceed_vla.cli.names import Names
from ceed_vla.cli.values import is_choice
from ceed_vla.discovery import FLAG as DISCOVER
from ceed_vla.discovery import named_by_user
from ceed_vla.fields import allowed_of, allowed_text, type_hints

_OURS = ("ceed_vla", "lerobot")
Flag = tuple[str, str, str, str]  # name, type, meaning and default
PAGES = Path(__file__).parent / "help_pages"
_COLUMN = 34  # where a flag's description starts
COMMON = (
    ("config_path", "FILE", "Read flags from a YAML or JSON file; the command line wins.", ""),
    (
        DISCOVER,
        "STR",
        "Comma-separated packages of yours to import at the start, which register their classes.",
        "",
    ),
)


@dataclass(frozen=True)
class Page:
    """Content of a command's `--help`; line breaks depend on the terminal."""

    introduction: str
    flags: tuple[Flag, ...]

    @classmethod
    def of(cls, config_class: type[Any], renamed: str = "") -> Page:
        """The page of a configuration; `renamed` is that of `Names.of`."""
        flags = flags_of(config_class, Names.of(config_class, renamed), foreign=False)
        return cls(_split_docstring(config_class)[0], tuple(flags))

    @classmethod
    def stored(cls, command: str) -> Page | None:
        """The page in the package; None if a command has none."""
        file = PAGES / f"{command}.json"
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return cls(found["introduction"], tuple((name, *rest) for name, *rest in found["flags"]))

    def text(self) -> str:
        """The content of its file: one line for each flag."""
        lines = (json.dumps(flag, ensure_ascii=False) for flag in self.flags)
        introduction = json.dumps(self.introduction, ensure_ascii=False)
        return f'{{\n"introduction": {introduction},\n"flags": [\n' + ",\n".join(lines) + "\n]\n}\n"


def flags_of(config_class: type[Any], names: Names, *, foreign: bool = True) -> Iterator[Flag]:
    """Every flag of a configuration, as spelled in `names`; `foreign` is that of `_describe`."""
    for name, kind, meaning, default in _describe(config_class, foreign=foreign):
        yield names.flag(name), kind, meaning, default


def format_help(
    program: str,
    page: Page | type[Any],
    positional: str = "",
    must: Sequence[str] = (),
    may: Sequence[str] = (),
    *,
    everything: bool = False,
) -> str:
    """Text of `--help`: the purpose of the command, then its flags in groups.

    Each flag has type, meaning, range and default.

    Args:
        program: The words that start the command.
        page: Its page, or its configuration dataclass.
        positional: The flag that a word without ``--`` sets, see `Command`.
        must: Flags that are explained first.
        may: Flags that are explained next.
        everything: Explain the other flags, too, instead of only naming them.
    """
    page = page if isinstance(page, Page) else Page.of(page)
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
    flags = {flag[0]: flag for flag in page.flags}
    first = list(
        dict.fromkeys([*must, *(name for name, flag in flags.items() if flag[3] == "(required)")])
    )
    second = (
        list(may)
        if must or may
        else [name for name in flags if flags[name][2] and name not in first]
    )
    rest = [name for name in flags if name not in (*first, *second)]
    several = " ..." if positional and flags[positional][1].startswith("LIST") else ""
    word = f"{positional.upper()}{several} " if positional else ""
    usage = f"usage: {program} {word}[--flag value | --flag=value ...] [--config_path FILE]"
    parts = [usage, "", page.introduction]

    def explain(title: str, group: Iterable[Flag]) -> None:
        parts.extend(["", title, *(line for flag in group for line in _explained(*flag, width))])

    if first:
        explain("you must set:", (flags[name] for name in first))
    explain("you may want:", [*(flags[name] for name in second), *COMMON])
    if rest and everything:
        explain("the rest:", (flags[name] for name in rest))
    elif rest:
        parts += ["", "the rest (--help=all explains them):", *_named(rest, width)]
    return "\n".join(parts)


def _explained(name: str, kind: str, meaning: str, default: str, width: int) -> list[str]:
    head = f"  --{name} {kind}"
    wrapped = textwrap.wrap(f"{meaning} {default}", width - _COLUMN, break_on_hyphens=False)
    first = f"{head:<{_COLUMN}}{wrapped.pop(0)}" if wrapped and len(head) + 2 <= _COLUMN else head
    return [first] + [" " * _COLUMN + line for line in wrapped]


def _named(names: Iterable[str], width: int) -> list[str]:
    """Lines that name flags; those of a group share its prefix."""
    groups: dict[str, list[str]] = {}
    for name in names:
        outer, dot, last = name.rpartition(".")
        groups.setdefault(f"--{outer}{dot}" if dot else "", []).append(last if dot else f"--{name}")
    wrapper = textwrap.TextWrapper(width, "  ", "      ", break_on_hyphens=False)
    texts = (
        f"{outer}{{{', '.join(inner)}}}" if outer else ", ".join(inner)
        for outer, inner in groups.items()
    )
    return [line for text in texts for line in wrapper.wrap(text)]


def _describe(
    config_class: type[Any], prefix: str = "", defaults: Any = None, *, foreign: bool = True
) -> Iterator[Flag]:
    """(name, type, meaning, default) of every flag, nested ones as `outer.inner`.

    If `foreign`, flags that belong only to other kinds of LeRobot's families are included.
    """
    _, meanings = _split_docstring(config_class)
    for item in (item for item in fields(config_class) if item.init):
        value = getattr(defaults, item.name, MISSING) if defaults is not None else default_of(item)
        kind = type_hints(config_class).get(item.name, item.type)
        meaning = meanings.get(item.name, "")
        allowed = allowed_of(item)
        if is_choice(kind):
            yield from _describe_choice(kind, prefix + item.name, meaning, value, foreign)
            continue
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _describe(
                kind, f"{prefix}{item.name}.", None if value is MISSING else value, foreign=foreign
            )
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        text = f"[{textwrap.shorten(text, 60, placeholder=' ...')}]"
        shown = "(required)" if value is MISSING else "" if value in (None, "") else text
        if meaning and allowed is not None:
            meaning = f"{meaning.rstrip('.')}; {allowed_text(allowed)}."
        named = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
        short_kind = re.sub(r"\b\w+\.(?=\w)", "", named.replace(" | None", "")).upper()
        yield prefix + item.name.removesuffix("_"), short_kind, meaning, shown


def _describe_choice(
    kind: type[Any], name: str, meaning: str, value: Any, foreign: bool
) -> Iterator[Flag]:
    """`name.type`, then the flags of the default kind, then those of other kinds."""
    usual = (
        kind.get_choice_class(kind.default_choice_name()) if value is MISSING else value.__class__
    )
    known = kind.get_known_choices()
    others = [
        choice
        for choice in known.values()
        if choice is not usual and (foreign or issubclass(kind, Choice))
    ]
    listed = [choice for choice, owner in known.items() if foreign or _is_listed(owner)]
    yield f"{name}.type", "|".join(listed), meaning, f"[{kind.get_choice_name(usual)}]"
    found: dict[str, Flag] = {}
    meanings: dict[str, list[str]] = {}
    for choice in (usual, *others):
        of = "" if choice is usual else f"{kind.get_choice_name(choice)}: "
        defaults = value if choice is usual and value is not MISSING else None
        for flag, flag_kind, text, shown in _describe(choice, f"{name}.", defaults):
            first = flag not in found
            if first:
                found[flag], meanings[flag] = (flag, flag_kind, text and of + text, shown), [text]
            elif text and text not in meanings[flag]:  # it has another meaning there
                _, flag_kind, before, shown = found[flag]
                found[flag] = (flag, flag_kind, f"{before} {of}{text}".strip(), shown)
                meanings[flag].append(text)
    yield from found.values()


def _is_listed(kind: type[Any]) -> bool:
    """Whether help lists a kind: one of this project, of LeRobot, or of a package the user named.

    Kinds of other installed packages are not listed, so that pages are the same everywhere.
    """
    return kind.__module__.partition(".")[0] in _OURS or named_by_user(kind.__module__)


def installed_environments() -> list[str]:
    """Installed packages that register environments when a command runs; they are not imported."""
    return sorted(
        module.name for module in iter_modules() if module.name.startswith("lerobot_env_")
    )


def default_of(item: Field[Any]) -> Any:
    """The default of a dataclass's field; MISSING if it has none."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _split_docstring(config_class: type[Any]) -> tuple[str, dict[str, str]]:
    """Split a Google docstring: its introduction, and the descriptions under "Attributes:".

    Descriptions of base classes are included.
    """
    meanings: dict[str, str] = {}
    introduction = ""
    for owner in reversed(config_class.__mro__):
        text = inspect.cleandoc(owner.__dict__.get("__doc__") or "")
        introduction, _, attributes = text.partition("Attributes:\n")
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(attributes)):
            name, colon, meaning = entry.partition(":")
            if colon and name.strip().isidentifier():
                meanings[name.strip()] = " ".join(meaning.split())
    return introduction.strip(), meanings
