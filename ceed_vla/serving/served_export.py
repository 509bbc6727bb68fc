"""Serves an export of a CEED-VLA checkpoint, with numpy and onnxruntime."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.predictor_types import PolicySpec, Request
from ceed_vla.serving.request_reader import check_instruction, check_observation
from ceed_vla.serving.served_policy import Decoded, DecodeOptions

if TYPE_CHECKING:
    from ceed_vla.edge import EdgePolicy


class ServedExport:
    """The `ServedPolicy` of an export.

    Args:
        policy: The export.
        spec: Its inputs and outputs.
    """

    engine = "edge"
    joins = False

    def __init__(self, policy: EdgePolicy, spec: PolicySpec) -> None:
        self._policy = policy
        self._spec = spec
        settings = policy.settings
        self.vocabulary = set(settings.text.vocabulary or settings.text.stem_vocabulary or ())
        self.tokens_per_step = self._policy.vocabulary.tokens_per_step
        self.chunk_steps = self._policy.vocabulary.chunk_steps
        self.n_action_steps = settings.n_action_steps
        self.decodings = settings.decodings or {}

    def decoding_config(self, name: str) -> Any:
        return self._policy.decoding_config(name)

    def read(self, request: Request) -> Any:
        observation = check_observation(self._spec, request)
        check_instruction(request.instruction, self.vocabulary)
        return self._policy.prepare(observation, request.instruction)

    def compile(self, request: Request, decoding: Any) -> None:
        """An export needs no compilation."""

    def decode(self, inputs: Any, request: Request, options: DecodeOptions) -> Decoded:
        previous: dict[str, Any] = {}
        if request.previous is not None:
            previous = {"previous": request.previous, "shift_steps": request.shift_steps}
        result = self._policy.decode_behind(
            inputs,
            **options.arguments,
            **previous,
        )
        arrays = cast("Any", result)
        return Decoded(
            arrays.actions[0],
            arrays.tokens[0],
            result.forwards,
            result.exit_reason[0],
            dict(result.seconds or {}),
        )

    def shape_of(self, inputs: Any) -> Hashable:
        raise NotImplementedError("An export decodes one chunk at a time.")

    def decode_together(
        self, inputs: Sequence[Any], requests: Sequence[Request], options: DecodeOptions
    ) -> list[Decoded]:
        raise NotImplementedError("An export decodes one chunk at a time.")

    def actions(self, tokens: Any) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", self._policy.vocabulary.decode(tokens)[0])


def export_spec(checkpoint: str, folder: Path) -> PolicySpec:
    """The inputs and outputs that an export declares.

    Args:
        checkpoint: As it was configured.
        folder: The export.

    Raises:
        CheckpointError: Its settings are missing or damaged.
    """
    from ceed_vla.edge.settings import read_settings

    settings = read_settings(folder)
    images = settings.images
    return PolicySpec(
        checkpoint=checkpoint,
        policy_type="ceed_vla",
        cameras={
            name: (3, height, width)
            for name, (height, width) in zip(images.cameras, images.sizes, strict=True)
        },
        states={settings.state.name: settings.state.size},
        action_dim=len(settings.tokens.low),
        chunk_steps=settings.tokens.chunk_steps,
        n_action_steps=settings.n_action_steps,
        warmup_s=0.0,
        delta_dims=tuple(settings.delta_dims or ()),
        action_names=tuple(settings.action_names or ()),
        control_rate=settings.control_rate,
    )
