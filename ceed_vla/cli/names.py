"""Spelling of flags: the same in every command, independent of the field; older spellings work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ceed_vla.cli.values import UsageError

# field -> flag, in every command
SPELLINGS = {
    "policy_path": "policy.path",
    "teacher_path": "teacher.path",
    "student_path": "student.path",
}


@dataclass(frozen=True)
class Names:
    """The spellings of one command.

    Attributes:
        flag_of: Flag of each field whose flag has another name ("policy_path" -> "policy.path").
        aliases: Older spelling -> flag; not shown by `--help`.
    """

    flag_of: Mapping[str, str]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, config_class: type[Any], renamed: str = "") -> Names:
        """The spellings of a configuration; `renamed` adds to `SPELLINGS`, as in "root=roots"."""
        aliases = SPELLINGS | dict(pair.split("=") for pair in renamed.split())
        own = {item.name for item in fields(config_class)}
        return cls({name: flag for name, flag in aliases.items() if name in own}, aliases)

    def flag(self, field: str) -> str:
        """The flag of a field."""
        return self.flag_of.get(field, field)

    def field(self, flag: str) -> str:
        """The field of a flag, nested ones as ``outer.inner``."""
        return next((field for field, spelled in self.flag_of.items() if spelled == flag), flag)

    def current(self, word: str, flags: Collection[str]) -> str:
        """The present name, among a command's `flags`, of the flag or alias `word`."""
        flag = self.aliases.get(word, word)
        return flag if flag in flags else word

    def by_field(self, values: Mapping[str, Any], flags: Collection[str]) -> dict[str, Any]:
        """Convert the nested `values` of a file from any spelling to the names of the fields.

        Raises:
            UsageError: A value is set in two spellings.
        """
        result = dict(values)
        for alias, flag in self.aliases.items():
            if flag not in flags:
                continue
            found = [_take(result, name) for name in (alias, flag)]
            if all(found):
                raise UsageError(f"--{flag} is set twice: {alias} is its older spelling")
            for value in found[0] or found[1]:
                outer, _, last = self.field(flag).rpartition(".")
                if not outer:
                    result[last] = value
                # a group that is not a mapping is refused later
                elif isinstance(group := result.get(outer, {}), dict):
                    result[outer] = {**group, last: value}
        return result


def _take(values: dict[str, Any], name: str) -> list[Any]:
    """Remove the value of a flag from nested `values`; [] if it is not there."""
    outer, _, last = name.rpartition(".")
    if not outer:
        return [values.pop(last)] if last in values else []
    group = values.get(outer)
    if not isinstance(group, dict) or last not in group:
        return []
    values[outer] = {key: value for key, value in group.items() if key != last}
    if not values[outer]:
        del values[outer]
    return [group[last]]
