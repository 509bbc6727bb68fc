"""Configuration of the CEED-VLA policy, registered with LeRobot as ``ceed_vla``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_STATE

import ceed_vla.axes  # these imports register decoders, backbones and vocabularies
import ceed_vla.backbones.compact.config
import ceed_vla.backbones.language.config
import ceed_vla.backbones.openvla.config
import ceed_vla.backbones.pi0_fast.config
import ceed_vla.backbones.vlm.config
import ceed_vla.tokens.fast
import ceed_vla.tokens.openvla  # noqa: F401  (registers itself)
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.checkpoint_files import FORMAT_VERSION, check_kinds, place_base, read_values
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.names import CEED, MOST_OWN, OWN, named_config
from ceed_vla.decoding.registry import find_exit
from ceed_vla.devices import check_device, check_device_name
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.fields import check_fields, ranged, short
from ceed_vla.files import plain_name, saving
from ceed_vla.folders import EXITS, MANIFEST, resolve_checkpoint
from ceed_vla.tokens.base import ActionTokensConfig
from ceed_vla.tokens.uniform import UniformTokensConfig

MOST_SIDE = 16384  # of an image [px], or values of a state


@PreTrainedConfig.register_subclass("ceed_vla")
@dataclass
class CeedVLAConfig(PreTrainedConfig):
    """Sizes, action vocabulary, losses and decoding of a CEED-VLA policy.

    For another robot, change `action_tokens` first (ranges, grippers), then `chunk_size` and
    `n_action_steps`. `backbone` sets the model and its sizes.

    Attributes:
        chunk_size: Steps ``m`` of a chunk; with "uniform" tokens, ``n = m * A``.
        n_action_steps: Steps ``h <= m`` executed before the next replan.
        backbone: Settings of the model.
        action_tokens: Settings of the action vocabulary.
        delta_dims: Action dimensions that are increments, for example of a commanded pose, and
            accumulate over steps; [] for none. Real-time chunking compensates in them for the
            motion of frozen steps (`ceed_vla.real_time`). With None, `train` sets them from the
            names of the actions.
        action_names: Names of the action's dimensions, set from the training data; empty if
            unknown.
        control_rate: Steps per second, set from the training data [Hz]; 0 if unknown.
        label_sigma: Width of the soft labels [bins]; 0 for hard labels.
        auxiliary_scale: Factors of the leading dimensions of ``observation.environment_state`` that
            the state token regresses during training (the grounding target); empty for no
            regression.
        auxiliary_weight: Loss weight of the grounding regression.
        augment_shift: Largest random image shift during training [px].
        augment_brightness: Largest relative change of brightness during training.
        augment_state: Standard deviation of the noise on the normalised state during training.
        decoding: Decoding with the name "ceed"; strict unless distillation has set an early exit.
        decodings: Decoder names that only this checkpoint defines, for example "risk0.05" (from
            `ceed-vla calibrate`), and the decodings that they stand for.
        decode_with: Decoder name that LeRobot's tools use (`ceed_vla.decoding.names`).
        packages: Other packages that define backbone, tokens or decoding; set when a checkpoint is
            written.
        format_version: Version of the checkpoint's files.
        sealed: Whether the folder of the checkpoint has a manifest; false in memory, because only
            `save` and `seal` write one.
    """

    chunk_size: int = ranged(8, "[1, 4096]")
    n_action_steps: int = ranged(4, "[1, 4096]")
    backbone: BackboneConfig = field(default_factory=CompactConfig)
    action_tokens: ActionTokensConfig = field(default_factory=UniformTokensConfig)

    delta_dims: list[int] | None = ranged(None, "[0, 4095]")
    action_names: list[str] = field(default_factory=list)
    control_rate: float = ranged(0.0, "[0, 10000]")
    label_sigma: float = ranged(1.0, "[0, 1000]")
    auxiliary_scale: list[float] = ranged([], "[-1e6, 1e6]")
    auxiliary_weight: float = ranged(0.5, "[0, 1e6]")
    augment_shift: int = ranged(2, "[0, 1024]")
    augment_brightness: float = ranged(0.15, "[0, 1]")
    augment_state: float = ranged(0.02, "[0, 10]")

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    decodings: dict[str, str] = field(default_factory=dict)
    decode_with: str = CEED
    packages: list[str] = field(default_factory=list)
    format_version: int = ranged(FORMAT_VERSION, f"[1, {FORMAT_VERSION}]")
    sealed: bool = False

    optimizer_lr: float = ranged(5e-4, "(0, 10]")
    optimizer_weight_decay: float = ranged(0.05, "[0, 10]")
    scheduler_warmup_steps: int = ranged(100, "[0, 1e9]")
    scheduler_decay_steps: int = ranged(20_000, "[1, 1e9]")

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.IDENTITY,
            "ACTION": NormalizationMode.IDENTITY,
        }
    )

    def __post_init__(self) -> None:
        # LeRobot replaces an unavailable device, such as one in a checkpoint. For a device that the
        # user requested, commands raise an error instead.
        self.asked_device = self.device
        if self.device is not None:
            check_device_name(self.device)
        check_fields(self)
        if self.n_obs_steps != 1:
            raise ConfigError(
                f"n_obs_steps is {short(self.n_obs_steps)}; it must be 1, as the policy reads one "
                "observation."
            )
        if self.use_peft:
            raise ConfigError(
                "use_peft is true, but adapters are part of the checkpoint's weights; set false."
            )
        super().__post_init__()
        self.ranges_from = "the settings"  # source of the action ranges, for the log
        self.sealed = False  # a configuration in memory has no manifest yet
        if self.n_action_steps > self.chunk_size:
            raise ConfigError(
                f"n_action_steps is {self.n_action_steps}; it must not exceed chunk_size = "
                f"{self.chunk_size}. Lower it, or raise chunk_size."
            )
        if not self.action_tokens.ordered:
            self.label_sigma = 0.0  # tokens have no neighbours
        if len(self.decodings) > MOST_OWN:
            raise ConfigError(
                f"decodings has {len(self.decodings)} names; at most {MOST_OWN} are allowed."
            )
        for name, meant in self.decodings.items():
            if not OWN.fullmatch(name) or OWN.fullmatch(meant):
                raise ConfigError(
                    f"decodings has {short(name)}: {short(meant)}; the names must be risk<E>, plan "
                    "or learned, and map to other decoder names."
                )
            self.named(name)
        self.named(self.decode_with)

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **options: Any) -> CeedVLAConfig:
        """Read the configuration of a local checkpoint, without access to a hub.

        Args:
            pretrained_name_or_path: A checkpoint folder, or "teacher" / "student".
            options: Options of LeRobot's own reader.

        Raises:
            CheckpointError: There is no configuration, or it cannot be used.
        """
        folder = resolve_checkpoint(pretrained_name_or_path, ("config.json",))
        if not options.get("cli_overrides"):
            return cls.read(folder)
        read_values(folder)
        config = super().from_pretrained(folder, **options)
        place_base(config, folder)
        return config

    @classmethod
    def read(cls, folder: Path, device: str | None = None) -> CeedVLAConfig:
        """Read the configuration in a checkpoint folder.

        Args:
            folder: The folder.
            device: Replaces the checkpoint's device, unless it is None.

        Raises:
            CheckpointError: The configuration cannot be used.
            ConfigError: This machine does not have `device`.
        """
        values = {name: value for name, value in read_values(folder).items() if name != "type"}
        if device is not None:
            values["device"] = check_device(device)
        # draccus raises exceptions of its own, and passes ConfigErrors on.
        what = f"{folder}: config.json cannot be used"
        with raised_as(CheckpointError, what, "copy it again, or correct it.", passing=()):
            config = draccus.decode(cls, values)
            config.validate_features()
            check_kinds(values, draccus.encode(config))
        return config

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json into a folder; see `saving`."""
        with saving(save_directory, options):
            super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        kinds: list[Any] = [type(self.backbone), type(self.action_tokens)]
        for decoding in (self.decoding, *map(self.named, (self.decode_with, *self.decodings))):
            kinds += [
                decoding.decoder.decode,
                *(find_exit(name).rule for name in decoding.exits),
            ]
        names = {str(kind.__module__).partition(".")[0] for kind in kinds}
        self.packages = sorted(names - {"ceed_vla", "__main__"})
        # The files that the manifest describes are about to change. Only `save` and `seal` write a
        # new manifest, because LeRobot writes the processors later.
        (save_directory / MANIFEST).unlink(missing_ok=True)
        super()._save_pretrained(save_directory)

    def forget(self, *stale: str, new: dict[str, str] | None = None) -> None:
        """Remove the checkpoint's own decoder names, because the basis of their measurements has
        changed.

        Args:
            stale: Prefixes of the names to remove; without any, all are removed.
            new: Names that are added.
        """
        valid = {
            name: meant
            for name, meant in self.decodings.items()
            if stale and not name.startswith(stale)
        }
        self.decodings = {**valid, **(new or {})}
        if OWN.fullmatch(self.decode_with) and self.decode_with not in self.decodings:
            self.decode_with = CEED

    def check_without_exits(self, folder: Path) -> None:
        """Raise `CheckpointError` if a folder without exits has a decoding that needs one."""
        for name in (CEED, self.decode_with, *self.decodings):
            decoder = self.named(name).decoder
            if any("{exit}" in rung for rung in decoder.ladder):
                decoding = f"its decoding {name!r} ({self.named(name).method})"
                raise CheckpointError(
                    f"{folder} lacks {EXITS}, which {decoding} needs; copy the whole checkpoint "
                    "again."
                )

    def named(self, decoding: str | DecodingConfig) -> DecodingConfig:
        """The decoding that a name specifies for this checkpoint; see `named_config`."""
        return named_config(decoding, self.decoding, self.decodings)

    @property
    def action_dim(self) -> int:
        if self.action_feature is None:
            raise ConfigError(
                "There is no action feature; set output_features or build it from a dataset."
            )
        return int(self.action_feature.shape[0])

    @property
    def block_length(self) -> int:
        """Tokens ``n`` of one block."""
        return self.shape.block_length

    @property
    def cameras(self) -> tuple[str, ...]:
        """Feature names of the cameras, in the order of the prefix."""
        return tuple(sorted(self.image_features))

    @property
    def shape(self) -> PolicyShape:
        """Inputs and outputs that the backbone must have."""
        state = self.robot_state_feature
        return PolicyShape(
            cameras={name: tuple(self.image_features[name].shape) for name in self.cameras},  # type: ignore[misc]
            state_dim=int(state.shape[0]) if state else 0,
            action_dim=self.action_dim,
            chunk_size=self.chunk_size,
            action_tokens=self.action_tokens,
            auxiliary_dim=len(self.auxiliary_scale),
            device=self.device or "cpu",
        )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=(0.9, 0.95),
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=1.0,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.optimizer_lr * 0.02,
        )

    def uses(self, feature: str, kind: object) -> bool:
        """Whether a feature is a camera, the state, the action or the environment state."""
        return feature in (OBS_STATE, ACTION) or kind in (FeatureType.VISUAL, FeatureType.ENV)

    def drop_unused_features(self) -> None:
        """Drop features of the data that the policy does not use, for example
        ``observation.force``.

        LeRobot's tools pass all features, and every observation must have those of the policy.
        """
        inputs: dict[str, Any] = self.input_features or {}
        outputs: dict[str, Any] = self.output_features or {}
        broken = {
            name: feature
            for name, feature in inputs.items()
            if not isinstance(feature, PolicyFeature)
        }
        used = {
            name: feature
            for name, feature in inputs.items()
            if name in broken or self.uses(name, feature.type)
        }
        self.input_features: dict[str, PolicyFeature] | None = used
        self.output_features: dict[str, PolicyFeature] | None = {
            n: f for n, f in outputs.items() if n == ACTION
        }

    def validate_features(self) -> None:
        """Drop features that the policy does not use; `ConfigError` for unsupported ones."""
        check_fields(self)
        for name in (*(self.input_features or {}), *(self.output_features or {})):
            plain_name(name, "The name of a feature", ConfigError)
        self.drop_unused_features()
        features = {**(self.input_features or {}), **(self.output_features or {})}
        for name, feature in features.items():
            _check_feature(name, feature)
        if not self.image_features:
            raise ConfigError(
                "The data have no camera; ceed_vla needs at least one feature "
                "observation.images.<camera> with names ['height', 'width', 'channels']."
            )
        if self.action_feature is None or len(self.action_feature.shape) != 1:
            raise ConfigError(
                "The data have no one-dimensional feature 'action'; the policy needs one."
            )
        self.action_tokens.validate_features(self.action_dim)
        if outside := [dim for dim in self.delta_dims or [] if dim >= self.action_dim]:
            raise ConfigError(
                f"delta_dims has {outside}; it must be in [0, {self.action_dim - 1}], the action "
                "dimensions."
            )
        self.backbone.validate_features(self.shape)
        terms = len(self.auxiliary_scale)
        state = self.env_state_feature
        if state is not None and terms > state.shape[0]:
            raise ConfigError(
                f"auxiliary_scale has {terms} entries; observation.environment_state has only "
                f"{state.shape[0]}."
            )


def _check_feature(name: str, feature: object) -> None:
    """Raise `ConfigError` unless a feature of the data has a shape that fits its type."""
    if not isinstance(feature, PolicyFeature) or not isinstance(feature.shape, tuple | list):
        raise ConfigError(
            f"The feature {name} is {short(feature)}; it must have a type and a shape."
        )
    sides = tuple(feature.shape)
    if not sides or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in sides):
        raise ConfigError(
            f"The feature {name} has the shape {sides}; sides must be whole numbers in [1, "
            f"{MOST_SIDE}]."
        )
    if feature.type is FeatureType.VISUAL and (len(sides) != 3 or sides[0] != 3):
        raise ConfigError(f"The camera {name} has the shape {sides}; expected (3, height, width).")
    if feature.type in (FeatureType.STATE, FeatureType.ENV) and len(sides) != 1:
        raise ConfigError(f"The feature {name} has the shape {sides}; it must have one dimension.")
