"""Find, load and name checkpoints: LeRobot folders with config, weights and processors."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.devices import check_device
from ceed_vla.errors import CheckpointError, root_cause
from ceed_vla.files import read_json
from ceed_vla.processor_steps import PROCESSOR_FILES, check_processors
from ceed_vla.weights import WEIGHTS, check_size

if TYPE_CHECKING:
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

PRETRAINED = ("teacher", "student")
POLICY_FILES = ("config.json", WEIGHTS)
FILES = (*POLICY_FILES, *PROCESSOR_FILES)


def pretrained_path(name: str) -> Path:
    """Folder of a checkpoint that ships inside the package.

    Args:
        name: "teacher" (autoregressive) or "student" (consistency-distilled).

    Raises:
        CheckpointError: Unknown name, or the package was installed without its weights.
    """
    if not isinstance(name, str) or name not in PRETRAINED:
        raise CheckpointError(
            f"No shipped checkpoint is called {name!r}; choose one of {', '.join(PRETRAINED)}."
        )
    path = Path(__file__).parent / "pretrained" / name
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"The shipped checkpoint {name!r} is missing from this installation ({path.name}/); reinstall."
        )
    return path


def resolve_checkpoint(path: str | Path, files: Sequence[str] = FILES) -> Path:
    """A checkpoint folder from a path or a shipped name ("teacher", "student").

    Args:
        path: The folder, one above its ``pretrained_model``, or a name.
        files: Files that must be in it.

    Raises:
        CheckpointError: No such folder, or files are missing from it.
    """
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise CheckpointError(
            f"The checkpoint is {path!r}; give a folder, or one of {', '.join(PRETRAINED)}."
        )
    folder = Path(path)
    try:
        if not folder.exists() and str(path) in PRETRAINED:
            return pretrained_path(str(path))
        if (folder / "pretrained_model").is_dir():
            folder = folder / "pretrained_model"
        found = folder.is_dir()
        missing = [name for name in files if not (folder / name).is_file()]
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(
            f"The checkpoint {str(path)[:200]!r} is not read ({error.strerror})."
        ) from error
    if not found:
        raise CheckpointError(
            f"No checkpoint folder at {path}; give a local folder that holds {' and '.join(POLICY_FILES)}, "
            f"or a shipped name ({', '.join(PRETRAINED)}). A model of a hub must be downloaded first."
        )
    if missing:
        raise CheckpointError(f"The checkpoint {path} lacks {', '.join(missing)}; it is incomplete.")
    return folder


def read_config(folder: Path, device: str | None = None) -> CeedVLAConfig:
    """The configuration in a checkpoint folder, for `device` if given.

    Raises:
        CheckpointError: Not JSON, another policy's, or with values that this version refuses.
        ConfigError: A device that this machine lacks.
    """
    import draccus

    from ceed_vla.configuration_ceed_vla import CeedVLAConfig

    values = read_json(folder / "config.json")
    kind, tokens = values.pop("type", None), values.get("action_tokens")
    if isinstance(tokens, dict) and tokens.get("path") and not tokens.get("symbols"):
        raise CheckpointError(f"{folder}: action_tokens in config.json are not fitted; copy it again.")
    if kind != "ceed_vla":
        raise CheckpointError(f"{folder} holds a policy of type {kind!r}; this loader reads type 'ceed_vla'.")
    if device is not None:
        values["device"] = check_device(device)
    try:
        config = draccus.decode(CeedVLAConfig, values)
        config.validate_features()
    except Exception as error:  # draccus raises its own kinds, and passes on those of the configuration
        raise CheckpointError(f"{folder}: config.json cannot be used ({root_cause(error)}).") from error
    return config


def load(
    path: str | Path, device: str | None = None, merge_adapters: bool = True
) -> tuple[CeedVLAPolicy, Any, Any]:
    """Load a policy with its pre- and post-processor, strictly and offline.

    Args:
        path: Checkpoint folder, or "teacher" / "student" for the shipped ones.
        device: Where to run it; the CPU if None.
        merge_adapters: See `CeedVLAPolicy.from_pretrained`.

    Returns:
        (policy in eval mode, pre-processor, post-processor).

    Raises:
        CheckpointError: Missing, foreign, truncated or corrupt files.
    """
    from lerobot.policies.factory import make_pre_post_processors

    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

    folder = resolve_checkpoint(path)
    config = read_config(folder, "cpu" if device is None else device)
    policy = CeedVLAPolicy.from_pretrained(folder, config=config, merge_adapters=merge_adapters)
    try:
        overrides = {"device_processor": {"device": config.device}}
        pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # LeRobot's pipelines raise many kinds
        raise CheckpointError(
            f"The processors of {path} cannot be loaded ({root_cause(error)}); copy it again."
        ) from error
    return policy, pre, post


def check_checkpoint(folder: Path, config: CeedVLAConfig) -> None:
    """Refuse what a checkpoint must not say, before anything is built: wrong sizes, steps that could run code.

    Processors are checked where the folder has them: a policy without is still a policy.

    Raises:
        CheckpointError: What is wrong, in which file.
    """
    if (
        getattr(config.backbone, "architecture", None) == ""
    ):  # or the model would be read from wherever `path` says
        raise CheckpointError(f"{folder}: backbone.architecture in config.json is empty; copy it again.")
    _check_decoding(folder)
    check_size(config, folder)
    if any((folder / name).exists() for name in PROCESSOR_FILES):
        check_processors(folder, config)


def save(
    path: str | Path,
    policy: CeedVLAPolicy,
    preprocessor: Any,
    postprocessor: Any,
    weights: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; each file of an existing one is replaced in one step.

    Args:
        path: The folder.
        policy: Its configuration and, without `weights`, its weights are written.
        preprocessor: The policy's.
        postprocessor: The policy's.
        weights: Written instead, for instance gathered from several processes.

    Raises:
        CheckpointError: It cannot be written, for instance on a full disk; what was there before stays.
    """
    from safetensors import SafetensorError

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            policy.save_pretrained(temporary, state_dict=weights)
            for part in (preprocessor, postprocessor):
                part.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise CheckpointError(
            f"The checkpoint {folder} cannot be written ({reason}); make room, then repeat."
        ) from error
    return folder


def _check_decoding(folder: Path) -> None:
    """Refuse decoding settings that are left out, for which a default would decode otherwise without a word."""
    found = read_json(folder / "config.json").get("decoding")
    settings: dict[str, Any] = found if isinstance(found, dict) else {}
    lost = [item.name for item in fields(DecodingConfig) if item.name not in settings]
    wrong = [name for name, value in settings.items() if isinstance(value, bool)]
    if lost or wrong:
        raise CheckpointError(
            f"{folder}: decoding in config.json {'lacks' if lost else 'has true or false for'} {(lost or wrong)[0]!r}; "
            "copy the checkpoint again."
        )


def weights_hash(path: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of the weights: names a checkpoint in reports and trajectories.

    Of weights that lie elsewhere, the configured reference counts instead of the weights.
    """
    folder = resolve_checkpoint(path)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    backbone = read_json(folder / "config.json").get("backbone")
    if isinstance(backbone, dict) and backbone.get("weights") == "reference":
        digest.update(json.dumps(backbone, sort_keys=True).encode())
    return digest.hexdigest()[:12]
