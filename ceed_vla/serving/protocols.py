"""The wire protocols of the server, and what each must implement."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ceed_vla.errors import ConfigError
from ceed_vla.serving.arrays import WireError
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response


@dataclass(frozen=True)
class Call:
    """A request of a client, as a protocol read it.

    Attributes:
        request: The request; the server sets its tokens if it continues a session.
        session: Name of the client's session, whose last chunk is the warm start; "" for none.
        shift_steps: Steps of the last chunk that were executed; None if the client did not say.
        deadline_s: Time from arrival until the answer is needed [s]; None without one.
        echo: What the answer repeats.
        goes_on: Whether the connection stays open if the call fails.
        at_once: Message that is sent before the call; None for none.
        beside: Whether the connection's next messages are read while the call runs.
    """

    request: Request
    session: str = ""
    shift_steps: int | None = None
    deadline_s: float | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)
    goes_on: bool = False
    at_once: bytes | None = None
    beside: bool = False


class RefusedError(WireError):
    """A message follows its protocol as far as its `call` was read."""

    def __init__(self, text: str, call: Call) -> None:
        super().__init__(text)
        self.call = call


class Conversation(Protocol):
    """The messages of one connection, in turn.

    The calls of a connection run one after the other. After a call that runs beside, `read` may be
    called before `answer` or `error`.
    """

    def read(self, message: bytes) -> Call | bytes | None:
        """Read a message.

        Returns:
            A call of the policy, an answer without one, or None if the message gets no answer.

        Raises:
            WireError: The message does not follow the protocol. The connection ends, unless it is a
                `RefusedError` whose call says that it goes on.
        """

    def answer(
        self, call: Call, response: Response, timing: Mapping[str, float]
    ) -> bytes | Call | None:
        """Write the answer to a call.

        Args:
            call: The call.
            response: The chunk.
            timing: Name -> time [s].

        Returns:
            The answer; for a call that ran beside, also None if the client needs none now, or the
            next call.
        """

    def error(self, call: Call | None, text: str) -> str | bytes | Call | None:
        """Write that a call failed, or None for a message that could not be read; see `answer`."""


class WireProtocol(Protocol):
    """One protocol. It has no state, so connections share an object."""

    @property
    def ping_seconds(self) -> float:
        """Time in which a client must answer a ping [s]."""

    def greeting(self, spec: PolicySpec) -> bytes | None:
        """The first message to a client; None to wait for the client's."""

    def conversation(self, spec: PolicySpec) -> Conversation:
        """The conversation of a new connection."""


def mapped_keys(text: str, spec: PolicySpec, taken: Collection[str] = ()) -> dict[str, str]:
    """The features that a client's observation keys stand for.

    Args:
        text: ``key=feature`` pairs, separated by commas; ``key=`` is a key that is ignored.
            Features without a pair have their own name.
        spec: The policy's inputs.
        taken: Keys that have another meaning.

    Returns:
        Key -> feature; "" for ignored keys.

    Raises:
        ConfigError: A pair is not of this form, there is no such feature, or a key or a feature is
            named twice.
    """
    features = [*spec.cameras, *spec.states]
    keys: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, feature = (part.strip() for part in pair.partition("="))
        twice = key in keys or (feature and feature in keys.values())
        if not key or not equals or feature not in ("", *features) or twice or key in taken:
            raise ConfigError(
                f"map has {pair!r}; it must be KEY=FEATURE, each once, with nothing or one of "
                f"the features {', '.join(features)}."
            )
        keys[key] = feature
    rest = [feature for feature in features if feature not in keys.values()]
    if both := [feature for feature in rest if feature in keys]:
        raise ConfigError(
            f"map gives the key {both[0]!r} another meaning, but it is a feature that has no other "
            "key; map that feature, too."
        )
    return keys | {feature: feature for feature in rest}
