"""OpenVLA's action tokens against numpy, as in the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.tokens.openvla import OpenVLATokenizer, OpenVLATokensConfig

Q01, Q99, MASK = [-0.5, -100.0, 0.0], [0.5, 300.0, 1.0], [True, True, False]


@pytest.fixture
def tokenizer() -> OpenVLATokenizer:
    return OpenVLATokenizer(OpenVLATokensConfig(q01=Q01, q99=Q99, mask=MASK), chunk_steps=2)


def test_decoding_equals_the_reference(tokenizer: OpenVLATokenizer) -> None:
    ids = np.random.default_rng(0).integers(32000 - 256, 32000, (5, 6))
    ids[0, :3], ids[1, :3] = 31999, 31744  # both ends
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    normalised = centres[np.clip(32000 - ids - 1, 0, 254)].reshape(5, 2, 3)
    low, high = np.array(Q01), np.array(Q99)
    expected = np.where(MASK, 0.5 * (normalised + 1) * (high - low) + low, normalised)
    tokens = torch.from_numpy(31999 - ids)
    assert np.array_equal(tokenizer.values(tokens).numpy(), expected)
    assert np.array_equal(tokenizer.decode(tokens).numpy(), expected.astype(np.float32))


def test_encoding_equals_the_reference(tokenizer: OpenVLATokenizer) -> None:
    actions = np.random.default_rng(1).uniform([-0.6, -120, 0], [0.6, 320, 1], (50, 2, 3))
    actions[0, 0], actions[0, 1] = [-0.5, -100, 0], [0.5, 300, 1]
    low, high = np.array(Q01), np.array(Q99)
    normalised = np.where(MASK, 2 * (actions - low) / (high - low) - 1, actions)
    ids = 32000 - np.digitize(np.clip(normalised, -1, 1), np.linspace(-1, 1, 256))
    assert np.array_equal(
        tokenizer.encode(torch.from_numpy(actions)).numpy(), 31999 - ids.reshape(50, 6)
    )
    assert tokenizer.clipped > 0


def test_a_round_trip_errs_by_half_a_bin(tokenizer: OpenVLATokenizer) -> None:
    tokens = torch.randint(255, (20, 6))
    assert torch.equal(tokenizer.encode(tokenizer.values(tokens)), tokens)
    share = torch.rand(20, 2, 3, dtype=torch.float64)
    actions = tokenizer.low + share * (tokenizer.high - tokenizer.low)
    error = (tokenizer.values(tokenizer.encode(actions)) - actions).abs()
    assert (error <= (tokenizer.high - tokenizer.low) / 255 / 2 + 1e-9).all()
    still = tokenizer.values(tokenizer.zero[None])
    assert (still.abs() <= (tokenizer.high - tokenizer.low) / 255).all()


@pytest.mark.parametrize(
    ("actions", "message"),
    [(torch.zeros(1, 3, 2), "expected"), (torch.full((1, 2, 3), float("nan")), "finite")],
)
def test_actions_without_tokens(
    tokenizer: OpenVLATokenizer, actions: torch.Tensor, message: str
) -> None:
    with pytest.raises(TokenError, match=message):
        tokenizer.encode(actions)


@pytest.mark.parametrize(
    "tokens", [torch.full((1, 6), 256), torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 6)]
)
def test_tokens_without_actions(tokenizer: OpenVLATokenizer, tokens: torch.Tensor) -> None:
    with pytest.raises(TokenError):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q01": [0.0]}, "one of each"),
        ({"q01": [1.0, 0.0, 0.0]}, r"Dimension 0 has the quantiles \[1.0, 0.5\]"),
        ({"q99": [0.5, float("nan"), 1.0]}, "finite"),
        ({"n_action_bins": 2}, r"n_action_bins is 2; it must be a whole number in \[3,"),
    ],
)
def test_quantiles_that_define_nothing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenVLATokensConfig(**{"q01": Q01, "q99": Q99, "mask": MASK, **changes}).build(2, 3)  # type: ignore[arg-type]


def test_quantiles_from_data() -> None:
    config = OpenVLATokensConfig()
    stats = {
        "q01": torch.tensor([-1.0, 0.0]),
        "q99": torch.tensor([2.0, 1.0]),
        "min": torch.tensor([-3.0, 0.0]),
        "max": torch.tensor([3.0, 1.0]),
    }
    config.fit(2, stats)
    assert (config.q01, config.q99, config.mask) == ([-1.0, 0.0], [2.0, 1.0], [True, False])
    with pytest.raises(ConfigError, match="no action statistics"):
        OpenVLATokensConfig().fit(2, None)
    with pytest.raises(ConfigError, match="q01 has 2 values, the action has 3"):
        config.validate_features(3)
