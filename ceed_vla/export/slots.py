"""What the graphs of an export return of logits.

They return little: for every slot its token, the log-sum of its logits, and what exit rules
measure. onnxruntime's maximum may skip NaN; the log-sum is finite only if no logit is NaN or +inf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ceed_vla.decoding.measures import NEAR

SLOT = ("tokens", "total", "mass", "lead")  # outputs (1, k) for k slots
CACHE = ("keys", "values")  # (layers, heads, positions, width)


def read_slots(logits: Tensor, ordered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the host reads of logits (1, k, V); see `SLOT`.

    Mass and lead are those of `ceed_vla.decoding.measures`. The mass near the token has a meaning
    only in `ordered` vocabularies; in others it is 0.
    """
    tokens = logits.argmax(-1)
    best = logits.amax(-1, keepdim=True)
    shares = (logits - best).exp()  # (1, k, V)
    sums = shares.sum(-1)
    total = best.squeeze(-1) + sums.log()
    mass = torch.zeros_like(total)
    if ordered:
        padded = F.pad(shares, (NEAR, NEAR))  # no mass past the ends
        near = tokens.unsqueeze(-1) + torch.arange(2 * NEAR + 1)  # (1, k, 5)
        mass = (padded.gather(-1, near).sum(-1) / sums).clamp(max=1)
    second = shares.topk(2, dim=-1).values[..., 1]
    return tokens, total, mass, (1 - second) / sums
