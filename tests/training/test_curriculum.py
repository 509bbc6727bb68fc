"""States by curriculum: drawn where an update of the student changes most."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.training.corruption import draw_states
from ceed_vla.training.curriculum import FLOOR, informative_states
from ceed_vla.training.distill import distill

SHARES = np.array([0.7, 0.2, 0.1])
FINAL = Path("checkpoints/final/pretrained_model")


class Counting:
    """A student whose every update corrects the next wrong token.

    After 4 correct tokens, it corrects all others, too.
    """

    config = SimpleNamespace(n_action_steps=1)

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(packed_logits=self.packed_logits)
        self.tokenizer = SimpleNamespace(
            guess=lambda kind, rows, *_, **__: torch.full((rows, 8), {"mid": 2}.get(kind, 1))
        )

    def packed_logits(self, embeddings: Any, blocks: list[torch.Tensor]) -> Any:
        found = []
        for block in blocks:
            new = block.clone()
            for row in new:
                wrong = row.nonzero().flatten()
                row[wrong[:1]] = 0
                row[wrong if len(wrong) <= 5 else wrong[:1]] = 0
            found.append(torch.nn.functional.one_hot(new, 3).float())
        return None, found


def test_the_curriculum_draws_where_an_update_changes_most() -> None:
    fixed, rows = torch.zeros(3000, 8, dtype=torch.int64), 3000
    draw = draw_states(Counting(), rows, SHARES, 0, np.random.default_rng(1))
    previous = live = torch.ones(rows, 8, dtype=torch.int64)
    states = informative_states(Counting(), None, previous, fixed, live, draw, 3, SHARES)
    wrong = (states != 0).sum(1)  # 7, 6, 5 after 0 to 2 updates, then none
    gain = {7: 1 / 8, 6: 1 / 8, 5: 5 / 8, 0: 0.0}
    total = sum(value + FLOOR for value in gain.values())
    for left, value in gain.items():
        assert (wrong == left).float().mean().item() == pytest.approx(
            (value + FLOOR) / total, abs=0.03
        )
    mid = (states == 2).any(1)[wrong > 0].float().mean().item()
    assert mid == pytest.approx(0.2, abs=0.03)  # shares of guesses stay the same
    args = (previous[::2], fixed[::2], live[::2], draw[::2], 3, SHARES)
    assert torch.equal(informative_states(Counting(), None, *args), states[::2])  # in any split


def test_a_run_with_the_curriculum(studio: Any, tmp_path: Path) -> None:
    config = studio.distill_config(tmp_path / "run", steps=4, batch_size=4, curriculum="spread")
    distill(config)
    uniform = studio.distill_config(tmp_path / "other", steps=4, batch_size=4)
    distill(uniform)
    assert (tmp_path / "run" / FINAL / "model.safetensors").read_bytes() != (
        tmp_path / "other" / FINAL / "model.safetensors"
    ).read_bytes()
