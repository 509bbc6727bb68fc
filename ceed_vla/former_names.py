"""The import names `sim`, `training` and `ros_nodes` of earlier versions, in a clone.

They are `ceed_vla.sim`, `ceed_vla.training` and `ceed_vla.ros_nodes` now. The folders are still at
the top of the repository, so the former names can be imported there; they resolve to the same
modules, with a `DeprecationWarning`. An installed package has only the long names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, cast


def redirect(name: str) -> None:
    """Replace the module `name` during its import by ``ceed_vla.<name>``, submodules included."""
    warnings.warn(f"Import ceed_vla.{name} instead of {name}.", DeprecationWarning, stacklevel=3)
    if not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name))
    sys.modules[name] = importlib.import_module(f"ceed_vla.{name}")


class _Finder(MetaPathFinder):
    """Finds the submodules of a former name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.name}."):
            return None
        present = importlib.util.find_spec(f"ceed_vla.{fullname}")
        if present is None:
            return None
        return ModuleSpec(fullname, _Loader(present), origin=present.origin)


class _Loader(Loader):
    """Loads the module of the present name."""

    def __init__(self, present: ModuleSpec) -> None:
        self.present = present

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(self.present.name)

    def exec_module(self, module: ModuleType) -> None:
        # restore it: the import system has just set the spec of the former name
        module.__spec__ = self.present

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m`` with a former name."""
        return cast("CodeType | None", cast("Any", self.present.loader).get_code(self.present.name))
