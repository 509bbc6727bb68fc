"""Students that run a part of the prefix (EXIT, arXiv 2412.12559).

The scorer of the teacher (`ceed-vla context`) chooses it: the same tokens in all frames, or those
of each frame.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ceed_vla.backbones.capabilities import ChoosesPrefix, require
from ceed_vla.errors import ConfigError
from ceed_vla.supervision import finish_training

FRAMES = 64  # over which the scores of prefix tokens are averaged


@torch.no_grad()
def keep_places(student: Any, kept: int, observations: dict[str, Any]) -> None:
    """Restrict a student to the `kept` prefix tokens with the highest mean scores, in all frames.

    Args:
        student: A policy of the compact backbone that runs its whole prefix, with a scorer.
        kept: Tokens to keep.
        observations: Preprocessed observations of `FRAMES` frames.

    Raises:
        ConfigError: The policy is none of these.
    """
    backbone, scorers = student.backbone, student.backbone.context
    if not scorers or getattr(backbone, "kept", True):
        raise ConfigError(
            "--kept_by places needs a teacher of the compact backbone that runs its whole prefix, "
            "with a context.safetensors (ceed-vla context). For another model set --kept_by scorer."
        )
    finish_training(student)  # drop the early head, which is trained on all tokens
    embeddings = backbone.embed_prefix(observations)
    scores = scorers[0](*backbone.prefix_tokens(embeddings)).mean(0)  # (N,)
    if kept < len(scores):
        student.config.backbone.kept_tokens = scores.topk(kept).indices.sort().values.tolist()
        backbone.keep(student.config.backbone.kept_tokens)


def keep_by_scorer(student: Any, kept: int) -> Callable[[Any], Any]:
    """A function that reduces prefix embeddings to the `kept` best tokens of each frame.

    Raises:
        ConfigError: The student has no scorer of more tokens, or its prefix cannot be chosen.
    """
    backbone = require(student.backbone, ChoosesPrefix, "kept_by scorer")
    count = len(backbone.context[0].place) if backbone.context else 0
    if kept >= count:
        raise ConfigError(
            f"--kept is {kept}; --kept_by scorer needs a teacher whose context.safetensors "
            f"(ceed-vla context) scores more tokens than that; this one scores {count}."
        )
    (scorer,) = backbone.context
    keep_scored = import_module("ceed_vla.axes.context.scorer").keep_scored

    def choose(embeddings: Any) -> Any:
        scores = scorer(*backbone.prefix_tokens(embeddings))
        return keep_scored(backbone, embeddings, scores, kept)

    return choose
