"""Serves a LeRobot checkpoint with torch. The module itself imports neither torch nor lerobot."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.scheduling import place_torch, torch_pinned
from ceed_vla.serving.predictor_types import PolicySpec, PredictorSettings, Request
from ceed_vla.serving.request_reader import check_instruction, check_observation
from ceed_vla.serving.served_policy import Decoded, DecodeOptions


class ServedCheckpoint:
    """The `ServedPolicy` of any LeRobot checkpoint.

    Args:
        settings: What to load, on which device.
        spec: Its inputs and outputs.

    Raises:
        CheckpointError: The checkpoint is damaged, or cannot be loaded.
        ConfigError: This machine does not have the device.
    """

    engine = "eager"
    joins = False
    tokens_per_step: int | None = None
    chunk_steps: int | None = None

    def __init__(self, settings: PredictorSettings, spec: PolicySpec) -> None:
        place_torch(settings.threads, settings.pin if settings.device == "cpu" else "none")
        self._spec = spec
        self._policy, self._preprocess, self._postprocess = load_policy(settings, spec.policy_type)
        self.vocabulary: set[str] = set()
        self.n_action_steps: int | None = getattr(self._policy.config, "n_action_steps", None)
        self.decodings: dict[str, str] = {}

    def decoding_config(self, name: str) -> Any:
        return None

    def read(self, request: Request) -> Any:
        """Return the preprocessed batch of one: images (1, 3, H, W) in [0, 1], vectors (1, D)."""
        import torch

        batch: dict[str, Any] = {"task": [request.instruction]}
        for key, value in check_observation(self._spec, request).items():
            if key in self._spec.cameras:
                batch[key] = torch.tensor(value).permute(2, 0, 1).unsqueeze(0).float() / 255.0
            else:
                batch[key] = torch.tensor(value, dtype=torch.float32).unsqueeze(0)
        check_instruction(request.instruction, self.vocabulary)
        with torch.inference_mode():
            return self._preprocess(batch)

    def compile(self, request: Request, decoding: Any) -> None:
        """Other policies are not compiled."""

    def decode(self, inputs: Any, request: Request, options: DecodeOptions) -> Decoded:
        import torch

        started = time.monotonic()
        with torch.inference_mode(), torch_pinned():
            chunk = self._predicted(inputs)  # (1, m, A)
            decoded = time.monotonic()
            seconds = {"prefill": 0.0, "decode": decoded - started}
            return Decoded(self._in_units(chunk), seconds=seconds)

    def _predicted(self, inputs: dict[str, Any]) -> Any:
        """The policy's chunk (1, m, A).

        Some of LeRobot's policies read their observations from queues that `select_action` alone
        fills; it takes the first step of the chunk and leaves the others in a queue.
        """
        import torch

        queues = getattr(self._policy, "_queues", None) or {}
        if set(queues) <= {"action"}:  # it reads what it is given
            return self._policy.predict_action_chunk(inputs)
        self._policy.reset()
        first = self._policy.select_action(dict(inputs))  # (1, A)
        return torch.stack([first, *self._policy._queues["action"]], dim=1)

    def shape_of(self, inputs: Any) -> Hashable:
        import torch

        return tuple(
            (name, value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)
        )

    def decode_together(
        self, inputs: Sequence[Any], requests: Sequence[Request], options: DecodeOptions
    ) -> list[Decoded]:
        raise NotImplementedError("Other policies decode one chunk at a time.")

    def actions(self, tokens: Any) -> NDArray[np.float32]:
        raise NotImplementedError("This policy has no tokens.")

    def _in_units(self, actions: Any) -> NDArray[np.float32]:
        """Return the actions (m, A) from the policy's (1, m, A)."""
        return cast("NDArray[np.float32]", self._postprocess(actions).float().cpu().numpy()[0])


