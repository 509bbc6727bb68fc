"""The protocol of vla-eval, AI2's harness for simulated benchmarks.

A message is a msgpack mapping of `type`, `payload`, `seq` and `timestamp`. The client says hello
first. Then every observation gets the one action (A,) of its time step, or an error; both have the
observation's `seq`. The start and the end of an episode get no answer.

In a live episode the client's clock does not wait. It executes the newest action that has arrived
at a tick, and holds if there is none; so an observation without a step gets no answer. One that
got a step also gets an error if the call that it started fails. An observation may say that the
robot `held` in the tick before it: the step of the observation before came too late then.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.arrays import WireError, packed, unpacked
from ceed_vla.serving.contract import described
from ceed_vla.serving.data_ranges import Range
from ceed_vla.serving.encoded_images import FORMATS, EncodedImage
from ceed_vla.serving.live_steps import LiveSteps
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.serving.protocols import Call, RefusedError
from ceed_vla.texts import instruction_problem, short, shown

VERSION = 1  # of the protocol
INSTRUCTION = "task_description"
HELD = "held"  # optional, of an observation in a live episode
HELLO, OBSERVATION, ACTION, ERROR = "hello", "observation", "action", "error"
EPISODE_START, EPISODE_END = "episode_start", "episode_end"
LIVE = "live"  # mode of an episode
_MISSING = object()
IMAGE = "__image__"  # marks the mapping of an encoded image


class VlaEval:
    """The protocol of vla-eval.

    Attributes:
        options: Keys of an observation that are not features.
        ping_seconds: Time in which a client must answer a ping [s]. The harness answers none while
            its simulator resets; its own watchdog ends it after this time.

    Args:
        keys: Key of a client's observation -> the policy's feature; "" to ignore it. The parts of
            keys in nested mappings are joined by slashes.
        metadata: What the hello says, besides the contract.
        ranges: Of the training data. The hello leaves them out: the harness writes it as JSON,
            which has no arrays.
    """

    options = (INSTRUCTION, HELD)
    ping_seconds = 1200.0

    def __init__(
        self,
        keys: Mapping[str, str],
        metadata: Mapping[str, Any],
        ranges: Mapping[str, Range | str],
    ) -> None:
        self._keys = {key: feature for key, feature in keys.items() if feature}
        self._metadata = dict(metadata)

    def greeting(self, spec: PolicySpec) -> None:
        """The client speaks first."""

    def conversation(self, spec: PolicySpec) -> VlaEvalConversation:
        return VlaEvalConversation(self._keys, self._metadata, spec)


@dataclass(frozen=True)
class _Observed:
    """An observation: its features, and the number of its message."""

    features: Mapping[str, Any]
    seq: int


class VlaEvalConversation:
    """One connection, with the chunk that its client is executing.

    The policy is called when all steps of a chunk are executed; in a live episode it is called
    while the chunk runs (`LiveSteps`). A chunk starts warm from the last one of its episode.

    Args:
        keys: Key of an observation -> the policy's feature.
        metadata: What the hello says, besides the contract.
        spec: The policy's inputs and outputs.
    """

    def __init__(
        self, keys: Mapping[str, str], metadata: Mapping[str, Any], spec: PolicySpec
    ) -> None:
        self._keys = keys
        self._metadata = metadata
        self._spec = spec
        self._steps: deque[NDArray[np.float32]] = deque()  # (A,) each; those still to be executed
        self._report: dict[str, Any] = {}  # how the chunk was decoded, until it is sent
        self._episode = 0
        self._instruction = ""  # of the chunk
        self._live = False  # whether the episode is live
        self._live_steps = LiveSteps(spec.chunk_steps, spec.n_action_steps)
        self._running: Call | None = None  # of a live episode, which may have ended
        self._waiting: _Observed | None = None  # newest one of the live episode, if unanswered

    def read(self, message: bytes) -> Call | bytes | None:
        kind, payload, seq = _envelope(message)
        if kind == HELLO:
            return self._hello(payload, seq)
        if kind == OBSERVATION:
            return self._observed(payload, seq)
        if kind in (EPISODE_START, EPISODE_END):
            self._forget()
            self._live = kind == EPISODE_START and payload.get("mode") == LIVE
        return None

    def answer(
        self, call: Call, response: Response, timing: Mapping[str, float]
    ) -> bytes | Call | None:
        if self._ended(call):
            return self._waiting_call()
        self._report = {
            "forwards": response.forwards,
            "exit_reason": response.exit_reason,
            "server_timing": {f"{name}_ms": 1e3 * seconds for name, seconds in timing.items()},
        }
        if self._live:
            return self._taken_over(response)
        self._steps.extend(response.actions[: self._spec.n_action_steps])
        return self._action(self._steps.popleft(), call.echo["seq"])

    def error(self, call: Call | None, text: str) -> bytes | Call | None:
        if call is not None and self._ended(call):
            return self._waiting_call()
        return _message(ERROR, {"error": text}, 0 if call is None else call.echo["seq"])

    def _hello(self, payload: Mapping[Any, Any], seq: int) -> bytes:
        version = payload.get("protocol_version")
        if type(version) is not int or version != VERSION:
            refused = Call(Request(0, {}, ""), echo={"seq": seq})
            raise RefusedError(
                f"protocol_version is {shown(version)}; it must be {VERSION}.", refused
            )
        spec = self._spec
        # Benchmarks leave both out by default; they ignore what they do not have.
        wanted = {
            "send_wrist_image": len(spec.cameras) > 1,
            "send_state": bool(spec.states),
        }
        answer = {
            "harness_version": self._metadata["server"],
            "protocol_version": VERSION,
            "model_server": self._metadata["server"],
            "capabilities": {},
            "observation_params": {name: True for name, needed in wanted.items() if needed},
            # The harness stores all of it with its results.
            **described(spec, self._keys, {}),
            **self._metadata,
        }
        return _message(HELLO, answer, seq)

    @property
    def _session(self) -> str:
        return f"episode {self._episode}"

    def _forget(self) -> None:
        """End chunk and warm start."""
        self._steps.clear()
        self._report = {}
        self._live_steps.restart()
        self._waiting = None
        self._episode += 1

    def _observed(self, payload: Mapping[Any, Any], seq: int) -> Call | bytes | None:
        """The next step of the chunk, or a call; a `RefusedError` leaves the connection open."""
        echo = {"seq": seq}
        try:
            instruction = _instruction(payload)
            held = _held(payload)
            observation = self._observation(payload)
        except WireError as error:
            refused = Call(Request(0, {}, ""), echo=echo, goes_on=True)
            raise RefusedError(str(error), refused) from error
        if instruction != self._instruction:
            self._forget()
            self._instruction = instruction
        if self._live:
            self._live_steps.observe(held=held)
            return self._ticked(_Observed(observation, seq))
        if self._steps:
            return self._action(self._steps.popleft(), seq)
        return Call(Request(0, observation, instruction), self._session, echo=echo, goes_on=True)

    def _action(self, step: NDArray[np.float32], seq: int) -> bytes:
        """A step (A,) as an answer; the first one of a chunk has its report."""
        payload = {"actions": step, **self._report}
        self._report = {}
        return _message(ACTION, payload, seq)

    def _ticked(self, observed: _Observed) -> Call | bytes | None:
        """One tick of a live episode: its step, and a call if one is due and none runs."""
        starts = self._running is None and self._live_steps.due
        step = None if starts and self._live_steps.prompt else self._live_steps.take()
        message = None if step is None else self._action(step, observed.seq)
        self._waiting = observed if message is None else None
        return self._live_call(observed, message) if starts else message

    def _live_call(self, observed: _Observed, at_once: bytes | None = None) -> Call:
        """A call with the newest observation, whose own step is sent `at_once`, if it has one."""
        steps = self._live_steps.begin(answered=at_once is not None)
        request = Request(
            0,
            observed.features,
            self._instruction,
            frozen_steps=steps.frozen_steps,
            executed_steps=steps.executed_steps,
        )
        self._running = Call(
            request,
            self._session,
            steps.shift_steps,
            echo={"seq": observed.seq},
            goes_on=True,
            at_once=at_once,
            beside=True,
        )
        return self._running

    def _taken_over(self, response: Response) -> bytes | None:
        """Continue with the chunk of a live call; its step, if the newest observation waits."""
        waiting = self._waiting
        self._waiting = None
        step = self._live_steps.take_over(
            response.actions,
            freezes=response.tokens is not None,
            waiting=waiting is not None,
        )
        if waiting is None or step is None:
            return None
        return self._action(step, waiting.seq)

    def _ended(self, call: Call) -> bool:
        """Note that a call is over; returns whether its episode is over, too."""
        if call is not self._running:
            return False
        self._running = None
        return call.session != self._session

    def _waiting_call(self) -> Call | None:
        """The call of a live episode that began while a call of an earlier one ran."""
        return None if self._waiting is None else self._live_call(self._waiting)

    def _observation(self, payload: Mapping[Any, Any]) -> dict[str, Any]:
        """The policy's features; raises `WireError` for missing ones. Others are ignored."""
        observation = {}
        for key, feature in self._keys.items():
            value = _at(payload, key)
            if value is _MISSING:
                found = ", ".join(itertools.islice(_names(payload), 20)) or "nothing"
                raise WireError(f"The observation lacks {key!r}; it has {found}.")
            observation[feature] = _feature(value, key)
        return observation


