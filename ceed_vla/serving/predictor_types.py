"""Inputs and outputs of a `Predictor`. Free of torch and lerobot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.fields import COUNTS, Checked, chosen, ranged

ENGINES = ("auto", "eager", "compiled", "edge")
BAD_INSTRUCTION = "bad_instruction"
NOT_FINITE = "not_finite"
BAD_IMAGE = "bad_image"
LOOK = 0  # id of a request that only decodes its images


@dataclass(frozen=True)
class PolicySpec:
    """The inputs and outputs of a checkpoint."""

    checkpoint: str  # name or folder, as configured
    policy_type: str  # LeRobot's name: "ceed_vla", "act", ...
    # feature name ("observation.images.front") -> (3, H, W)
    cameras: dict[str, tuple[int, int, int]]
    # name of every other observation feature ("observation.state") -> its length
    states: dict[str, int]
    action_dim: int  # action dims A
    chunk_steps: int  # m
    n_action_steps: int  # steps that the checkpoint executes before it replans
    warmup_s: float  # time of the last warm-up call [s]
    delta_dims: tuple[int, ...] = ()  # dimensions of actions that are increments
    action_names: tuple[str, ...] = ()  # of the dimensions; empty if unknown
    units: tuple[str, ...] = ()  # of the dimensions: "rad", "deg", "m", ...; empty if unknown
    control_rate: float = 0.0  # steps per second [Hz]; 0 if unknown
    example_instruction: str = "move"  # one that the policy accepts
    decoding: str = ""  # decoder name in use; "" for policies with only one way to decode
    engine: str = ""  # engine in use: "eager", "compiled" or "edge"


@dataclass(frozen=True)
class Seen:
    """Result of decoding the images of an observation.

    Attributes:
        problems: Feature -> why its image is bad; None if it is good.
        blank: Features whose pixels all have one colour.
        seconds: Time of decoding [s].
    """

    problems: Mapping[str, str | None] = field(default_factory=dict)
    blank: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def problem(self) -> str:
        """Why the first bad image is bad; "" if all are good."""
        return next(filter(None, self.problems.values()), "")


@dataclass(frozen=True)
class Request:
    """The request of one chunk."""

    id: int  # repeated in the response
    # Feature name -> vector (D,) of floats, or image (H, W, 3) uint8; in a ROS node, an
    # image may still be encoded.
    observation: Mapping[str, Any]
    instruction: str
    # tokens (n,) of the running chunk, for the warm start
    previous: NDArray[np.int64] | None = None
    shift_steps: int = 0  # steps of `previous` that are consumed
    frozen_steps: int = 0  # leading steps of the new chunk that are copied from `previous`
    # time from `InferenceWorker.submit` until the answer is needed [s]
    deadline_s: float | None = None
    decoding: str = ""  # decoder name; "" for the settings' own
    executed_steps: int | None = None  # None: the settings' `replan_steps`
    # whether to answer with certain steps before the whole chunk; without frozen steps only
    stream: bool = False


@dataclass(frozen=True)
class Response:
    """One decoded chunk, or the reason for its absence."""

    id: int  # of the request
    # (m, A) in the environment's units, finite; empty (0, 0) on error.
    actions: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    tokens: NDArray[np.int64] | None = None  # (n,); None for policies without tokens
    forwards: int = 0  # model calls after the prefill; 0 for policies that do not report them
    exit_reason: str = ""  # rule that ended decoding; "" for policies that do not report it
    # "preprocess", "prefill", "decode", "total" [s]; without stages, "decode" has the whole time
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # why there are no actions; None on success
    code: str = ""  # `BAD_INSTRUCTION`, `NOT_FINITE`, `BAD_IMAGE`, or "" for any other error
    # whether the answer is complete; otherwise `actions` (k, A) are the first steps of the chunk
    whole: bool = True
    seen: Seen = field(default_factory=Seen)  # result of decoding the images


@dataclass(frozen=True)
class PredictorSettings(Checked):
    """Settings that run a checkpoint.

    Raises:
        ConfigError: A value is outside its range.
    """

    checkpoint: str  # LeRobot checkpoint folder, an export, or "teacher" / "student"
    # comma-separated packages to import first; they register names that the checkpoint uses
    discover_packages: str = ""
    # decoder name for `CeedVLAPolicy.decoding_config`; other policies ignore it
    decoding: str = "ceed"
    # Steps after the frozen ones that must have converged; None: as the checkpoint declares.
    replan_steps: int | None = ranged(None, COUNTS)
    threads: int = ranged(1, COUNTS)  # of the engine
    pin: str = "auto"  # the cores of these threads, see `ceed_vla.scheduling.Placement`
    device: str = "cpu"
    # eager; compiled: loads some minutes longer, then runs faster; edge: an export, without torch;
    # auto: edge on a CPU if the checkpoint can be exported and onnxruntime is installed, else eager
    engine: str = chosen("eager", ENGINES)
    # time limit by which decoding "plan" selects among the plan<MS> [s]
    chunk_deadline: float = ranged(1.0, "(0, inf)")
    warmup: int = ranged(3, COUNTS)  # calls on a blank observation before the first request
    # time added to every chunk, to test slow inference [s]
    delay_s: float = ranged(0.0, "[0, 60)")
