"""`ceed-vla convert`: make a checkpoint of this project from a model as it was published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lerobot.configs import FeatureType, PolicyFeature

from ceed_vla.action_tokens_config import OpenVLATokensConfig
from ceed_vla.backbones.config import DTYPES, WEIGHTS
from ceed_vla.backbones.openvla.config import OpenVLAConfig
from ceed_vla.backbones.openvla.folder import LARGEST_SIDE, action_statistics, read_config
from ceed_vla.checkpoints import save
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding import DecodingConfig
from ceed_vla.devices import check_device_name
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, chosen, ranged
from ceed_vla.files import plain_name, read_json

if TYPE_CHECKING:
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

PI0_FAST = "pi0_fast"
KINDS = ("openvla", PI0_FAST)
EXPECTED = "expected.json"  # reference outputs beside a model, for `ceed-vla verify`


@dataclass
class ConvertConfig:
    """Make a checkpoint that every other command loads from a model as it was published.

    Attributes:
        path: Folder of the published model.
        from_: What it is.
        output_dir: Where the checkpoint goes.
        weights: "copied" into the checkpoint, or by "reference": it then reads them from `path`.
        dtype: openvla: Type of the weights: "auto" (as published), "float32", "bfloat16" or "float16".
        quantization: openvla: "8bit" or "4bit" language model on a GPU (bitsandbytes), with weights by reference.
        unnorm_key: openvla: Data set whose statistics un-normalise the actions; needed where the model has several.
        chunk_size: openvla: Steps of one action chunk that the model was trained to write.
        n_action_steps: openvla: Steps executed before the next replan; all of them if 0.
        prompt: openvla: text around ``{instruction}``; the usual one of the folder's language model if empty.
        camera: openvla: Name of the camera: the policy reads ``observation.images.<camera>``.
        camera_size: openvla: HEIGHTxWIDTH of the camera's images, such as 480x640, which the model's own transform then
            scales as it did in training; the size that the model sees if empty.
        fast_tokenizer: pi0_fast: folder of the FAST tokenizer; the one that the checkpoint names if empty.
        text_tokenizer: pi0_fast: folder of PaliGemma's tokenizer; the one that the checkpoint names if empty.
        vocabulary: pi0_fast: "full" (its own tokens for any weights) or "actions" (only what an action can hold).
        device: Where checkpoints run unless told otherwise.
    """

    path: str
    output_dir: str = ""
    from_: str = chosen("openvla", KINDS)
    weights: str = chosen("copied", WEIGHTS)
    dtype: str = chosen("auto", ("auto", *DTYPES))
    quantization: str = chosen("none", ("none", "8bit", "4bit"))
    unnorm_key: str = ""
    chunk_size: int = ranged(1, "[1, 4096]")
    n_action_steps: int = ranged(0, "[0, 4096]")
    prompt: str = ""
    camera: str = "front"
    camera_size: str = ""
    fast_tokenizer: str = ""
    text_tokenizer: str = ""
    vocabulary: str = chosen("full", ("full", "actions"))
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        check_device_name(self.device)
        plain_name(self.camera, "camera", ConfigError)
        others = [name for kind, names in _OWN.items() if kind != self.from_ for name in names]
        defaults = {item.name: item.default for item in fields(self)}
        ignored = [f"--{name}" for name in others if getattr(self, name) != defaults[name]]
        if ignored:
            raise ConfigError(f"{', '.join(ignored)} means nothing with --from {self.from_}; leave it out.")


def openvla_policy(config: ConvertConfig) -> CeedVLAConfig:
    """The policy configuration of an OpenVLA folder.

    Raises:
        CheckpointError: Another kind of folder, or one that is incomplete.
        ConfigError: An unknown ``unnorm_key``, or settings that contradict each other.
    """
    published = read_config(config.path)
    key, statistics = action_statistics(config.path, config.unnorm_key)
    height, width = _camera_size(config.camera_size) or _size(published["image_sizes"][0])
    return CeedVLAConfig(
        input_features={
            f"observation.images.{config.camera}": PolicyFeature(FeatureType.VISUAL, (3, height, width))
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(statistics["q01"]),))},
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps or config.chunk_size,
        backbone=OpenVLAConfig(
            path=str(Path(config.path).resolve()),
            weights=config.weights,
            dtype=config.dtype,
            quantization=config.quantization,
            prompt=config.prompt,
        ),
        action_tokens=OpenVLATokensConfig(
            n_action_bins=int(published["n_action_bins"]), unnorm_key=key, **statistics
        ),
        label_sigma=0.0,
        # Strict until the model is distilled: an early exit would change what it does.
        decoding=DecodingConfig(method="jacobi", guess="previous"),
        device=config.device,
        push_to_hub=False,
    )


def _camera_size(text: str) -> tuple[int, int] | None:
    """(height, width) of "480x640"."""
    if not text:
        return None
    height, _, width = text.partition("x")
    sides = [int(side) for side in (height, width) if side.isascii() and side.isdecimal() and len(side) < 6]
    if len(sides) < 2 or not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ConfigError(
            f"camera_size is {text[:50]!r}; give HEIGHTxWIDTH, such as 480x640, sides up to {LARGEST_SIDE}."
        )
    return sides[0], sides[1]


def _size(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _convert_pi0_fast(config: ConvertConfig) -> str:
    """LeRobot's pi0-FAST, which brings its own processors."""
    from ceed_vla.convert.pi0_fast import convert_pi0_fast

    folder = convert_pi0_fast(
        config.path,
        config.output_dir,
        fast_tokenizer=config.fast_tokenizer,
        text_tokenizer=config.text_tokenizer,
        vocabulary=config.vocabulary,
        weights=config.weights,
        device=config.device,
    )
    return f"{folder}: LeRobot's pi0-FAST, weights {config.weights}, vocabulary {config.vocabulary}"


