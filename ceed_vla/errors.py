"""Exceptions of the project. Messages name the value, the rule and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from draccus.utils import ParsingError
except ImportError:  # a robot node whose policy runs in another Python does not need LeRobot
    ParsingError = ValueError  # type: ignore[misc,assignment]


LONGEST = 1800  # characters of a message


class CeedVLAError(Exception):
    """Base class of every error that this project raises on purpose."""

    def __str__(self) -> str:
        """The message, cut to `LONGEST` characters."""
        text = super().__str__()
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


class ConfigError(CeedVLAError, ParsingError):
    """A setting has an invalid value.

    It is a `ParsingError` because LeRobot's parser re-raises errors of that type unchanged.
    """


def root_cause(error: BaseException) -> str:
    """Type and first line of the innermost cause of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return line if isinstance(error, CeedVLAError) else f"{type(error).__name__}: {line}"


def is_failure(error: BaseException) -> bool:
    """Whether `error` is an ordinary exception or a panic of a Rust library.

    Requests to end the process (`KeyboardInterrupt`, `SystemExit`) are not failures.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


@contextmanager
def raised_as(
    kind: type[CeedVLAError],
    what: str,
    advice: str,
    passing: type[CeedVLAError] | tuple[()] = CeedVLAError,
) -> Iterator[None]:
    """Re-raise errors of libraries as `kind`, with the message `what`, the cause and `advice`.

    It encloses the use of untrusted files, settings and models, where each library raises
    exceptions of its own types. Errors of the types `passing` pass unchanged.
    """
    try:
        yield
    except passing:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise kind(f"{what} ({root_cause(error)}); {advice}") from error


class CheckpointError(CeedVLAError):
    """A checkpoint is missing, incomplete, damaged or of another format."""


class DatasetError(CeedVLAError):
    """A dataset is missing, damaged, or lacks what the caller needs."""


class TokenError(CeedVLAError, ValueError):
    """Actions or tokens do not fit the action vocabulary or the block."""


class MalformedChunkError(TokenError):
    """Decoded tokens do not form a chunk of ``m`` steps of ``A`` dimensions; a robot holds."""


class NotFiniteError(CeedVLAError):
    """The model's logits are NaN or infinite: weights or activations are broken. A robot holds."""


class ObservationError(CeedVLAError, ValueError):
    """An observation lacks a feature, or a feature has another shape or type."""


class InstructionError(ObservationError):
    """The policy does not accept the instruction of an observation."""


class VerificationError(CeedVLAError):
    """A model's outputs differ from those of its reference implementation."""


class SimulationError(CeedVLAError):
    """A simulation lacks what the caller requests, or received an invalid action."""


class NodeError(CeedVLAError):
    """A ROS node ended, refused a request or did not answer."""
