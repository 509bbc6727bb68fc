"""Settings of every test run: no screen, no network, one thread."""

import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"
# Exports that tests need are made once in a run, and are not the user's.
_RUN = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
_EXPORTS = Path(tempfile.gettempdir(), f"ceed_vla-tests-{_RUN}")
os.environ["CEED_VLA_CACHE"] = str(_EXPORTS)
os.environ["LIBERO_CONFIG_PATH"] = str(_EXPORTS / "libero")  # not the user's, of any installation

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that keep time, before ``-m`` chooses; others with a robot's processes are
    marked where they are.

    On a busy machine real time may fail a test that is right: CI runs such a one once more, and
    reports that.
    """
    for item in items:
        realtime = item.get_closest_marker("realtime")
        if realtime or "graph" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timed)
        if realtime and os.environ.get("CI"):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the run's exports, once all workers have ended."""
    if not hasattr(session.config, "workerinput"):
        shutil.rmtree(_EXPORTS, ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests run beside each other (`-n 2`), but those that keep time have both cores, unless they
    are marked `realtime(alone=False)`.
    """
    if not (run := os.environ.get("PYTEST_XDIST_TESTRUNUID")):
        return (yield)
    marker = item.get_closest_marker("realtime")
    alone = item.get_closest_marker("timed") and (
        marker is None or marker.kwargs.get("alone", True)
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
