"""How the measurements of this folder print their results and end."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ceed_vla.errors import CeedVLAError


def print_results(name: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> int:
    """Print every result as a line of JSON; return the exit code.

    Args:
        name: Of the program, for its error.
        measure: Yields the results. SIGTERM ends it as an exit does, so that it can clean up.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for found in measure():
            print(json.dumps(found), flush=True)
    except CeedVLAError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
