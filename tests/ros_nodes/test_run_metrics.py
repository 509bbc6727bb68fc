"""Timing of command streams and reading of diagnostics, against numbers counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.demo.report import command_timing, counts, number, status_values

MS = 1_000_000  # [ns]


def test_a_steady_stream_has_no_jitter() -> None:
    timing, more = command_timing([10 * MS * tick for tick in range(101)], [(0, 1000 * MS)])
    assert timing == {
        "command_rate_hz": 100.0,
        "missed_ticks_fraction": 0.0,
        "jitter_ms": {"p50": 0.0, "p99": 0.0},
    }
    assert more == {"commands": 101, "longest_gap_ms": 10.0}


def test_a_gap_of_more_than_one_and_a_half_periods_is_a_missed_tick() -> None:
    times = [0, 10, 20, 36, 40, 50]  # 16 ms and then 4 ms to catch up
    timing, more = command_timing([time * MS for time in times], [(0, 100 * MS)])
    assert timing["missed_ticks_fraction"] == 0.2
    assert timing["jitter_ms"] == {"p50": 0.0, "p99": pytest.approx(6.0, rel=0.01)}
    assert more["longest_gap_ms"] == 16.0


def test_pauses_between_spans_do_not_count() -> None:
    times = [*range(0, 100, 10), *range(5000, 5100, 10)]
    spans = [(0, 100 * MS), (5000 * MS, 5100 * MS)]
    timing, more = command_timing([time * MS for time in times], spans)
    assert more["commands"] == 20
    assert timing["missed_ticks_fraction"] == 0.0
    assert timing["command_rate_hz"] == 100.0


@given(st.lists(st.integers(1, 50), min_size=2, max_size=50), st.randoms())
def test_the_order_of_arrival_does_not_matter(gaps: list[int], random: object) -> None:
    times = (np.cumsum(gaps) * MS).tolist()
    shuffled = list(times)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    span = [(0, int(times[-1]))]
    assert command_timing(times, span) == command_timing(shuffled, span)


@pytest.mark.parametrize(("times", "spans"), [([], [(0, 10)]), ([1, 2], []), ([1, 2], [(5, 9)])])
def test_nothing_to_measure_is_an_error(times: list[int], spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match="no interval"):
        command_timing(times, spans)


def test_the_status_that_has_a_key_is_found_and_read() -> None:
    def status(**values: str) -> SimpleNamespace:
        pairs = [
            SimpleNamespace(key=key.replace("__", "."), value=value)
            for key, value in values.items()
        ]
        return SimpleNamespace(values=pairs)

    message = SimpleNamespace(
        status=[
            status(other="1"),
            status(rate="99.5", empty="", clamps="2", clamps__step="2", clamps__velocity="0"),
        ]
    )
    values = status_values(message, "rate")
    assert values is not None
    assert number(values, "rate") == 99.5
    assert number(values, "empty") is None
    assert number(values, "absent") is None
    assert counts(values, "clamps") == {"step": 2}
    assert counts(values, "holds") == {}
    assert status_values(message, "absent") is None
