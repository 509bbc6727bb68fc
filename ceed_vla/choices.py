"""Settings of several kinds: the flag or key ``type`` selects the dataclass of the others."""

from __future__ import annotations

from typing import Any, ClassVar

from ceed_vla.errors import ConfigError


class Choice:
    """A family of dataclasses that are registered by name.

    Its base class inherits from ``draccus.ChoiceRegistry``, too.
    """

    setting: ClassVar[str] = ""  # name of the family in messages
    usual: ClassVar[str] = ""  # the default kind
    _choice_registry: ClassVar[dict[str, Any]]

    @classmethod
    def default_choice_name(cls) -> str | None:
        return cls.usual

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        """The dataclass called `name`; `ConfigError` if there is none."""
        if name not in cls._choice_registry:
            known = ", ".join(sorted(cls._choice_registry))
            raise ConfigError(f"{cls.setting}.type is {name!r}; choose one of {known}.")
        return cls._choice_registry[name]

    @property
    def type(self) -> str:
        """The name this kind is registered under."""
        return next(name for name, kind in self._choice_registry.items() if kind is self.__class__)
