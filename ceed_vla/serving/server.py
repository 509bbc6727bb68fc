"""The server: connections in an event loop, the policy in a thread of its own.

    client --message--> read --call--> `PolicyThread`: `Predictor` --> answer --> client

A connection waits for the answer to its message before it reads the next one, unless its protocol
lets the call run beside. Either way the queue holds at most one call of each client, and clients
take turns.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import http
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.protocol import State

from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError, raised_as
from ceed_vla.serving.arrays import WireError
from ceed_vla.serving.connection import Connection
from ceed_vla.serving.encoded_images import EncodedImage
from ceed_vla.serving.health import problem
from ceed_vla.serving.metrics import Metrics
from ceed_vla.serving.policy_thread import Answered, Job, PolicyThread, kind_of
from ceed_vla.serving.predictor import Predictor
from ceed_vla.serving.predictor_types import Request, Response
from ceed_vla.serving.protocols import Call, Conversation, RefusedError, WireProtocol
from ceed_vla.serving.sessions import Sessions

logger = logging.getLogger(__name__)

FAILED = 1011  # closing code after an error
GOING = 1001  # closing code when the server stops
SEND_SECONDS = 10.0  # time in which a client must take an answer
_DECODERS = 2  # threads that decode images of clients
HEALTH = ("/healthz", "/health")  # of openpi, and of vla-eval
GRACE_SECONDS = 30.0  # time for what runs when the server stops


@dataclass(frozen=True)
class Limits:
    """What clients may do.

    Attributes:
        message_bytes: Largest message.
        connections: Open connections.
        rate: Requests of a connection [Hz].
        batch: Requests of different clients that are decoded together at most.
        batch_wait_s: Time that the first of them waits for others [s].
        key: API key that clients must send; "" for none.
    """

    message_bytes: int
    connections: int
    rate: float
    batch: int = 1
    batch_wait_s: float = 0.0
    key: str = ""


@dataclass
class _Client:
    """One client.

    Attributes:
        connection: Its connection.
        conversation: Its messages.
        sessions: Its warm starts.
        turn: Held while a call runs.
        arrived: Time on `time.monotonic`'s clock at which its last message arrived [s].
        total: Time from the arrival of a message until its answer was sent, of the last one [s].
        ended: Whether an error has ended the connection.
    """

    connection: ServerConnection
    conversation: Conversation
    sessions: Sessions
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    arrived: float = 0.0
    total: float = 0.0
    ended: bool = False


class _EndedError(Exception):
    """An error has ended a connection, and was sent."""


class PolicyServer:
    """Serves one policy until `stop` is called.

    Args:
        load: Loads the policy; called in the policy's thread.
        protocol: Reads requests and writes answers.
        limits: What clients may do.
        tls: Certificate and key; None without TLS.
        latency_s: Time from the arrival of a request before which no chunk is sent [s].
    """

    def __init__(
        self,
        load: Callable[[], Predictor],
        protocol: WireProtocol,
        limits: Limits,
        tls: ssl.SSLContext | None = None,
        latency_s: float = 0.0,
    ) -> None:
        self._load, self._protocol = load, protocol
        self._limits, self._tls = limits, tls
        self._latency_s = latency_s
        self._thread = PolicyThread(limits.batch, limits.batch_wait_s)
        self._open: dict[Connection, None] = {}
        self._metrics = Metrics()
        self._predictor: Predictor | None = None
        self._decoders = asyncio.Semaphore(_DECODERS)
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._failure: CeedVLAError | None = None

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
        server = await serve(
            self._connection,
            host,
            port,
            ssl=self._tls,
            process_request=self._before,
            create_connection=cast("Any", self._new),
            origins=[None],  # no browser: a web page could use a server on its own machine
            compression=None,
            max_size=self._limits.message_bytes,
            max_queue=1,
            ping_timeout=self._protocol.ping_seconds,
            server_header=None,
        )
        loading = asyncio.ensure_future(self._warm())
        try:
            opened(server.sockets[0].getsockname()[1])
            await self._stopping.wait()
            server.close(close_connections=False)  # no new ones; the open ones end by themselves
            try:
                await asyncio.wait_for(server.wait_closed(), GRACE_SECONDS)
            except TimeoutError:
                for connection in list(self._open):
                    connection.transport.abort()
        finally:
            loading.cancel()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `run` as soon as what runs is answered; safe in a signal handler of the loop."""
        self._stopping.set()

    async def _warm(self) -> None:
        """Load the policy; if that fails, stop."""
        try:
            # Policies of other packages raise errors of any type.
            with raised_as(
                CheckpointError, "The policy cannot be loaded", "correct this, and start again."
            ):
                self._predictor = await self._thread.begin(
                    self._load, lambda predictor: predictor.predict_together
                )
            if self._limits.batch > 1 and not self._predictor.joins:
                engine = self._predictor.spec.engine
                raise ConfigError(
                    f"max_batch is {self._limits.batch}; the engine {engine} decodes one request "
                    "at a time. Use a CEED-VLA checkpoint with --engine eager, or 1."
                )
        except CeedVLAError as error:
            self._failure = error
            self._stopping.set()
            return
        self._thread.chunk_s = self._predictor.spec.warmup_s
        gc.collect()
        gc.freeze()  # a full collection of the policy's objects takes longer than an answer
        self._ready.set()
        logger.info("The policy is ready: %.1f ms per chunk.", 1e3 * self._predictor.spec.warmup_s)

    def _before(self, connection: ServerConnection, request: HttpRequest) -> HttpResponse | None:
        """Answer plain HTTP, and refuse clients that may not connect."""
        if request.path in HEALTH:
            ready = self._ready.is_set() and not self._stopping.is_set()
            why = problem(self._predictor if ready else None, self._thread)
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if why else http.HTTPStatus.OK
            return connection.respond(status, f"{why or 'OK'}\n")
        key = self._limits.key
        given = request.headers.get_all("Authorization")
        one = given[0] if len(given) == 1 else ""
        if key and not hmac.compare_digest(one.encode(), f"Api-Key {key}".encode()):
            text = "send the header Authorization: Api-Key KEY\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        if request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self._metrics.text())
        if self._metrics.connections >= self._limits.connections or self._stopping.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "no more connections\n")
        return None

    def _new(self, *arguments: Any, **options: Any) -> Connection:
        return Connection(self._open, 2 * self._limits.connections, *arguments, **options)

    async def _connection(self, connection: ServerConnection) -> None:
        """Serve one client."""
        self._metrics.connections += 1
        try:
            if await self._or_stop(self._loaded(connection)):
                await self._calls(connection)
            else:
                await connection.close(GOING)
        except* (ConnectionClosed, TimeoutError, _EndedError):
            pass  # the client has gone, does not read, or has got the error that ends it
        finally:
            self._metrics.connections -= 1

    async def _loaded(self, connection: ServerConnection) -> bool:
        """Wait until the policy is loaded, or the client has left; its next use fails then."""
        waited = [
            asyncio.ensure_future(self._ready.wait()),
            asyncio.ensure_future(connection.wait_closed()),
        ]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waited:
                task.cancel()
        return self._ready.is_set()

    async def _calls(self, connection: ServerConnection) -> None:
        """Answer the messages of one client, one after the other."""
        assert self._predictor is not None
        spec = self._predictor.spec
        client = _Client(connection, self._protocol.conversation(spec), Sessions(spec))
        greeting = self._protocol.greeting(spec)
        if greeting is not None:
            await self._send(connection, greeting)
        last = float("-inf")
        async with asyncio.TaskGroup() as beside:  # it waits for the call that runs
            while (message := await self._or_stop(connection.recv())) is not None:
                client.arrived = time.monotonic()
                soon = last + 1 / self._limits.rate - client.arrived
                if soon > 0:
                    await self._or_stop(asyncio.sleep(soon))
                last = time.monotonic()
                call = await self._read(client, message)
                if call is not None and call.beside:
                    beside.create_task(self._answer(client, call, client.arrived))
                elif call is not None:
                    await self._answer(client, call, client.arrived)
                if client.ended:
                    raise _EndedError  # cancels the call that runs
        await connection.close(GOING)

    async def _read(self, client: _Client, message: str | bytes) -> Call | None:
        """Read a message, and send what answers it at once; returns the call that it needs."""
        try:
            if isinstance(message, str):
                raise WireError("The message is text; it must be binary.")
            read = _read(client.conversation, message)
        except WireError as error:
            self._metrics.count("refused")
            refused = error.call if isinstance(error, RefusedError) else None
            return await self._failed(client, refused, str(error))
        call = read if isinstance(read, Call) else None
        at_once = read.at_once if isinstance(read, Call) else read
        if at_once is not None:
            await self._sent(client, at_once, client.arrived)
        return call

    async def _answer(self, client: _Client, call: Call, arrived: float) -> None:
        """Make a call, and those that follow from it, and send the answers.

        `arrived` is the time of its message [s].
        """
        following: Call | None = call
        async with client.turn:
            while following is not None:
                following = await self._answer_one(client, following, arrived)
                arrived = client.arrived  # what follows is of the newest message

    async def _answer_one(self, client: _Client, call: Call, arrived: float) -> Call | None:
        """Make one call, and send its answer; returns the call that follows from it."""
        last_total = client.total
        try:
            request = await self._with_pixels(client.sessions.warm(call))
        except WireError as error:
            self._metrics.count("refused")
            return await self._failed(client, call, str(error))
        self._metrics.waiting += 1
        try:
            answered = await self._predict(client, call, request, arrived)
        finally:
            self._metrics.waiting -= 1
        response = answered.response
        if response.error is not None:
            self._metrics.count("failed")
            return await self._failed(client, call, response.error, response.code)
        timing = {
            "queue": answered.started - arrived,
            "infer": time.monotonic() - answered.started,
        }
        self._metrics.add(response, timing, answered.rows)
        await self._wait_for_latency(arrived)
        client.sessions.keep(call, response)
        timing["prev_total"] = last_total
        return await self._sent(client, client.conversation.answer(call, response, timing), arrived)

    async def _sent(
        self, client: _Client, answer: str | bytes | Call | None, arrived: float
    ) -> Call | None:
        """Send an answer; a call is returned instead."""
        if isinstance(answer, Call):
            return answer
        if answer is not None:
            await self._send(client.connection, answer)
        client.total = time.monotonic() - arrived
        return None

    async def _failed(
        self, client: _Client, call: Call | None, text: str, code: str = ""
    ) -> Call | None:
        """Send an error as `_sent` does; the connection ends, unless the call goes on."""
        following = await self._sent(client, client.conversation.error(call, text), client.arrived)
        if call is None or not call.goes_on:
            client.ended = True
            reason = code or "the error is in the previous frame"
            await client.connection.close(FAILED, reason)
        return following

    async def _wait_for_latency(self, arrived: float) -> None:
        """Wait until an answer to a message that arrived at this time may be sent [s]."""
        left = arrived + self._latency_s - time.monotonic()
        if left > 0:
            await self._or_stop(asyncio.sleep(left))

    async def _with_pixels(self, request: Request) -> Request:
        """The request with decoded images, a few at a time, beside the event loop."""
        encoded = {
            name: value
            for name, value in request.observation.items()
            if isinstance(value, EncodedImage)
        }
        if not encoded:
            return request
        async with self._decoders:
            pixels = await asyncio.to_thread(lambda: {k: v.pixels() for k, v in encoded.items()})
        return replace(request, observation={**request.observation, **pixels})

    async def _predict(
        self, client: _Client, call: Call, request: Request, arrived: float
    ) -> Answered:
        """Run a call in the policy's thread."""
        deadline = None if call.deadline_s is None else arrived + call.deadline_s
        parts: asyncio.Queue[Response | None] = asyncio.Queue()
        put = asyncio.get_running_loop().call_soon_threadsafe

        def early(part: Response) -> None:
            put(parts.put_nowait, part)

        def left() -> bool:
            return client.connection.state is not State.OPEN

        running = asyncio.ensure_future(
            self._thread.run(Job(request, deadline, early, left, kind_of(request)))
        )
        running.add_done_callback(lambda _: parts.put_nowait(None))
        while (part := await parts.get()) is not None:
            await self._wait_for_latency(arrived)
            await self._sent(client, client.conversation.answer(call, part, {}), arrived)
        return running.result()

    async def _send(self, connection: ServerConnection, message: str | bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await connection.send(message)

    async def _or_stop(self, waited: Any) -> Any:
        """The result of `waited`; None if the server stops first."""
        task = asyncio.ensure_future(waited)
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return None if self._stopping.is_set() or not task.done() else task.result()
        finally:
            task.cancel()
            stop.cancel()


def _read(conversation: Conversation, message: bytes) -> Call | bytes | None:
    """As `Conversation.read`; every error is a `WireError`."""
    try:
        return conversation.read(message)
    except WireError:
        raise
    except Exception as error:
        logger.exception("A message cannot be read.")
        raise WireError(f"The message cannot be read ({type(error).__name__}).") from error
