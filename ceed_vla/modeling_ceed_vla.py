"""The CEED-VLA policy: LeRobot's policy interface over a backbone, an action vocabulary and a decoder."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION
from torch import Tensor

from ceed_vla.action_tokens import ActionTokenizer, ranges_from_stats
from ceed_vla.backbones.compact import LANGUAGE_KEY, STATE_KEY, CompactBackbone
from ceed_vla.checkpoints import POLICY_FILES, load_weights, read_config, resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding import DecodeResult, DecodingConfig, decode_block, named_config
from ceed_vla.errors import ConfigError, ObservationError

ENVIRONMENT_STATE_KEY = "observation.environment_state"


class CeedVLAPolicy(PreTrainedPolicy):
    """Vision-language-action policy that writes actions as tokens and decodes them in parallel.

    Args:
        config: Sizes and vocabulary; ``input_features`` and ``output_features`` must be set.
        dataset_stats: LeRobot statistics, needed once for ``action_range`` "quantile" and "min_max".

    Raises:
        ConfigError: Features that the policy cannot serve, or action ranges that nothing defines.
    """

    config_class = CeedVLAConfig
    name = "ceed_vla"
    config: CeedVLAConfig

    def __init__(self, config: CeedVLAConfig, dataset_stats: dict[str, Any] | None = None, **_: Any) -> None:
        super().__init__(config)
        config.validate_features()
        if not config.action_low:
            _fill_action_ranges(config, dataset_stats)
        self.tokenizer = ActionTokenizer(
            config.action_low,
            config.action_high,
            config.chunk_size,
            num_bins=config.num_bins,
            gripper_dims=config.gripper_indices,
        )
        state = config.robot_state_feature
        self.backbone = CompactBackbone(
            cameras=config.cameras,
            state_dim=int(state.shape[0]) if state else 0,
            block_length=config.block_length,
            vocabulary_size=config.num_bins,
            words=config.vocabulary_size,
            max_words=config.max_instruction_words,
            image_size=config.image_size,
            image_grid=config.image_grid,
            stem_channels=config.stem_channels,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_width=config.mlp_width,
            auxiliary_dim=len(config.auxiliary_scale),
        )
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> CeedVLAPolicy:
        """Load a local checkpoint in evaluation mode; never asks a hub.

        Args:
            pretrained_name_or_path: A checkpoint folder, or "teacher" / "student" for the shipped ones.
            config: Used instead of the checkpoint's own.
            strict: Refuse missing and additional weights.
            kwargs: What LeRobot's tools pass besides; only ``dataset_stats`` is read.

        Raises:
            CheckpointError: Missing, foreign, truncated or corrupt files.
        """
        folder = resolve_checkpoint(pretrained_name_or_path, POLICY_FILES)
        policy = cls(config if isinstance(config, CeedVLAConfig) else read_config(folder), **kwargs)
        load_weights(policy, folder, strict)
        return policy.to(policy.config.device).eval()

    # ---- acting -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the previous chunk and the queued actions; call it when an episode starts."""
        self._previous: Tensor | None = None
        self._action_queue: deque[Tensor] = deque()

    @torch.no_grad()
    def decode(
        self,
        batch: dict[str, Tensor],
        decoding: str | DecodingConfig = "ceed",
        previous: Tensor | None = None,
        generator: torch.Generator | None = None,
        record_states: bool = False,
    ) -> DecodeResult:
        """Decode one action chunk for every row of a pre-processed batch. Keeps no state.

        Args:
            batch: What the pre-processor returned.
            decoding: "ar", "jacobi" (strict), "ceed" (the checkpoint's early exit) or a `DecodingConfig`.
            previous: Tokens (B, n) of the chunk before, for the warm start; rows of -1 have none.
            generator: Random source of random guesses; the configuration's seed if None.
            record_states: Keep every Jacobi state.

        Returns:
            Tokens (B, n), actions (B, m, A) in the environment's units, forwards, iterations, exit reasons and times.

        Raises:
            ConfigError: Unknown decoding.
            ObservationError: A feature is missing or has another shape.
        """
        self.check_observation(batch)
        config = self.decoding_config(decoding)
        started = time.perf_counter()
        prefix = self.backbone.prefill(batch)
        prefilled = time.perf_counter()
        result = decode_block(
            self.backbone,
            prefix,
            config,
            tokenizer=self.tokenizer,
            previous=previous,
            shift_steps=self.config.n_action_steps,
            generator=generator,
            record_states=record_states,
        )
        result.actions = self.tokenizer.decode(result.tokens)
        result.seconds = {"prefill": prefilled - started, "decode": time.perf_counter() - prefilled}
        return result

    def decoding_config(self, decoding: str | DecodingConfig) -> DecodingConfig:
        """Resolve a decoder's name for this checkpoint."""
        return named_config(decoding, ceed=self.config.decoding)

    def check_observation(self, batch: dict[str, Tensor]) -> None:
        """Raise `ObservationError` unless every feature is there, finite and in its shape, with equal rows."""
        state = self.config.robot_state_feature
        wanted: dict[str, tuple[int | None, ...]] = {
            **dict.fromkeys(self.config.cameras, (3, None, None)),
            STATE_KEY: tuple(state.shape) if state else (),
            LANGUAGE_KEY: (self.config.max_instruction_words,),
        }
        for key, shape in wanted.items():
            if key not in batch:
                have = ", ".join(sorted(k for k in batch if k.startswith("observation."))) or "none"
                raise ObservationError(
                    f"The observation lacks {key!r}; it has {have}. "
                    "Pass it through the checkpoint's pre-processor first."
                )
            rows, *sizes = batch[key].shape
            fits = len(sizes) == len(shape) and all(b in (None, a) for a, b in zip(sizes, shape, strict=True))
            if not fits or rows != batch[self.config.cameras[0]].shape[0]:
                expected = ", ".join("any" if size is None else str(size) for size in shape)
                raise ObservationError(
                    f"{key} has shape {tuple(batch[key].shape)}, expected (B, {expected}) "
                    f"with the rows B of {self.config.cameras[0]}."
                )
        for camera in self.config.cameras:
            if not batch[camera].is_floating_point():
                raise ObservationError(f"{camera} is {batch[camera].dtype}; images are floats in [0, 1].")
        if not torch.isfinite(batch[STATE_KEY]).all():
            raise ObservationError(f"{STATE_KEY} is not finite: {batch[STATE_KEY].tolist()}.")

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """Actions (B, m, A) in the environment's units; warm-started from the chunk of the last call."""
        rows = batch[STATE_KEY].shape[0]
        if self._previous is not None and self._previous.shape[0] != rows:
            self._previous = None
        result = self.decode(batch, "ceed", previous=self._previous)
        self._previous = result.tokens
        assert result.actions is not None
        return result.actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The next action (B, A); decodes a new chunk every ``n_action_steps`` calls."""
        if self._action_queue and self._action_queue[0].shape[0] != batch[STATE_KEY].shape[0]:
            self.reset()  # another number of environments
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch)
            self._action_queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._action_queue.popleft()

    # ---- training -----------------------------------------------------------------------------------------------

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, batch: dict[str, Tensor], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Autoregressive loss of the teacher, with the auxiliary regression where its target is in the batch.

        Args:
            batch: Pre-processed observation with ``action`` (B, m, A) and, optionally, ``action_is_pad`` (B, m) and
                ``observation.environment_state``.
            reduction: "mean", or "none" for one loss a row.

        Returns:
            The loss and its parts as floats.
        """
        self.check_observation(batch)
        if batch.get(ACTION) is None:
            raise ObservationError(
                f"The batch has no {ACTION!r} to learn from; it has {', '.join(sorted(batch))}."
            )
        if self.training:
            batch = self.augment(batch)
        tokens = self.tokenizer.encode(batch[ACTION])  # (B, n)
        embeddings = self.backbone.embed_prefix(batch)
        state, (logits,) = self.backbone.packed_logits(embeddings, [tokens])  # (B, n, V)
        weight = self._token_weight(batch, tokens)
        losses = soft_cross_entropy(logits, tokens, self.config.label_sigma)
        rows = (losses * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B,)
        with torch.no_grad():
            hits = ((logits.argmax(-1) == tokens) * weight).sum() / weight.sum().clamp(min=1)
        parts = {"ar_loss": rows.mean().item(), "token_accuracy": hits.item()}
        if self.backbone.auxiliary is not None and ENVIRONMENT_STATE_KEY in batch:
            auxiliary = self.auxiliary_loss(state, batch[ENVIRONMENT_STATE_KEY])  # (B,)
            parts["auxiliary_loss"] = auxiliary.mean().item()
            rows = rows + self.config.auxiliary_weight * auxiliary
        return (rows.mean() if reduction == "mean" else rows), parts

    def auxiliary_loss(self, state: Tensor, environment_state: Tensor) -> Tensor:
        """Smooth-L1 (B,) between the state token's regression and the scaled leading `environment_state` terms."""
        assert self.backbone.auxiliary is not None
        scale = torch.tensor(self.config.auxiliary_scale, device=state.device)
        target = environment_state[:, : len(scale)] * scale
        return F.smooth_l1_loss(
            self.backbone.auxiliary(state).float(), target, beta=0.1, reduction="none"
        ).mean(1)

    def grounding_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The auxiliary loss alone (scalar), for frames that have no action."""
        if self.backbone.auxiliary is None:
            raise ConfigError("auxiliary_scale is empty: this policy has no grounding target.")
        if self.training:
            batch = self.augment(batch)
        state = self.backbone.prefix_state(self.backbone.embed_prefix(batch))
        return self.auxiliary_loss(state, batch[ENVIRONMENT_STATE_KEY]).mean()

    def augment(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Random shift and brightness of every image, noise on the state."""
        config, batch = self.config, dict(batch)
        for camera in config.cameras:
            image = batch[camera]
            if config.augment_shift:
                image = random_shift(image, config.augment_shift)
            if config.augment_brightness:
                gain = 1 + config.augment_brightness * (
                    2 * torch.rand(len(image), 1, 1, 1, device=image.device) - 1
                )
                image = (image * gain).clamp(0, 1)
            batch[camera] = image
        if config.augment_state:
            batch[STATE_KEY] = batch[STATE_KEY] + config.augment_state * torch.randn_like(batch[STATE_KEY])
        return batch

    def _token_weight(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        padded = batch.get("action_is_pad")
        if padded is None:
            return torch.ones_like(tokens, dtype=torch.float32)
        return (~padded.bool()).repeat_interleave(self.tokenizer.action_dim, dim=1).float()  # (B, n)


def soft_cross_entropy(logits: Tensor, tokens: Tensor, sigma: float) -> Tensor:
    """Cross-entropy (B, n) against a Gaussian of `sigma` bins around every label; hard labels for sigma 0."""
    log_probabilities = F.log_softmax(logits.float(), dim=-1)  # (B, n, V)
    if sigma <= 0:
        return -log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -(label_table(logits.shape[-1], sigma, logits.device)[tokens] * log_probabilities).sum(-1)


def label_table(num_bins: int, sigma: float, device: torch.device) -> Tensor:
    """(V, V): row v is the soft label of bin v."""
    bins = torch.arange(num_bins, device=device, dtype=torch.float32)
    return torch.softmax(-0.5 * ((bins[:, None] - bins[None, :]) / sigma) ** 2, dim=-1)


def random_shift(image: Tensor, pixels: int) -> Tensor:
    """Shift every image (B, 3, H, W) by up to `pixels` in both directions, repeating the edge."""
    batch, _, height, width = image.shape
    padded = F.pad(image, (pixels,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * pixels + 1, (batch, 2), device=image.device)
    rows = offsets[:, :1] + torch.arange(height, device=image.device)  # (B, H)
    columns = offsets[:, 1:] + torch.arange(width, device=image.device)  # (B, W)
    index = torch.arange(batch, device=image.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _fill_action_ranges(config: CeedVLAConfig, dataset_stats: dict[str, Any] | None) -> None:
    if dataset_stats is None or "action" not in dataset_stats:
        raise ConfigError(
            f'action_range "{config.action_range}" needs the data set\'s action statistics, or set '
            'action_range="fixed" with action_low and action_high.'
        )
    low, high = ranges_from_stats(
        dataset_stats["action"], config.action_range, config.gripper_indices, config.num_bins
    )
    config.action_low, config.action_high = [float(v) for v in low], [float(v) for v in high]
