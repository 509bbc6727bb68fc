"""A client of ``ceed-vla serve``, with numpy, msgpack and websockets, without torch.

with PolicyClient("ws://gpu:8000") as client:
response = client.predict(Request(1, observation, "put the cube in the bin"))
"""

from __future__ import annotations

import logging
import math
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NoReturn, Self, cast

import numpy as np
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    InvalidURI,
)
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from ceed_vla.errors import ConfigError, raised_as
from ceed_vla.serving.arrays import WireError, packed, unpacked
from ceed_vla.serving.contract import Contract
from ceed_vla.serving.encoded_images import jpeg
from ceed_vla.serving.faults import FOREIGN, LOST, REFUSED, SILENT, ServerError
from ceed_vla.serving.predictor_types import (
    BAD_INSTRUCTION,
    NOT_FINITE,
    PolicySpec,
    Request,
    Response,
)
from ceed_vla.texts import short, shown

_OF_SERVER = (BAD_INSTRUCTION, NOT_FINITE)
# Closing codes of a connection whose request can never be answered.
_REFUSING = {
    1003: "it does not take such messages",
    1007: "it does not take such messages",
    1008: "it does not allow that",
    1009: "the message is too large: raise its --max_message_mb, or send images as JPEG "
    "(jpeg_quality, inference_jpeg_quality)",
}
_HTTP = {401: "give its API key (inference_key_file)", 403: "it does not allow that"}
# Everything that goes wrong is raised.
_SILENT_LOG = logging.getLogger(f"{__name__}.connection")
_SILENT_LOG.setLevel(logging.CRITICAL)
LONGEST_ANSWER = 64_000_000  # [bytes]
# A server that does not answer pings is lost; it answers them while the policy runs. On a slow
# network a ping waits behind a request [s].
_PING_EVERY, _PONG_WITHIN = 1.0, 10.0
_GUARD_EVERY = 0.2  # [s]


