"""Measurements of a run that takes hours: an interrupt leaves them in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.files import read_json, write_text
from ceed_vla.outputs import MADE_BY

MEASURED = "measured.json"


class Progress:
    """Measurements by key, as JSON values.

    Args:
        folder: Output folder.
        identity: Everything that affects a measurement, as JSON values.
        resume: Go on with what is there.

    Raises:
        ConfigError: There are measurements, and `resume` is false or they are of another run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool) -> None:
        self.file = folder / MEASURED
        self._identity = json.loads(json.dumps(identity))
        self._found: dict[str, Any] = {}
        if not self.file.exists():
            return
        content = read_json(self.file, ConfigError)
        theirs, found = content.get("identity"), content.get("measured")
        if not isinstance(theirs, dict) or not isinstance(found, dict):
            raise ConfigError(f"{self.file} is damaged; remove it, or set another --output_dir.")
        if not resume:
            raise ConfigError(
                f"{folder} holds an interrupted run ({len(found)} measurements); continue it with "
                "--resume=true, or set another --output_dir."
            )
        names = sorted(self._identity.keys() | theirs.keys())
        if other := [name for name in names if theirs.get(name) != self._identity.get(name)]:
            raise ConfigError(
                f"{self.file} was measured with other {', '.join(other)}; set another --output_dir."
            )
        self._found = found

    def measured[T](self, key: str, measure: Callable[[], Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of a measurement, which is made and written if there is none.

        Raises:
            ConfigError: `read` raised `KeyError`, `TypeError` or `ValueError`.
        """
        if key not in self._found:
            self._found[key] = measure()
            values = {"program": MADE_BY, "identity": self._identity, "measured": self._found}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(values))
        try:
            return read(self._found[key])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{self.file} is damaged at {key[:100]!r}; remove it, or set another --output_dir."
            ) from None

    def end(self) -> None:
        """The run is complete."""
        self.file.unlink(missing_ok=True)
