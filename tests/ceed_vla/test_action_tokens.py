"""Action tokens: wrong input, then the round trip by independent arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tokens.openvla import OpenVLATokensConfig
from ceed_vla.tokens.uniform import ActionTokenizer, ranges_from_stats


def tabletop(num_bins: int = 255, steps: int = 8) -> ActionTokenizer:
    low, high = [-1.0, -1.0, -1.0, -0.25, -0.25, -1.0, -1.0], [1.0, 1.0, 1.0, 0.25, 0.25, 1.0, 1.0]
    return ActionTokenizer(low, high, steps, num_bins=num_bins, gripper_dims=(-1,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_rejected_by_place(value: float) -> None:
    actions = torch.zeros(3, 8, 7)
    actions[1, 4, 5] = value
    with pytest.raises(TokenError, match=r"batch row 1, step 4, dimension 5"):
        tabletop().encode(actions)


@pytest.mark.parametrize("shape", [(8, 7), (2, 7, 7), (2, 8, 6), (2, 56), (1, 2, 8, 7)])
def test_actions_of_another_shape_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(TokenError, match=r"expected \(B, 8, 7\)"):
        tabletop().encode(torch.zeros(shape))


def test_tokens_that_are_not_in_the_vocabulary_are_rejected() -> None:
    tokenizer = tabletop()
    for bad in (-1, 255):
        tokens = torch.zeros(2, 56, dtype=torch.int64)
        tokens[1, 9] = bad
        with pytest.raises(TokenError, match=rf"tokens\[1, 9\] is {bad}; .* \[0, 254\]"):
            tokenizer.decode(tokens)
    with pytest.raises(TokenError, match=r"expected \(B, 56\)"):
        tokenizer.decode(torch.zeros(2, 55, dtype=torch.int64))
    with pytest.raises(TokenError, match="integers"):
        tokenizer.decode(torch.zeros(2, 56))


@pytest.mark.parametrize(
    "arguments",
    [
        ([], [], 8),
        ([-1.0], [1.0, 1.0], 8),
        ([1.0], [1.0], 8),
        ([1.0], [-1.0], 8),
        ([float("nan")], [1.0], 8),
        ([-1.0], [float("inf")], 8),
        ([-1.0], [1.0], 0),
        ([-1.0], [1.0], 8, 1),
        ([-1.0], [1.0], 8, 255, (1,)),
    ],
)
def test_grids_that_cannot_be_are_rejected(arguments: tuple) -> None:
    with pytest.raises(ConfigError):
        ActionTokenizer(*arguments)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    low=st.lists(st.floats(-100, 100), min_size=1, max_size=4),
    width=st.floats(1e-2, 200),
    num_bins=st.integers(2, 300),
    seed=st.integers(0, 2**16),
)
def test_round_trip_is_within_half_a_bin(low, width, num_bins, seed) -> None:
    high = [v + width * (i + 1) for i, v in enumerate(low)]
    tokenizer = ActionTokenizer(low, high, 3, num_bins=num_bins)
    values = np.random.default_rng(seed).uniform(low, high, (5, 3, len(low)))
    tokens = tokenizer.encode(torch.from_numpy(values))
    assert tokens.shape == (5, 3 * len(low))
    assert tokens.dtype == torch.int64
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == values.shape
    assert decoded.dtype == torch.float32
    half = (np.array(high) - np.array(low)) / (num_bins - 1) / 2
    rounding = 1e-6 * (np.abs(low).max() + np.abs(high).max())  # of float32
    assert (np.abs(decoded.numpy() - values) <= half * (1 + 1e-6) + rounding).all()
    assert tokenizer.clipped == 0
    assert torch.equal(tokenizer.encode(decoded), tokens)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reach=st.floats(1e-3, 1e3), half=st.integers(1, 200))
def test_zero_is_exact_for_odd_bins_and_symmetric_ranges(reach: float, half: int) -> None:
    tokenizer = ActionTokenizer([-reach], [reach], 1, num_bins=2 * half + 1)
    tokens = tokenizer.encode(torch.zeros(1, 1, 1))
    assert tokens.tolist() == [[half]] == [tokenizer.zero.tolist()]
    assert tokenizer.decode(tokens).item() == 0.0
    every = tokenizer.decode(torch.arange(2 * half + 1).unsqueeze(1)).flatten()
    assert torch.equal(every, -every.flip(0))


def test_range_ends_are_exact_so_a_gripper_is() -> None:
    for num_bins in (2, 255, 256):
        tokenizer = tabletop(num_bins)
        ends = torch.tensor([-1.0, 1.0]).repeat(4).reshape(1, 8, 1).expand(1, 8, 7).clone()
        ends[..., 3:5] *= 0.25
        assert torch.equal(tokenizer.decode(tokenizer.encode(ends)), ends)
        assert tokenizer.clipped == 0
    odd_ends = ActionTokenizer([0.1], [0.7], 2)
    ends = torch.tensor([[[0.1], [0.7]]])
    assert torch.equal(odd_ends.decode(odd_ends.encode(ends)), ends)


def test_256_bins_have_two_bins_about_zero() -> None:
    tokenizer = tabletop(256)
    assert set(tokenizer.zero.tolist()) <= {127, 128}
    assert tokenizer.encode(torch.full((1, 8, 7), -1.0))[0, 0] == 0
    assert tokenizer.encode(torch.full((1, 8, 7), 1.0))[0, 0] == 255


def test_zero_lies_at_the_nearest_end_when_zero_is_outside() -> None:
    assert ActionTokenizer([1.0, -3.0], [2.0, -1.0], 1).zero.tolist() == [0, 254]


def test_out_of_range_values_are_clipped_and_counted() -> None:
    tokenizer = tabletop()
    actions = torch.zeros(2, 8, 7)
    actions[0, 0, 0], actions[1, 7, 3], actions[1, 7, 6] = 1.5, -0.3, 1.0
    tokens = tokenizer.encode(actions)
    assert tokenizer.clipped == 2
    assert tokens[0, 0] == 254
    assert tokens[1, 7 * 7 + 3] == 0
    tokenizer.encode(actions)
    assert tokenizer.clipped == 4
    tokenizer.encode(torch.full((1, 8, 7), 1e30))
    assert tokenizer.clipped == 4 + 56


def test_tokens_are_step_major() -> None:
    tokenizer = tabletop()
    actions = torch.zeros(1, 8, 7)
    actions[0, 2, 1] = 1.0
    assert (tokenizer.encode(actions) == 254).nonzero().tolist() == [[0, 2 * 7 + 1]]
    assert (tokenizer.action_dim, tokenizer.chunk_steps, tokenizer.block_length) == (7, 8, 56)
    assert tokenizer.gripper_dims == (6,)


def test_integer_and_half_precision_actions_are_accepted() -> None:
    tokenizer = tabletop()
    assert torch.equal(
        tokenizer.encode(torch.ones(1, 8, 7, dtype=torch.int64)),
        tokenizer.encode(torch.ones(1, 8, 7)),
    )
    half = torch.full((1, 8, 7), 0.2, dtype=torch.float16)
    assert torch.equal(tokenizer.encode(half), tokenizer.encode(half.float()))


def stats(**more) -> dict:
    base = {
        "min": [-2.0, 0.0, 0.5, -1.0],
        "max": [1.0, 3.0, 0.5, 1.0],
        "q01": [-0.5, 0.1, 0.5, -1.0],
        "q99": [0.8, 2.0, 0.5, -1.0],
    }
    return {**{k: np.array(v, dtype=np.float32) for k, v in base.items()}, **more}


def test_ranges_are_symmetric_for_odd_bins_and_grippers_keep_their_ends() -> None:
    low, high = ranges_from_stats(stats(), "quantile", gripper_dims=(-1,), num_bins=255)
    assert low[:2] == pytest.approx([-0.8, 0.0])  # zero is the smallest value of dimension 1
    assert high[:2] == pytest.approx([0.8, 2.0])
    assert (low[3], high[3]) == (-1.0, 1.0)  # the quantiles coincide
    low, high = ranges_from_stats(stats(), "min_max", gripper_dims=(3,), num_bins=256)
    assert low[:2] == [-2.0, 0.0]
    assert high[:2] == [1.0, 3.0]
    assert (low[3], high[3]) == (-1.0, 1.0)


def test_positions_on_one_side_of_zero_keep_their_range() -> None:
    positions = stats(min=[3.0, -512.0, 1.0, -1.0], max=[512.0, -4.0, 2.0, 1.0])
    positions["q01"], positions["q99"] = (
        np.array([10.0, -500.0, 1.0, -1.0]),
        np.array([500.0, -20.0, 2.0, 1.0]),
    )
    assert ranges_from_stats(positions, "quantile", gripper_dims=(3,)) == (
        [10.0, -500.0, 1.0, -1.0],
        [500.0, -20.0, 2.0, 1.0],
    )


def test_one_stray_value_beyond_zero_does_not_widen_a_range() -> None:
    values = stats(min=[-1.0, -0.001, -0.5, -0.1], max=[120.0, 2.5, 0.02, 0.6])
    values["q01"] = np.array([95.0, 0.3, 0.001, 0.5])
    values["q99"] = np.array([119.0, 2.4, 0.02, 0.5])
    low, high = ranges_from_stats(values, "quantile")
    assert low == [95.0, 0.0, 0.0, 0.0]  # zero becomes an end where it is near
    assert high == [119.0, 2.4, 0.02, 0.5]


def test_dimensions_without_width_get_a_small_one() -> None:
    still = {k: torch.zeros(2) for k in ("min", "max", "q01", "q99")}
    for mode in ("quantile", "min_max"):
        low, high = ranges_from_stats(still, mode)
        tokenizer = ActionTokenizer(low, high, 1)
        assert torch.equal(
            tokenizer.decode(tokenizer.encode(torch.zeros(1, 1, 2))), torch.zeros(1, 1, 2)
        )
        assert max(high) < 0.01
    constant = ranges_from_stats(stats(), "min_max", num_bins=256)
    assert constant[0][2] < 0.5 < constant[1][2]


@pytest.mark.parametrize("value", [63.0, 90.0, -1000.0, 1e6])
def test_a_large_value_that_never_moves_has_bins_too(value: float) -> None:
    still = {k: torch.full((1,), value) for k in ("min", "max", "q01", "q99")}
    for num_bins in (255, 65_536):
        tokenizer = ActionTokenizer(
            *ranges_from_stats(still, "quantile", num_bins=num_bins), 1, num_bins
        )
        found = tokenizer.decode(tokenizer.encode(torch.full((1, 1, 1), value)))
        assert abs(float(found) - value) <= 1e-6 * abs(value)


def test_a_gripper_that_openvlas_range_does_not_hold_is_normalised() -> None:
    ends = {"min": [0.0, 0.0, -1.0], "max": [9.0, 100.0, 1.0]}
    stats = {**ends, "q01": ends["min"], "q99": ends["max"]}
    config = OpenVLATokensConfig(gripper_dims=[1, 2])
    config.fit(3, stats)
    assert config.mask == [True, True, False]
    tokenizer = config.build(1, 3)
    actions = torch.tensor([[[3.0, 100.0, 1.0]], [[3.0, 0.0, -1.0]], [[3.0, 50.0, 1.0]]])
    torch.testing.assert_close(
        tokenizer.decode(tokenizer.encode(actions)), actions, atol=0.3, rtol=0
    )
    assert tokenizer.clipped == 0


def test_bad_statistics_are_named() -> None:
    with pytest.raises(ConfigError, match="'mean_std'; choose one of quantile, min_max"):
        ranges_from_stats(stats(), "mean_std")
    without = stats()
    del without["q01"]
    with pytest.raises(ConfigError, match="lack 'q01'"):
        ranges_from_stats(without, "quantile")
    assert ranges_from_stats(without, "min_max")
    with pytest.raises(ConfigError, match="finite"):
        ranges_from_stats(stats(max=[1.0, np.nan, 1.0, 1.0]), "min_max")
    with pytest.raises(ConfigError, match="differ in length"):
        ranges_from_stats(stats(max=[1.0]), "min_max")
    with pytest.raises(ConfigError, match="there are 4 action dimensions"):
        ranges_from_stats(stats(), "min_max", gripper_dims=(4,))
