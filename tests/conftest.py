"""Settings of every test run: no screen, no network, one thread."""

import fcntl
import importlib.util
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a busy machine real time may fail a test that is right: CI runs such a one once more, and
    reports that.
    """
    if os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("realtime"):
                item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests run beside each other (`-n 2`), but those with a robot's processes, or in real time,
    have both cores, unless they are marked `realtime(alone=False)`.
    """
    if not (run := os.environ.get("PYTEST_XDIST_TESTRUNUID")):
        return (yield)
    marker = item.get_closest_marker("realtime")
    alone = (
        marker.kwargs.get("alone", True) if marker else "graph" in getattr(item, "fixturenames", ())
    )
    files = (Path(tempfile.gettempdir(), f"pytest-{run}.{name}") for name in ("turn", "tests"))
    with next(files).open("w") as turn, next(files).open("w") as tests:
        fcntl.flock(turn, fcntl.LOCK_EX)  # who waits to be alone is not overtaken
        fcntl.flock(tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """For tests that run commands in this process: their precision and their packages are not the
    others'.
    """
    from accelerate.state import AcceleratorState

    from ceed_vla import discovery

    known = set(discovery._discovered)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    discovery._discovered.intersection_update(known)
