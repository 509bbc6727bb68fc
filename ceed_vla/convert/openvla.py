"""Convert published OpenVLA folders into policies."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lerobot.configs import FeatureType, PolicyFeature

from ceed_vla.backbones.openvla.config import OpenVLAConfig
from ceed_vla.backbones.openvla.folder import LARGEST_SIDE, action_statistics, read_config
from ceed_vla.checkpoints import save
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.convert.config import ConvertConfig
from ceed_vla.errors import ConfigError
from ceed_vla.files import read_json
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.tokens.openvla import OpenVLATokensConfig

EXPECTED = "expected.json"  # reference outputs next to a model, for `ceed-vla verify`


def _camera_size(text: str) -> tuple[int, int] | None:
    """(height, width) of "480x640"; None if the text is empty."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    sides = [int(side) for side in found.groups()] if found else [0]
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ConfigError(
            f"camera_size is {text[:50]!r}; it must be HEIGHTxWIDTH (480x640), with sides up to "
            f"{LARGEST_SIDE}."
        )
    return sides[0], sides[1]


def published_policy(config: ConvertConfig) -> tuple[CeedVLAPolicy, Any, Any]:
    """Build (policy in eval mode, preprocessor, postprocessor) without saving them."""
    published = read_config(config.path)
    key, statistics = action_statistics(config.path, config.unnorm_key)
    seen = published["image_sizes"][0]
    height, width = _camera_size(config.camera_size) or (
        (seen, seen) if isinstance(seen, int) else seen[-2:]
    )
    same = {name: getattr(config, name) for name in ("weights", "dtype", "quantization", "prompt")}
    settings = CeedVLAConfig(
        input_features={
            f"observation.images.{config.camera}": PolicyFeature(
                FeatureType.VISUAL, (3, height, width)
            )
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(statistics["q01"]),))},
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps or config.chunk_size,
        backbone=OpenVLAConfig(path=str(Path(config.path).resolve()), **same),
        action_tokens=OpenVLATokensConfig(
            n_action_bins=int(published["n_action_bins"]), unnorm_key=key, **statistics
        ),
        label_sigma=0.0,
        device=config.device,
        push_to_hub=False,
    )
    policy = CeedVLAPolicy(settings).to(config.device).eval()
    return policy, *make_ceed_vla_pre_post_processors(settings)


def write(config: ConvertConfig) -> str:
    """Convert the model, and return a line about the checkpoint."""
    policy, *processors = published_policy(replace(config, quantization="none", device="cpu"))
    backbone = cast("OpenVLAConfig", policy.config.backbone)
    # the weights are quantized when the checkpoint is loaded
    policy.config.backbone = replace(backbone, quantization=config.quantization)
    policy.config.device = config.device
    folder = save(config.output_dir, policy, *processors)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    where = f"weights in {config.path}" if config.weights == "reference" else "weights copied"
    return f"{folder}: {size:.1f} MB, {where}{_hint(config, folder)}"


def _hint(config: ConvertConfig, folder: Path) -> str:
    """The next command to run, if the model has reference outputs of this chunk size."""
    expected = Path(config.path) / EXPECTED
    chunk = read_json(expected).get("chunk") if expected.is_file() else None
    if chunk is None:
        return ""
    if chunk != config.chunk_size:
        return (
            f"; {EXPECTED} there has chunks of {chunk}: convert with --chunk_size {chunk} to "
            "verify it"
        )
    return f"; try `ceed-vla verify {config.path} --policy.path {folder}`"
