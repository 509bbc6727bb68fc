"""Converts requests to the policy's batches, and refuses invalid requests.

The module itself imports neither torch nor lerobot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.robot.predictor_types import PolicySpec, Request
from ceed_vla.ros_nodes.robot.texts import shown


class InstructionError(ObservationError):
    """The policy does not accept the instruction."""


class RequestReader:
    """Prepares the requests of one policy.

    Attributes:
        vocabulary: Words that the policy was trained with; empty if it accepts any word.
    """

    def __init__(
        self,
        spec: PolicySpec,
        preprocess: Callable[[dict[str, Any]], Any],
        vocabulary: set[str],
    ) -> None:
        """`preprocess` is the checkpoint's preprocessor."""
        self.vocabulary = vocabulary
        self._spec = spec
        self._preprocess = preprocess

    def read(self, request: Request) -> Any:
        """Return the policy's batch for a request.

        Raises:
            ObservationError: Features are missing or of a wrong shape or type.
            InstructionError: The policy does not accept the instruction. This has its own type
                because the warm-up on a blank observation does not detect it.
        """
        from ceed_vla.backbones.compact.words import split_words

        batch = self._batch(request)
        words = split_words(request.instruction)
        try:
            unknown = [word for word in words if word not in self.vocabulary]
            # With a few known words among unknown ones, the policy would still move the arm.
            if self.vocabulary and (not words or 2 * len(unknown) > len(words)):
                raise ObservationError(
                    f"{len(words) - len(unknown)} of the {len(words)} words of the instruction "
                    f"{shown(request.instruction)} are in the policy's vocabulary; at least half "
                    f"must be, for example {', '.join(sorted(self.vocabulary)[:8])}."
                )
            return self._preprocess(batch)
        except ObservationError as error:
            raise InstructionError(str(error)) from error

    def _batch(self, request: Request) -> dict[str, Any]:
        """Return a LeRobot batch of one: images (1, 3, H, W) in [0, 1], vectors (1, D), task."""
        import torch

        batch: dict[str, Any] = {"task": [request.instruction]}
        for key in (*self._spec.cameras, *self._spec.states):
            if key not in request.observation:
                have = ", ".join(sorted(request.observation)) or "nothing"
                raise ObservationError(f"The observation lacks {key!r}; it has {have}.")
            value = np.asarray(request.observation[key])
            if key in self._spec.cameras:
                if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
                    raise ObservationError(
                        f"{key} is {value.dtype} {value.shape}, expected uint8 (H, W, 3)."
                    )
                image = torch.tensor(value).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W)
                batch[key] = image.float() / 255.0
                continue
            length = self._spec.states[key]
            if value.shape != (length,) or not np.isfinite(value).all():
                raise ObservationError(
                    f"{key} is {shown(value.tolist())}, expected {length} finite numbers."
                )
            batch[key] = torch.tensor(value, dtype=torch.float32).unsqueeze(0)  # (1, D)
        return batch
