"""What goes into a `Predictor` and what comes out of it. Free of torch and lerobot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.fields import COUNTS, Checked, chosen, ranged
from ceed_vla.ros_nodes.robot.images import Seen

ENGINES = ("eager", "compiled")
BAD_INSTRUCTION = "bad_instruction"
NOT_FINITE = "not_finite"
BAD_IMAGE = "bad_image"
LOOK = 0  # id of a request that only decodes its images


@dataclass(frozen=True)
class PolicySpec:
    """What a checkpoint wants and gives."""

    checkpoint: str  # name or folder, as given
    policy_type: str  # LeRobot's name: "ceed_vla", "act", ...
    # feature name ("observation.images.front") -> (3, H, W)
    cameras: dict[str, tuple[int, int, int]]
    # name of every other observation feature ("observation.state") -> its length
    states: dict[str, int]
    action_dim: int  # A
    chunk_steps: int  # m
    n_action_steps: int  # steps that the checkpoint executes before it replans
    warmup_s: float  # time of the last warm-up call [s]
    delta_dims: tuple[int, ...] = ()  # dimensions of actions that are increments
    decoding: str = ""  # name of the decoding that is used; "" for policies that have one way


@dataclass(frozen=True)
class Request:
    """One chunk to decode."""

    id: int  # repeated in the response
    # Feature name -> vector (D,) of floats, or an image: `Shown` until `images.decode`, then (H, W,
    # 3) uint8.
    observation: Mapping[str, Any]
    instruction: str
    # tokens (n,) of the running chunk, for the warm start
    previous: NDArray[np.int64] | None = None
    shift_steps: int = 0  # steps of `previous` that are consumed
    frozen_steps: int = 0  # leading steps of the new chunk that stay as they are in `previous`
    # until the answer is needed, from `InferenceWorker.submit` on [s]
    deadline_s: float | None = None
    # answer with steps that are certain before the whole chunk; not behind frozen ones
    stream: bool = False


@dataclass(frozen=True)
class Response:
    """One decoded chunk, or why there is none."""

    id: int  # of the request
    # (m, A) in the environment's units, finite; empty (0, 0) on error.
    actions: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    tokens: NDArray[np.int64] | None = None  # (n,); None for policies without
    forwards: int = 0  # model calls after the prefill; 0 for policies that do not report them
    exit_reason: str = ""  # rule that ended decoding; "" for policies that do not report it
    # "preprocess", "prefill", "decode", "total" [s]; without stages all is in "decode".
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # why there are no actions; None if all went well
    code: str = ""  # `BAD_INSTRUCTION`, `NOT_FINITE`, `BAD_IMAGE`, or "" for any other error
    # whether no more is to come; otherwise `actions` (k, A) are the first steps of the chunk
    whole: bool = True
    seen: Seen = field(default_factory=Seen)  # what decoding the images has found


@dataclass(frozen=True)
class PredictorSettings(Checked):
    """How to run a checkpoint.

    Raises:
        ConfigError: A value outside its range.
    """

    checkpoint: str  # LeRobot checkpoint folder, or "teacher" / "student"
    # comma-separated, to import before: they register what the checkpoint names
    discover_packages: str = ""
    # a name that `CeedVLAPolicy.decoding_config` knows; other policies have one way
    decoding: str = "ceed"
    # Steps behind the frozen ones that must have converged; None: the checkpoint's own.
    replan_steps: int | None = ranged(None, COUNTS)
    threads: int = ranged(1, COUNTS)  # of torch
    device: str = "cpu"
    engine: str = chosen("eager", ENGINES)  # compiled: some minutes longer to load, then faster
    # by which decoding "plan" chooses among the plan<MS> [s]
    chunk_deadline: float = ranged(1.0, "(0, inf)")
    warmup: int = ranged(3, COUNTS)  # calls on a blank observation before the first request
    # added to every chunk, to see what slow inference does [s]
    delay_s: float = ranged(0.0, "[0, 60)")
