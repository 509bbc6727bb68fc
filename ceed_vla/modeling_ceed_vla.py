"""The CEED-VLA policy: LeRobot's policy interface over a backbone, an action vocabulary and a
decoder.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION
from torch import Tensor

from ceed_vla.axes import SAVED
from ceed_vla.backbones.base import runs
from ceed_vla.checkpoints.manifest import check_files, held_still
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding import DecodeResult, DecodingConfig, decode_block, prefill
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import short
from ceed_vla.files import saving
from ceed_vla.folders import POLICY_FILES, PROCESSOR_FILES, WEIGHTS, resolve_checkpoint
from ceed_vla.from_data import (
    correct_action_statistics,
    log_lerobot,
    normalises_actions,
    take_from_lerobot,
    without_quantiles,
)
from ceed_vla.lora import merge

# which registers the steps that a checkpoint may name
from ceed_vla.processor_ceed_vla import widen
from ceed_vla.processor_steps import check_processors
from ceed_vla.real_time import continuation, decode_behind
from ceed_vla.supervision import teacher_loss
from ceed_vla.weights import check_sizes, load_weights, save_weights


class CeedVLAPolicy(PreTrainedPolicy):
    """Vision-language-action policy that writes actions as tokens and decodes them in parallel.

    Args:
        config: Sizes and vocabulary; ``input_features`` and ``output_features`` must be set.
        dataset_stats: Statistics, needed once for action ranges that come from the data. Those of
            a LeRobotDataset itself have a ``count``; their quantiles are averages over episodes
            and are not used. Changed in place: LeRobot's normalisers get the same object.
        dataset_meta: LeRobot's metadata of the data set, which `lerobot-train` passes. A new
            policy then takes what its settings leave open from the frames, as in `ceed-vla train`.

    Attributes:
        tokenizer: Actions to tokens and back.
        backbone: The model.
        referenced: Weights that a checkpoint leaves in the folder the backbone was read from.
        adapters: Low-rank adapters of the checkpoint that have not been added to the weights
            (`ceed_vla.lora`).
        auxiliary_terms: Regress only so many leading terms of the auxiliary target; None for all.
            Training sets it.

    `ConfigError`: Features that the policy cannot serve, or action ranges that nothing defines.
    """

    config_class = CeedVLAConfig
    name = "ceed_vla"
    config: CeedVLAConfig

    def __init__(
        self,
        config: CeedVLAConfig,
        dataset_stats: dict[str, Any] | None = None,
        dataset_meta: Any | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        if dataset_meta is not None:
            dataset_stats = {} if dataset_stats is None else dataset_stats
            take_from_lerobot(config, dataset_meta, dataset_stats)
        config.validate_features()
        action_stats = (dataset_stats or {}).get(ACTION)
        if dataset_meta is None and isinstance(action_stats, Mapping) and "count" in action_stats:
            action_stats = without_quantiles(action_stats)
        config.action_tokens.fit(config.action_dim, action_stats)
        # which LeRobot's tools give the normaliser of a checkpoint that they train on, too
        widen(dataset_stats)
        self.tokenizer = config.action_tokens.build(config.chunk_size, config.action_dim)
        mode = config.normalization_mapping.get("ACTION", NormalizationMode.IDENTITY)
        if mode is not NormalizationMode.IDENTITY and not self.tokenizer.normalised:
            raise ConfigError(
                f"normalization_mapping has ACTION {mode.value}, but {config.action_tokens.type} "
                "tokens write what a data set has; leave it IDENTITY."
            )
        self.tokenizer.ordered = config.action_tokens.ordered
        self.backbone = config.backbone.build(config.shape)
        self.referenced = {f"backbone.{name}" for name in self.backbone.referenced}
        self.adapters: dict[str, Tensor] = {}
        self.auxiliary_terms: int | None = None
        self.reset()
        if dataset_meta is not None:
            log_lerobot(config, self.tokenizer, dataset_meta)

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

        `CheckpointError` for missing, foreign, truncated or corrupt files, and for files of a
        sealed checkpoint that differ from its manifest.

        Args:
            pretrained_name_or_path: A checkpoint folder, or "teacher" / "student" for the shipped
                ones.
            config: Used instead of the checkpoint's own.
            strict: Refuse missing and additional weights.
            merge_adapters: Add low-rank adapters in the checkpoint to the weights; otherwise they
                are in `adapters`.
            kwargs: What LeRobot's tools pass besides; only ``dataset_stats`` and ``dataset_meta``
                are read. The checkpoint's action ranges stay.
        """
        folder = resolve_checkpoint(pretrained_name_or_path, POLICY_FILES)
        with held_still(folder):
            check_files(folder)
            chosen = CeedVLAConfig.read(folder) if config is None else config
            policy = cls._from_folder(folder, chosen, strict, **kwargs)
        if merge_adapters and policy.adapters:
            merge(policy, policy.adapters)
            policy.adapters = {}
        return policy.to(policy.config.device).eval()

    @classmethod
    def _from_folder(
        cls, folder: Path, chosen: CeedVLAConfig, strict: bool, **kwargs: Any
    ) -> CeedVLAPolicy:
        """The policy in a folder whose files have been checked against their manifest."""
        chosen.ranges_from = "the checkpoint"
        chosen.drop_unused_features()  # LeRobot's tools have put in those of their data
        # Before anything is built. Without an architecture the model would be read from wherever
        # `path` says.
        if getattr(chosen.backbone, "architecture", None) == "":
            raise CheckpointError(
                f"{folder}: backbone.architecture in config.json is empty; copy it again."
            )
        # Sizes that the weights cannot have are not built.
        files = chosen.backbone.weight_files() or [folder / WEIGHTS]
        check_sizes(files, *chosen.backbone.least_sizes(chosen.shape))
        # a policy without is still a policy
        if any((folder / name).exists() for name in PROCESSOR_FILES):
            check_processors(folder, chosen)
        meta = kwargs.get("dataset_meta")
        stats = kwargs.get("dataset_stats")
        if meta is not None and stats is not None and normalises_actions(chosen):
            correct_action_statistics(meta, stats)
        try:
            policy = cls(chosen, dataset_stats=stats)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: config.json cannot be used ({error}).") from error
        load_weights(policy, folder, strict)
        for saved in SAVED:
            saved.load(policy.backbone, folder)
        if not policy.backbone.exits:
            CeedVLAConfig.read(folder, "cpu").check_without_exits(folder)
        if meta is not None:
            log_lerobot(chosen, policy.tokenizer, meta)
        return policy

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write configuration and weights into a folder, as LeRobot does; see `saving`."""
        with saving(save_directory, options):
            return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, *arguments: Any, **options: Any) -> str:
        """Refused with a `ConfigError`, which says what to do: nothing here asks a hub."""
        raise ConfigError(
            "Nothing here asks a hub: save_pretrained writes a folder, `hf upload` uploads it."
        )

    def _save_pretrained(
        self, save_directory: Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Configuration and weights; weights that the backbone refers to stay where they are."""
        self.config._save_pretrained(save_directory)
        save_weights(self, save_directory, state_dict)
        for saved in SAVED:
            saved.save(self.backbone, save_directory)

    # Moves and converts modules that are no submodules, too.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for saved in SAVED:
            for own in saved.modules(self.backbone):
                own._apply(fn)
        return super()._apply(fn, recurse)

    # ---- acting ----------------------------------------------------------------------------------

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
        executed_steps: int | None = None,
        frozen_steps: int = 0,
        read: bool = True,
        on_proven: Callable[[Tensor, int, int], None] | None = None,
        deadline_s: float | None = None,
        frozen: None = None,
    ) -> DecodeResult:
        """Decode one action chunk for every row of a pre-processed batch. Keeps no state.

        Args:
            batch: What the pre-processor returned.
            decoding: A name, such as "ar", "jacobi" (strict), "cap2" or "ceed" (the checkpoint's
                own); see `ceed_vla.decoding.names`. Or a `DecodingConfig`.
            previous: Tokens (B, n) of the chunk before, for the warm start; rows of -1 have none.
            generator: Random source of random guesses; the configuration's seed if None.
            record_states: Keep every Jacobi state.
            shift_steps: Steps of `previous` that were executed since; ``config.n_action_steps`` if
                None.
            executed_steps: Steps of this chunk executed before the next; None:
                ``config.n_action_steps``.
            frozen_steps: Steps of this chunk that stay what they are in `previous` behind
                `shift_steps`, because the robot executes them before this chunk is ready.
            read: Turn the tokens into actions; without it malformed chunks of variable length are
                no error.
            on_proven: See `BlockRequest`.
            deadline_s: Time for the block behind the prefill, beside a deadline of the decoding
                [s]; of Jacobi decodings.
            frozen: Removed, refused with the name of its successor.

        Returns:
            Tokens (B, n), actions (B, m, A) in the environment's units, forwards, iterations, exit
            reasons and times.

        Raises:
            ConfigError: Unknown decoding.
            ObservationError: A feature is missing or has another shape.
            TokenError: A previous chunk that does not fit, or lacks the frozen steps.
            MalformedChunkError: Tokens of variable length that stand for no chunk.
            NotFiniteError: The model's scores are NaN or infinite.
        """
        if frozen is not None:
            raise ConfigError(
                "decode(frozen=tokens) was removed. Pass the chunk before as previous, its "
                "executed steps as shift_steps, and the number of steps that stay as frozen_steps."
            )
        self.check_observation(batch)
        config = self.decoding_config(decoding)
        usual = self.config.n_action_steps
        shift_steps = usual if shift_steps is None else shift_steps
        executed_steps = usual if executed_steps is None else executed_steps
        longest = self.config.chunk_size
        if type(executed_steps) is not int or not 1 <= executed_steps <= longest:
            raise ConfigError(
                f"executed_steps is {short(executed_steps)}; it must be in [1, {longest}]."
            )
        if deadline_s is not None and not deadline_s > 0:
            raise ConfigError(f"deadline_s is {deadline_s}; it must be positive.")
        started = time.perf_counter()
        with runs(self.backbone):
            prefix = prefill(self.backbone, batch, config)
            prefilled = _now(prefix.logits.device)
            result = decode_block(
                self.backbone,
                prefix,
                self.tokenizer,
                config,
                previous=previous,
                shift_steps=shift_steps,
                executed_steps=executed_steps,
                frozen_steps=frozen_steps,
                generator=generator,
                record_states=record_states,
                on_proven=on_proven,
                deadline_s=deadline_s,
            )
        if read:
            result.actions = self.tokenizer.decode(result.tokens)
        decoded = _now(prefix.logits.device)
        result.seconds = {"prefill": prefilled - started, "decode": decoded - prefilled}
        return result

    def decoding_config(self, decoding: str | DecodingConfig) -> DecodingConfig:
        """Resolve a decoder's name for this checkpoint."""
        return self.config.named(decoding)

    def check_observation(self, batch: dict[str, Tensor]) -> int:
        """The rows ``B`` of a pre-processed batch; `ObservationError` for what the backbone cannot
        read.
        """
        return self.backbone.check_observation(batch)

    def supports_rtc(self) -> bool:
        """Whether a chunk can continue what is left of the one before: where tokens have a fixed
        length.
        """
        return self.tokenizer.tokens_per_step is not None

    @torch.no_grad()
    def predict_action_chunk(  # type: ignore[override]
        self,
        batch: dict[str, Tensor],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
    ) -> Tensor:
        """Actions (B, m, A) in the environment's units, of the configured decoding.

        Warm-started from the chunk of the last call, whose ``n_action_steps`` have been executed;
        or from what is left of the running one, as LeRobot's real-time chunking gives it
        (`ceed_vla.real_time`): then step 0 is the next that the robot takes, and the steps of the
        delay stay what they were.

        Args:
            batch: What the pre-processor returned.
            inference_delay: Steps that the robot takes while this chunk is decoded; only read with
                a left-over.
            prev_chunk_left_over: Actions (T, A) or (B, T, A) of an earlier call that were not
                executed.

        Raises:
            ConfigError: A left-over and tokens of variable length, or no number of steps.
            TokenError: A left-over of another shape, or not finite.
        """
        rows = self.check_observation(batch)
        delay = 0 if inference_delay is None else inference_delay
        previous = self._previous
        frozen_steps = 0
        shift = None
        executed = None
        if prev_chunk_left_over is not None:
            previous, frozen_steps = continuation(self.tokenizer, prev_chunk_left_over, delay, rows)
            shift = 0
            executed = min(max(self.config.n_action_steps, delay), self.config.chunk_size)
        elif previous is not None and previous.shape[0] != rows:
            previous = None
        result = decode_behind(
            self,
            batch,
            frozen_steps,
            executed,
            decoding=self.config.decode_with,
            previous=previous,
            shift_steps=shift,
        )
        self._previous = result.tokens
        assert result.actions is not None
        return result.actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """The next action (B, A); decodes a new chunk every ``n_action_steps`` calls."""
        if self._action_queue and self._action_queue[0].shape[0] != self.check_observation(batch):
            self.reset()  # another number of environments
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch)
            self._action_queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._action_queue.popleft()

    # ---- training --------------------------------------------------------------------------------

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """What LeRobot's ``--peft.*`` adapts: the linear layers that distillation trains."""
        learning = set(self.backbone.distillation_parameters())
        linear = (
            name
            for name, module in self.backbone.named_modules()
            if isinstance(module, torch.nn.Linear)
        )
        return {
            "target_modules": [
                f"backbone.{name}" for name in linear if f"{name}.weight" in learning
            ]
        }

    def forward(
        self, batch: dict[str, Tensor], reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of the teacher and its parts; see `ceed_vla.supervision.teacher_loss`."""
        return teacher_loss(self, batch, reduction)


def _now(device: torch.device) -> float:
    """The time [s], when the device has done what was launched: a deadline counts from there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
