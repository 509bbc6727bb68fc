"""Context: which tokens of a prefix run, and which parts of images, by a module of its own beside frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ceed_vla.backbones.base import View
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.weights import copy_weights, opened

CONTEXT = "context.safetensors"


class ContextScorer(nn.Module):
    """How far the policy's scores would move without a prefix token, judged in its context (EXIT, arXiv 2412.12559).

    Its `views` (W, cameras, 4) are parts of the images that shrink from one to the next (`find_views`).
    """

    def __init__(self, width: int, tokens: int, views: Sequence[View] = ()) -> None:
        super().__init__()
        self.register_buffer("views", torch.tensor(views, dtype=torch.int64))
        self.norm = nn.LayerNorm(width)
        self.own, self.context = nn.Linear(width, 64), nn.Linear(2 * width, 64, bias=False)
        self.out = nn.Linear(64, 1, bias=False)
        self.place = nn.Parameter(torch.full((tokens,), 1 / tokens).log())  # (N,) what a token's place says alone
        nn.init.normal_(self.out.weight, std=1e-3)

    def forward(self, x: Tensor, may_go: Tensor, stays: Tensor) -> Tensor:
        """Scores (B, N) of the tokens of x (B, P, d) that `may_go` (B, P); others stay, or are padding."""
        x = self.norm(x.to(self.place.dtype))
        marks = torch.stack([may_go | stays, stays], dim=1).to(x.dtype)  # (B, 2, P)
        seen = (marks @ x / marks.sum(-1, keepdim=True).clamp(min=1)).flatten(1)  # (B, 2 d), of all and of what stays
        own = self.own(x[may_go].view(len(x), len(self.place), -1)) + self.context(seen).unsqueeze(1)
        return self.out(F.silu(own)).squeeze(-1) + self.place  # type: ignore[no-any-return]


def keep_best(backbone: Any, embeddings: Any, count: int) -> tuple[Any, int]:
    """`embeddings` of the `count` best tokens, if more may go, and how many went; `ConfigError` without a scorer."""
    x, may_go, stays = backbone.prefix_tokens(embeddings)
    tokens = int(may_go[0].sum())
    if count >= tokens:
        return embeddings, 0
    if [len(scorer.place) for scorer in backbone.context] != [tokens]:
        reason = f"Keeping {count} of {tokens} prefix tokens needs a checkpoint whose {CONTEXT} scores so many"
        raise ConfigError(f"{reason}; train one: ceed-vla context.")
    return keep_scored(backbone, embeddings, backbone.context[0](x, may_go, stays), count), tokens - count


def keep_scored(backbone: Any, embeddings: Any, scores: Tensor, count: int) -> Any:
    """`embeddings` with the `count` tokens of the highest `scores` (B, N), and all that may not go, in order."""
    may_go = backbone.prefix_tokens(embeddings)[1]
    ranked = torch.full(may_go.shape, torch.inf, device=scores.device)  # (B, P)
    ranked[may_go] = scores.float().flatten()
    left = may_go.shape[1] - scores.shape[1] + count
    return backbone.keep_tokens(embeddings, ranked.topk(left).indices.sort(dim=1).values)


def cells(view: View) -> int:
    """How many a view has."""
    return sum((bottom - top) * (right - left) for top, bottom, left, right in view)


def percent(view: View, whole: View) -> int:
    """The cells of a `view` in percent of all, rounded up."""
    return -(-100 * cells(view) // cells(whole))


def see_best(backbone: Any, batch: dict[str, Tensor], most: int) -> tuple[Any, int]:
    """What `embed_prefix` makes of `most` % of the cells, those that matter, before any other is computed; and how many
    tokens it lacks. `ConfigError` where images are not cut, or no view is so small.
    """
    whole = backbone.view
    if not whole:
        raise ConfigError(f"{type(backbone).__name__} looks at whole images (`embed_view`); leave out view<P>.")
    for view in (view for scorer in backbone.context for view in scorer.views.tolist()):
        if percent(view, whole) <= most:
            return backbone.embed_view(batch, view), cells(whole) - cells(view)
    raise ConfigError(
        f"view{most} needs a checkpoint whose {CONTEXT} has a view so small; train one: ceed-vla context."
    )


def _inside(views: Tensor, whole: Tensor) -> bool:
    """Whether these are views (W, cameras, 4) whose windows all hold cells, of the `whole` images alone."""
    if views.dtype != torch.int64 or views.ndim != 3 or views.shape[1:] != whole.shape:
        return False
    first, end = views[..., ::2], views[..., 1::2]
    return bool(((first >= 0) & (first < end) & (end <= whole[:, 1::2])).all())


def save_context(backbone: Any, folder: Path) -> None:
    """Write the scorer of a backbone, if there is one."""
    for scorer in backbone.context:
        save_file(scorer.state_dict(), folder / CONTEXT)


def load_context(backbone: Any, folder: Path) -> None:
    """Attach the scorer of a checkpoint's folder, if there is one; `CheckpointError` for another model's, or damage."""
    if not (file := folder / CONTEXT).is_file():
        return
    with opened(file) as tensors:
        places = tensors.get_slice("place").get_shape() if "place" in tensors.keys() else []  # noqa: SIM118
        views = tensors.get_tensor("views") if "views" in tensors.keys() else torch.empty(0)  # noqa: SIM118
    known = views.tolist() if _inside(views, torch.tensor(backbone.view)) else []
    scorer = ContextScorer(backbone.exit_parts()[2], places[0] if len(places) == 1 else 1, known)
    if wrong := [name for names in copy_weights(scorer, [file]) for name in names]:
        raise CheckpointError(f"{file} does not belong to this model: {', '.join(wrong)}.")
    backbone.context = (scorer.eval().requires_grad_(False),)
