"""Flags of a command from its configuration dataclass: parsed by draccus as in LeRobot, help from docstrings."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from ceed_vla.choices import Choice
from ceed_vla.cli_values import UsageError, check_moved, is_choice, is_nested, read_config, read_yaml, shaped, unknown
from ceed_vla.devices import check_device
from ceed_vla.discovery import FLAG as DISCOVER
from ceed_vla.errors import CeedVLAError
from ceed_vla.fields import allowed_of, allowed_text, type_hints

_Flag = tuple[str, str, str, str]  # name, type, meaning and default
_COLUMN = 34  # where a flag's description starts
_COMMON = (
    ("config_path", "FILE", "Read flags from a YAML or JSON file; those given here win.", ""),
    (DISCOVER, "STR", "Comma-separated packages of yours, imported first for what they register.", ""),
)


def parse_flags[T](config_class: type[T], flags: Sequence[str], positional: str = "") -> T:
    """Build a configuration from `--key value`, `--key=value` and `--config_path FILE` (YAML or JSON).

    Nested dataclasses give flags such as `--policy.path`; setting one of these leaves the others at the defaults that
    the outer class gives them. A switch without a value means true, and the path may be given to a group that has one
    (`--trajectories FOLDER` is `--trajectories.path FOLDER`). Where Python reserves a flag's name, the field has an
    underscore behind it. One word without ``--`` stands for the flag `positional`.

    `UsageError` for an unknown, missing or repeated flag, or a value of another type. The configuration raises its own.
    """
    import draccus
    from draccus.utils import DraccusException

    given = _read_words(config_class, flags, positional)
    file = given.pop("config_path", None)
    defaults = _over(_nested_defaults(config_class), read_config(config_class, file))
    merged = _over(defaults, shaped(given, config_class))
    policy = merged.get("policy")
    if isinstance(policy, dict) and policy.get("device") is not None:
        check_device(policy["device"])  # LeRobot's configurations take another one instead
    try:
        return draccus.decode(config_class, merged)
    except DraccusException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, CeedVLAError):
                raise cause from None
            cause = cause.__cause__
        raise UsageError(_explain(error)) from error


def take_packages(flags: Sequence[str]) -> tuple[str, list[str]]:
    """LeRobot's flag `--discover_packages_path`: its value (empty without it), and the other words."""
    names, others, words = [], [], iter(flags)
    for word in words:
        flag, equals, text = word.partition("=")
        if flag != f"--{DISCOVER}":
            others.append(word)
            continue
        names.append(text if equals else next(words, ""))
        if not names[-1].strip() or names[-1].startswith("--"):
            raise UsageError(f"--{DISCOVER} needs a value")
    return ",".join(names), others


def format_help(
    program: str,
    config_class: type[Any],
    positional: str = "",
    must: Sequence[str] = (),
    may: Sequence[str] = (),
    *,
    everything: bool = False,
) -> str:
    """Text of `--help`: what the command does, then its flags in groups, with type, meaning, range and default.

    `positional`, `must` and `may` are those of `Command`; `everything` explains the other flags, else only named.
    """
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
    flags = {flag[0]: flag for flag in _describe(config_class, foreign=False)}
    first = list(dict.fromkeys([*must, *(name for name, flag in flags.items() if flag[3] == "(required)")]))
    second = list(may) if must or may else [name for name in flags if flags[name][2] and name not in first]
    rest = [name for name in flags if name not in (*first, *second)]
    word = f"{positional.upper()} " if positional else ""
    usage = f"usage: {program} {word}[--flag value | --flag=value ...] [--config_path FILE]"
    parts = [usage, "", _split_docstring(config_class)[0]]

    def explain(title: str, group: Iterable[_Flag]) -> None:
        parts.extend(["", title, *(line for flag in group for line in _explained(*flag, width))])

    if first:
        explain("you must set:", (flags[name] for name in first))
    explain("you may want:", [*(flags[name] for name in second), *_COMMON])
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
    """Flags by name only; those of a group share its prefix."""
    groups: dict[str, list[str]] = {}
    for name in names:
        outer, dot, last = name.rpartition(".")
        groups.setdefault(f"--{outer}{dot}" if dot else "", []).append(last if dot else f"--{name}")
    wrapper = textwrap.TextWrapper(width, "  ", "      ", break_on_hyphens=False)
    texts = (f"{outer}{{{', '.join(inner)}}}" if outer else ", ".join(inner) for outer, inner in groups.items())
    return [line for text in texts for line in wrapper.wrap(text)]


