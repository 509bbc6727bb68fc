"""Where checkpoints are: folders, their files, and the shipped ones. Imports nothing heavy: a robot's node asks too."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ceed_vla.errors import CheckpointError
from ceed_vla.fields import short

PRETRAINED = ("teacher", "student")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"  # see `ceed_vla.checkpoints.manifest`
EXITS = "exits.safetensors"
CONTEXT = "context.safetensors"
MODULES = (EXITS, CONTEXT)  # beside the weights, and read if they are there
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
PROCESSOR_FILES = (PREPROCESSOR, POSTPROCESSOR)
POLICY_FILES = (CONFIG, WEIGHTS)
FILES = (*POLICY_FILES, *PROCESSOR_FILES)


def pretrained_path(name: str) -> Path:
    """Folder of a checkpoint inside the package: "teacher" (autoregressive), "student" (consistency-distilled).

    "metaworld/student" is the student of an installed wheel of weights, ceed_vla_metaworld, which is not imported.
    """
    wheel, _, own = name.rpartition("/") if isinstance(name, str) else ("", "", "")
    if own not in PRETRAINED or not (not wheel or wheel.isidentifier()):
        raise CheckpointError(f"No shipped checkpoint is called {short(name)}; choose one of {', '.join(PRETRAINED)}.")
    spec = find_spec(f"ceed_vla_{wheel}") if wheel else None
    if wheel and (spec is None or spec.origin is None):
        raise CheckpointError(f"There is no folder {name}, and no wheel ceed_vla_{wheel} is installed.")
    path = (Path(spec.origin).parent if spec and spec.origin else Path(__file__).parent / "pretrained") / own
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
        named = folder.name in PRETRAINED and len(folder.parts) <= 2 and not folder.is_absolute()
        if named and not folder.exists() and not (len(folder.parts) == 2 and folder.parent.exists()):
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
