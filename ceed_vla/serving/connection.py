"""A connection of the policy server, which ends if its client takes more than its share."""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

MOST_UNREAD = 1_000_000  # bytes that a client has not taken


class Connection(ServerConnection):
    """A connection that ends if its client does not read, or if there are too many.

    Args:
        others: All connections, the oldest first, of which this one becomes a part.
        most: How many there may be, with those that have not said who they are.
    """

    def __init__(
        self, others: dict[Connection, None], most: int, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._others, self._most = others, most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._others[self] = None
        if len(self._others) > self._most:  # the one that has been silent for longest
            silent = (other for other in self._others if other.state is State.CONNECTING)
            ends = next(silent, self)
            del self._others[ends]  # at once: `connection_lost` comes after others were accepted
            ends.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MOST_UNREAD:  # answers to pings, for example
            self.transport.abort()
