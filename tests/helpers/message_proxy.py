"""A proxy between a client and a server that harms whole messages on purpose."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from ceed_vla.serving.arrays import packed, unpacked

NONE, DELAY, STALL, DROP, DOUBLE, SWAP, CUT, STRANGE = (
    *("none", "delay", "stall", "drop", "double", "swap", "cut", "strange"),
)
DELAYS = 0.05, 0.3  # [s]
STALLED = 2.0  # [s]
_OPTIONS = {"compression": None, "max_size": None}


class MessageProxy:
    """Passes messages on, harmed by `fault`.

    Attributes:
        upstream: The server; "" refuses connections.
        fault: One of the faults; `SWAP` answers every request with the answer to the one before,
            `STRANGE` with that to a request of somebody else.
        harmed: Number of messages that were harmed.
    """

    def __init__(self) -> None:
        self.upstream = ""
        self.fault = NONE
        self.harmed = 0
        self._random = random.Random(0)

    def handle(self, client: ServerConnection) -> None:
        """Serve one client until either side ends the connection."""
        if not self.upstream:
            return
        with suppress(ConnectionClosed, OSError), connect(self.upstream, **_OPTIONS) as server:
            client.send(server.recv())
            before: str | bytes | None = None
            for request in client:
                before = self._pass(client, server, request, before)

    def _pass(
        self,
        client: ServerConnection,
        server: ClientConnection,
        request: str | bytes,
        before: str | bytes | None,
    ) -> str | bytes | None:
        """Pass one request and its answer, which is returned."""
        fault = self.fault
        self.harmed += fault != NONE
        if fault == DROP:
            return before
        if fault == CUT:
            client.socket.close()
            raise ConnectionResetError
        if fault == DELAY:
            time.sleep(self._random.uniform(*DELAYS) / 2)
        server.send(request)
        answer = server.recv()
        if fault == DELAY:
            time.sleep(self._random.uniform(*DELAYS) / 2)
        if fault == STALL:
            time.sleep(STALLED)
        if fault == STRANGE and isinstance(answer, bytes):
            answer = packed({**unpacked(answer), "request_id": 123_456})
        client.send(before if fault == SWAP and before is not None else answer)
        if fault == DOUBLE:
            client.send(answer)
        return answer


@contextmanager
def proxied(upstream: str) -> Iterator[tuple[MessageProxy, str]]:
    """A running proxy, and its address."""
    proxy = MessageProxy()
    proxy.upstream = upstream
    with serve(proxy.handle, "127.0.0.1", 0, **_OPTIONS) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield proxy, f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()
