"""A client of ``ceed-vla serve``, with numpy, msgpack and websockets, without torch.

with PolicyClient("ws://gpu:8000") as client:
response = client.predict(Request(1, observation, "put the cube in the bin"))
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self, cast

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from ceed_vla.errors import CeedVLAError, ConfigError, raised_as
from ceed_vla.serving.arrays import WireError, packed, unpacked
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.texts import short, shown

LONGEST_ANSWER = 64_000_000  # [bytes]


class ServerError(CeedVLAError):
    """The server cannot be reached, has refused a request, or has answered what it must not."""


class PolicyClient:
    """One connection to a server of openpi's protocol.

    Args:
        url: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        key: API key; "" for none.
        ca_file: Certificates to trust (PEM), for ``wss``; "" for those of the system.
        timeout_s: Time limit to connect, and for an answer [s].

    Attributes:
        spec: The policy's inputs and outputs, as the server declares them.
        metadata: Everything that the server says of itself.

    Raises:
        ConfigError: The address or the certificates cannot be used.
        ServerError: The server cannot be reached, or does not describe a policy.
    """

    def __init__(self, url: str, key: str = "", ca_file: str = "", timeout_s: float = 10.0) -> None:
        self._url, self._timeout = url, timeout_s
        self._open = ExitStack()
        context = None
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
                    open_timeout=timeout_s,
                    close_timeout=min(timeout_s, 1.0),
                    additional_headers=headers,
                    ssl=context,
                )
            )
        except (OSError, InvalidHandshake) as error:
            raise ServerError(f"{shown(url)} cannot be reached ({short(error)}).") from error
        except (InvalidURI, ValueError) as error:  # or UnicodeError
            raise ConfigError(f"{shown(url)} is no address; it must be ws://HOST:PORT.") from error
        seconds, rest = divmod(timeout_s, 1.0)
        self._connection.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(1e6 * rest))
        )
        self._number = 0
        try:
            self.metadata = self._greeting()
            self.spec = _spec(self.metadata)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the server then forgets its sessions."""
        self._open.close()

    def predict(self, request: Request, **options: Any) -> Response:
        """Ask for one chunk.

        Args:
            request: Its observation has the policy's features.
            options: Further keys of the message, for example ``session``.

        Returns:
            The chunk; the `id` is that of the request.

        Raises:
            ServerError: The server has refused the request, has not answered in time, or the
                connection is lost. The connection is closed then.
        """
        message: dict[str, Any] = {
            **request.observation,
            "prompt": request.instruction,
            "request_id": self._number + 1,
            **options,
        }
        self._number += 1
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
        return self._response(request, self._ask(packed(message)))

    def _greeting(self) -> dict[str, Any]:
        return self._mapping(self._receive())

    def _ask(self, message: bytes) -> dict[str, Any]:
        try:
            self._connection.send(message)
        except ConnectionClosed as error:
            raise ServerError(f"The connection to {self._url} is lost ({short(error)}).") from error
        return self._mapping(self._receive())

    def _receive(self) -> bytes:
        """The next message; a text frame is an error."""
        try:
            message = self._connection.recv(self._timeout)
        except TimeoutError as error:
            self.close()  # a late answer would be taken for that to the next request
            raise ServerError(f"{self._url} has not answered in {self._timeout:g} s.") from error
        except ConnectionClosed as error:
            raise ServerError(f"The connection to {self._url} is lost ({short(error)}).") from error
        if isinstance(message, str):
            self.close()
            raise ServerError(f"{self._url}: {short(message, 500)}")
        return message

    def _mapping(self, message: bytes) -> dict[str, Any]:
        try:
            value = unpacked(message)
        except WireError as error:
            self.close()
            raise ServerError(f"{self._url} does not speak openpi's protocol. {error}") from error
        if not isinstance(value, dict):
            self.close()
            raise ServerError(f"{self._url} has answered {shown(value)}; it must be a mapping.")
        return cast("dict[str, Any]", value)

    def _response(self, request: Request, answer: Mapping[str, Any]) -> Response:
        """The answer as a `Response`; raises `ServerError` if it does not fit the greeting."""
        if answer.get("request_id", self._number) != self._number:
            self.close()
            raise ServerError(
                f"{self._url} has answered request {shown(answer['request_id'])} instead of "
                f"{self._number}."
            )
        actions, tokens = answer.get("actions"), answer.get("tokens")
        if isinstance(actions, np.ndarray) and actions.dtype.kind == "f":
            with np.errstate(over="ignore"):  # it is not finite then
                actions = actions.astype(np.float32)
        wanted = (self.spec.chunk_steps, self.spec.action_dim)
        if (
            not isinstance(actions, np.ndarray)
            or actions.shape != wanted
            or actions.dtype.kind != "f"
            or not np.isfinite(actions).all()
            or not (tokens is None or (isinstance(tokens, np.ndarray) and _are_tokens(tokens)))
        ):
            self.close()
            raise ServerError(
                f"{self._url} has answered actions {shown(actions)}; they must be finite numbers "
                f"{wanted}, as it has declared."
            )
        timing = answer.get("policy_timing")
        seconds = {
            str(name).removesuffix("_ms"): float(value) / 1e3
            for name, value in (timing.items() if isinstance(timing, dict) else ())
            if isinstance(value, int | float)
        }
        forwards = answer.get("forwards")
        return Response(
            request.id,
            actions,
            None if tokens is None else tokens.astype(np.int64),
            forwards if isinstance(forwards, int) else 0,
            str(answer.get("exit_reason", ""))[:100],
            seconds,
        )


def _are_tokens(array: np.ndarray) -> bool:
    return array.ndim == 1 and array.dtype.kind == "i"


def _spec(metadata: Mapping[str, Any]) -> PolicySpec:
    """The inputs and outputs that a greeting declares; `ServerError` if it does not."""
    with raised_as(
        ServerError, "The server does not describe a policy", "use a server of ceed_vla."
    ):
        cameras, states = {}, {}
        for key, feature in metadata["observation"].items():
            shape = tuple(int(size) for size in feature["shape"])
            if len(shape) == 3:
                cameras[str(key)] = (shape[2], shape[0], shape[1])
            else:
                states[str(key)] = int(shape[0])
        steps, dim = (int(size) for size in metadata["actions"]["shape"])
        return PolicySpec(
            checkpoint=str(metadata.get("checkpoint", "")),
            policy_type=str(metadata["policy_type"]),
            cameras=cameras,
            states=states,
            action_dim=dim,
            chunk_steps=steps,
            n_action_steps=int(metadata["actions"]["n_action_steps"]),
            warmup_s=0.0,
            delta_dims=tuple(int(dim) for dim in metadata["actions"]["increments"]),
            decoding=str(metadata.get("decoding", "")),
            engine=str(metadata.get("engine", "")),
        )
