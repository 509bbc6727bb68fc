"""The axes of early exit besides iterations, one folder each: depth, drafts, programs, context,
rate, the learned exit, and forwards that are launched ahead.

A folder contains everything that an axis adds to a policy: its decoders and exit rules, which
register themselves; the module that it saves next to the weights; its rows in `ceed-vla bench`.
Everything else works without the folder.
"""

from __future__ import annotations

import importlib
import pkgutil

from ceed_vla.axes.base import Axis as Axis


def _installed() -> dict[str, Axis]:
    """The axes whose folders exist, together with the folders that they build on (`REQUIRES`)."""
    names = [found.name for found in pkgutil.iter_modules(__path__) if found.ispkg]
    axes = {}
    for name in names:
        package = importlib.import_module(f"{__name__}.{name}")
        if set(package.REQUIRES) <= set(names):
            axes[name] = importlib.import_module(f"{__name__}.{name}.axis").AXIS
    return axes


AXES: dict[str, Axis] = _installed()
SAVED = [axis.saved for axis in AXES.values() if axis.saved is not None]
