"""A program whose work, on a Ray cluster, kills and stops its workers: ADDRESS FOLDER.

It prints one JSON object. Its items leave marks in FOLDER, so that a fault happens once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ceed_vla.errors import CeedVLAError, TokenError
from ceed_vla.workers import ClusterConfig, open_workers

ITEMS = ["killed", "hanging", "listed", *range(40)]
SILENCE_S = 6.0  # after which a worker counts as hanging [s]


def make(folder: str) -> Callable[[Any], Iterable[tuple[Any, int]]]:
    """Return the function of a worker: two results per item, yielded or in a list."""
    marks = Path(folder)

    def run(item: Any) -> Iterator[tuple[Any, int]]:
        if item == "wrong":
            raise TokenError("this item is wrong")
        yield item, 0
        time.sleep(0.15)
        first = isinstance(item, str) and not (marks / item).exists()
        if item == "deadly" or (first and item == "killed"):
            (marks / item).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if first and item == "hanging":
            (marks / item).touch()
            time.sleep(10**6)
        with (marks / "nodes").open("a") as file:
            print(os.environ.get("NODE", ""), file=file)
        yield item, 1

    return lambda item: list(run(item)) if item == "listed" else run(item)


def main(address: str, folder: str) -> str:
    """Run the items; return what to print."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    cluster = ClusterConfig(address, timeout_s=SILENCE_S)
    errors = []
    with open_workers(1, cluster, make, folder) as workers:
        mapped = list(workers.map(ITEMS))
        for item in ("wrong", "deadly"):
            try:
                list(workers.map([item]))
            except CeedVLAError as error:
                errors.append(f"{type(error).__name__}: {error}")
    return json.dumps({"mapped": mapped, "errors": errors})


if __name__ == "__main__":
    try:
        print(main(*sys.argv[1:]))
    except CeedVLAError as refused:
        sys.exit(f"{type(refused).__name__}: {refused}")
