"""Chooses what a `Predictor` runs: the checkpoint of any LeRobot policy, or an export.

The module itself imports neither torch nor lerobot.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError, raised_as
from ceed_vla.extras import again, installed, require
from ceed_vla.serving.predictor_types import PolicySpec, PredictorSettings
from ceed_vla.serving.served_policy import ServedPolicy
from ceed_vla.texts import short

logger = logging.getLogger(__name__)


def declared_spec(checkpoint: str) -> PolicySpec:
    """Read what a checkpoint or an export declares, without loading its weights.

    Args:
        checkpoint: Name or folder.

    Returns:
        The specification; `chunk_steps` is 0 if the file does not declare it.

    Raises:
        CheckpointError: The folder is missing, or its config.json is not a LeRobot policy's.
    """
    from ceed_vla.checkpoints.manifest import read_config
    from ceed_vla.folders import is_export, resolve_checkpoint

    if is_export(checkpoint):
        from ceed_vla.serving.served_export import export_spec

        return export_spec(checkpoint, Path(checkpoint))
    config = read_config(resolve_checkpoint(checkpoint))
    try:
        features = {
            name: (feature["type"], feature["shape"])
            for name, feature in config["input_features"].items()
        }
        if not isinstance(config["type"], str):
            raise TypeError
        return PolicySpec(
            checkpoint=checkpoint,
            policy_type=config["type"],
            cameras={
                k: (int(s[0]), int(s[1]), int(s[2]))
                for k, (kind, s) in features.items()
                if kind == "VISUAL"
            },
            states={k: int(s[0]) for k, (kind, s) in features.items() if kind in ("STATE", "ENV")},
            action_dim=int(config["output_features"]["action"]["shape"][0]),
            chunk_steps=int(config.get("chunk_size") or 0),
            n_action_steps=int(config.get("n_action_steps") or 0),
            warmup_s=0.0,
            delta_dims=tuple(int(dim) for dim in config.get("delta_dims") or ()),
            action_names=tuple(str(name) for name in config.get("action_names") or ()),
            control_rate=float(config.get("control_rate") or 0.0),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{short(checkpoint)}: config.json lacks a type, or input_features and output_features "
            "with type and shape; copy it again."
        ) from error


def load_served(settings: PredictorSettings, spec: PolicySpec) -> ServedPolicy:
    """Load a policy in the engine that the settings choose.

    Args:
        settings: What to load, and how.
        spec: Its inputs and outputs.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of a type that cannot be loaded.
        ConfigError: The engine does not run this checkpoint, or this machine lacks the device.
        VerificationError: The engine is edge, and gives other tokens than torch.
    """
    from ceed_vla.folders import is_export

    engine = settings.engine
    if is_export(settings.checkpoint):
        if engine not in ("auto", "edge"):
            raise ConfigError(
                f"engine is {engine}; {settings.checkpoint} is an export, which runs with edge."
            )
        if settings.device != "cpu":
            raise ConfigError(f"device is {settings.device}; exports run on cpu.")
        return _given_export(settings, spec)
    if engine not in ("auto", "eager") and spec.policy_type != "ceed_vla":
        raise ConfigError(
            f"engine is {engine}; a {spec.policy_type} checkpoint supports only eager."
        )
    if engine == "edge" and settings.device != "cpu":
        raise ConfigError(f"device is {settings.device}; the engine edge runs on cpu. Use eager.")
    if engine == "edge" or (engine == "auto" and _may_be_exported(settings, spec)):
        try:
            return _made_export(settings, spec)
        except CeedVLAError as error:
            if engine == "edge":
                raise
            logger.info("%s runs with torch. %s", settings.checkpoint, error)
    require(settings.checkpoint, "policy")
    from ceed_vla.serving.served_checkpoint import ServedCeed, ServedCheckpoint

    kind = ServedCeed if spec.policy_type == "ceed_vla" else ServedCheckpoint
    return kind(settings, spec)


def _may_be_exported(settings: PredictorSettings, spec: PolicySpec) -> bool:
    """Whether the engine auto tries an export."""
    if spec.policy_type != "ceed_vla" or settings.device != "cpu":
        return False
    if not installed("onnxruntime"):
        logger.info("%s runs with torch. onnxruntime is not installed.", settings.checkpoint)
        return False
    return True


def _given_export(settings: PredictorSettings, spec: PolicySpec) -> ServedPolicy:
    """Load the export that is the checkpoint; `ConfigError` if it does not run the decoding."""
    with raised_as(ConfigError, "onnxruntime cannot be imported", again("edge")):
        from ceed_vla.edge.policy import EdgePolicy
    from ceed_vla.serving.served_export import ServedExport

    served = ServedExport(
        EdgePolicy(Path(settings.checkpoint), settings.threads, settings.pin), spec
    )
    plans = [name for name in served.decodings if re.fullmatch("plan.+", name)]
    for name in plans if settings.decoding == "plan" else ():
        served.decoding_config(name)
    served.decoding_config(settings.decoding)
    return served


def _made_export(settings: PredictorSettings, spec: PolicySpec) -> ServedPolicy:
    """Load the export of a checkpoint, which is made if it is missing."""
    from ceed_vla.export.cached import cached_policy
    from ceed_vla.serving.served_export import ServedExport

    policy = cached_policy(
        settings.checkpoint,
        settings.threads,
        [settings.decoding],
        settings.discover_packages,
        settings.pin,
    )
    return ServedExport(policy, spec)
