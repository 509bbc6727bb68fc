"""Settings that come in kinds: the flag or entry ``type`` picks the dataclass that reads the
others.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ceed_vla.errors import ConfigError


class Choice:
    """Beside ``draccus.ChoiceRegistry`` as a base: a family of dataclasses that register themselves
    by name.
    """

    setting: ClassVar[str] = ""  # what the family is called in messages
    usual: ClassVar[str] = ""  # the kind that is meant where none is named
    _choice_registry: ClassVar[dict[str, Any]]

    @classmethod
    def default_choice_name(cls) -> str | None:
        return cls.usual

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        """The dataclass called `name`; `ConfigError` if there is none."""
        if name not in cls._choice_registry:
            known = ", ".join(cls._choice_registry)
            raise ConfigError(f"{cls.setting}.type is {name!r}; choose one of {known}.")
        return cls._choice_registry[name]

    @property
    def type(self) -> str:
        """The name this kind is registered under."""
        return next(name for name, kind in self._choice_registry.items() if kind is self.__class__)
