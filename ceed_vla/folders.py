"""Where checkpoints are: folders, their files, and the shipped ones. Imports nothing heavy: a robot's node asks too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ceed_vla.errors import CheckpointError
from ceed_vla.fields import short

PRETRAINED = ("teacher", "student")
WEIGHTS = "model.safetensors"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
PROCESSOR_FILES = (PREPROCESSOR, POSTPROCESSOR)
POLICY_FILES = ("config.json", WEIGHTS)
FILES = (*POLICY_FILES, *PROCESSOR_FILES)


def pretrained_path(name: str) -> Path:
    """Folder of a checkpoint inside the package: "teacher" (autoregressive), "student" (consistency-distilled)."""
    if not isinstance(name, str) or name not in PRETRAINED:
        raise CheckpointError(f"No shipped checkpoint is called {short(name)}; choose one of {', '.join(PRETRAINED)}.")
    path = Path(__file__).parent / "pretrained" / name
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"The shipped checkpoint {name!r} is missing from this installation; reinstall.")
    return path


def resolve_checkpoint(path: str | Path, files: Sequence[str] = FILES) -> Path:
    """A checkpoint folder that holds `files`, from its path, the one above its ``pretrained_model``, or a shipped name
    ("teacher", "student"); `CheckpointError` if there is none, or files are missing from it.
    """
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise CheckpointError(f"The checkpoint is {short(path)}; give a folder, or one of {', '.join(PRETRAINED)}.")
    folder = Path(path)
    try:
        if not folder.exists() and str(path) in PRETRAINED:
            return pretrained_path(str(path))
        if (folder / "pretrained_model").is_dir():
            folder = folder / "pretrained_model"
        found = folder.is_dir()
        missing = [name for name in files if not (folder / name).is_file()]
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"The checkpoint {str(path)[:200]!r} is not read ({error.strerror}).") from error
    if not found:
        raise CheckpointError(
            f"No checkpoint folder at {path}; give a local folder that holds {' and '.join(POLICY_FILES)}, "
            f"or a shipped name ({', '.join(PRETRAINED)}). A model of a hub must be downloaded first."
        )
    if missing:
        raise CheckpointError(f"The checkpoint {path} lacks {', '.join(missing)}; it is incomplete.")
    return folder
