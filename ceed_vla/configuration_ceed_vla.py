"""Configuration of the CEED-VLA policy, registered with LeRobot as ``ceed_vla``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import ConfigError

ACTION_RANGES = ("quantile", "min_max", "fixed")


def _early_exit() -> DecodingConfig:
    return DecodingConfig(method="jacobi", guess="previous", max_iterations=2, executed_steps=4)


@PreTrainedConfig.register_subclass("ceed_vla")
@dataclass
class CeedVLAConfig(PreTrainedConfig):
    """Sizes, action vocabulary, losses and decoding of a CEED-VLA policy.

    What to change first for another robot: `action_range` (or `action_low` / `action_high`), `gripper_dims`, then
    `chunk_size` and `n_action_steps`. The other fields are sizes that the shipped checkpoints were trained with.

    Attributes:
        chunk_size: Steps ``m`` of one action chunk; a block has ``n = m * A`` tokens.
        n_action_steps: Steps ``h <= m`` executed before the next replan.
        num_bins: Values of one action token. Odd numbers put zero exactly on a bin centre.
        action_range: Where the bins end: "quantile" (1 % and 99 %), "min_max" (of the data), or "fixed"
            (`action_low`, `action_high`). Quantiles break dimensions that are nearly always zero.
        action_low: Lower end of every action dimension [the data set's units]; filled from the data unless fixed.
        action_high: Upper end of every action dimension [the data set's units].
        gripper_dims: Two-valued action dimensions; always min/max, decoded exactly, never relaxed by a tolerance.
        image_size: Side of the square images that the stems see [px]; other sizes are resized.
        image_grid: A camera gives ``image_grid ** 2`` prefix tokens.
        stem_channels: Channels of the four convolutions of a camera stem.
        max_instruction_words: Longest instruction [words].
        vocabulary_size: Rows of the word embedding (padding and unknown included).
        width: Model width ``d``.
        layers: Decoder layers.
        heads: Attention heads.
        mlp_width: Hidden width of the gated MLP.
        label_sigma: Width of the soft labels [bins]; 0 gives hard labels.
        auxiliary_scale: Factors of the leading dimensions of ``observation.environment_state`` that the state token
            regresses during training (the grounding target); empty switches it off.
        auxiliary_weight: Weight of that regression.
        augment_shift: Largest random image shift during training [px].
        augment_brightness: Largest relative change of brightness during training.
        augment_state: Standard deviation of the noise on the normalised state during training.
        decoding: The early-exit decoding that ``decoding="ceed"`` and LeRobot's tools use.
    """

    chunk_size: int = 8
    n_action_steps: int = 4
    num_bins: int = 255
    action_range: str = "quantile"
    action_low: list[float] = field(default_factory=list)
    action_high: list[float] = field(default_factory=list)
    gripper_dims: list[int] = field(default_factory=lambda: [-1])

    image_size: int = 96
    image_grid: int = 4
    stem_channels: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    max_instruction_words: int = 12
    vocabulary_size: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6
    mlp_width: int = 512

    label_sigma: float = 1.0
    auxiliary_scale: list[float] = field(default_factory=list)
    auxiliary_weight: float = 0.5
    augment_shift: int = 2
    augment_brightness: float = 0.15
    augment_state: float = 0.02

    decoding: DecodingConfig = field(default_factory=_early_exit)

    optimizer_lr: float = 5e-4
    optimizer_weight_decay: float = 0.05
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 20_000

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.IDENTITY,
            "ACTION": NormalizationMode.IDENTITY,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "chunk_size",
            "n_action_steps",
            "image_size",
            "image_grid",
            "width",
            "layers",
            "heads",
            "mlp_width",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_action_steps > self.chunk_size:
            raise ConfigError(
                f"n_action_steps is {self.n_action_steps}, more than chunk_size = {self.chunk_size}: "
                "a chunk cannot be executed past its end."
            )
        if (self.decoding.executed_steps or 1) > self.chunk_size:
            raise ConfigError(
                f"decoding.executed_steps is {self.decoding.executed_steps}, more than chunk_size = {self.chunk_size}; "
                "set it to n_action_steps."
            )
        if self.num_bins < 2:
            raise ConfigError(
                f"num_bins is {self.num_bins}; at least 2 bins are needed (255 is the default)."
            )
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}.")
        if len(self.stem_channels) != 4:
            raise ConfigError(
                f"stem_channels has {len(self.stem_channels)} entries; a stem has exactly 4 convolutions."
            )
        if self.image_size % (8 * self.image_grid):
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of 8 * image_grid = {8 * self.image_grid}; "
                "the stem halves the image three times and then cuts it into the grid."
            )
        if self.action_range not in ACTION_RANGES:
            raise ConfigError(
                f"action_range is {self.action_range!r}; choose one of {', '.join(ACTION_RANGES)}."
            )
        if len(self.action_low) != len(self.action_high):
            raise ConfigError(
                f"action_low has {len(self.action_low)} values and action_high {len(self.action_high)}; "
                "give one of each for every action dimension."
            )
        if self.action_range == "fixed" and not self.action_low:
            raise ConfigError('action_range "fixed" needs action_low and action_high, one value a dimension.')
        if not all(math.isfinite(v) for v in (*self.action_low, *self.action_high, *self.auxiliary_scale)):
            raise ConfigError("action_low, action_high and auxiliary_scale must be finite.")

    @property
    def action_dim(self) -> int:
        """Action dimensions ``A``."""
        if self.action_feature is None:
            raise ConfigError(
                "The configuration names no action feature; set output_features or build it from a data set."
            )
        return int(self.action_feature.shape[0])

    @property
    def block_length(self) -> int:
        """Tokens ``n = m * A`` of one block."""
        return self.chunk_size * self.action_dim

    @property
    def gripper_indices(self) -> tuple[int, ...]:
        """`gripper_dims` as non-negative indices."""
        return tuple(sorted({d % self.action_dim for d in self.gripper_dims}))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Feature names of the cameras, in the order of the prefix."""
        return tuple(sorted(self.image_features))

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

    def validate_features(self) -> None:
        """Check that the features can be served.

        Raises:
            ConfigError: No camera, no ``observation.state``, no action, or ranges of another action dimension.
        """
        if not self.image_features:
            raise ConfigError(
                "The data have no camera: ceed_vla needs at least one observation.images.<camera> feature with "
                "names ['height', 'width', 'channels']."
            )
        if self.robot_state_feature is None:
            raise ConfigError("The data have no observation.state; ceed_vla reads one state vector.")
        if self.action_feature is None or len(self.action_feature.shape) != 1:
            raise ConfigError("The data have no one-dimensional action feature.")
        bad = [d for d in self.gripper_dims if not -self.action_dim <= d < self.action_dim]
        if bad:
            raise ConfigError(f"gripper_dims {bad} lie outside the {self.action_dim} action dimensions.")
        if self.action_low and len(self.action_low) != self.action_dim:
            raise ConfigError(
                f"action_low/action_high have {len(self.action_low)} values, the action has {self.action_dim}."
            )
        if self.auxiliary_scale and self.env_state_feature is not None:
            available = int(self.env_state_feature.shape[0])
            if len(self.auxiliary_scale) > available:
                raise ConfigError(
                    f"auxiliary_scale has {len(self.auxiliary_scale)} entries, "
                    f"observation.environment_state only {available}."
                )


def tabletop_config(**changes: object) -> CeedVLAConfig:
    """The configuration of the shipped tabletop checkpoints, with `changes` on top."""
    values: dict[str, object] = {
        "input_features": {
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
        "action_range": "fixed",
        "action_low": [-1.0, -1.0, -1.0, -0.25, -0.25, -1.0, -1.0],
        "action_high": [1.0, 1.0, 1.0, 0.25, 0.25, 1.0, 1.0],
        "auxiliary_scale": [10.0, 10.0, 10.0, 1.0, 1.0, 10.0, 10.0, 10.0],
        "device": "cpu",
        "push_to_hub": False,
    }
    return CeedVLAConfig(**{**values, **changes})  # type: ignore[arg-type]
