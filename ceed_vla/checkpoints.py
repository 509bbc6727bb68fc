"""Find, load and name checkpoints: LeRobot folders with config, weights and processors."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceed_vla.errors import CheckpointError
from ceed_vla.lora import is_adapter

if TYPE_CHECKING:
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

logger = logging.getLogger(__name__)

PRETRAINED = ("teacher", "student")
POLICY_FILES = ("config.json", "model.safetensors")
PROCESSOR_FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
FILES = (*POLICY_FILES, *PROCESSOR_FILES)
REMOTE_CODE = (
    "action_tokenizer_processor",
)  # LeRobot's step that runs the Python files of a tokenizer's folder


def pretrained_path(name: str) -> Path:
    """Folder of a checkpoint that ships inside the package.

    Args:
        name: "teacher" (autoregressive) or "student" (consistency-distilled).

    Raises:
        CheckpointError: Unknown name, or the package was installed without its weights.
    """
    if name not in PRETRAINED:
        raise CheckpointError(
            f"No shipped checkpoint is called {name!r}; choose one of {', '.join(PRETRAINED)}."
        )
    path = Path(__file__).parent / "pretrained" / name
    if not (path / "model.safetensors").is_file():
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
    folder = Path(path)
    if not folder.exists() and str(path) in PRETRAINED:
        return pretrained_path(str(path))
    if (folder / "pretrained_model").is_dir():
        folder = folder / "pretrained_model"
    if not folder.is_dir():
        raise CheckpointError(
            f"No checkpoint folder at {path}; give a local folder that holds {' and '.join(POLICY_FILES)}, "
            f"or a shipped name ({', '.join(PRETRAINED)}). A model of a hub must be downloaded first."
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"The checkpoint {path} lacks {', '.join(missing)}; it is incomplete.")
    return folder


def read_config(folder: Path, device: str | None = None) -> CeedVLAConfig:
    """The configuration in a checkpoint folder, for `device` if given.

    Raises:
        CheckpointError: Not JSON, another policy's, or with values that this version refuses.
    """
    import draccus

    from ceed_vla.configuration_ceed_vla import CeedVLAConfig

    try:
        values = json.loads((folder / "config.json").read_text())
        kind = values.pop("type", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: config.json is not readable JSON ({error}).") from error
    if kind != "ceed_vla":
        raise CheckpointError(f"{folder} holds a policy of type {kind!r}; this loader reads type 'ceed_vla'.")
    try:
        return draccus.decode(CeedVLAConfig, values | ({"device": device} if device else {}))
    except Exception as error:  # draccus raises its own kinds, and passes on those of the configuration
        raise CheckpointError(f"{folder}: config.json cannot be used ({_reason(error)}).") from error


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

    import ceed_vla.processor_ceed_vla  # noqa: F401  (registers the steps that a saved pipeline names)
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

    folder = resolve_checkpoint(path)
    check_steps(folder)
    config = read_config(folder, device or "cpu")
    policy = CeedVLAPolicy.from_pretrained(folder, config=config, merge_adapters=merge_adapters)
    try:
        overrides = {"device_processor": {"device": config.device}}
        pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # LeRobot's pipelines raise many kinds
        raise CheckpointError(
            f"The processors of {path} cannot be loaded ({_reason(error)}); copy it again."
        ) from error
    return policy, pre, post


def check_steps(folder: Path, allowed: Sequence[str] = ()) -> None:
    """Refuse processors that name a class instead of a registered step, or a step that runs code of a folder.

    LeRobot would import and call whatever class a processor's file names.

    Args:
        folder: The checkpoint.
        allowed: Steps out of `REMOTE_CODE` that the caller does not run.

    Raises:
        CheckpointError: Such a step, or a file that is no processor's.
    """
    for name in PROCESSOR_FILES:
        try:
            steps = json.loads((folder / name).read_text())["steps"]
            names = [step.get("registry_name") for step in steps]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / name} is no processor's file ({error!r}); copy it again."
            ) from error
        for step, registered in zip(steps, names, strict=True):
            if not registered or (registered in REMOTE_CODE and registered not in allowed):
                raise CheckpointError(
                    f"{folder / name} has a step {registered or step.get('class')!r}, which would run code that the "
                    "checkpoint names; only registered steps are loaded."
                )


def load_weights(policy: CeedVLAPolicy, folder: Path, strict: bool = True) -> None:
    """Read a checkpoint's weights into a policy.

    Args:
        policy: Built from the checkpoint's configuration.
        folder: The checkpoint.
        strict: Refuse missing and additional weights; otherwise they are only logged. Weights that the policy
            refers to elsewhere (`CeedVLAPolicy.referenced`) are not missing.

    Raises:
        CheckpointError: Truncated or corrupt weights, or those of other sizes.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    file = folder / "model.safetensors"
    try:
        missing, unexpected = load_model(policy, file, strict=False)  # copied into weights that have a place
        with safe_open(file, "pt") as weights:
            own = set(weights.keys())
            policy.adapters = {name: weights.get_tensor(name) for name in own if is_adapter(name)}
    except Exception as error:  # safetensors and torch each raise their own kinds
        raise CheckpointError(
            f"The weights {file} do not load ({_reason(error)}); copy the checkpoint again or rebuild it."
        ) from error
    lost, unknown = set(missing) - policy.referenced, set(unexpected) - policy.adapters.keys()
    policy.referenced -= own
    for kind, names in (("misses", lost), ("has unknown", unknown)):
        if names and strict:
            raise CheckpointError(
                f"The weights {file} do not load: the checkpoint {kind} {', '.join(sorted(names)[:8])}; "
                "copy it again or rebuild it."
            )
        if names:
            logger.warning("The checkpoint %s %s weights: %s", folder, kind, ", ".join(sorted(names)))


def save_weights(policy: CeedVLAPolicy, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write a policy's weights, without those that it refers to and has not trained.

    Args:
        policy: The policy.
        folder: Existing folder.
        state_dict: The weights, gathered by whoever sharded them; the policy's own if None.
    """
    from safetensors.torch import save_file, save_model

    file = folder / "model.safetensors"
    if state_dict is None and not policy.referenced:
        save_model(policy, str(file))
        return
    kept = policy.referenced - {name for name, p in policy.named_parameters() if p.requires_grad}
    weights = policy.state_dict() if state_dict is None else state_dict
    own = {name: tensor.contiguous() for name, tensor in weights.items() if _weight(name) not in kept}
    save_file(own, file, metadata={"format": "pt"})


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
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        policy.save_pretrained(temporary, state_dict=weights)
        for part in (preprocessor, postprocessor):
            part.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)
    return folder


def _weight(name: str) -> str:
    """The weight that an entry belongs to: itself, but for the scales and states of bitsandbytes."""
    module, _, last = name.rpartition(".")
    if last in ("SCB", "weight_format"):
        return f"{module}.weight"
    return f"{name.partition('.weight.')[0]}.weight" if ".weight." in name else name


def weights_hash(path: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of the weights: names a checkpoint in reports and trajectories.

    Of weights that lie elsewhere, the configured reference counts instead of the weights.
    """
    folder = resolve_checkpoint(path)
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    backbone = json.loads((folder / "config.json").read_text()).get("backbone", {})
    if backbone.get("weights") == "reference":
        digest.update(json.dumps(backbone, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _reason(error: BaseException) -> str:
    """Kind and first line of the error that caused `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return f"{type(error).__name__}: {line}"
