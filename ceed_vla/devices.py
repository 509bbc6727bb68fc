"""Check devices: a missing device is an error, never replaced by another one."""

from __future__ import annotations

from ceed_vla.errors import ConfigError
from ceed_vla.fields import short

KINDS = ("cpu", "cuda", "mps", "xpu")


def check_device(name: object) -> str:
    """Return `name` ("cpu", "cuda", "cuda:1", "mps" or "xpu") if this machine has that device.

    Raises:
        ConfigError: It does not have it.
    """
    kind, index = _parsed(name)
    if not 0 <= index < _count(kind):
        here = [kind for kind in KINDS if _count(kind)]
        raise ConfigError(f"The device is {short(name)}; this machine has {', '.join(here)}.")
    return str(name)


def check_device_name(name: object) -> None:
    """Raise `ConfigError` unless `name` names a device, of this machine or another."""
    if not _parsed(name)[0]:
        raise ConfigError(f"device is {short(name)}; choose one of {', '.join(KINDS)}, or cuda:1.")


def _parsed(name: object) -> tuple[str, int]:
    """Kind and index of a device; ("", 0) for any other value."""
    kind, colon, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in KINDS or (
        colon and not (index.isdecimal() and index.isascii() and len(index) < 4)
    ):
        return "", 0
    return kind, int(index or 0)


def _count(kind: str) -> int:
    """Devices of a kind on this machine."""
    import torch

    if kind == "cpu":
        return 1
    module = getattr(torch, kind, None) if kind else None
    return int(module.device_count()) if module is not None and module.is_available() else 0
