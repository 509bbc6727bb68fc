"""Values of flags, from the command line or a file: read as YAML 1.2, checked against types."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Self

from ceed_vla.discovery import FLAG as DISCOVER
from ceed_vla.fields import describe, options_of, short, type_hints
from ceed_vla.files import whole

MOST_FLAGS = 2**20  # [bytes] of a file of flags
MOST_DEPTH = 50  # nesting levels
MOST_MARKS = 20_000  # separators in YAML; each value takes some 0.1 ms to read
_MARKS = (",", "[", "{", "\n", ":", "- ", "? ")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_LONGEST_NUMBER = 400  # [characters]
_MOVED = {
    "policy.decoding.executed_steps": "policy.decoding.watch=executed",
    "policy.decoding.tolerance_bins": (
        "policy.decoding.confidence, which ends sooner at the same success"
    ),
    "policy.decoding.stable_iterations": (
        "policy.decoding.confidence, which ends sooner at the same success"
    ),
    "policy.backbone.vocabulary_size": "policy.backbone.words",
    "policy.action_tokens.vocabulary_size": "policy.action_tokens.most_ids",
}


class UsageError(Exception):
    """The command line cannot be read."""


def unknown(name: str, known: Iterable[str], word: str = "") -> UsageError:
    """The error for the unknown flag `name` (typed as `word`), with the closest `known` one."""
    close = get_close_matches(name[:100], known, n=1)
    hint = f"; did you mean --{close[0]}?" if close else ""
    return UsageError(f"unknown flag {short(word or f'--{name}')}{hint}")


def check_moved(name: str, config_class: type[Any]) -> None:
    """Raise `UsageError` for a flag that was renamed (`moved` of the configuration)."""
    if new := {**_MOVED, **getattr(config_class, "moved", {})}.get(name):
        raise UsageError(f"--{name} is now --{new}")


class Spelled(str):
    """A number as it is written in a file, which is text where a flag takes text.

    Attributes:
        number: Its value.
    """

    number: int | float

    @classmethod
    def of(cls, text: str, read: Callable[[str], int | float]) -> Self:
        """The number in `text`, read by `read`."""
        spelled = cls(text)
        spelled.number = read(text)
        return spelled


def plain(value: Any) -> Any:
    """`value`, in which numbers are no longer `Spelled`."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.number if isinstance(value, Spelled) else value


def read_yaml(text: str, source: str, *, spelled: bool = False) -> Any:
    """Parse YAML by the rules of version 1.2, where 010 is ten and "no" is a string.

    Args:
        text: The YAML, without aliases and duplicate keys.
        source: Its origin, with which the message of an error begins.
        spelled: Return numbers as `Spelled`.

    Returns:
        The value.

    Raises:
        UsageError: The text cannot be parsed or is too large.
    """
    import yaml

    if sum(map(text.count, _MARKS)) > MOST_MARKS:
        raise UsageError(f"{source} cannot be read: it has more than {MOST_MARKS} lines and values")
    loader = _yaml_loader(spelled)
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError, MemoryError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UsageError(f"{source} cannot be read: {reason}") from error


