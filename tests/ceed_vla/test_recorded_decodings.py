"""Decoding returns the results of version 9257658: 31 decodings of 200 closed-loop observations.

The fixture contains the output of the preprocessor (seeds 40000 and up, with student_all_tokens in
control) and the results. All runs use float64, so that rounding decides none of them.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ceed_vla import load
from ceed_vla.axes import AXES
from ceed_vla.decoding import decode_block, prefill

RECORDED = Path(__file__).parents[1] / "fixtures" / "decoded_9257658.zip"
CAMERAS = ("observation.images.front", "observation.images.wrist")
# Axes and the prefixes of their decoder names.
OF_AXES = {
    "context": "keep",
    "depth": ("depth", "deer", "sure"),
    "drafts": ("ngram", "spec", "del"),
    "launch_ahead": "loop",
    "learned": "head",
    "programs": "program",
}
# `del` chooses among exits, so it needs them.
GONE = tuple(
    name
    for axis, names in OF_AXES.items()
    if axis not in AXES
    for name in ((names,) if isinstance(names, str) else names)
) + (() if "depth" in AXES else ("del", "spec"))
EXECUTED = 4  # steps
STEP = 7  # tokens


class Recorded:
    """The observations and the recorded results."""

    def __init__(self) -> None:
        with zipfile.ZipFile(RECORDED) as archive:
            values = np.load(io.BytesIO(archive.read("decoded.npz")))
            self.values = {name: values[name] for name in values.files}
            count = len(self.values["state"])
            self.images = {
                camera: np.asarray(Image.open(io.BytesIO(archive.read(f"{camera}.png")))).reshape(
                    count, 96, 96, 3
                )
                for camera in CAMERAS
            }
        self.all: list[str] = self.values["names"].tolist()
        self.names = [name for name in self.all if not name.startswith(GONE)]

    def observation(self, index: int) -> dict[str, Tensor]:
        batch = {
            camera: torch.from_numpy(images[index].copy()).permute(2, 0, 1)[None].float() / 255
            for camera, images in self.images.items()
        }
        words = self.values["words"][index : index + 1].astype(np.int64)
        state = self.values["state"][index : index + 1]
        return {
            **batch,
            "observation.state": torch.from_numpy(state),
            "observation.language.tokens": torch.from_numpy(words),
        }

    def previous(self, index: int) -> Tensor | None:
        """Tokens (1, n) of the previous chunk; None at the start of an episode."""
        tokens = self.values["previous"][index : index + 1].astype(np.int64)
        return None if tokens.min() < 0 else torch.from_numpy(tokens)

    def result(self, name: str, index: int) -> tuple[list[int], int, int, int, str]:
        row = self.all.index(name)
        numbers = [int(self.values[part][row, index]) for part in ("forwards", "layers", "exact")]
        reason = str(self.values["exits"][row, index])
        return self.values["tokens"][row, index].tolist(), *numbers, reason  # type: ignore[return-value]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def student() -> Any:
    """student_all_tokens with linear exits and a scorer of prefix tokens, randomly initialised
    from a seed.
    """
    policy = load("student_all_tokens")[0]
    backbone = policy.backbone
    generator = torch.Generator().manual_seed(0)
    width = backbone.exit_parts()[2]
    # The order of the draws is that of the recording.
    weights = [torch.randn(width, width, generator=generator) * 0.02 for _ in (1, 2, 3)]
    if "depth" in AXES:
        from ceed_vla.axes.depth.exits import make_exits

        exits = make_exits(backbone, [1, 2, 3], "linear")
        for own, weight in zip(exits.values(), weights, strict=True):
            own.requires_grad_(False).eval().linear.weight.copy_(weight)
        backbone.exits = exits
    if "context" in AXES:
        from ceed_vla.axes.context.scorer import ContextScorer

        scorer = ContextScorer(width, backbone.prefix_length - 1).requires_grad_(False).eval()
        for name, parameter in sorted(scorer.named_parameters()):
            scale = 0.1 if parameter.ndim > 1 else 1.0
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn + (1.0 if name == "norm.weight" else 0.0))
        backbone.context = (scorer,)
    return policy


@torch.no_grad()
def decoded(policy: Any, recorded: Recorded, name: str, index: int) -> Any:
    """The current result of decoder `name`; with "@1", one step of the previous chunk is frozen."""
    base, _, frozen = name.partition("@")
    config = policy.config.named(base)
    previous = recorded.previous(index)
    if frozen and previous is None:  # the recording froze tokens in the middle of the vocabulary
        begin = EXECUTED * STEP
        previous = policy.tokenizer.zero.repeat(1, 1)
        previous[:, begin : begin + int(frozen) * STEP] = 127
    result = decode_block(
        policy.backbone,
        prefill(policy.backbone, recorded.observation(index), config),
        policy.tokenizer,
        config,
        previous=previous,
        shift_steps=EXECUTED,
        executed_steps=EXECUTED,
        frozen_steps=int(frozen or 0),
    )
    return (
        result.tokens[0].tolist(),
        result.forwards,
        int(result.layer_forwards[0]),
        int(result.exact_tokens[0]),
        result.exit_reason[0],
    )


@pytest.mark.parametrize(
    "indices",
    [
        range(0, 200, 25),
        pytest.param(range(0, 200, 5), marks=pytest.mark.slow),
        pytest.param(range(200), marks=[pytest.mark.external, pytest.mark.timeout(1200)]),
    ],
    ids=["eight", "forty", "all"],
)
def test_every_decoding_gives_what_it_gave(
    recorded: Recorded, student: Any, indices: range
) -> None:
    assert len(recorded.all) == 31
    assert bool(recorded.values["sure"].all())
    wrong = []
    layers = student.backbone.num_layers
    for index in indices:
        for name in recorded.names:
            found = decoded(student, recorded, name, index)
            expected = recorded.result(name, index)
            if name.startswith("del"):  # whose estimates did not last from chunk to chunk then
                expected = (expected[0], *found[1:3], *expected[3:])
            if name.startswith(("deer", "sure")):  # without a forward that started over then
                again = expected[2] > layers * expected[1]
                expected = (expected[0], expected[1] + again, *expected[2:])
            if found != expected:
                wrong.append(f"{name} of observation {index}")
    assert not wrong, wrong
