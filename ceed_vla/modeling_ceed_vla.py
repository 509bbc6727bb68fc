"""The CEED-VLA policy: LeRobot's policy interface over a backbone, an action vocabulary and a
decoder.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION
from safetensors.torch import load_file
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

# This import also registers the processor steps of checkpoints.
from ceed_vla.processor_ceed_vla import widen
from ceed_vla.processor_steps import check_processors, has_relative_actions
from ceed_vla.real_time import continuation, decode_behind
from ceed_vla.supervision import teacher_loss
from ceed_vla.weights import check_sizes, load_weights, save_weights


class CeedVLAPolicy(PreTrainedPolicy):
    """Vision-language-action policy that writes actions as tokens and decodes them in parallel.

    Args:
        config: Sizes and vocabulary; ``input_features`` and ``output_features`` must be set.
        dataset_stats: Statistics, needed once for action ranges that come from the data. If they
            have a ``count``, they are a LeRobotDataset's own, whose quantiles are averages over
            episodes and are not used. Changed in place, as LeRobot's normalisers use the same
            object.
        dataset_meta: LeRobot's metadata of the dataset, which `lerobot-train` passes. A new policy
            then takes open settings from the frames, as in `ceed-vla train`.

    Attributes:
        tokenizer: Converts actions to tokens and back.
        backbone: The model.
        referenced: Names of the weights that a checkpoint reads from another folder.
        adapters: Low-rank adapters of the checkpoint that are not added to the weights yet
            (`ceed_vla.lora`).
        auxiliary_terms: Number of leading terms of the auxiliary target that are regressed; None
            for all. Training sets it.

    Raises:
        ConfigError: The policy does not support the features, or action ranges are missing.
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
        # LeRobot's tools also pass these to the normaliser of a checkpoint that they train further.
        widen(dataset_stats)
        self.tokenizer = config.action_tokens.build(config.chunk_size, config.action_dim)
        mode = config.normalization_mapping.get("ACTION", NormalizationMode.IDENTITY)
        if mode is not NormalizationMode.IDENTITY and not self.tokenizer.normalised:
            raise ConfigError(
                f"normalization_mapping has ACTION {mode.value}; it must be IDENTITY, because "
                f"{config.action_tokens.type} tokens need actions that are not normalised."
            )
        self.tokenizer.ordered = config.action_tokens.ordered
        self.backbone = config.backbone.build(config.shape)
        self.referenced = {f"backbone.{name}" for name in self.backbone.referenced}
        self.adapters: dict[str, Tensor] = {}
        # what the checkpoint's own file holds, if it refers to weights in another folder
        self.own_weights: dict[str, Tensor] = {}
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
        """Load a local checkpoint in evaluation mode, without access to a hub.

        Args:
            pretrained_name_or_path: A checkpoint folder, or "teacher" / "student" for the shipped
                checkpoints.
            config: Replaces the checkpoint's configuration.
            strict: Whether missing and additional weights are an error.
            merge_adapters: Whether low-rank adapters in the checkpoint are added to the weights;
                otherwise they are in `adapters`.
            kwargs: Further arguments of LeRobot's tools; only ``dataset_stats`` and
                ``dataset_meta`` are read. The checkpoint's action ranges do not change.

        Raises:
            CheckpointError: Files are missing, damaged or of another model, or differ from the
                manifest of a sealed checkpoint.
        """
        folder = resolve_checkpoint(pretrained_name_or_path, POLICY_FILES)
        with held_still(folder):
            check_files(folder)
            chosen = CeedVLAConfig.read(folder) if config is None else config
            policy = cls._from_folder(folder, chosen, strict, **kwargs)
            if policy.referenced:
                policy.own_weights = load_file(folder / WEIGHTS)
        if merge_adapters and policy.adapters:
            merge(policy, policy.adapters)
            policy.adapters = {}
        return policy.to(policy.config.device).eval()

    @classmethod
    def _from_folder(
        cls, folder: Path, chosen: CeedVLAConfig, strict: bool, **kwargs: Any
    ) -> CeedVLAPolicy:
        """Load the policy from a folder whose files match its manifest."""
        chosen.ranges_from = "the checkpoint"
        chosen.drop_unused_features()  # LeRobot's tools add all features of their data
        # Checked before a model is built: without an architecture, it would be read from `path`.
        if getattr(chosen.backbone, "architecture", None) == "":
            raise CheckpointError(
                f"{folder}: backbone.architecture in config.json is empty; copy it again."
            )
        # Sizes that do not match the weights are rejected before the model is built.
        files = chosen.backbone.weight_files() or [folder / WEIGHTS]
        check_sizes(files, *chosen.backbone.least_sizes(chosen.shape))
        # A policy can be loaded without processors.
        if any((folder / name).exists() for name in PROCESSOR_FILES):
            check_processors(folder, chosen)
        meta = kwargs.get("dataset_meta")
        stats = kwargs.get("dataset_stats")
        # Statistics of relative actions are LeRobot's; the frames hold absolute ones.
        absolute = not has_relative_actions(folder)
        if meta is not None and stats is not None and absolute and normalises_actions(chosen):
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
        """Raise `ConfigError`: this package does not access a hub."""
        raise ConfigError(
            "push_to_hub is not supported, as this package does not access a hub; write a folder "
            "with save_pretrained and upload it with `hf upload`."
        )

    def _save_pretrained(
        self, save_directory: Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write configuration and weights, without weights that the backbone refers to."""
        self.config._save_pretrained(save_directory)
        save_weights(self, save_directory, state_dict)
        for saved in SAVED:
            saved.save(self.backbone, save_directory)

    # Also moves and converts the axes' modules, which are not submodules.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for saved in SAVED:
            for own in saved.modules(self.backbone):
                own._apply(fn)
        return super()._apply(fn, recurse)

    # ---- acting ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Discard the previous chunk and the queued actions; call it at the start of an episode."""
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
        """Decode one action chunk for every row of a preprocessed batch, without any state.

        Args:
            batch: A batch from the preprocessor.
            decoding: A decoder name, for example "ar", "jacobi" (strict), "cap2" or "ceed" (the
                checkpoint's own); see `ceed_vla.decoding.names`. Or a `DecodingConfig`.
            previous: Tokens (B, n) of the previous chunk, for the warm start; -1 in rows that have
                none.
            generator: Random source of random guesses; the configuration's seed if None.
            record_states: Whether the result holds every Jacobi state.
            shift_steps: Steps of `previous` that were executed since it was decoded;
                ``config.n_action_steps`` if None.
            executed_steps: Steps of this chunk that are executed before the next replan;
                ``config.n_action_steps`` if None.
            frozen_steps: Steps at the start of this chunk, copied from `previous` behind
                `shift_steps`, because the robot executes them before this chunk is ready.
            read: Whether tokens are converted to actions; if not, malformed chunks of variable
                length are no error.
            on_proven: See `BlockRequest`.
            deadline_s: Time limit for the block after the prefill, in addition to a deadline of the
                decoding [s]; for Jacobi decodings only.
            frozen: Removed; raises an error that names its successor.

        Returns:
            Tokens (B, n), actions (B, m, A) in the environment's units, forwards, iterations, exit
            reasons and times.

        Raises:
            ConfigError: The decoding is unknown, or an argument does not fit it.
            ObservationError: A feature is missing or has another shape.
            TokenError: The previous chunk does not fit, or lacks the frozen steps.
            MalformedChunkError: Tokens of variable length do not decode to a chunk.
            NotFiniteError: The model's logits are NaN or infinite.
        """
        if frozen is not None:
            raise ConfigError(
                "decode(frozen=tokens) was removed. Pass the previous chunk as previous, its "
                "executed steps as shift_steps, and the number of frozen steps as frozen_steps."
            )
        self.check_observation(batch)
        config = self.decoding_config(decoding)
        usual = self.config.n_action_steps
        shift_steps = usual if shift_steps is None else shift_steps
        executed_steps = usual if executed_steps is None else executed_steps
        longest = self.config.chunk_size
        if type(executed_steps) is not int or not 1 <= executed_steps <= longest:
            raise ConfigError(
                f"executed_steps is {short(executed_steps)}; it must be an int in [1, {longest}]."
            )
        if deadline_s is not None and not (isinstance(deadline_s, Real) and deadline_s > 0):
            raise ConfigError(f"deadline_s is {short(deadline_s)}; it must be a positive number.")
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
        """The decoding that a name specifies for this checkpoint."""
        return self.config.named(decoding)

    def check_observation(self, batch: dict[str, Tensor]) -> int:
        """Validate a preprocessed batch and return its rows ``B``.

        Raises:
            ObservationError: The backbone cannot read it.
        """
        return self.backbone.check_observation(batch)

    def supports_rtc(self) -> bool:
        """Whether a chunk can continue the previous one, which needs tokens of fixed length."""
        return self.tokenizer.tokens_per_step is not None

    @torch.no_grad()
    def predict_action_chunk(  # type: ignore[override]
        self,
        batch: dict[str, Tensor],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
    ) -> Tensor:
        """Decode a chunk of actions with the configured decoding.

        The warm start is the chunk of the last call, of which ``n_action_steps`` were executed. In
        LeRobot's real-time chunking, it is the remainder of the running chunk
        (`ceed_vla.real_time`): then step 0 is the robot's next step, and the steps of the delay are
        frozen.

        Args:
            batch: A batch from the preprocessor.
            inference_delay: Steps that the robot executes while this chunk is decoded; read only
                with `prev_chunk_left_over`.
            prev_chunk_left_over: Actions (T, A) or (B, T, A) of an earlier call that are not
                executed yet.

        Returns:
            Actions (B, m, A) in the environment's units.

        Raises:
            ConfigError: Tokens have variable length, or the delay is not a number of steps.
            TokenError: `prev_chunk_left_over` has another shape, or is not finite.
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
            self.reset()  # the number of environments has changed
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch)
            self._action_queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._action_queue.popleft()

    # ---- training --------------------------------------------------------------------------------

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """Default targets of LeRobot's ``--peft.*``: the linear layers that distillation trains."""
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
        self,
        batch: dict[str, Tensor],
        reduction: str = "mean",
        imitated: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The teacher's loss and its parts; see `ceed_vla.supervision.teacher_loss`."""
        return teacher_loss(self, batch, reduction, imitated)


def _now(device: torch.device) -> float:
    """The time [s] after the device has finished all launched work; a deadline counts from it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
