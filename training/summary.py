"""The summary of a training run: steps, measurements on held-out episodes, and the next command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ceed_vla.data.frames import FrameStore
from ceed_vla.outputs import default_console
from ceed_vla.training.held_out import held_out_frames
from ceed_vla.wording import counted

MOST_FRAMES = 256  # held-out frames to measure on
PART = 32  # frames of a batch
NOTHING_HELD_OUT = "No episode was held out: fewer than ten in a dataset, or --held_out 0"


@dataclass
class Summary:
    """Content of the summary.

    Attributes:
        steps: Steps taken.
        asked: Steps set, or chosen at the start.
        seconds: Duration of the run.
        checkpoint: Folder of the final checkpoint.
        following: The next command.
        measured: Name -> value, for the log.
        lines: Sentences about the measurements on held-out episodes.
    """

    steps: int
    asked: int
    seconds: float
    checkpoint: str
    following: str
    measured: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def show(self, console: Console | None = None) -> None:
        """Print the summary."""
        taken = (
            f"{self.steps:,} of {counted(self.asked, 'step')} in {self.seconds / 60:.1f} minutes"
        )
        rows = [taken, *self.lines, f"Checkpoint: {self.checkpoint}", f"Next: {self.following}"]
        for row in rows:
            (console or default_console()).print(row, soft_wrap=True, highlight=False, markup=False)


@dataclass
class HeldOut:
    """Frames of held-out episodes."""

    stores: Sequence[FrameStore]
    frames: list[NDArray[np.int64]]  # of every store
    episodes: int

    @property
    def count(self) -> int:
        return sum(len(frames) for frames in self.frames)

    def __str__(self) -> str:
        return f"{counted(self.count, 'frame')} of {counted(self.episodes, 'held-out episode')}"


def find_held_out(stores: Sequence[FrameStore], share: float) -> HeldOut:
    """Draw up to `MOST_FRAMES` frames of the held-out episodes; every call draws the same ones."""
    found, episodes = [], 0
    for store in stores:
        frames = np.flatnonzero(held_out_frames(store, share) & store.shown)
        episodes += len(np.unique(store.episode[frames]))
        most = max(1, MOST_FRAMES // len(stores))
        if len(frames) > most:
            frames = np.sort(np.random.default_rng(0).choice(frames, most, replace=False))
        found.append(frames)
    return HeldOut(stores, found, episodes)


def held_out_batches(
    held: HeldOut, pre: Any, chunk_size: int, size: int = PART
) -> Iterator[dict[str, Any]]:
    """Preprocessed batches of up to `size` frames with their action chunks."""
    for store, frames in zip(held.stores, held.frames, strict=True):
        for part in np.split(frames, range(size, len(frames), size)):
            if len(part):
                yield pre(store.batch(part, chunk_size))


@torch.no_grad()
def token_accuracy(
    policy: Any, forward: Any, batches: Iterable[dict[str, Any]]
) -> dict[str, float]:
    """Share of the tokens that the policy predicts from the correct tokens before them.

    Args:
        policy: The policy, in evaluation mode.
        forward: Preprocessed batch -> (loss, parts), as `CeedVLAPolicy.forward`.
        batches: Preprocessed batches of held-out frames.

    Returns:
        The share, and for comparison that of the best constant block.
    """
    hits = 0.0
    labels: list[Tensor] = []
    weights: list[Tensor] = []
    for batch in batches:
        tokens = policy.tokenizer.encode(batch["action"])
        weight = policy.tokenizer.weight(tokens, batch.get("action_is_pad")).cpu()
        hits += float(weight.sum()) * forward(batch)[1]["token_accuracy"]
        labels.append(tokens.cpu())
        weights.append(weight)
    every = torch.cat(labels)  # (N, n)
    live = torch.cat(weights)  # (N, n), 0 on tokens without a loss
    # The most frequent live token of every slot.
    constant = torch.stack(
        [_mode(column[on > 0]) for column, on in zip(every.T, live.T, strict=True)]
    )
    return {
        "held_out_token_accuracy": hits / float(live.sum()),
        "constant_token_accuracy": float(((every == constant) * live).sum() / live.sum()),
    }


def _mode(tokens: Tensor) -> Tensor:
    return tokens.mode().values if len(tokens) else torch.tensor(-1)


@torch.no_grad()
def mean_forwards(
    policy: Any, batch: dict[str, Any], decoding: Any, previous: Tensor | None = None
) -> float:
    """Mean forwards of a chunk of one batch with a decoder."""
    result = policy.decode(batch, decoding, previous=previous, read=False)
    return float(result.iterations.double().mean())