class PolicyClient:
    """One connection to a server of openpi's protocol, of this package.

    Args:
        url: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        key: API key; "" for none.
        ca_file: Certificates to trust (PEM), for ``wss``; "" for those of the system.
        timeout_s: Time limit for an answer [s].
        connect_s: Time limit to connect, and until the server has loaded its policy [s]; None: as
            `timeout_s`.
        jpeg_quality: Quality of images, which are sent as JPEG; 0: pixels, without loss.

    Attributes:
        contract: What the server promises.
        spec: The policy's inputs and outputs.
        metadata: Everything that the server says of itself.
        timeout_s: As above; it may be changed.

    Raises:
        ConfigError: The address or the certificates cannot be used.
        ServerError: The server cannot be reached, or does not describe a policy.
    """

    def __init__(
        self,
        url: str,
        key: str = "",
        ca_file: str = "",
        timeout_s: float = 10.0,
        connect_s: float | None = None,
        jpeg_quality: int = 0,
    ) -> None:
        self._url, self.timeout_s = url, timeout_s
        self._jpeg_quality = jpeg_quality
        self._open = ExitStack()
        # Other connections count from elsewhere, so that no answer to them has the same number.
        self._number = secrets.randbits(48)
        self._send_until = math.inf  # steady time at which a message must be sent [s]
        self._closed = threading.Event()
        begun = timeout_s if connect_s is None else connect_s
        context = None
        if ca_file and not url.startswith("wss://"):
            raise ConfigError(f"{shown(url)} has no TLS, so ca_file is not used; give wss://.")
        if url.startswith("wss://"):
            with raised_as(ConfigError, f"{ca_file} cannot be used", "give certificates as PEM."):
                context = ssl.create_default_context(cafile=ca_file or None)
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("The API key has other characters than printable ASCII.")
        headers = {"Authorization": f"Api-Key {key}"} if key else None
        try:
            self._connection: ClientConnection = self._open.enter_context(
                connect(
                    url,
                    compression=None,
                    max_size=LONGEST_ANSWER,
                    open_timeout=begun,
                    close_timeout=min(begun, 1.0),
                    ping_interval=_PING_EVERY,
                    ping_timeout=_PONG_WITHIN,
                    additional_headers=headers,
                    logger=_SILENT_LOG,
                    ssl=context,
                    proxy=None,
                )
            )
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(
                f"The certificate of {shown(url)} is not trusted ({short(error)}); give its "
                "authority (ca_file, inference_ca_file)."
            ) from error
        except InvalidStatus as error:
            status = error.response.status_code
            code = REFUSED if status in _HTTP else LOST
            remedy = f"; {_HTTP[status]}" if status in _HTTP else ""
            raise ServerError(code, f"{shown(url)} has answered HTTP {status}{remedy}.") from error
        except (OSError, EOFError, InvalidHandshake) as error:
            raise ServerError(LOST, f"{shown(url)} cannot be reached ({short(error)}).") from error
        except (InvalidURI, ValueError) as error:  # or UnicodeError
            raise ConfigError(f"{shown(url)} is no address; it must be ws://HOST:PORT.") from error
        threading.Thread(target=self._guard, name="policy client", daemon=True).start()
        try:
            self.metadata = self._mapping(self._receive(begun))
            what = f"{shown(url)} does not describe a policy"
            with raised_as(_GreetingError, what, "use a server of ceed_vla."):
                self.contract = Contract.read(self.metadata)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> PolicySpec:
        return self.contract.spec

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the server then forgets its sessions."""
        self._closed.set()
        self._open.close()

    @property
    def is_open(self) -> bool:
        """Whether the connection was open when it was last used, or pinged."""
        return self._connection.state is State.OPEN

    def abort(self) -> None:
        """Cut the connection at once, also while another thread sends or waits for an answer."""
        self._closed.set()
        with suppress(OSError):
            self._connection.socket.shutdown(socket.SHUT_RDWR)

    def predict(
        self,
        request: Request,
        early: Callable[[Response], None] | None = None,
        **options: Any,
    ) -> Response:
        """Ask for one chunk.

        Args:
            request: Its observation has the policy's features.
            early: Receives the first steps of the chunk before the rest, if the request is for a
                `stream`.
            options: Further keys of the message, for example ``session``.

        Returns:
            The chunk; the `id` is that of the request. Its `seconds` are those of the server, and
            "network", the rest of the time until the answer.

        Raises:
            ServerError: The server has refused the request, has not answered in time, or the
                connection is lost. The connection is closed then.
        """
        self._number += 1
        message = packed({**self._message(request, stream=early is not None), **options})
        sent = time.monotonic()
        self._send_until = sent + self.timeout_s
        try:
            self._connection.send(message)
        except ConnectionClosed as error:
            self._lost(error)
        finally:
            self._send_until = math.inf
        while True:
            answer = self._mapping(self._receive(self.timeout_s))
            response = self._response(request, answer, time.monotonic() - sent)
            if response.whole:
                return response
            if early is None or not request.stream:
                self._foreign("has answered a part of a chunk; the request was for a whole one.")
            early(response)

    def _message(self, request: Request, *, stream: bool) -> dict[str, Any]:
        """A request as it is sent; `stream`: with first steps, if it is for a stream."""
        message: dict[str, Any] = {
            **{
                self.contract.keys.get(name, name): self._sent(value)
                for name, value in request.observation.items()
            },
            "prompt": request.instruction,
            "request_id": self._number,
        }
        if request.frozen_steps:
            message["frozen_steps"] = request.frozen_steps
        if request.previous is not None:
            message |= {"previous_tokens": request.previous, "shift_steps": request.shift_steps}
        if request.deadline_s is not None:
            message["deadline_ms"] = 1e3 * request.deadline_s
        if request.decoding:
            message["decoding"] = request.decoding
        if request.executed_steps is not None:
            message["executed_steps"] = request.executed_steps
        if request.stream and stream:
            message["stream"] = True
        return message

    def _guard(self) -> None:
        """Cut a connection whose server takes no message; sockets with TLS have no time limit."""
        while not self._closed.wait(_GUARD_EVERY):
            if time.monotonic() > self._send_until:
                self.abort()
                return

    def _sent(self, value: Any) -> Any:
        """A feature as it is sent."""
        is_image = isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype == np.uint8
        return jpeg(value, self._jpeg_quality) if self._jpeg_quality and is_image else value

    def _receive(self, timeout_s: float) -> bytes:
        """The next message; a text frame is an error."""
        try:
            message = self._connection.recv(timeout_s)
        except TimeoutError as error:
            self.close()  # a late answer would be taken for that to the next request
            text = f"{self._url} has not answered in {timeout_s:g} s."
            raise ServerError(SILENT, text) from error
        except ConnectionClosed as error:
            self._lost(error)
        if isinstance(message, str):
            raise ServerError(self._reason(), f"{self._url}: {short(message, 500)}")
        return message

    def _lost(self, error: ConnectionClosed) -> NoReturn:
        self.close()
        closed = error.rcvd.code if error.rcvd is not None else 0
        if closed in _REFUSING:
            text = f"{self._url} has ended the connection: {_REFUSING[closed]}."
            raise ServerError(REFUSED, text) from error
        text = f"The connection to {self._url} is lost ({short(error)})."
        raise ServerError(LOST, text) from error

    def _reason(self) -> str:
        """The code with which the server closes after an error."""
        code = ""
        with suppress(TimeoutError):
            try:
                self._connection.recv(1.0)
            except ConnectionClosed as closed:
                code = closed.rcvd.reason if closed.rcvd is not None else ""
        self.close()
        return code if code in _OF_SERVER else REFUSED

    def _foreign(self, text: str) -> NoReturn:
        self.close()
        raise ServerError(FOREIGN, f"{self._url} {text}")

    def _mapping(self, message: bytes) -> dict[str, Any]:
        try:
            value = unpacked(message)
        except WireError as error:
            self._foreign(f"does not speak openpi's protocol. {error}")
        if not isinstance(value, dict):
            self._foreign(f"has answered {shown(value)}; it must be a mapping.")
        return cast("dict[str, Any]", value)

    def _response(self, request: Request, answer: Mapping[str, Any], round_trip: float) -> Response:
        """The answer as a `Response`; raises `ServerError` if it breaks the contract."""
        if answer.get("request_id") != self._number:
            found = shown(answer.get("request_id"))
            self._foreign(f"has answered request {found} instead of {self._number}.")
        actions, tokens = answer.get("actions"), answer.get("tokens")
        whole = answer.get("whole") is not False
        if isinstance(actions, np.ndarray) and actions.dtype.kind == "f":
            with np.errstate(over="ignore"):  # it is not finite then
                actions = actions.astype(np.float32)
        wanted = (self.spec.chunk_steps, self.spec.action_dim)
        if (
            not isinstance(actions, np.ndarray)
            or actions.ndim != 2
            or actions.shape[1] != wanted[1]
            or not (actions.shape == wanted if whole else 1 <= len(actions) < wanted[0])
            or actions.dtype.kind != "f"
            or not np.isfinite(actions).all()
            or not (tokens is None or (isinstance(tokens, np.ndarray) and _are_tokens(tokens)))
        ):
            self._foreign(
                f"has answered actions {shown(actions)}; they must be finite numbers {wanted}, as "
                "it has declared."
            )
        seconds = _seconds(answer.get("policy_timing"))
        server = _seconds(answer.get("server_timing"))
        inside = server.get("queue", 0.0) + server.get("infer", 0.0)
        seconds["network"] = max(round_trip - inside, 0.0)
        forwards = answer.get("forwards")
        return Response(
            request.id,
            actions,
            None if tokens is None else tokens.astype(np.int64),
            forwards if isinstance(forwards, int) else 0,
            str(answer.get("exit_reason", ""))[:100],
            seconds,
            whole=whole,
        )


class _GreetingError(ServerError):
    """A greeting that does not describe a policy."""

    def __init__(self, text: str) -> None:
        super().__init__(FOREIGN, text)


def _are_tokens(array: np.ndarray) -> bool:
    return array.ndim == 1 and array.dtype.kind == "i"


def _seconds(timing: Any) -> dict[str, float]:
    """Times of an answer [s]."""
    return {
        str(name).removesuffix("_ms"): float(value) / 1e3
        for name, value in (timing.items() if isinstance(timing, dict) else ())
        if isinstance(value, int | float) and 0.0 <= float(value) < math.inf
    }
