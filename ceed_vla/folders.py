"""Where checkpoints are: folders, their files, and the shipped ones.

It imports nothing heavy, because robot nodes use it, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path

from ceed_vla.errors import CheckpointError
from ceed_vla.fields import short

_logger = logging.getLogger(__name__)
_relocated: dict[str, Path] = {}  # in a worker of a cluster: where checkpoints are on its node
_origins: dict[Path, Path] = {}  # folders with the files of a checkpoint whose place is another

PRETRAINED = ("teacher", "student", "student_all_tokens")
# Wheels of weights of this project, whose names are those of their students.
WHEELS = ("libero_object", "metaworld_mt10")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TEMPLATE = "robot.yaml"  # the file of the robot that a checkpoint was trained with, if it has one
EXPORT = "export.json"  # of an export, see `ceed_vla.edge`
MANIFEST = "manifest.json"  # see `ceed_vla.checkpoints.manifest`
EXITS = "exits.safetensors"
CONTEXT = "context.safetensors"
ROUTER = "router.safetensors"
MODULES = (EXITS, CONTEXT, ROUTER)  # read with the weights, if they exist
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
PROCESSOR_FILES = (PREPROCESSOR, POSTPROCESSOR)
POLICY_FILES = (CONFIG, WEIGHTS)
FILES = (*POLICY_FILES, *PROCESSOR_FILES)


def pretrained_path(name: str) -> Path:
    """Folder of a shipped checkpoint.

    In the package are "teacher" (autoregressive), "student" (consistency-distilled; it runs 8 of
    the 46 image tokens and words of its prefix), and "student_all_tokens", which runs all of them.
    "libero_object/teacher" is the teacher of an installed wheel of weights, ceed_vla_libero_object,
    which is not imported; "libero_object" and "metaworld_mt10" are the students of theirs.
    """
    full = f"{name}/student" if name in WHEELS else name
    wheel, _, own = full.rpartition("/") if isinstance(full, str) else ("", "", "")
    if own not in PRETRAINED or not (not wheel or wheel.isidentifier()):
        raise CheckpointError(
            f"No shipped checkpoint is called {short(name)}; choose one of "
            f"{', '.join((*PRETRAINED, *WHEELS))}."
        )
    spec = find_spec(f"ceed_vla_{wheel}") if wheel else None
    if wheel in WHEELS and (spec is None or spec.origin is None):
        raise CheckpointError(
            f"{name} is in a wheel of weights that is not installed. In a clone, `python "
            f"scripts/weights_wheel.py --name {wheel}` builds it from weights/{wheel}, or with "
            f"--folder and --card from the runs of a recipe; then `pip install "
            f"dist/ceed_vla_{wheel}-*.whl`."
        )
    if wheel and (spec is None or spec.origin is None):
        raise CheckpointError(
            f"There is no folder {name}, and no wheel ceed_vla_{wheel} is installed."
        )
    path = (
        Path(spec.origin).parent if spec and spec.origin else Path(__file__).parent / "pretrained"
    ) / own
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"The shipped checkpoint {name!r} is missing from this installation; reinstall."
        )
    return path


def relocate(path: str, folder: Path) -> None:
    """Let the checkpoint `path` be the copy in `folder`, in this process."""
    _relocated[path] = folder


@contextmanager
def standing_for(folder: Path, origin: Path) -> Iterator[None]:
    """Within the block, the checkpoint in `folder` refers to other folders as `origin` does."""
    _origins[folder] = origin
    try:
        yield
    finally:
        del _origins[folder]


def base_folder(checkpoint: Path, path: str) -> Path:
    """The folder with the weights by reference of a checkpoint.

    Its `path` in config.json may be relative to the folder of the checkpoint.
    """
    folder = Path(path)
    if folder.is_absolute():
        return folder
    return (_origins.get(checkpoint, checkpoint) / folder).resolve()


def resolve_checkpoint(path: str | Path, files: Sequence[str] = FILES) -> Path:
    """Find a checkpoint folder and check that it holds `files`.

    A name of a shipped checkpoint may also be that of a local folder. The folder is used if it is a
    checkpoint, the shipped one otherwise; a warning says which. ``./student`` is always the folder.

    Args:
        path: The folder, the one above its ``pretrained_model``, or a shipped name ("teacher",
            "student"; "libero_object", "libero_object/teacher" of a wheel of weights).
        files: Names of files that it must hold.

    Returns:
        The folder; absolute if its relative path has the form of a shipped name.

    Raises:
        CheckpointError: There is no such folder, or files are missing from it.
    """
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise CheckpointError(
            f"The checkpoint is {short(path)}; give a folder, or one of {', '.join(PRETRAINED)}."
        )
    path = _relocated.get(str(path), path)
    folder = Path(path)
    try:
        if _may_be_shipped(path):
            folder = _chosen(folder)
        elif _may_be_shipped(folder):  # ./student: `Path` drops the ./
            folder = Path.cwd() / folder
        if (folder / "pretrained_model").is_dir():
            folder = folder / "pretrained_model"
        found = folder.is_dir()
        missing = [name for name in files if not (folder / name).is_file()]
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(
            f"The checkpoint {str(path)[:200]!r} cannot be read ({error.strerror})."
        ) from error
    if not found:
        raise CheckpointError(
            f"No checkpoint folder at {path}; give a local folder that holds "
            f"{' and '.join(POLICY_FILES)}, or a shipped name ({', '.join(PRETRAINED)}). A model "
            "of a hub must be downloaded first."
        )
    if missing and is_export(folder):
        raise CheckpointError(
            f"{path} is an export, and a checkpoint is needed here. Exports run in policy_node and "
            "ceed_vla.edge; name the checkpoint that was exported."
        )
    if missing:
        raise CheckpointError(
            f"The checkpoint {path} lacks {', '.join(missing)}; it is incomplete."
        )
    return folder


def resolve_served(path: str | Path) -> Path:
    """As `resolve_checkpoint`, for commands that also take an export."""
    return Path(path).absolute() if is_export(path) else resolve_checkpoint(path)


def is_export(path: str | Path) -> bool:
    """Whether `path` is the folder of an export, not that of a checkpoint."""
    try:
        return (Path(path) / EXPORT).is_file()
    except (OSError, TypeError, ValueError):
        return False


def unambiguous(text: str) -> str:
    """Return the path `text` in a form that is still local as a `Path`.

    `Path` drops the ``./`` of ``./student``, so this path becomes absolute.
    """
    return (
        str(Path.cwd() / text)
        if not _may_be_shipped(text) and _may_be_shipped(Path(text))
        else text
    )


def _may_be_shipped(path: str | Path) -> bool:
    """Whether `path` has the form of a shipped name: "student", "wheel/student" or a wheel's name.

    "./student" does not have it.
    """
    text = str(path)
    folder = Path(text)
    return (
        (text in WHEELS or (folder.name in PRETRAINED and len(folder.parts) <= 2))
        and not folder.is_absolute()
        and text.split("/")[0] not in (".", "..")
    )


def _chosen(named: Path) -> Path:
    """The local or shipped folder that `named`, a path in the form of a shipped name, refers to."""
    name = str(named)
    local = Path.cwd() / named
    is_wheel = len(named.parts) == 2
    if not local.exists() and not (is_wheel and local.parent.exists()):
        return pretrained_path(name)
    try:
        shipped = pretrained_path(name)
    except CheckpointError:  # only the folder can be meant
        return named
    if (local / CONFIG).is_file() or (local / "pretrained_model").is_dir():
        _warn(
            f"{name} is the local folder {local}, not the shipped checkpoint of this name; write "
            f"./{name} to select the folder explicitly, or rename it to use the shipped one"
        )
        return local
    if local.exists():
        _warn(
            f"{name} is the shipped checkpoint; the local folder {local} is not a checkpoint: "
            f"it lacks {CONFIG} and pretrained_model. Write ./{name} if you mean the folder"
        )
    return shipped


@cache
def _warn(message: str) -> None:
    """Log `message` once per process, and not in workers: a command resolves a path many times."""
    if parent_process() is None:
        _logger.warning(message)