class ServedCeed(ServedCheckpoint):
    """The `ServedPolicy` of a CEED-VLA checkpoint, with torch or compiled torch."""

    def __init__(self, settings: PredictorSettings, spec: PolicySpec) -> None:
        super().__init__(settings, spec)
        self._compiled = settings.engine == "compiled"
        after = self._postprocess.steps
        # Actions relative to the state are completed with the state that was read last.
        relative = any(getattr(step, "enabled", False) for step in after)
        self.joins = not self._compiled and not relative
        if self._compiled:
            self.engine = "compiled"
            from ceed_vla.compiled import engine

            self._policy.backbone = engine.compiled(self._policy.backbone)
        steps = self._preprocess.steps
        self.vocabulary = {word for step in steps for word in getattr(step, "vocabulary", ())}
        # tokens of relative actions mean others behind another state: none can be frozen
        self.tokens_per_step = None if relative else self._policy.tokenizer.tokens_per_step
        self.chunk_steps = self._policy.tokenizer.chunk_steps
        self.decodings = self._policy.config.decodings

    def decoding_config(self, name: str) -> Any:
        config = self._policy.decoding_config(name)
        if self._compiled and not config.decoder.compiles:
            raise ConfigError(f"engine is compiled; {name} ({config.method}) supports only eager.")
        return config

    def compile(self, request: Request, decoding: Any) -> None:
        import torch

        from ceed_vla.decoding import prefill

        if not self._compiled:
            return
        inputs = self.read(request)
        backbone = self._policy.backbone
        with torch.inference_mode():  # as for requests
            backbone.compile_now(prefill(backbone, inputs, decoding))

    def decode(self, inputs: Any, request: Request, options: DecodeOptions) -> Decoded:
        return self.decode_together([inputs], [request], options)[0]

    def decode_together(
        self, inputs: Sequence[Any], requests: Sequence[Request], options: DecodeOptions
    ) -> list[Decoded]:
        import torch

        from ceed_vla.real_time import decode_behind

        previous: dict[str, Any] = {}
        if requests[0].previous is not None:
            tokens = torch.stack([torch.as_tensor(request.previous) for request in requests])
            previous = {"previous": tokens, "shift_steps": requests[0].shift_steps}  # (B, n)
        with torch.inference_mode(), torch_pinned():
            result = decode_behind(self._policy, _joined(inputs), **options.arguments, **previous)
            assert result.actions is not None
            return [
                Decoded(
                    self._in_units(result.actions[row : row + 1]),
                    result.tokens[row].cpu().numpy(),
                    result.forwards if len(requests) == 1 else int(result.iterations[row]),
                    result.exit_reason[row],
                    dict(result.seconds or {}),
                )
                for row in range(len(requests))
            ]

    def actions(self, tokens: Any) -> NDArray[np.float32]:
        return self._in_units(self._policy.tokenizer.decode(tokens))


def _joined(inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several of one row; `RuntimeError` if their tensors have other shapes."""
    import torch

    first = inputs[0]
    if len(inputs) == 1:
        return first
    return {
        name: torch.cat([one[name] for one in inputs]) if isinstance(value, torch.Tensor) else value
        for name, value in first.items()
    }


def load_policy(settings: PredictorSettings, kind: str) -> tuple[Any, Any, Any]:
    """Load any LeRobot checkpoint folder.

    Args:
        settings: Their `checkpoint` and `device` are used.
        kind: LeRobot's name of the policy: "ceed_vla", "act", ...

    Returns:
        The policy in evaluation mode, its preprocessor and its postprocessor.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of a type that cannot be loaded.
        ConfigError: This machine does not have the device.
    """
    from ceed_vla.checkpoints import load, resolve_checkpoint
    from ceed_vla.devices import check_device

    folder = resolve_checkpoint(settings.checkpoint)
    device = check_device(settings.device)
    if kind == "ceed_vla":
        return load(folder, device=device)
    # LeRobot's policies raise errors of many types.
    what = f"The checkpoint {settings.checkpoint} of type {kind!r} cannot be loaded"
    with raised_as(CheckpointError, what, "see what its type needs in LeRobot, or copy it again."):
        return _load_other(folder, kind, device)


def _load_other(folder: Path, kind: str, device: str) -> tuple[Any, Any, Any]:
    """Load another LeRobot policy whose type, settings and processor steps are on the allow list.

    It never contacts a hub.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # for modules that are imported from here on
    import draccus
    import huggingface_hub.constants

    from ceed_vla.checkpoints.allowed import read_allowed
    from ceed_vla.folders import WEIGHTS
    from ceed_vla.processor_steps import check_foreign_processors
    from ceed_vla.weights import check_floating, check_weights

    # huggingface_hub may be imported already; it reads this flag at every request.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    values = read_allowed(folder, device)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    policy_class = get_policy_class(kind)
    settings = {name: value for name, value in values.items() if name != "type"}
    config: Any = draccus.decode(PreTrainedConfig.get_choice_class(kind), settings)
    if config.n_obs_steps > 1:
        raise CheckpointError(
            f"The policy reads {config.n_obs_steps} observations at once; the node gives one."
        )
    check_foreign_processors(folder, config)
    check_floating([folder / WEIGHTS])
    policy = policy_class.from_pretrained(folder, config=config, strict=True)
    check_weights(policy, folder / WEIGHTS)
    overrides = {"device_processor": {"device": device}}
    pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    return policy.eval(), pre, post
