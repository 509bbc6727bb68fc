"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ceed_vla.serving.predictor_types import Response


class Metrics:
    """Counters of one server; they are changed by its event loop alone.

    Attributes:
        connections: Open connections.
        waiting: Calls that wait or run.
    """

    def __init__(self) -> None:
        self.connections = 0
        self.waiting = 0
        self._requests: Counter[str] = Counter()  # by outcome: ok, refused, failed
        self._exits: Counter[str] = Counter()  # by reason
        self._seconds: dict[str, float] = {}  # by part
        self._forwards = 0

    def count(self, outcome: str) -> None:
        """Count a request that ended without a chunk: "refused" or "failed"."""
        self._requests[outcome] += 1

    def add(self, response: Response, timing: Mapping[str, float], rows: int = 1) -> None:
        """Count a chunk, which was decoded together with others, `rows` in all."""
        self._requests["ok"] += 1
        self._forwards += response.forwards
        self._exits[response.exit_reason or "none"] += 1
        for part, seconds in {**response.seconds, **timing}.items():
            own = seconds if part == "queue" else seconds / rows
            self._seconds[part] = self._seconds.get(part, 0.0) + own

    def text(self) -> str:
        """All metrics, one per line."""
        lines = [
            "# TYPE ceed_vla_connections gauge",
            f"ceed_vla_connections {self.connections}",
            "# TYPE ceed_vla_queue gauge",
            f"ceed_vla_queue {self.waiting}",
            "# TYPE ceed_vla_forwards_total counter",
            f"ceed_vla_forwards_total {self._forwards}",
            *_labelled("requests_total", "outcome", self._requests),
            *_labelled("exits_total", "reason", self._exits),
            *_labelled("seconds_total", "part", self._seconds),
        ]
        return "\n".join(lines) + "\n"


def _labelled(name: str, label: str, counts: Mapping[str, float]) -> list[str]:
    lines = [f"# TYPE ceed_vla_{name} counter"]
    for key, value in sorted(counts.items()):
        shown = re.sub(r"[^\w .-]", "_", key)
        lines.append(f'ceed_vla_{name}{{{label}="{shown}"}} {value!r}')
    return lines
