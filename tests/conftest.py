"""Settings of every test run: no screen, no network, one thread."""

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a busy machine real time may fail a test that is right: CI runs such a one once more, and reports that."""
    if os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("realtime"):
                item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture
def own_precision() -> Iterator[None]:
    """For tests that run commands in this process: their precision and their packages are not the others'."""
    from accelerate.state import AcceleratorState

    from ceed_vla import discovery

    known = set(discovery._discovered)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    discovery._discovered.intersection_update(known)
