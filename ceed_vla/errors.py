"""Exceptions of the project. Messages say what was wrong (the value), what is allowed and what to
do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from draccus.utils import ParsingError
except ImportError:  # a robot's node whose policy runs in another Python needs no LeRobot
    ParsingError = ValueError  # type: ignore[misc,assignment]


LONGEST = 1800  # characters of a message that somebody reads


class CeedVLAError(Exception):
    """Base class of every error that this project raises on purpose."""

    def __str__(self) -> str:
        """The message; a value of any length in it is cut."""
        text = super().__str__()
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


class ConfigError(CeedVLAError, ParsingError):
    """A setting has a value that cannot work. (LeRobot's parser lets errors of its own kind pass as
    they are.)
    """


def root_cause(error: BaseException) -> str:
    """Kind and first line of what caused `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return line if isinstance(error, CeedVLAError) else f"{type(error).__name__}: {line}"


def is_failure(error: BaseException) -> bool:
    """Whether `error` is an ordinary exception, or a panic of a library in Rust: no request to end
    the process.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


@contextmanager
def raised_as(
    kind: type[CeedVLAError],
    what: str,
    advice: str,
    passing: type[CeedVLAError] | tuple[()] = CeedVLAError,
) -> Iterator[None]:
    """Raise what a library raises as a `kind`, whose message is `what`, the cause and `advice`;
    errors `passing` pass.

    For what others wrote: files, settings and models, with which each library fails in kinds of its
    own.
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
    """A data set is missing, damaged, or lacks what the caller needs."""


class TokenError(CeedVLAError, ValueError):
    """Actions or tokens do not fit the action vocabulary or the block."""


class MalformedChunkError(TokenError):
    """Decoded tokens that stand for no chunk of ``m`` steps of ``A`` dimensions. On a robot:
    hold.
    """


class NotFiniteError(CeedVLAError):
    """The model's scores are NaN or infinite: its weights or activations are broken. On a robot:
    hold.
    """


class ObservationError(CeedVLAError, ValueError):
    """An observation lacks a feature, or a feature has another shape or type."""


class VerificationError(CeedVLAError):
    """A model does not give the outputs of its reference implementation."""


class SimulationError(CeedVLAError):
    """The simulation was asked for something it does not have, or got an invalid action."""


class NodeError(CeedVLAError):
    """A ROS node ended, refused a request or did not answer."""
