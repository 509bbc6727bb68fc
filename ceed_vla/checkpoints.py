"""Find, load and name checkpoints: LeRobot folders with config, weights and processors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ceed_vla.errors import CheckpointError

PRETRAINED = ("teacher", "student")
FILES = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json")


def pretrained_path(name: str) -> Path:
    """Folder of a checkpoint that ships inside the package.

    Args:
        name: "teacher" (autoregressive) or "student" (consistency-distilled).

    Raises:
        CheckpointError: Unknown name, or the package was installed without its weights.
    """
    if name not in PRETRAINED:
        raise CheckpointError(f"No shipped checkpoint is called {name!r}; choose one of {', '.join(PRETRAINED)}.")
    path = Path(__file__).parent / "pretrained" / name
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(f"The shipped checkpoint {name!r} is missing from this installation ({path.name}/); reinstall.")
    return path


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from a path or a shipped name ("teacher", "student").

    Raises:
        CheckpointError: No such folder, or files are missing from it.
    """
    folder = Path(path)
    if not folder.exists() and str(path) in PRETRAINED:
        return pretrained_path(str(path))
    if (folder / "pretrained_model").is_dir():
        folder = folder / "pretrained_model"
    if not folder.is_dir():
        raise CheckpointError(
            f"No checkpoint folder at {path}; give a folder that holds {FILES[0]} and {FILES[1]}, "
            f"or a shipped name ({', '.join(PRETRAINED)})."
        )
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"The checkpoint {path} lacks {', '.join(missing)}; it is incomplete.")
    return folder


def load(path: str | Path, device: str | None = None) -> tuple[Any, Any, Any]:
    """Load a policy with its pre- and post-processor, strictly and offline.

    Args:
        path: Checkpoint folder, or "teacher" / "student" for the shipped ones.
        device: Overrides the checkpoint's device.

    Returns:
        (policy in eval mode, pre-processor, post-processor).

    Raises:
        CheckpointError: Missing, foreign, truncated or corrupt files.
    """
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    import ceed_vla.processor_ceed_vla  # noqa: F401  (registers the steps that a saved pipeline names)
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

    folder = resolve_checkpoint(path)
    try:
        kind = json.loads((folder / "config.json").read_text()).get("type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: config.json is not readable JSON ({error}).") from error
    if kind != "ceed_vla":
        raise CheckpointError(f"{path} holds a policy of type {kind!r}; this loader reads type 'ceed_vla'.")
    try:
        config = PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--device={device or 'cpu'}"])
        policy = CeedVLAPolicy.from_pretrained(folder, config=config, strict=True)
        overrides = {"device_processor": {"device": config.device}}
        pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # safetensors, torch and draccus each raise their own kinds
        raise CheckpointError(
            f"The checkpoint {path} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "copy it again or rebuild it."
        ) from error
    return policy.eval(), pre, post


def save(path: str | Path, policy: Any, preprocessor: Any, postprocessor: Any) -> Path:
    """Write a checkpoint folder; an existing one is replaced file by file."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(folder)
    preprocessor.save_pretrained(folder)
    postprocessor.save_pretrained(folder)
    return folder


def weights_hash(path: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of the weights: names a checkpoint in reports and trajectories."""
    return hashlib.sha256((resolve_checkpoint(path) / "model.safetensors").read_bytes()).hexdigest()[:12]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