def _envelope(message: bytes) -> tuple[str, dict[Any, Any], int]:
    """Type, payload and number of a message."""
    value = unpacked(message)
    if not isinstance(value, dict):
        raise WireError(f"The message is {shown(value)}; it must be a mapping.")
    kind, payload, seq = value.get("type"), value.get("payload"), value.get("seq")
    known = (HELLO, OBSERVATION, EPISODE_START, EPISODE_END, ERROR)
    if not isinstance(kind, str) or kind not in known:
        raise WireError(f"type is {shown(kind)}; it must be one of {', '.join(known)}.")
    if not isinstance(payload, dict):
        raise WireError(f"payload is {shown(payload)}; it must be a mapping.")
    if type(seq) is not int or seq < 0:
        raise WireError(f"seq is {shown(seq)}; it must be a whole number of at least 0.")
    return kind, payload, seq


def _message(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    return packed(message, str)


def _instruction(payload: Mapping[Any, Any]) -> str:
    instruction = payload.get(INSTRUCTION)
    if not isinstance(instruction, str):
        raise WireError(f"{INSTRUCTION} is {shown(instruction)}; it must be text.")
    problem = instruction_problem(instruction)
    if problem:
        raise WireError(f"{INSTRUCTION} is {shown(instruction)}: {problem}.")
    return instruction


def _held(payload: Mapping[Any, Any]) -> bool:
    held = payload.get(HELD, False)
    if type(held) is not bool:
        raise WireError(f"{HELD} is {shown(held)}; it must be true or false.")
    return held


def _at(payload: Mapping[Any, Any], key: str) -> Any:
    """The value of a key whose parts are separated by slashes; `_MISSING` without it."""
    value: Any = payload
    for part in key.split("/"):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    return value


def _names(payload: Mapping[Any, Any]) -> Iterator[str]:
    """Keys of nested mappings, for an error."""
    for key, value in payload.items():
        if isinstance(value, dict) and IMAGE not in value:
            yield from (f"{short(key, 50)}/{short(inner, 50)}" for inner in value)
        else:
            yield short(key, 50)


def _encoded(value: Mapping[Any, Any], key: str) -> EncodedImage:
    data, form = value.get("data"), value.get("format")
    if not isinstance(data, bytes) or not isinstance(form, str) or form not in FORMATS:
        raise WireError(
            f"{key} has {shown(data)} of the format {shown(form)}; it must have bytes of one of "
            f"the formats {', '.join(FORMATS)}."
        )
    return EncodedImage(data, key, form)


def _feature(value: Any, key: str) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, dict):
        return _encoded(value, key)
    if not isinstance(value, list) or any(type(number) not in (int, float) for number in value):
        raise WireError(
            f"{key} is {shown(value)}; it must be an array, an image, or a list of numbers."
        )
    return np.array(value, np.float64)


PROTOCOL = VlaEval
