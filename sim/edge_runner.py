"""Runs exports (`ceed_vla.edge`) in the closed loop, one observation at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lerobot.utils.constants import OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE
from torch import Tensor

from ceed_vla.sim.environment import Bundle, Observation
from ceed_vla.sim.rollout import Chunk, PolicyRunner

if TYPE_CHECKING:
    from ceed_vla.edge import EdgePolicy


def arrays_of(observation: Observation) -> dict[str, np.ndarray]:
    """An environment's observation by LeRobot's features: images (H, W, 3), vectors (D,)."""
    pixels = observation["pixels"]
    images = (
        {f"{OBS_IMAGES}.{name}": image for name, image in pixels.items()}
        if isinstance(pixels, dict)
        else {OBS_IMAGE: pixels}
    )
    named = {"agent_pos": OBS_STATE, "environment_state": OBS_ENV_STATE}
    vectors = {feature: observation[key] for key, feature in named.items() if key in observation}
    return {name: np.asarray(value) for name, value in (images | vectors).items()}


class EdgeRunner(PolicyRunner):
    """A `PolicyRunner` on an export; rows of a batch are decoded one after the other.

    Args:
        export: The export of the policy.
        bundle: The policy that was exported, for its configuration and vocabulary.
        decoding: The decoding.
        executed_steps: See `PolicyRunner`.
        delay: See `PolicyRunner`.
    """

    def __init__(
        self,
        export: EdgePolicy,
        bundle: Bundle,
        decoding: Any,
        executed_steps: int | None = None,
        delay: int = 0,
    ) -> None:
        super().__init__(bundle, decoding, None, executed_steps, delay)
        self.export = export

    def decode(
        self,
        observations: Sequence[dict[str, Any]],
        instructions: Sequence[str],
        previous: Sequence[Tensor | None],
        frozen_steps: Sequence[int] = (),
    ) -> list[Chunk]:
        frozen = frozen_steps or [0] * len(observations)
        rows = zip(observations, instructions, previous, frozen, strict=True)
        return [self._decode(*row) for row in rows]

    def _decode(
        self, observation: Observation, instruction: str, previous: Tensor | None, frozen: int
    ) -> Chunk:
        every = max(self.executed_steps, self.delay)  # steps from one observation to the next
        started = time.perf_counter()
        prepared = self.export.prepare(arrays_of(observation), instruction)
        seconds = {"process": time.perf_counter() - started, "rows": 1.0}
        result: Any = self.export.decode_behind(
            prepared,
            frozen,
            every,
            decoding=self.decoding,
            previous=None if previous is None else previous.numpy(),
            shift_steps=0 if self.continues else every,
        )
        return Chunk(
            torch.from_numpy(result.tokens[0]),
            result.actions[0],
            int(result.iterations[0]),
            result.exit_reason[0],
            {**seconds, **result.seconds},
            int(result.layer_forwards[0]),
            int(result.prefix_layers[0]),
        )
