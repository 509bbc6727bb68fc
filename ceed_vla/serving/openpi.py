"""The protocol of openpi, which its client, and clients of other servers, speak.

A message is a msgpack mapping. The server sends its metadata first. Then every message of the
client is an observation, and every answer has `actions` (m, A). An error is a text frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.arrays import WireError, packed, unpacked
from ceed_vla.serving.contract import described
from ceed_vla.serving.data_ranges import Range
from ceed_vla.serving.encoded_images import EncodedImage
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.serving.protocols import Call
from ceed_vla.texts import instruction_problem, shown

PROMPT = "prompt"
LONGEST_SESSION = 200
_MOST_TOKENS = 65_536  # of a chunk
# Keys of a request that are not features; all but the prompt are ours.
OPTIONS = (
    PROMPT,
    "session",
    "previous_tokens",
    "shift_steps",
    "frozen_steps",
    "executed_steps",
    "deadline_ms",
    "decoding",
    "request_id",
    "stream",
)


class OpenPi:
    """openpi's protocol.

    Attributes:
        options: Keys of a request that are not features.
        ping_seconds: Time in which a client must answer a ping [s].

    Args:
        keys: Key of a client's observation -> the policy's feature; "" to ignore it.
        metadata: What the greeting says, besides the contract.
        ranges: Of the training data, or why they are unknown.
    """

    options = OPTIONS
    ping_seconds = 20.0

    def __init__(
        self,
        keys: Mapping[str, str],
        metadata: Mapping[str, Any],
        ranges: Mapping[str, Range | str],
    ) -> None:
        self._keys, self._ranges = keys, ranges
        self._metadata = dict(metadata)

    def greeting(self, spec: PolicySpec) -> bytes:
        return packed({**described(spec, self._keys, self._ranges), **self._metadata})

    def conversation(self, spec: PolicySpec) -> OpenPi:
        return self  # a message does not depend on those before it

    def read(self, message: bytes) -> Call:
        value = unpacked(message)
        if not isinstance(value, dict):
            raise WireError(f"The message is {shown(value)}; it must be a mapping.")
        observation = self._observation(value)
        prompt = value.get(PROMPT)
        problem = instruction_problem(prompt) if isinstance(prompt, str) else "it is not text"
        if problem:
            raise WireError(f"prompt is {shown(prompt)}: {problem}.")
        deadline = _number(value, "deadline_ms", 1, 1e7)
        executed = _whole(value, "executed_steps", 1)
        session = value.get("session", "")
        if not isinstance(session, str) or len(session) > LONGEST_SESSION:
            raise WireError(
                f"session is {shown(session)}; it must be text of at most {LONGEST_SESSION} "
                "characters."
            )
        decoding = value.get("decoding", "")
        if not isinstance(decoding, str):
            raise WireError(f"decoding is {shown(decoding)}; it must be a decoder name.")
        stream = value.get("stream", False)
        if not isinstance(stream, bool):
            raise WireError(f"stream is {shown(stream)}; it must be true or false.")
        shift = _whole(value, "shift_steps", 0)
        number = _whole(value, "request_id", 0)
        request = Request(
            number or 0,
            observation,
            str(prompt),
            _tokens(value),
            shift or 0,
            _whole(value, "frozen_steps", 0) or 0,
            decoding=decoding,
            executed_steps=executed,
            stream=stream,
        )
        echo = {} if number is None else {"request_id": number}
        return Call(request, session, shift, None if deadline is None else deadline / 1e3, echo)

    def _observation(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        """The features of a message; raises `WireError` for missing and unknown keys."""
        observation = {}
        for key, feature in self._keys.items():
            if not feature:
                continue
            if key not in value:
                known = ", ".join(shown(k) for k in list(value)[:20]) or "nothing"
                raise WireError(f"The observation lacks {key!r}; it has {known}.")
            observation[feature] = _array(value[key], key)
        unknown = sorted(shown(k) for k in value if k not in self._keys and k not in OPTIONS)
        if unknown:
            raise WireError(
                f"The observation has the unknown key {unknown[0]}; known are "
                f"{', '.join((*self._keys, *OPTIONS))}."
            )
        return observation

    def answer(self, call: Call, response: Response, timing: Mapping[str, float]) -> bytes:
        tokens = {} if response.tokens is None else {"tokens": response.tokens}
        return packed(
            {
                "actions": response.actions,
                **tokens,
                **({} if response.whole else {"whole": False}),
                "forwards": response.forwards,
                "exit_reason": response.exit_reason,
                "server_timing": {f"{name}_ms": 1e3 * seconds for name, seconds in timing.items()},
                "policy_timing": {f"{k}_ms": 1e3 * s for k, s in response.seconds.items()},
                **call.echo,
            }
        )

    def error(self, call: Call | None, text: str) -> str:
        return text


def _array(value: Any, key: str) -> NDArray[Any] | EncodedImage:
    """A feature of an observation: an array, the bytes of a JPEG, or a list of numbers."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bytes):
        return EncodedImage(value, key)
    problem = f"{key} is {shown(value)}; it must be an array, a JPEG, or a list of numbers."
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(problem) from error
    if array.dtype.kind not in "iuf" or not array.ndim:
        raise WireError(problem)
    return array


def _tokens(value: Mapping[Any, Any]) -> NDArray[np.int64] | None:
    """The tokens (n,) of a running chunk; None without them."""
    found = value.get("previous_tokens")
    if found is None:
        return None
    tokens = found if isinstance(found, np.ndarray) else np.zeros(())
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.size > _MOST_TOKENS:
        raise WireError(
            f"previous_tokens is {shown(found)}; it must be the tokens (n,) of an answer."
        )
    return tokens.astype(np.int64)


def _number(value: Mapping[Any, Any], name: str, least: float, most: float) -> float | None:
    """The number `name` of a message; None if it is missing."""
    found = value.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float | np.integer | np.floating):
        raise WireError(f"{name} is {shown(found)}; it must be a number.")
    if not least <= float(found) <= most:  # NaN is neither
        raise WireError(f"{name} is {shown(found)}; it must be in [{least:g}, {most:g}].")
    return float(found)


def _whole(value: Mapping[Any, Any], name: str, least: int) -> int | None:
    """The whole number `name` of a message; None if it is missing."""
    found = _number(value, name, least, 2**53)
    if found is not None and found != int(found):
        raise WireError(f"{name} is {shown(value.get(name))}; it must be a whole number.")
    return None if found is None else int(found)


PROTOCOL = OpenPi
