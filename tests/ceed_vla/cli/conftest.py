"""Commands in this process: the packages that they import are forgotten after each test."""

from collections.abc import Iterator

import pytest

from ceed_vla import discovery


@pytest.fixture(autouse=True)
def forgotten_packages() -> Iterator[None]:
    known = set(discovery._discovered)
    yield
    discovery._discovered.intersection_update(known)
