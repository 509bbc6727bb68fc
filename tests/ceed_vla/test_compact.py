"""The compact backbone's camera stems."""

from __future__ import annotations

import pytest
import torch

from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.compact.stem import CameraStem, Keypoints
from ceed_vla.backbones.compact.words import split_words
from ceed_vla.errors import ConfigError


@pytest.mark.parametrize("name", ["keypoints", "early_readout"])
def test_counts_are_not_negative(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be a whole number in"):
        CompactConfig(**{name: -1})


def test_keypoints_are_the_places_of_their_heat() -> None:
    """A single hot cell of one fine channel is found at its column and row, in [-1, 1]."""
    keypoints = Keypoints(fine=2, coarse=3, count=1, width=2)
    with torch.no_grad():
        keypoints.fine.weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
        keypoints.coarse.weight.zero_()
        keypoints.project.weight.copy_(torch.eye(2))
        keypoints.project.bias.zero_()
    features = torch.randn(3, 2, 5, 5)
    for row, (y, x) in enumerate([(0, 0), (1, 4), (3, 2)]):
        features[row, 1] = 0.0
        features[row, 1, y, x] = 100.0
    wanted = torch.tensor([[-1.0, -1.0], [1.0, -0.5], [0.0, 0.5]])  # x, y
    torch.testing.assert_close(keypoints(features, torch.randn(3, 3, 2, 2)).squeeze(1), wanted)


def test_a_stem_without_keypoints_has_a_token_less() -> None:
    for count, tokens in ((0, 4), (8, 5)):
        stem = CameraStem(
            (4, 4, 4, 4), grid=2, keypoints=count, image_size=32, width=6, instruction_width=3
        )
        assert stem(torch.randn(2, 3, 32, 32), torch.randn(2, 3)).shape == (2, tokens, 6)


def test_words_are_those_of_any_script() -> None:
    assert split_words("Move_the RED cube, 2 cm!") == ["move", "the", "red", "cube", "2", "cm"]
    assert split_words("移动 红色-1 grünen") == ["移动", "红色", "1", "grünen"]
