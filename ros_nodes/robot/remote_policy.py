"""Runs a policy on a server (``ceed-vla serve``), which may be another machine.

The node's computer then needs neither torch nor the checkpoint. The connection is made when the
node is configured, and made anew after every fault, with the next request; a server that then
serves another policy is refused. Every fault is an answer whose code is the reason of the hold.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.errors import CeedVLAError, CheckpointError
from ceed_vla.files import read_text
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.contract import Contract
from ceed_vla.serving.data_ranges import Range
from ceed_vla.serving.failure_log import FailureLog
from ceed_vla.serving.faults import CHANGED, LOST, SILENT, ServerError
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.texts import short

logger = logging.getLogger(__name__)

PASSING = (LOST, SILENT)  # codes of faults that may end by themselves while a policy is awaited
_CONNECT = 2.0  # time to connect, and until the server has its policy; it blocks the node [s]
_FIRST_ANSWERS = 60.0  # time limit of the answers that show the usual time [s]
_WARMUP = 4  # requests that measure the usual time, of which the first does not count
_LATEST = 10  # answers whose times outside the server are known
_LEAST_TIMEOUT = 2.0  # [s]
_LENIENCE = 4.0  # an answer is missing after this many times the usual time
_LEAST_DEADLINE = 0.001  # [s]


@dataclass(frozen=True)
class RemoteSettings:
    """Where the server is, and how it is asked.

    Attributes:
        url: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        key_file: File with the API key; "" for none.
        ca_file: Certificates to trust (PEM), for ``wss``; "" for those of the system.
        timeout_s: Time limit for an answer [s]; 0: four times the usual time, at least 2 s.
        jpeg_quality: Quality of images, which are sent as JPEG; 0: pixels, without loss.
        decoding: Decoder name of all requests; "plan" and "" leave it to the server.
        replan_steps: Steps that are executed; None: as the checkpoint declares.
    """

    url: str
    key_file: str = ""
    ca_file: str = ""
    timeout_s: float = 0.0
    jpeg_quality: int = 0
    decoding: str = ""
    replan_steps: int | None = None


class RemotePolicy:
    """A policy on a server; see `ceed_vla.ros_nodes.robot.inference.RunsPolicy`.

    Raises:
        CeedVLAError: The key's file cannot be read.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._key = read_text(Path(settings.key_file)).strip() if settings.key_file else ""
        self._timeout = settings.timeout_s or _FIRST_ANSWERS
        self._network: deque[float] = deque([0.0], _LATEST)  # times outside the server [s]
        self._failures = FailureLog(logger)
        self._client: PolicyClient | None = None
        self._contract: Contract | None = None
        self._stopped = threading.Event()

    @property
    def _promised(self) -> Contract:
        if self._contract is None:
            self._contract = self._connected().contract
        return self._contract

    def declared(self) -> PolicySpec:
        """What the server promises.

        Raises:
            ServerError: There is no server, or none of this package.
        """
        return self._promised.spec

    def ranges(self, lengths: Mapping[str, int]) -> dict[str, Range | str]:
        known = self._promised.ranges
        unknown = f"{self._settings.url} has no statistics of it"
        return {
            feature: known[feature]
            if feature in known and len(known[feature].low) == length
            else unknown
            for feature, length in lengths.items()
        }

    def load(self) -> PolicySpec:
        """Measure the time until an answer; wait while there is no server.

        Raises:
            CeedVLAError: The server refuses a blank observation.
        """
        while True:
            try:
                return self._warm_up()
            except ServerError as error:
                if error.code not in PASSING or self._stopped.is_set():
                    raise
                self._failures.add(error)
            self._stopped.wait(1.0)

    def predict(
        self, request: Request, deadline: float | None, early: Callable[[Response], None]
    ) -> Response:
        try:
            return self._ask(request, deadline, early)
        except ServerError as error:
            self._failures.add(error)
            return Response(request.id, error=str(error), code=error.code)
        except Exception as error:  # of sockets or TLS; the worker must continue
            self._failures.add(error)
            text = f"{self._settings.url}: {type(error).__name__}: {short(error)}"
            return Response(request.id, error=text, code=LOST)

    def stop(self, timeout_s: float) -> None:
        self._stopped.set()
        client = self._client
        if client is not None:
            client.abort()

    def _warm_up(self) -> PolicySpec:
        spec = self._promised.spec
        blank: dict[str, Any] = {
            **{name: np.zeros((h, w, 3), np.uint8) for name, (_, h, w) in spec.cameras.items()},
            **{name: np.zeros(length, np.float32) for name, length in spec.states.items()},
        }
        times = []
        for _ in range(_WARMUP):
            response = self._ask(Request(0, blank, spec.example_instruction), None)
            times.append(response.seconds["total"])
        usual = float(np.median(times[1:]))
        if not self._settings.timeout_s:
            self._timeout = max(_LENIENCE * usual, _LEAST_TIMEOUT)
        return replace(spec, warmup_s=usual)

    def _ask(
        self,
        request: Request,
        deadline: float | None,
        early: Callable[[Response], None] | None = None,
    ) -> Response:
        """The answer, whose "total" is the time until it came; raises `ServerError`."""
        client = self._connected()
        started = time.monotonic()
        left = None
        if deadline is not None:
            left = max(deadline - started - float(np.median(self._network)), _LEAST_DEADLINE)
        decoding = self._settings.decoding
        client.timeout_s = self._timeout
        try:
            response = client.predict(
                replace(
                    request,
                    deadline_s=left,
                    decoding="" if decoding == "plan" else decoding,
                    executed_steps=self._settings.replan_steps,
                ),
                early,
            )
        except BaseException:
            self._disconnect()
            raise
        self._network.append(response.seconds["network"])
        response.seconds["total"] = time.monotonic() - started
        return response

    def _disconnect(self) -> None:
        """End the connection, so that nothing that still comes is taken for a later answer."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> PolicyClient:
        """The connection, made anew if there is none; raises `ServerError`."""
        if self._client is not None and self._client.is_open:
            return self._client
        self._disconnect()
        settings = self._settings
        client = PolicyClient(
            settings.url,
            self._key,
            settings.ca_file,
            timeout_s=self._timeout,
            connect_s=_CONNECT,
            jpeg_quality=settings.jpeg_quality,
        )
        changed = self._contract.difference(client.contract) if self._contract else ""
        if changed or self._stopped.is_set():
            with suppress(CeedVLAError):
                client.close()
            if self._stopped.is_set():
                raise CheckpointError("The node has ended.")
            raise ServerError(
                CHANGED,
                f"{settings.url} serves another policy than when the node was configured: "
                f"{changed}. Start the former one, or clean up and configure the node again.",
            )
        self._client = client
        return client
