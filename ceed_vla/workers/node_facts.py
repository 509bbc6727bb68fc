"""What must be equal on all nodes, so that every one of them gives the same episodes.

Ray sends this module to the nodes by value: it must not import this package, which a node may lack.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "ceed_vla"
NONE = "none"  # the version of a package that is not installed
# Their versions decide what a policy and a simulator compute, where they are installed.
OTHERS = (
    *("torch", "transformers", "lerobot", "mujoco", "numpy", "gymnasium"),
    *("onnxruntime", "metaworld", "hf-libero", "robosuite"),
)


def facts() -> dict[str, str]:
    """Versions of Python and packages on this node, by name; "none" with a reason if unusable."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2]), PACKAGE: _own_version()}
    for name in OTHERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = NONE
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # a library of the system may be missing
        found["mujoco"] = f"none ({type(error).__name__}: {error})"
    return found


def _own_version() -> str:
    """Version of this package, and a digest of its code."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return NONE
    folder = Path(spec.origin).parent
    digest = hashlib.sha256()
    # In a clone, some packages are linked folders.
    for where, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                file = Path(where, name)
                digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    named = re.search(r'^__version__ = "(.+)"$', Path(spec.origin).read_text("utf-8"), re.MULTILINE)
    return f"{named[1] if named else 'unknown'} (code {digest.hexdigest()[:8]})"
