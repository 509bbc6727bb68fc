"""The server: connections in an event loop, the policy in a thread of its own.

    client --message--> read --call--> queue --> one thread: `Predictor` --> answer --> client

A connection waits for the answer to its message before it reads the next one, so the queue holds at
most one call of each client, and clients take turns.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse

from ceed_vla.errors import CeedVLAError
from ceed_vla.serving.arrays import WireError
from ceed_vla.serving.metrics import Metrics
from ceed_vla.serving.predictor import Predictor
from ceed_vla.serving.predictor_types import PolicySpec, Response
from ceed_vla.serving.protocols import Call, WireProtocol
from ceed_vla.serving.sessions import Sessions

logger = logging.getLogger(__name__)

FAILED = 1011  # closing code after an error
GOING = 1001  # closing code when the server stops
SEND_SECONDS = 10.0  # time in which a client must take an answer
GRACE_SECONDS = 30.0  # time for what runs when the server stops


@dataclass(frozen=True)
class Limits:
    """What clients may do.

    Attributes:
        message_bytes: Largest message.
        connections: Open connections.
        rate: Requests of a connection [Hz].
        key: API key that clients must send; "" for none.
    """

    message_bytes: int
    connections: int
    rate: float
    key: str = ""


class PolicyServer:
    """Serves one policy until `stop` is called.

    Args:
        load: Loads the policy; called in the policy's thread.
        protocol: Makes the protocol for the loaded policy.
        limits: What clients may do.
        tls: Certificate and key; None without TLS.
    """

    def __init__(
        self,
        load: Callable[[], Predictor],
        protocol: Callable[[PolicySpec], WireProtocol],
        limits: Limits,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._load, self._protocol_of = load, protocol
        self._limits, self._tls = limits, tls
        self._thread = ThreadPoolExecutor(1, "policy")
        self._metrics = Metrics()
        self._predictor: Predictor | None = None
        self._protocol: WireProtocol | None = None
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None

    async def run(
        self, host: str, port: int, opened: Callable[[int], object] = lambda port: None
    ) -> None:
        """Serve until `stop`, then answer what runs.

        Args:
            host: Address to listen on.
            port: Port; 0 for a free one.
            opened: Called with the port when the server listens.

        Raises:
            CeedVLAError: The policy cannot be loaded.
            OSError: The address cannot be listened on.
        """
        loading = asyncio.ensure_future(self._warm())
        server = await serve(
            self._connection,
            host,
            port,
            ssl=self._tls,
            process_request=self._before,
            compression=None,
            max_size=self._limits.message_bytes,
            server_header=None,
        )
        try:
            opened(server.sockets[0].getsockname()[1])
            await self._stopping.wait()
            server.close(close_connections=False)  # no new ones; the open ones end by themselves
            with_grace = asyncio.wait_for(server.wait_closed(), GRACE_SECONDS)
            try:
                await with_grace
            except TimeoutError:
                server.close()
        finally:
            loading.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `run` as soon as what runs is answered; safe in a signal handler of the loop."""
        self._stopping.set()

    async def _warm(self) -> None:
        """Load the policy; if that fails, stop."""
        loop = asyncio.get_running_loop()
        try:
            self._predictor = await loop.run_in_executor(self._thread, self._load)
            self._protocol = self._protocol_of(self._predictor.spec)
        except CeedVLAError as error:
            self._failure = error
            self._stopping.set()
            return
        self._ready.set()
        logger.info("The policy is ready: %.1f ms per chunk.", 1e3 * self._predictor.spec.warmup_s)

    def _before(self, connection: ServerConnection, request: HttpRequest) -> HttpResponse | None:
        """Answer plain HTTP, and refuse clients that may not connect."""
        if request.path == "/healthz":
            ready = self._ready.is_set() and not self._stopping.is_set()
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "OK\n" if ready else "the policy is not ready\n")
        key = self._limits.key
        given = request.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Api-Key {key}".encode()):
            text = "send the header Authorization: Api-Key KEY\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        if request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self._metrics.text())
        if self._metrics.connections >= self._limits.connections or self._stopping.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "no more connections\n")
        return None

    async def _connection(self, connection: ServerConnection) -> None:
        """Serve one client."""
        self._metrics.connections += 1
        try:
            if await self._or_stop(self._ready.wait()) is None:
                await connection.close(GOING)
                return
            await self._calls(connection)
        except (ConnectionClosed, TimeoutError):
            pass  # the client has gone, or does not read
        finally:
            self._metrics.connections -= 1

    async def _calls(self, connection: ServerConnection) -> None:
        """Answer the messages of one client, one after the other."""
        assert self._predictor is not None
        assert self._protocol is not None
        spec = self._predictor.spec
        sessions = Sessions(spec)
        greeting = self._protocol.greeting(spec)
        if greeting is not None:
            await self._send(connection, greeting)
        last = float("-inf")
        while True:
            message = await self._or_stop(connection.recv())
            if message is None:
                await connection.close(GOING)
                return
            arrived = time.monotonic()
            await asyncio.sleep(max(last + 1 / self._limits.rate - arrived, 0))
            last = time.monotonic()
            answer, failed = await self._answer(message, arrived, sessions)
            await self._send(connection, answer)
            if failed:
                await connection.close(FAILED, "the error is in the previous frame")
                return

    async def _answer(
        self, message: str | bytes, arrived: float, sessions: Sessions
    ) -> tuple[str | bytes, bool]:
        """The answer to a message, and whether it is an error."""
        assert self._predictor is not None
        assert self._protocol is not None
        try:
            if isinstance(message, str):
                raise WireError("The message is text; it must be binary.")
            call = self._protocol.read(message)
        except WireError as error:
            self._metrics.count("refused")
            return self._protocol.error(None, str(error)), True
        self._metrics.waiting += 1
        try:
            response, started = await self._predict(call, sessions, arrived)
        finally:
            self._metrics.waiting -= 1
        if response.error is not None:
            self._metrics.count("failed")
            return self._protocol.error(call, response.error), True
        sessions.keep(call, response)
        now = time.monotonic()
        timing = {"queue": started - arrived, "infer": now - started}
        self._metrics.add(response, timing)
        return self._protocol.answer(call, response, timing), False

    async def _predict(
        self, call: Call, sessions: Sessions, arrived: float
    ) -> tuple[Response, float]:
        """Run a call in the policy's thread; returns when it started, too."""
        predictor: Any = self._predictor
        request = sessions.warm(call)
        deadline = None if call.deadline_s is None else arrived + call.deadline_s

        def run() -> tuple[Response, float]:
            started = time.monotonic()
            return predictor.predict(replace(request, id=1), deadline), started

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _send(self, connection: ServerConnection, message: str | bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await connection.send(message)

    async def _or_stop(self, waited: Any) -> Any:
        """The result of `waited`; None if the server stops first."""
        task = asyncio.ensure_future(waited)
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stop.cancel()
