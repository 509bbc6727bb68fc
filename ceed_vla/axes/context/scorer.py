"""Context: a module that scores prefix tokens; the policy's weights stay frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ceed_vla.backbones.capabilities import ChoosesPrefix, require
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import regular
from ceed_vla.folders import CONTEXT as CONTEXT
from ceed_vla.weights import copy_weights, opened


class ContextScorer(nn.Module):
    """Predicts how far the policy's logits move without a prefix token, from the token and its
    context (EXIT, arXiv 2412.12559).
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, 64)
        self.context = nn.Linear(2 * width, 64, bias=False)
        self.out = nn.Linear(64, 1, bias=False)
        # (N,) the part of the score that depends on the token's place alone
        self.place = nn.Parameter(torch.full((tokens,), 1 / tokens).log())
        nn.init.normal_(self.out.weight, std=1e-3)

    def forward(self, x: Tensor, may_go: Tensor, stays: Tensor) -> Tensor:
        """Score the prefix tokens that can be dropped.

        Args:
            x: (B, P, d) the prefix tokens.
            may_go: (B, P) bool, the N tokens of each row that can be dropped.
            stays: (B, P) bool, tokens that always run; all others are padding.

        Returns:
            Scores (B, N).
        """
        x = self.norm(x.to(self.place.dtype))
        marks = torch.stack([may_go | stays, stays], dim=1).to(x.dtype)  # (B, 2, P)
        # (B, 2 d), the means of all tokens and of those that stay
        seen = (marks @ x / marks.sum(-1, keepdim=True).clamp(min=1)).flatten(1)
        own = self.own(x[may_go].view(len(x), len(self.place), -1)) + self.context(seen).unsqueeze(
            1
        )
        return self.out(F.silu(own)).squeeze(-1) + self.place  # type: ignore[no-any-return]


def keep_scored(backbone: Any, embeddings: Any, scores: Tensor, count: int) -> Any:
    """Reduce `embeddings` to the `count` tokens with the highest `scores` (B, N) and all tokens
    that always run, in order.
    """
    may_go = backbone.prefix_tokens(embeddings)[1]
    ranked = torch.full(may_go.shape, torch.inf, device=scores.device)  # (B, P)
    ranked[may_go] = scores.float().flatten()
    left = may_go.shape[1] - scores.shape[1] + count
    return backbone.keep_tokens(embeddings, ranked.topk(left).indices.sort(dim=1).values)


def save_context(backbone: Any, folder: Path) -> None:
    """Write the scorer of a backbone into a folder; without one, remove an earlier policy's."""
    (folder / CONTEXT).unlink(missing_ok=True)
    for scorer in backbone.context:
        save_file(scorer.state_dict(), folder / CONTEXT)


def load_context(backbone: Any, folder: Path) -> None:
    """Attach the scorer of a checkpoint folder to a backbone, if there is one.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model.
    """
    file = folder / CONTEXT
    if not file.exists(follow_symlinks=False):
        return
    with opened(regular(file)) as tensors:
        names = list(tensors.keys())
        places = tensors.get_slice("place").get_shape() if "place" in names else []
    if len(places) != 1 or places[0] < 1:
        raise CheckpointError(
            f"{file} scores places of shape {tuple(places)}; it must have one number per prefix "
            "token that can be dropped. Copy the checkpoint again."
        )
    with raised_as(
        CheckpointError, f"{file} does not belong to this model", "copy it again.", passing=()
    ):
        width = require(backbone, ChoosesPrefix, CONTEXT).exit_parts()[2]
    scorer = ContextScorer(width, places[0])
    missing, unknown = copy_weights(scorer, [file])
    if wrong := [*missing, *unknown]:
        raise CheckpointError(f"{file} does not belong to this model: {', '.join(wrong)}.")
    backbone.context = (scorer.eval().requires_grad_(False),)
