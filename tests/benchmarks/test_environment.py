"""The environment's benchmark steps the real environment, with and without cameras."""

from __future__ import annotations

import pytest

from benchmarks.environment import rate


@pytest.mark.parametrize("cameras", [False, True])
def test_rates_are_measured(cameras: bool) -> None:
    processor, wall = rate(130, 20_000, cameras)  # past the end of an episode
    assert processor > 0
    assert wall > 0
