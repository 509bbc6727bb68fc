"""The CEED-VLA policy: LeRobot's policy interface over a backbone, an action vocabulary and a decoder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ceed_vla.backbones.base import runs
from ceed_vla.checkpoints import POLICY_FILES, check_checkpoint, read_config, resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding import DecodeResult, DecodingConfig, decode_block, named_config
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError, TokenError
from ceed_vla.fields import short
from ceed_vla.files import saving
from ceed_vla.lora import merge
from ceed_vla.targets import AUGMENTATION_NOISE, ENVIRONMENT_STATE_KEY, check_targets
from ceed_vla.variable_length import VariableLengthTokenizer
from ceed_vla.weights import load_weights, save_weights


class CeedVLAPolicy(PreTrainedPolicy):
    """Vision-language-action policy that writes actions as tokens and decodes them in parallel.

    Args:
        config: Sizes and vocabulary; ``input_features`` and ``output_features`` must be set.
        dataset_stats: LeRobot statistics, needed once for action ranges that come from the data.

    Attributes:
        tokenizer: Actions to tokens and back.
        backbone: The model.
        referenced: Weights that a checkpoint leaves in the folder the backbone was read from.
        adapters: Low-rank adapters of the checkpoint that have not been added to the weights (`ceed_vla.lora`).
        auxiliary_terms: Regress only so many leading terms of the auxiliary target; None for all. Training sets it.

    Raises:
        ConfigError: Features that the policy cannot serve, or action ranges that nothing defines.
    """

    config_class = CeedVLAConfig
    name = "ceed_vla"
    config: CeedVLAConfig

    def __init__(self, config: CeedVLAConfig, dataset_stats: dict[str, Any] | None = None, **_: Any) -> None:
        if not isinstance(config, CeedVLAConfig):
            raise ConfigError(f"config is a {type(config).__name__}; a CeedVLAPolicy needs a CeedVLAConfig.")
        if not isinstance(dataset_stats, Mapping | None):
            raise ConfigError(f"dataset_stats is a {type(dataset_stats).__name__}; pass statistics or None.")
        super().__init__(config)
        config.validate_features()
        config.action_tokens.fit(config.action_dim, (dataset_stats or {}).get(ACTION))
        self.tokenizer = config.action_tokens.build(config.chunk_size, config.action_dim)
        self.backbone = config.backbone.build(config.shape)
        self.referenced = {f"backbone.{name}" for name in self.backbone.referenced()}
        self.adapters: dict[str, Tensor] = {}
        self.auxiliary_terms: int | None = None
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        merge_adapters: bool = True,
        **kwargs: Any,
    ) -> CeedVLAPolicy:
        """Load a local checkpoint in evaluation mode; never asks a hub.

        Args:
            pretrained_name_or_path: A checkpoint folder, or "teacher" / "student" for the shipped ones.
            config: Used instead of the checkpoint's own.
            strict: Refuse missing and additional weights.
            merge_adapters: Add low-rank adapters in the checkpoint to the weights; otherwise they are in `adapters`.
            kwargs: What LeRobot's tools pass besides; only ``dataset_stats`` is read.

        Raises:
            CheckpointError: Missing, foreign, truncated or corrupt files.
        """
        folder = resolve_checkpoint(pretrained_name_or_path, POLICY_FILES)
        _check_switches(strict=strict, merge_adapters=merge_adapters)
        if not isinstance(config, CeedVLAConfig | None):
            raise ConfigError(f"config is a {type(config).__name__}; pass a CeedVLAConfig or None.")
        chosen = read_config(folder) if config is None else config
        check_checkpoint(folder, chosen)
        try:
            policy = cls(chosen, **kwargs)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: config.json cannot be used ({error}).") from error
        load_weights(policy, folder, strict)
        if merge_adapters and policy.adapters:
            merge(policy, policy.adapters)
            policy.adapters = {}
        return policy.to(policy.config.device).eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write configuration and weights into a folder, as LeRobot does.

        Raises:
            ConfigError: A hub is asked for.
            CheckpointError: No folder's name, or it cannot be written.
        """
        with saving(save_directory, options):
            return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, *arguments: Any, **options: Any) -> str:
        """Refused: nothing here asks a hub.

        Raises:
            ConfigError: Always; it says what to do.
        """
        raise ConfigError("Nothing here asks a hub: save_pretrained writes a folder, `hf upload` uploads it.")

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Configuration and weights; weights that the backbone refers to stay where they are."""
        if state_dict is not None and not (
            isinstance(state_dict, Mapping)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state_dict.items())
        ):
            raise CheckpointError(f"state_dict is {short(state_dict)}; it must map names to tensors.")
        self.config._save_pretrained(save_directory)
        save_weights(self, save_directory, state_dict)

    def to(self, *arguments: Any, **options: Any) -> Any:
        """As torch's.

        Raises:
            ConfigError: No such device or type.
        """
        try:
            return super().to(*arguments, **options)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ConfigError(f"It cannot move to {short(arguments or options)} ({short(error)}).") from error

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
        shift_steps: int | None = None,
        frozen: Tensor | None = None,
        read: bool = True,
    ) -> DecodeResult:
        """Decode one action chunk for every row of a pre-processed batch. Keeps no state.

        Args:
            batch: What the pre-processor returned.
            decoding: "ar", "jacobi" (strict), "ceed" (the checkpoint's early exit) or a `DecodingConfig`.
            previous: Tokens (B, n) of the chunk before, for the warm start; rows of -1 have none.
            generator: Random source of random guesses; the configuration's seed if None.
            record_states: Keep every Jacobi state.
            shift_steps: Steps of `previous` that were executed since; ``config.n_action_steps`` if None.
            frozen: Tokens (B, k * A) of the first ``k`` steps, which stay: they are executed before this chunk
                is ready.
            read: Turn the tokens into actions; without it malformed chunks of variable length are no error.

        Returns:
            Tokens (B, n), actions (B, m, A) in the environment's units, forwards, iterations, exit reasons and times.

        Raises:
            ConfigError: Unknown decoding.
            ObservationError: A feature is missing or has another shape.
            TokenError: A previous chunk or frozen tokens that do not fit.
            MalformedChunkError: Tokens of variable length that stand for no chunk.
            NotFiniteError: The model's scores are NaN or infinite.
        """
        self.check_observation(batch)
        _check_switches(record_states=record_states, read=read)
        config = self.decoding_config(decoding)
        steps = self.config.n_action_steps if shift_steps is None else shift_steps
        if not isinstance(steps, int) or not 0 <= steps <= self.config.chunk_size:
            raise TokenError(f"shift_steps is {short(steps)}; it must be in [0, {self.config.chunk_size}].")
        if not isinstance(generator, torch.Generator | None):
            raise ConfigError(f"generator is a {type(generator).__name__}; pass a torch.Generator or None.")
        started = time.perf_counter()
        with runs(self.backbone):
            prefix = self.backbone.prefill(batch)
            prefilled = time.perf_counter()
            result = decode_block(
                self.backbone,
                prefix,
                config,
                tokenizer=self.tokenizer,
                previous=previous,
                shift_steps=steps,
                frozen=frozen,
                generator=generator,
                record_states=record_states,
            )
        if read:
            result.actions = self.tokenizer.decode(result.tokens)
        result.seconds = {"prefill": prefilled - started, "decode": time.perf_counter() - prefilled}
        return result

    def decoding_config(self, decoding: str | DecodingConfig) -> DecodingConfig:
        """Resolve a decoder's name for this checkpoint."""
        return named_config(decoding, ceed=self.config.decoding)

    def check_observation(self, batch: dict[str, Tensor]) -> int:
        """The rows ``B`` of a pre-processed batch.

        Raises:
            ObservationError: A feature is missing, has another shape or type, or is not finite.
        """
        return self.backbone.check_observation(batch)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """Actions (B, m, A) in the environment's units; warm-started from the chunk of the last call."""
        rows = self.check_observation(batch)
        if self._previous is not None and self._previous.shape[0] != rows:
            self._previous = None
        result = self.decode(batch, "ceed", previous=self._previous)
        self._previous = result.tokens
        assert result.actions is not None
        return result.actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The next action (B, A); decodes a new chunk every ``n_action_steps`` calls."""
        if self._action_queue and self._action_queue[0].shape[0] != self.check_observation(batch):
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
        if not isinstance(reduction, str) or reduction not in ("mean", "none"):
            raise ConfigError(f"reduction is {short(reduction)}; choose mean or none.")
        rows_count = self.check_observation(batch)
        if batch.get(ACTION) is None:
            raise ObservationError(
                f"The batch has no {ACTION!r} to learn from; it has {', '.join(sorted(map(str, batch)))}."
            )
        self._check_targets(batch, rows_count)
        if self.training:
            batch = self._augment(batch)
        tokens = self.tokenizer.encode(batch[ACTION])  # (B, n)
        with runs(self.backbone):
            embeddings = self.backbone.embed_prefix(batch)
            state, (logits,) = self.backbone.packed_logits(embeddings, [tokens])  # (B, n, V)
        weight = self._token_weight(batch, tokens)
        sigma = self.config.label_sigma if self.config.action_tokens.ordered else 0.0
        losses = soft_cross_entropy(logits, tokens, sigma)
        rows = (losses * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B,)
        with torch.no_grad():
            hits = ((logits.argmax(-1) == tokens) * weight).sum() / weight.sum().clamp(min=1)
        parts = {"ar_loss": rows.mean().item(), "token_accuracy": hits.item()}
        if self.backbone.auxiliary is not None and batch.get(ENVIRONMENT_STATE_KEY) is not None:
            auxiliary = self.auxiliary_loss(embeddings, state, batch[ENVIRONMENT_STATE_KEY])  # (B,)
            parts["auxiliary_loss"] = auxiliary.mean().item()
            rows = rows + self.config.auxiliary_weight * auxiliary
        return (rows.mean() if reduction == "mean" else rows), parts

    def finish_training(self) -> None:
        """Drop the head that only training uses, in the configuration too."""
        self.backbone.early_auxiliary = None
        self.config.backbone = self.config.backbone.finished()

    def auxiliary_loss(self, embeddings: Any, state: Tensor, environment_state: Tensor) -> Tensor:
        """Smooth-L1 (B,) between the regressions and the scaled leading `environment_state` terms.

        Args:
            embeddings: From the backbone's `embed_prefix`; its early head regresses from these.
            state: The state token's final hidden vector (B, d); the head after the trunk regresses from it.
            environment_state: (B, E) [m, rad].
        """
        backbone = self.backbone
        assert backbone.auxiliary is not None
        scale = torch.tensor(self.config.auxiliary_scale[: self.auxiliary_terms], device=state.device)
        target = environment_state[:, : len(scale)] * scale
        regressed = [backbone.auxiliary(state)]
        if backbone.early_auxiliary is not None:
            regressed.append(backbone.early_auxiliary(embeddings))
        losses = [
            F.smooth_l1_loss(found[:, : len(scale)].float(), target, beta=0.1, reduction="none").mean(1)
            for found in regressed
        ]
        return torch.stack(losses).sum(0)

    def grounding_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The auxiliary loss alone (scalar), for frames that have no action."""
        if self.backbone.auxiliary is None:
            raise ConfigError("auxiliary_scale is empty: this policy has no grounding target.")
        rows = self.check_observation(batch)
        if batch.get(ENVIRONMENT_STATE_KEY) is None:
            raise ObservationError(f"The batch has no {ENVIRONMENT_STATE_KEY!r} to learn from.")
        self._check_targets(batch, rows)
        if self.training:
            batch = self._augment(batch)
        with runs(self.backbone):
            embeddings = self.backbone.embed_prefix(batch)
            state = self.backbone.prefix_state(embeddings)
        return self.auxiliary_loss(embeddings, state, batch[ENVIRONMENT_STATE_KEY]).mean()

    def augment(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Random shift and brightness of every image that the backbone sees as such, noise on the state.

        ``batch["augmentation_noise"]`` (B, `augmentation_size`), uniform in [0, 1), decides where it is given: then
        the augmentation of a frame does not depend on how a batch is split over processes.
        """
        self._check_targets(batch, self.check_observation(batch))
        return self._augment(batch)

    def _augment(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`augment` of a batch that was checked."""
        config, batch = self.config, dict(batch)
        images = {camera: batch[camera] for camera in self.backbone.augmented_images}
        noise = batch.pop(AUGMENTATION_NOISE, None)
        if not self.augmentation_size:
            return batch
        if noise is None:
            rows = len(next(iter(images.values()))) if images else len(batch[OBS_STATE])
            noise = torch.rand(rows, self.augmentation_size)
        for i, (camera, image) in enumerate(images.items()):
            own = noise[:, 3 * i : 3 * i + 3].to(image.device)  # (B, 3)
            if config.augment_shift:
                image = random_shift(image, config.augment_shift, own[:, :2])
            if config.augment_brightness:
                gain = 1 + config.augment_brightness * (2 * own[:, 2, None, None, None] - 1)
                image = (image * gain).clamp(0, 1)
            batch[camera] = image
        if config.augment_state and config.robot_state_feature is not None:
            state = batch[OBS_STATE]  # (B, D)
            uniform = noise[:, 3 * len(images) :].to(state.device, state.dtype).clamp(1e-6, 1 - 1e-6)
            batch[OBS_STATE] = state + config.augment_state * torch.special.ndtri(uniform)
        return batch

    @property
    def augmentation_size(self) -> int:
        """Random numbers a row that `augment` needs: shift (2) and brightness of every image, noise of the state."""
        state = self.config.robot_state_feature
        return 3 * len(self.backbone.augmented_images) + (int(state.shape[0]) if state else 0)

    def _check_targets(self, batch: Mapping[str, Any], rows: int) -> None:
        check_targets(
            batch, rows, self.config.chunk_size, self.augmentation_size, len(self.config.auxiliary_scale)
        )

    def _token_weight(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        if isinstance(self.tokenizer, VariableLengthTokenizer):
            return self.tokenizer.weight(tokens)
        padded = batch.get("action_is_pad")
        if padded is None:
            return torch.ones_like(tokens, dtype=torch.float32)
        return (~padded.bool()).repeat_interleave(self.tokenizer.action_dim, dim=1).float()  # (B, n)


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {short(value)}; it must be true or false.")


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


def random_shift(image: Tensor, pixels: int, noise: Tensor | None = None) -> Tensor:
    """Shift every image (B, 3, H, W) by up to `pixels` in both directions, repeating the edge.

    Args:
        image: The images.
        pixels: Largest shift [px].
        noise: (B, 2) uniform in [0, 1), which decide; drawn if None.
    """
    batch, _, height, width = image.shape
    padded = F.pad(image, (pixels,) * 4, mode="replicate")
    noise = torch.rand(batch, 2, device=image.device) if noise is None else noise
    offsets = (noise * (2 * pixels + 1)).long().clamp(max=2 * pixels)  # (B, 2)
    rows = offsets[:, :1] + torch.arange(height, device=image.device)  # (B, H)
    columns = offsets[:, 1:] + torch.arange(width, device=image.device)  # (B, W)
    index = torch.arange(batch, device=image.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
