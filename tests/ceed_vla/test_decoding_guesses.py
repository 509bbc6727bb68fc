"""Initial guesses: always action tokens, always reproducible."""

from __future__ import annotations

import pytest
import torch

from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tokens.uniform import ActionTokenizer

TOKENS = ActionTokenizer([-10.0, -20.0], [88.0, 78.0], 3, num_bins=99)  # zero is bin 10 or bin 20
PREVIOUS = torch.arange(12).reshape(2, 6)


def test_shifted_chunk_repeats_its_last_step() -> None:
    assert TOKENS.guess("previous", 2, PREVIOUS, 1).tolist() == [
        [2, 3, 4, 5, 4, 5],
        [8, 9, 10, 11, 10, 11],
    ]
    assert TOKENS.guess("previous", 2, PREVIOUS, 0).tolist() == PREVIOUS.tolist()
    assert TOKENS.guess("previous", 2, PREVIOUS, 3)[0].tolist() == [4, 5] * 3


def test_rows_without_a_previous_chunk_start_at_mid() -> None:
    previous = PREVIOUS.clone()
    previous[0] = -1
    assert TOKENS.guess("previous", 2, previous, 2).tolist() == [[10, 20] * 3, [10, 11] * 3]
    assert TOKENS.guess("previous", 2).tolist() == [[10, 20] * 3] * 2
    assert TOKENS.guess("mid", 2, PREVIOUS, 1).tolist() == [[10, 20] * 3] * 2


def test_random_guesses_are_seeded_and_cover_the_vocabulary() -> None:
    few = ActionTokenizer([-1.0] * 2, [1.0] * 2, 3, num_bins=5)

    def draw(seed: int) -> torch.Tensor:
        return few.guess("random", 50, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert set(draw(1).unique().tolist()) == set(range(5))


def test_guesses_do_not_share_memory_with_their_sources() -> None:
    previous, zero = PREVIOUS.clone(), TOKENS.zero.clone()
    for kind in ("mid", "previous"):
        TOKENS.guess(kind, 2, previous, 0).fill_(0)
        TOKENS.guess(kind, 2).fill_(0)
    assert torch.equal(previous, PREVIOUS)
    assert torch.equal(zero, TOKENS.zero)


@pytest.mark.parametrize(
    ("previous", "shift", "message"),
    [
        (PREVIOUS[:1], 1, r"\(1, 6\)"),
        (PREVIOUS.float(), 1, "float32"),
        (PREVIOUS, 1.0, "is 1.0"),
        (PREVIOUS, 4, "is 4"),
        (PREVIOUS, -1, "is -1"),
        (PREVIOUS + 90, 1, r"chunk\[1, 3\] is 99; .* \[0, 98\]"),
        (PREVIOUS - 1, 1, r"chunk\[0, 0\] is -1"),
    ],
)
def test_previous_chunks_that_do_not_fit_are_named(previous, shift, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        TOKENS.guess("previous", 2, previous, shift)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ConfigError, match="'prompt'; choose one of previous, mid, random"):
        TOKENS.guess("prompt", 2)
