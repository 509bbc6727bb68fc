"""The configuration of a command that exists for tests of the command line only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, ranged


@dataclass
class Inner:
    """A nested configuration.

    Attributes:
        path: Where it lies.
        width: Its width.
        sizes: Its sizes.
    """

    path: str = ""
    width: int = 8
    sizes: list[int] = field(default_factory=list)


@dataclass
class ToyConfig:
    """Do something to a folder.

    Attributes:
        root: The folder.
        steps: How often; a sentence that is long enough to need a second line of text, so that
            wrapping is seen, even on a terminal that is as wide as the help text may become.
        mode: "good" or "fine".
        rate: How fast.
        resume: Go on.
        inner: What is inside.
    """

    root: Path
    steps: int = 3
    mode: str = "good"
    rate: float = ranged(0.5, "(0, 1]")
    resume: bool = False
    unexplained: int = 0
    inner: Inner = field(default_factory=lambda: Inner(width=16, sizes=[1, 2]))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mode not in ("good", "fine"):
            raise ConfigError(f"unknown mode {self.mode!r}; choose good or fine")
