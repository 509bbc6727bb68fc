"""Between device and host: tokens, measurements of exit rules, and sums of logits in one transfer;
and the result of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceed_vla.decoding.finite import check_rows as check_rows
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows


def row_sums(best: Tensor) -> Tensor:
    """Sums (B, 1) float32 of the largest logits `best` (B, k), finite if all of a row are; see
    `ceed_vla.decoding.finite`.
    """
    return best.float().sum(1, keepdim=True)


def to_host(tokens: Tensor, *more: Tensor) -> list[np.ndarray]:
    """Tokens (B, k) int64 and `more` (B, ...) float32 as arrays, in one transfer.

    On the CPU the arrays share the tensors' memory. From other devices, token ids are transferred
    as float32, which represents ids below 2^24 exactly.
    """
    parts = [part.float() for part in more]
    if tokens.device.type == "cpu":
        return [tokens.numpy(), *(part.numpy() for part in parts)]
    widths = np.cumsum([tokens.shape[1], *(part.shape[1] for part in parts)])
    together = torch.cat([tokens.float(), *parts], dim=1).cpu().numpy()
    ids, *rest = np.split(together, widths[:-1], axis=1)
    return [ids.astype(np.int64), *rest]


def result_of(
    rows: Rows, tokens: Tensor, forwards: int, states: list[Tensor] | None
) -> DecodeResult:
    """The result of decoding `tokens` (B, n), whose rows have all ended."""
    return DecodeResult(
        tokens=tokens,
        forwards=forwards,
        iterations=torch.from_numpy(rows.iterations),
        exit_reason=rows.exit_reasons,
        exact_tokens=torch.from_numpy(rows.exact),
        exact=torch.from_numpy(rows.exact >= rows.block_length),
        states=states,
    )