def _yaml_loader(spelled: bool) -> type[Any]:
    """A loader of YAML 1.2; made here because `yaml` takes long to import."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*name); write the value out")
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise yaml.YAMLError("it is nested too deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise yaml.YAMLError("keys must be strings")
                if key.value in seen:
                    raise yaml.YAMLError(f"duplicate key {key.value!r}")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    scalars: dict[str, tuple[str, Callable[[str], Any]]] = {
        "null": (r"~|null|Null|NULL|", lambda value: None),
        "bool": (r"true|True|TRUE|false|False|FALSE", lambda value: value.lower() == "true"),
        "int": (_WHOLE.pattern, partial(Spelled.of, read=whole) if spelled else whole),
        "float": (_DECIMAL.pattern, partial(Spelled.of, read=float) if spelled else float),
    }
    for kind, (pattern, read) in scalars.items():
        tag = f"tag:yaml.org,2002:{kind}"
        Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), None)
        Loader.add_constructor(tag, lambda loader, node, read=read: read(str(node.value)))
    return Loader


def read_config(
    config_class: type[Any],
    file: str | None,
    by_field: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Read the flags in a file, as `shaped` returns them; nothing without a file.

    `by_field` replaces the names of flags by those of fields.
    """
    if file is None:
        return {}
    source = f"--config_path {file}"
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{source} is not a file")
        with path.open("rb") as content:
            found = content.read(MOST_FLAGS + 1)
        if len(found) > MOST_FLAGS:
            raise UsageError(
                f"{source} has more than {MOST_FLAGS // 1000} kB; it cannot be a file of flags"
            )
        values = read_yaml(found.decode("utf-8"), source, spelled=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold a mapping of flags to values")
    if DISCOVER in values:
        raise UsageError(
            f"{source} has {DISCOVER}; write it on the command line, as it decides which other "
            "flags there are"
        )
    try:
        return shaped(by_field(values), config_class)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def shaped(values: dict[str, Any], config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    """Convert `values` by flag to values by field, each of the type of its field.

    Args:
        values: Values by flag.
        config_class: The dataclass, or the family in which the key ``type`` selects one. Without
            that key, the fields of all kinds are allowed; the default selects the kind later.
        prefix: Prefix of names in messages.

    Returns:
        Values by field.

    Raises:
        UsageError: A name is unknown, or a value has another type.
    """
    owners: list[Any] = [config_class]
    result: dict[str, Any] = {}
    if is_choice(config_class):
        kinds = config_class.get_known_choices()  # type: ignore[attr-defined]
        owners = list(kinds.values())
        if "type" in values:
            kind = values["type"]
            if not isinstance(kind, str) or kind not in kinds:
                raise UsageError(
                    f"--{prefix}type is {short(kind)}; choose one of {', '.join(kinds)}, or import "
                    "the package of another one with --discover_packages_path"
                )
            owners, result = [kinds[kind]], {"type": kind}
    known = {
        i.name.removesuffix("_"): (i.name, owner)
        for owner in owners
        for i in fields(owner)
        if i.init
    }
    for name, value in values.items():
        if name in result:
            continue
        if name not in known or (name == "env" and not isinstance(value, dict)):
            check_moved(prefix + name, config_class)
        if name not in known:
            raise unknown(prefix + name, [prefix + n for n in known])
        field, owner = known[name]
        result[field] = _typed(value, type_hints(owner).get(field, Any), prefix + name)
    return result


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Convert `value`, of the type `hint` or a string of such a value, for draccus.

    Raises `UsageError` for a value of another type.
    """
    # None first: "none" is a string, too
    for option in sorted(options_of(hint), key=lambda option: option is not type(None)):
        fits, typed = _as(value, option, name)
        if fits:
            return typed
    raise UsageError(f"--{name} is {short(plain(value))}; it must be {describe(hint, None)}")


def _as(value: Any, hint: Any, name: str) -> tuple[bool, Any]:
    """Whether `value` is or can be parsed as a `hint`, and the parsed value."""
    if hint is type(None):
        return value is None or value in ("None", "none"), None
    if is_nested(hint):
        return isinstance(value, dict), (
            shaped(value, hint, f"{name}.") if isinstance(value, dict) else None
        )
    origin = typing.get_origin(hint) or hint
    inside = typing.get_args(hint) or (Any,)
    if origin in (list, tuple):
        if type(value) in (str, Spelled, int, float) and value not in (
            "None",
            "none",
        ):  # 0,50,100 is [0, 50, 100]
            value = [part.strip() for part in str(value).split(",")]
        fits = isinstance(value, list)
        return fits, (
            [_typed(v, inside[0], f"{name}.{i}") for i, v in enumerate(value)] if fits else None
        )
    if origin is dict:
        return isinstance(value, dict), plain(value)
    if hint in (str, Path):
        return isinstance(value, str | int | float) and not isinstance(value, bool), str(value)
    if hint is bool:
        return isinstance(value, bool) or value in ("true", "false"), value in (True, "true")
    if hint not in (int, float):
        return True, plain(value)
    pattern = _WHOLE if hint is int else _DECIMAL
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and pattern.fullmatch(value):
        value = hint(value)
    numbers = (int,) if hint is int else (int, float)
    return type(value) in numbers and (type(value) is int or math.isfinite(value)), value


def is_choice(kind: Any) -> bool:
    """Whether `kind` is a family of dataclasses, from which ``type`` selects one."""
    return isinstance(kind, type) and any(
        base.__name__ == "ChoiceRegistry" for base in kind.__bases__
    )


def is_nested(kind: Any) -> bool:
    """Whether a setting is a group of settings."""
    return is_dataclass(kind) or is_choice(kind)
