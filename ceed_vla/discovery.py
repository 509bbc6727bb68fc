"""Import packages that a user names on the command line: LeRobot's `--discover_packages_path`.

A checkpoint can use code of other projects only if the user names their packages.
"""

from __future__ import annotations

import importlib
import sys

from ceed_vla.errors import ConfigError, is_failure

FLAG = "discover_packages_path"
_discovered: set[str] = set()


def discover(text: str, option: str = f"--{FLAG}") -> None:
    """Import the packages of a comma-separated list, which register their classes on import.

    `option` names the source of the list in messages.
    """
    for name in filter(None, (part.strip() for part in text.split(","))):
        try:
            importlib.import_module(name)
        # a foreign package may raise any exception, or end the process
        except BaseException as error:
            if not (is_failure(error) or isinstance(error, SystemExit)):
                raise
            raise ConfigError(
                f"{option}: the package {name!r} cannot be imported ({type(error).__name__}: "
                f"{error}); install it, or set PYTHONPATH."
            ) from error
        _discovered.add(name)


def discovered() -> list[str]:
    """The packages imported by `discover`, for other processes to import, too."""
    return sorted(_discovered)


def named_by_user(module: str) -> bool:
    """Whether a module is of a package that the user named to this program or a LeRobot tool."""
    words = [word.partition("=") for word in sys.argv if FLAG in word.partition("=")[0]]
    named = _discovered | {
        name.strip() for _, _, value in words for name in value.split(",") if name.strip()
    }
    return any(module == name or module.startswith(f"{name}.") for name in named)