def _describe(
    config_class: type[Any], prefix: str = "", defaults: Any = None, *, foreign: bool = True
) -> Iterator[_Flag]:
    """(name, type, meaning, default) of every flag, nested ones as `outer.inner`.

    Those that only other kinds of LeRobot's families have are `foreign`.
    """
    _, meanings = _split_docstring(config_class)
    for item in (item for item in fields(config_class) if item.init):
        value = getattr(defaults, item.name, MISSING) if defaults is not None else _default(item)
        kind = type_hints(config_class).get(item.name, item.type)
        meaning, allowed = meanings.get(item.name, ""), allowed_of(item)
        if is_choice(kind):
            yield from _describe_choice(kind, prefix + item.name, meaning, value, foreign)
            continue
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _describe(kind, f"{prefix}{item.name}.", None if value is MISSING else value, foreign=foreign)
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        text = f"[{textwrap.shorten(text, 60, placeholder=' ...')}]"
        shown = "(required)" if value is MISSING else "" if value in (None, "") else text
        if meaning and allowed is not None:
            meaning = f"{meaning.rstrip('.')}; {allowed_text(allowed)}."
        named = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
        short_kind = re.sub(r"\b\w+\.(?=\w)", "", named.replace(" | None", "")).upper()
        yield prefix + item.name.removesuffix("_"), short_kind, meaning, shown


def _describe_choice(kind: type[Any], name: str, meaning: str, value: Any, foreign: bool) -> Iterator[_Flag]:
    """`name.type`, then the flags of the usual kind, then those that only other kinds have."""
    usual = kind.get_choice_class(kind.default_choice_name()) if value is MISSING else value.__class__
    known = kind.get_known_choices()
    others = [choice for choice in known.values() if choice is not usual and (foreign or issubclass(kind, Choice))]
    yield f"{name}.type", "|".join(known), meaning, f"[{kind.get_choice_name(usual)}]"
    seen = set()
    for choice in (usual, *others):
        of = "" if choice is usual else f"{kind.get_choice_name(choice)}: "
        defaults = value if choice is usual and value is not MISSING else None
        for flag, flag_kind, text, shown in _describe(choice, f"{name}.", defaults):
            if flag not in seen:
                seen.add(flag)
                yield flag, flag_kind, text and of + text, shown


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _split_docstring(config_class: type[Any]) -> tuple[str, dict[str, str]]:
    """A Google docstring's introduction, and what it says of each name under "Attributes:" (bases included)."""
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


def _read_words(config_class: type[Any], flags: Sequence[str], positional: str) -> dict[str, Any]:
    """The given flags as nested mappings; lists and mappings are read as YAML, as draccus does."""
    kinds = {name: kind for name, kind, *_ in _describe(config_class)} | {"config_path": "FILE"}
    values: dict[str, Any] = {}
    words, seen = list(flags), set()
    while words:
        word = words.pop(0)
        if positional and not word.startswith("--") and positional not in values:
            word = f"--{positional}={word}"
        name, equals, text = word.removeprefix("--").partition("=")
        if name not in kinds and f"{name}.path" in kinds:
            name = f"{name}.path"  # --policy FOLDER
        if not word.startswith("--") or name not in kinds:
            check_moved(name, config_class)
            raise unknown(name, kinds, word)
        if name in seen:
            raise UsageError(f"--{name} is given twice")
        seen.add(name)
        if not equals and words and not words[0].startswith("--"):
            text, equals = words.pop(0), "="
        elif not equals and kinds[name] == "BOOL":
            text = "true"
        is_text = kinds[name] in ("STR", "PATH", "FILE")
        if not text.strip() and not (is_text and equals):
            raise UsageError(f"--{name} needs a value")
        *outer, last = name.split(".")
        place = values
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = text if is_text else read_yaml(text, f"--{name}")
    return values


def _nested_defaults(config_class: type[Any]) -> dict[str, Any]:
    """Values of the nested dataclasses that a configuration has by default.

    Without them, `--policy.width=96` would build a new policy configuration without the outer class's choices.
    """
    import draccus

    hints = type_hints(config_class)
    defaults = {item.name: _default(item) for item in fields(config_class) if is_nested(hints.get(item.name))}
    return {name: draccus.encode(value, hints[name]) for name, value in defaults.items() if value is not MISSING}


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top` in their place, mapping by mapping; another `type` starts from nothing."""
    if "type" in base and top.get("type", base["type"]) != base["type"]:
        return top
    merged = {**base, **top}
    for name in base.keys() & top.keys():
        if isinstance(base[name], dict) and isinstance(top[name], dict):
            merged[name] = _over(base[name], top[name])
    return merged


def _explain(error: Exception) -> str:
    """One line about values that draccus refused."""
    text = str(error)
    if missing := re.match(r".*Missing required field\(s\) (.+) for", text):
        return "missing " + ", ".join(f"--{name}" for name in re.findall(r"`(\w+)`", missing[1]))
    cause = error.__cause__
    return f"{text} ({cause})" if cause is not None and str(cause) not in text else text
