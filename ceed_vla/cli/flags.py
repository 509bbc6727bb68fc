"""Read the flags of a command into its configuration dataclass, with draccus as in LeRobot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import takewhile
from typing import Any

from ceed_vla.cli.help import default_of, flags_of
from ceed_vla.cli.help import format_help as format_help
from ceed_vla.cli.names import Names
from ceed_vla.cli.values import (
    UsageError,
    check_moved,
    is_nested,
    read_config,
    read_yaml,
    shaped,
    unknown,
)
from ceed_vla.devices import check_device
from ceed_vla.discovery import FLAG as DISCOVER
from ceed_vla.errors import CeedVLAError
from ceed_vla.fields import type_hints
from ceed_vla.folders import unambiguous

_TEXTS = ("STR", "PATH", "FILE")  # kinds of flags that are not read as YAML


def parse_flags[T](
    config_class: type[T], flags: Sequence[str], positional: str = "", renamed: str = ""
) -> T:
    """Build a configuration from flags.

    Flags are `--key value`, `--key=value` and `--config_path FILE` (YAML or JSON). Nested
    dataclasses have flags such as `--policy.path`; setting one of them leaves the others at the
    defaults of the outer class. A switch without a value is true. A group with a path takes it as
    its value (`--trajectories FOLDER` is `--trajectories.path FOLDER`). If the name of a flag is
    reserved in Python, its field ends in an underscore. One word without ``--`` is the value of the
    flag `positional`; if that is a list, all words before the first flag are. `renamed` is that of
    `Names.of`.

    Raises:
        UsageError: A flag is unknown, missing or repeated, or a value has another type.
        CeedVLAError: The configuration refuses its values.
    """
    import draccus
    from draccus.utils import DraccusException

    names = Names.of(config_class, renamed)
    kinds = {name: kind for name, kind, *_ in flags_of(config_class, names)} | {
        "config_path": "FILE"
    }
    from_words = _read_words(config_class, flags, positional, names, kinds)
    file = from_words.pop("config_path", None)

    def by_field(values: dict[str, Any]) -> dict[str, Any]:
        found = names.by_field(values, kinds)
        for field, flag in names.flag_of.items():
            if kinds.get(flag) == "PATH" and isinstance(found.get(field), str):
                found[field] = unambiguous(found[field])
        return found

    from_file = read_config(config_class, file, by_field)
    defaults = _over(_nested_defaults(config_class), from_file)
    merged = _over(defaults, shaped(from_words, config_class))
    policy = merged.get("policy")
    if isinstance(policy, dict) and policy.get("device") is not None:
        check_device(policy["device"])  # LeRobot's configurations replace a missing device silently
    try:
        return draccus.decode(config_class, merged)
    except DraccusException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, CeedVLAError):
                raise cause from None
            cause = cause.__cause__
        raise UsageError(_explain(error, names)) from error


def take_packages(flags: Sequence[str]) -> tuple[str, list[str]]:
    """Split off LeRobot's flag `--discover_packages_path`.

    Returns:
        Its value (empty without the flag), and the other words.
    """
    names = []
    others = []
    words = iter(flags)
    for word in words:
        flag, equals, text = word.partition("=")
        if flag != f"--{DISCOVER}":
            others.append(word)
            continue
        names.append(text if equals else next(words, ""))
        if not names[-1].strip() or names[-1].startswith("--"):
            raise UsageError(f"--{DISCOVER} needs a value")
    return ",".join(names), others


def _read_words(
    config_class: type[Any],
    flags: Sequence[str],
    positional: str,
    names: Names,
    kinds: Mapping[str, str],
) -> dict[str, Any]:
    """Read the words of a command line into nested mappings by the names of the fields.

    Lists and mappings are read as YAML, as draccus does. `kinds` has the type of each flag.
    """
    values: dict[str, Any] = {}
    words = list(flags)
    seen: set[str] = set()
    if positional and kinds[positional].startswith("LIST") and words and words[0][:2] != "--":
        listed = list(takewhile(lambda word: not word.startswith("--"), words))
        words = words[len(listed) :]
        values[names.field(positional)] = listed
        seen.add(positional)
    while words:
        word = words.pop(0)
        if positional and not word.startswith("--") and positional not in seen:
            word = f"--{positional}={word}"
        name = _flag_name(word, config_class, names, kinds)
        if name in seen:
            raise UsageError(f"--{name} is set twice")
        seen.add(name)
        text = _text_of(name, word, words, kinds[name])
        if kinds[name] == "PATH" and name in names.flag_of.values():
            text = unambiguous(text)
        *outer, last = names.field(name).split(".")
        place = values
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = text
        if kinds[name] not in _TEXTS and not _is_list_of_texts(kinds[name], text):
            place[last] = read_yaml(text, f"--{name}", spelled=True)
    return values


def _is_list_of_texts(kind: str, text: str) -> bool:
    """Whether `text` is a list A,B of texts, which stay as they are; [A, B] is YAML."""
    return kind.startswith("LIST[STR]") and text.strip() != "null" and text.lstrip()[0] != "["


def _flag_name(word: str, config_class: type[Any], names: Names, kinds: Mapping[str, str]) -> str:
    """The flag that a word of the command line names, by its present name."""
    name = names.current(word.removeprefix("--").partition("=")[0], kinds)
    if name not in kinds and f"{name}.path" in kinds:
        name = f"{name}.path"  # --policy FOLDER
    if not word.startswith("--") or name not in kinds:
        check_moved(name, config_class)
        raise unknown(name, kinds, word)
    return name


def _text_of(name: str, word: str, words: list[str], kind: str) -> str:
    """The value of the flag `name`, after the "=" of its `word` or in the next one.

    A value in the next word is removed from `words`, which follow `word`.
    """
    _, equals, text = word.partition("=")
    if not equals and words and not words[0].startswith("--"):
        text = words.pop(0)
        equals = "="
    elif not equals and kind == "BOOL":
        text = "true"
    if not text.strip() and not (kind in _TEXTS and equals):
        raise UsageError(f"--{name} needs a value")
    return text


def _nested_defaults(config_class: type[Any]) -> dict[str, Any]:
    """Values of the nested dataclasses that a configuration has by default.

    Without them, `--policy.width=96` would build a new policy configuration without the outer
    class's choices.
    """
    import draccus

    hints = type_hints(config_class)
    defaults = {
        item.name: default_of(item)
        for item in fields(config_class)
        if is_nested(hints.get(item.name))
    }
    return {
        name: draccus.encode(value, hints[name])
        for name, value in defaults.items()
        if value is not MISSING
    }


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge `top` into `base`, nested mappings included; another `type` discards `base`."""
    if "type" in base and top.get("type", base["type"]) != base["type"]:
        return top
    merged = {**base, **top}
    for name in base.keys() & top.keys():
        if isinstance(base[name], dict) and isinstance(top[name], dict):
            merged[name] = _over(base[name], top[name])
    return merged


def _explain(error: Exception, names: Names) -> str:
    """One line about values that draccus refused."""
    text = str(error)
    if missing := re.match(r".*Missing required field\(s\) (.+) for", text):
        return "missing " + ", ".join(
            f"--{names.flag(name)}" for name in re.findall(r"`(\w+)`", missing[1])
        )
    cause = error.__cause__
    return f"{text} ({cause})" if cause is not None and str(cause) not in text else text
