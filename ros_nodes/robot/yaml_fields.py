"""Reads a YAML file field by field; errors name the file, the key and the allowed values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ceed_vla.cli.values import UsageError, read_yaml
from ceed_vla.errors import ConfigError
from ceed_vla.texts import LONGEST, short, shown

_MISSING: Any = object()
HUGE = 1e6  # m, rad or anything per second; sums and squares of smaller numbers are finite
_LARGEST_FILE = 100_000  # [bytes]
TOPIC = re.compile(r"(~/|/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")


class Fields:
    """One mapping of a YAML file; errors name `source` and `path`, such as "action.workspace"."""

    def __init__(self, source: Path, path: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConfigError(
                f"{source}: {short(path) or 'the file'} is {shown(values)}; give keys with values."
            )
        self.source = source
        self.path = path
        self._values = values
        self._taken: set[str] = set()
        self._children: list[Fields] = []

    @classmethod
    def read(cls, file: Path) -> Fields:
        """Read a file: YAML 1.2 without aliases or repeated keys, as on the command line."""
        try:
            if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
                raise ConfigError(f"it must be a file of at most {_LARGEST_FILE} bytes")
            values = read_yaml(file.read_text(encoding="utf-8"), short(file))
        except UsageError as error:
            raise ConfigError(short(error, 2 * LONGEST)) from error
        # nested too deeply, impossible dates, ...: YAML's constructors raise many types
        except Exception as error:
            reason = short(error) or type(error).__name__
            raise ConfigError(f"{short(file)} cannot be read: {reason}") from error
        return cls(file, "", values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def flat(self) -> dict[str, Any]:
        """Return every value by its full name, such as "limits.step"."""
        found: dict[str, Any] = {}
        for key, value in self._values.items():
            below = (
                Fields(self.source, self._name(key), value).flat()
                if isinstance(value, dict)
                else {}
            )
            found |= below or {self._name(key): value}
        return found

    def error(self, key: str, problem: str) -> ConfigError:
        """Return an error about `key`, for the caller to raise."""
        return ConfigError(f"{self.source}: {short(self._name(key))} {problem}.")

    def child(self, key: str, *, optional: bool = False) -> Fields:
        """Return the mapping below `key`; an empty one if it is optional and absent."""
        value = self._get(key, {} if optional else _MISSING)
        self._children.append(Fields(self.source, self._name(key), value))
        return self._children[-1]

    def children(self) -> Iterator[tuple[str, Fields]]:
        """Iterate over the keys with the mappings below them."""
        for key in self:
            yield key, self.child(key)

    def text(self, key: str, default: str = _MISSING, choices: Sequence[str] = ()) -> str:
        """Return a string; one of `choices` if there are any."""
        value = self._get(key, default)
        if not isinstance(value, str) or (not value and default != ""):
            raise self.error(key, f"is {shown(value)}; give a string")
        if choices and value not in choices:
            raise self.error(key, f"is {shown(value)}; choose one of {', '.join(choices)}")
        return value

    def topic(self, key: str) -> str:
        """Return a valid ROS topic name."""
        value = self.text(key)
        if not TOPIC.fullmatch(value) or len(value) > LONGEST:
            raise self.error(
                key, f"is {shown(value)}; a topic has letters, digits and _ between single /"
            )
        return value

    def topics(self, key: str) -> dict[str, str]:
        """Return a topic as {"": topic}, or a mapping of names to topics."""
        if not isinstance(self._values.get(key), dict):
            return {"": self.topic(key)}
        child = self.child(key)
        return {name: child.topic(name) for name in child}

    def texts(
        self, key: str, choices: Sequence[str] = (), default: tuple[str, ...] = _MISSING
    ) -> tuple[str, ...]:
        """Return a list of different strings."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, str) and item for item in value
        ):
            raise self.error(key, f"is {shown(value)}; give a list of strings")
        if len(set(value)) != len(value):
            raise self.error(key, f"is {shown(value)}; it has a duplicate value")
        unknown = [item for item in value if choices and item not in choices]
        if unknown:
            raise self.error(
                key, f"has {', '.join(map(shown, unknown[:3]))}; choose from {', '.join(choices)}"
            )
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {shown(value)}; give true or false")
        return value

    def number(
        self, key: str, low: float = -HUGE, high: float = HUGE, default: float = _MISSING
    ) -> float:
        """Return a finite number in [low, high]."""
        return self._number(key, self._get(key, default), low, high)

    def numbers(
        self,
        key: str,
        length: int,
        low: float = -HUGE,
        high: float = HUGE,
        *,
        optional: bool = False,
    ) -> tuple[float, ...]:
        """Return `length` finite numbers in [low, high]; none if optional and absent."""
        if optional and key not in self:
            return ()
        value = self._get(key, _MISSING)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"is {shown(value)}; give a list of {length} numbers")
        return tuple(self._number(key, item, low, high) for item in value)

    def finish(self) -> None:
        """Refuse keys that were not read, here or below: a misspelt limit must not be ignored."""
        for child in self._children:
            child.finish()
        unknown = [key for key in self._values if key not in self._taken]
        if unknown:
            known = short(", ".join(sorted(self._taken)))
            raise self.error(unknown[0], f"is unknown; the keys here are {known}")

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _get(self, key: str, default: Any) -> Any:
        self._taken.add(key)
        value = self._values.get(key, default)
        if value is _MISSING:
            raise self.error(key, "is missing")
        return value

    def _number(self, key: str, value: Any, low: float, high: float) -> float:
        # an integer of any size, which a float may not be able to represent
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, float) and math.isfinite(value)):
            raise self.error(key, f"has {shown(value)}; give a finite number")
        if not low <= value <= high:
            raise self.error(key, f"has {shown(value)}; it must lie in [{low:g}, {high:g}]")
        return float(value)
