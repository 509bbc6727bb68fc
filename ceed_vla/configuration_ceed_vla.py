"""Configuration of the CEED-VLA policy, registered with LeRobot as ``ceed_vla``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_STATE

import ceed_vla.axes  # these register what they have
import ceed_vla.backbones.compact.config
import ceed_vla.backbones.openvla.config
import ceed_vla.backbones.pi0_fast.config
import ceed_vla.backbones.vlm.config
import ceed_vla.tokens.fast
import ceed_vla.tokens.openvla  # noqa: F401  (these register what they have)
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.checkpoint_files import FORMAT_VERSION, check_kinds, read_values
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

    What to change first for another robot: `action_tokens` (ranges, grippers), then `chunk_size`
    and `n_action_steps`. `backbone` names the model and its sizes.

    Attributes:
        chunk_size: Steps ``m`` of a chunk; "uniform" tokens: ``n = m * A``.
        n_action_steps: Steps ``h <= m`` executed before the next replan.
        backbone: The model.
        action_tokens: How actions become tokens.
        delta_dims: Action dimensions that are increments, of a commanded pose say, and so add up
            over steps. Real-time chunking makes up for what frozen steps move otherwise than
            planned (`ceed_vla.real_time`). None: `train` takes them from the names of the actions;
            [] for none.
        label_sigma: Width of the soft labels [bins]; 0 gives hard labels.
        auxiliary_scale: Factors of the leading dimensions of ``observation.environment_state`` that
            the state token regresses during training (the grounding target); empty switches it off.
        auxiliary_weight: Weight of that regression.
        augment_shift: Largest random image shift during training [px].
        augment_brightness: Largest relative change of brightness during training.
        augment_state: Standard deviation of the noise on the normalised state during training.
        decoding: What the decoding "ceed" stands for; strict unless distillation wrote an early
            exit here.
        decodings: Names that only this checkpoint has, and what they stand for: "risk0.05" (of
            `ceed-vla calibrate`).
        decode_with: Name of the decoding that LeRobot's tools use (`ceed_vla.decoding.names`).
        packages: Packages of others that backbone, tokens or decoding come from; filled when a
            checkpoint is written.
        format_version: Of the checkpoint's files.
        sealed: Whether the folder that it is read from has a manifest; false in memory, for only
            `save` and `seal` write one.
    """

    chunk_size: int = ranged(8, "[1, 4096]")
    n_action_steps: int = ranged(4, "[1, 4096]")
    backbone: BackboneConfig = field(default_factory=CompactConfig)
    action_tokens: ActionTokensConfig = field(default_factory=UniformTokensConfig)

    delta_dims: list[int] | None = ranged(None, "[0, 4095]")
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
        # LeRobot replaces a device that is not there, as one in a checkpoint may be; commands
        # refuse one asked for.
        self.asked_device = self.device
        if self.device is not None:
            check_device_name(self.device)
        check_fields(self)
        if self.n_obs_steps != 1:
            raise ConfigError(
                f"n_obs_steps is {short(self.n_obs_steps)}; the policy sees one observation."
            )
        if self.use_peft:
            raise ConfigError(
                "use_peft is true; adapters lie in the checkpoint's own weights: set false."
            )
        super().__post_init__()
        self.ranges_from = "the settings"  # of the action tokens; what fills them writes where from
        self.sealed = False  # what is written from here on has no manifest yet
        if self.n_action_steps > self.chunk_size:
            raise ConfigError(
                f"n_action_steps is {self.n_action_steps}, more than chunk_size = "
                f"{self.chunk_size}: a chunk cannot be executed past its end."
            )
        if not self.action_tokens.ordered:
            self.label_sigma = 0.0  # no token is near another
        if len(self.decodings) > MOST_OWN:
            raise ConfigError(
                f"decodings has {len(self.decodings)} names; a checkpoint has at most {MOST_OWN}."
            )
        for name, meant in self.decodings.items():
            if not OWN.fullmatch(name) or OWN.fullmatch(meant):
                raise ConfigError(
                    f"decodings has {short(name)}: {short(meant)}; a checkpoint's own names are "
                    "risk<E>, plan and learned, and stand for others."
                )
            self.named(name)
        self.named(self.decode_with)

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **options: Any) -> CeedVLAConfig:
        """Read the configuration of a local checkpoint, or of "teacher" / "student"; never asks a
        hub.

        `options` are what LeRobot's own reader takes. `CheckpointError` if there is none, or it
        cannot be used.
        """
        folder = resolve_checkpoint(pretrained_name_or_path, ("config.json",))
        if not options.get("cli_overrides"):
            return cls.read(folder)
        read_values(folder)
        return super().from_pretrained(folder, **options)

    @classmethod
    def read(cls, folder: Path, device: str | None = None) -> CeedVLAConfig:
        """The configuration in a checkpoint folder, for `device` if given (`ConfigError` if this
        machine lacks it).
        """
        values = {name: value for name, value in read_values(folder).items() if name != "type"}
        if device is not None:
            values["device"] = check_device(device)
        what = (  # draccus raises its own kinds, and passes on our ConfigErrors
            f"{folder}: config.json cannot be used"
        )
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
        # What it describes is about to change. Only `save` and `seal` write a new one: LeRobot
        # writes the processors later.
        (save_directory / MANIFEST).unlink(missing_ok=True)
        super()._save_pretrained(save_directory)

    def forget(self, *stale: str, new: dict[str, str] | None = None) -> None:
        """Drop the names that only this checkpoint has, or those that begin so: what they were
        measured on has changed.

        `new` ones take their place.
        """
        kept = {
            name: meant
            for name, meant in self.decodings.items()
            if stale and not name.startswith(stale)
        }
        self.decodings = {**kept, **(new or {})}
        if OWN.fullmatch(self.decode_with) and self.decode_with not in self.decodings:
            self.decode_with = CEED

    def check_without_exits(self, folder: Path) -> None:
        """Raise `CheckpointError` if a folder without exits names a decoding that needs one."""
        for name in (CEED, self.decode_with, *self.decodings):
            decoder = self.named(name).decoder
            if any("{exit}" in rung for rung in decoder.ladder):
                decoding = f"its decoding {name!r} ({self.named(name).method})"
                raise CheckpointError(
                    f"{folder} lacks {EXITS}, which {decoding} needs; copy the whole checkpoint "
                    "again."
                )

    def named(self, decoding: str | DecodingConfig) -> DecodingConfig:
        """The decoding that a name stands for, of this checkpoint; see `named_config`."""
        return named_config(decoding, self.decoding, self.decodings)

    @property
    def action_dim(self) -> int:
        if self.action_feature is None:
            raise ConfigError(
                "There is no action feature; set output_features or build it from a data set."
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
        """What the backbone must fit."""
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
        """Whether a feature is a camera, the state, the action, or the environment state (a
        target).
        """
        return feature in (OBS_STATE, ACTION) or kind in (FeatureType.VISUAL, FeatureType.ENV)

    def drop_unused_features(self) -> None:
        """Drop features of the data that the policy does not use, such as ``observation.force``.

        LeRobot's tools pass all of them, and every observation would have to have those that stay.
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
        """Drop features that the policy does not use; `ConfigError` for others it cannot serve."""
        check_fields(self)
        for name in (*(self.input_features or {}), *(self.output_features or {})):
            plain_name(name, "The name of a feature", ConfigError)
        self.drop_unused_features()
        features = {**(self.input_features or {}), **(self.output_features or {})}
        for name, feature in features.items():
            _check_feature(name, feature)
        if not self.image_features:
            raise ConfigError(
                "The data have no camera: ceed_vla needs at least one observation.images.<camera> "
                "feature with names ['height', 'width', 'channels']."
            )
        if self.action_feature is None or len(self.action_feature.shape) != 1:
            raise ConfigError("The data have no one-dimensional action feature.")
        self.action_tokens.validate_features(self.action_dim)
        if outside := [dim for dim in self.delta_dims or [] if dim >= self.action_dim]:
            raise ConfigError(
                f"delta_dims {outside} lie outside the {self.action_dim} action dimensions."
            )
        self.backbone.validate_features(self.shape)
        terms = len(self.auxiliary_scale)
        state = self.env_state_feature
        if state is not None and terms > state.shape[0]:
            raise ConfigError(
                f"auxiliary_scale has {terms} entries, observation.environment_state "
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
            f"The feature {name} has the shape {sides}; sides are whole, in [1, {MOST_SIDE}]."
        )
    if feature.type is FeatureType.VISUAL and (len(sides) != 3 or sides[0] != 3):
        raise ConfigError(f"The camera {name} has the shape {sides}; expected (3, height, width).")
    if feature.type in (FeatureType.STATE, FeatureType.ENV) and len(sides) != 1:
        raise ConfigError(
            f"The feature {name} has the shape {sides}; expected one number, its length."
        )
