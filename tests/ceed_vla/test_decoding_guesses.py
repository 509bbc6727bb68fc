"""First states: always action tokens, always reproducible."""

from __future__ import annotations

import pytest
import torch

from ceed_vla.decoding import make_guess
from ceed_vla.errors import ConfigError, TokenError

ZERO = torch.tensor([10, 20])  # A = 2
PREVIOUS = torch.arange(12).reshape(2, 6)  # m = 3


def test_shifted_chunk_repeats_its_last_step() -> None:
    assert make_guess("previous", 2, 6, 99, ZERO, PREVIOUS, 2).tolist() == [
        [2, 3, 4, 5, 4, 5],
        [8, 9, 10, 11, 10, 11],
    ]
    assert make_guess("previous", 2, 6, 99, ZERO, PREVIOUS, 0).tolist() == PREVIOUS.tolist()
    assert make_guess("previous", 2, 6, 99, ZERO, PREVIOUS, 6)[0].tolist() == [4, 5] * 3


def test_rows_without_a_previous_chunk_start_at_mid() -> None:
    previous = PREVIOUS.clone()
    previous[0] = -1
    guess = make_guess("previous", 2, 6, 99, ZERO, previous, 4)
    assert guess.tolist() == [[10, 20] * 3, [10, 11] * 3]
    assert make_guess("previous", 2, 6, 99, ZERO).tolist() == [[10, 20] * 3] * 2
    assert make_guess("mid", 2, 6, 99, ZERO, PREVIOUS, 2).tolist() == [[10, 20] * 3] * 2


def test_zero_bins_may_be_given_for_every_slot() -> None:
    per_slot = ZERO.repeat(3)
    assert torch.equal(make_guess("mid", 2, 6, 99, per_slot), make_guess("mid", 2, 6, 99, ZERO))
    assert torch.equal(
        make_guess("previous", 2, 6, 99, per_slot, PREVIOUS, 2, action_dim=2),
        make_guess("previous", 2, 6, 99, ZERO, PREVIOUS, 2),
    )


def test_random_guesses_are_seeded_and_cover_the_vocabulary() -> None:
    def draw(seed: int) -> torch.Tensor:
        return make_guess("random", 50, 6, 5, ZERO, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert set(draw(1).unique().tolist()) == set(range(5))


def test_guesses_do_not_share_memory_with_their_sources() -> None:
    previous, zero = PREVIOUS.clone(), ZERO.clone()
    for kind in ("mid", "previous"):
        make_guess(kind, 2, 6, 99, zero, previous, 0).fill_(0)
        make_guess(kind, 2, 6, 99, zero).fill_(0)
    assert torch.equal(previous, PREVIOUS)
    assert torch.equal(zero, ZERO)


@pytest.mark.parametrize(
    ("previous", "shift", "message"),
    [
        (PREVIOUS[:1], 2, r"\(1, 6\)"),
        (PREVIOUS.float(), 2, "float32"),
        (PREVIOUS, 3, "by 3"),
        (PREVIOUS, 8, "by 8"),
        (PREVIOUS, -2, "by -2"),
        (PREVIOUS + 90, 2, r"chunk\[1, 3\] is 99; .* \[0, 98\]"),
        (PREVIOUS - 1, 2, r"chunk\[0, 0\] is -1"),
    ],
)
def test_previous_chunks_that_do_not_fit_are_named(previous, shift: int, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        make_guess("previous", 2, 6, 99, ZERO, previous, shift)


def test_unknown_kinds_and_layouts_are_named() -> None:
    with pytest.raises(ConfigError, match="'prompt'; choose one of previous, mid, random"):
        make_guess("prompt", 2, 6, 99, ZERO)
    with pytest.raises(TokenError, match="does not divide"):
        make_guess("mid", 2, 7, 99, ZERO)
