"""Failures that repeat at 100 Hz do not fill the disk, and each is counted in a line."""

from __future__ import annotations

import logging

import pytest

from ceed_vla.errors import ObservationError
from ceed_vla.serving.failure_log import FailureLog


def fails(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_traceback_once_a_kind_and_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = FailureLog(logging.getLogger("test"), lambda: now[0])
    for i in range(3000):  # half a minute
        now[0] = 0.01 * i
        log.add(fails(KeyError("x" * 10_000)))
        log.add(fails(ObservationError("two\nlines " + "y" * 10_000)))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 4  # two kinds, and one line every ten seconds
    assert sum("test_failure_log.py" in text for text in texts) == 1
    assert all(len(text) < 1000 for text in texts)
    assert "KeyError" in texts[0]
    assert texts[1].startswith("Inference failed: two lines y")
    assert "\n" not in texts[1]
    assert "more since the last line)" in texts[2]


def test_endless_kinds_are_no_way_around_it(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(logging.getLogger("test"), lambda: 0.0)
    for i in range(1000):
        log.add(type(f"Error{i}", (Exception,), {})("no"))
    assert len(caplog.records) == 20