# Settings that only one kind has.
_OWN = {
    "openvla": (
        "dtype",
        "quantization",
        "unnorm_key",
        "chunk_size",
        "n_action_steps",
        "prompt",
        "camera",
        "camera_size",
    ),
    PI0_FAST: ("fast_tokenizer", "text_tokenizer", "vocabulary"),
}
CONVERTERS: dict[str, Callable[[ConvertConfig], CeedVLAConfig]] = {"openvla": openvla_policy}


def published_policy(config: ConvertConfig) -> tuple[CeedVLAPolicy, Any, Any]:
    """The model as (policy in eval mode, pre-processor, post-processor), not saved; see `convert`."""
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
    from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors

    settings = CONVERTERS[config.from_](config)
    policy = CeedVLAPolicy(settings).to(config.device).eval()
    return policy, *make_ceed_vla_pre_post_processors(settings)


def convert(config: ConvertConfig) -> str:
    """Convert a model.

    Returns:
        A line about what was written.

    Raises:
        CheckpointError: A folder that is no such model, or an incomplete or damaged one.
        ConfigError: Settings that do not fit the model.
    """
    if not config.output_dir:
        raise ConfigError("No --output_dir; name the folder for the checkpoint.")
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is no empty folder; choose another --output_dir.")
    if config.from_ == PI0_FAST:
        return _convert_pi0_fast(config)
    policy, *processors = published_policy(replace(config, quantization="none", device="cpu"))
    backbone = cast("OpenVLAConfig", policy.config.backbone)
    policy.config.backbone = replace(
        backbone, quantization=config.quantization
    )  # quantised where it is loaded
    policy.config.device = config.device
    folder = save(config.output_dir, policy, *processors)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    where = f"weights in {config.path}" if config.weights == "reference" else "weights copied"
    return f"{folder}: {size:.1f} MB, {where}{_hint(config, folder)}"


def _hint(config: ConvertConfig, folder: Path) -> str:
    """What to run next, where the model came with reference outputs that fit."""
    expected = Path(config.path) / EXPECTED
    chunk = read_json(expected).get("chunk") if expected.is_file() else None
    if chunk is None:
        return ""
    if chunk != config.chunk_size:
        return f"; {EXPECTED} there has chunks of {chunk}: convert with --chunk_size {chunk} to verify it"
    return f"; try `ceed-vla verify {config.path} --policy_path {folder}`"
