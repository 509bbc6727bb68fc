"""Registration of the drafts axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.axes.base import Axis
from ceed_vla.axes.drafts import ngram as ngram  # registers its decoder
from ceed_vla.axes.drafts import speculation as speculation  # registers its decoders
from ceed_vla.axes.exit_file import described_exits


def bench_rows(config: Any, folder: Path) -> list[str]:
    """Prompt lookup for ordered tokens; self-speculation for a policy with linear exits."""
    rows = ["ngram8_h"] if config.action_tokens.ordered else []
    kind, depths = described_exits(folder)
    if kind == "linear":
        rows += [f"spec{depths[0]}x4", f"spec{depths[0]}x4r2", "del"]
    return rows


AXIS = Axis("drafts", bench_rows)
