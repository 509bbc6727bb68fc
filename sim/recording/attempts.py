"""Attempts of the scripted expert, and the frames that they yield.

Only a successful attempt yields frames. A segment becomes one stored episode: consecutive expert
steps without interruption, so that every action chunk cut from it is what the expert did next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from ceed_vla.errors import SimulationError
from ceed_vla.sim.environment import Environment, images_of
from ceed_vla.sim.recording.config import RecordConfig

Frame = dict[str, Any]

EXCURSION_STEPS = (0, 5)  # random steps before the expert starts
BURST_STEPS = (1, 3)  # random steps of one perturbation burst
# expert steps between two bursts; chunks that extend beyond a segment's end are padded
BURST_EVERY = (11, 19)


@dataclass
class Attempt:
    """Result of one seed."""

    seed: int
    task: str
    # "recorded"; "failed": the expert did not finish; "unfinished": it did not finish after the
    # takeover; "solved": the policy finished before the takeover
    outcome: str = "failed"
    # frames of each stored episode; empty unless recorded
    segments: list[list[Frame]] = field(default_factory=list)


def make_frame(env: Environment, action: np.ndarray | None) -> Frame:
    """Build a dataset frame of the current state, with the expert's action (A,) unless it is None.

    Raises:
        SimulationError: The observation has no camera or no state.
    """
    observation = env.observe()
    frame: Frame = dict(images_of(observation))
    if not frame or "agent_pos" not in observation:
        raise SimulationError(
            f"Observations have {', '.join(observation)}; recording needs pixels and agent_pos."
        )
    frame[OBS_STATE] = np.asarray(observation["agent_pos"], dtype=np.float32)
    if hasattr(env.inner, "privileged_state"):
        frame[OBS_ENV_STATE] = np.asarray(env.inner.privileged_state(), dtype=np.float32)
    if action is not None:
        frame[ACTION] = np.asarray(action, dtype=np.float32)
    frame["task"] = env.instruction
    return frame


def frame_features(env: Environment, config: RecordConfig) -> dict[str, dict[str, Any]]:
    """LeRobot features of the frames; resets the environment."""
    env.reset(config.first_seed, config.task(config.first_seed))
    frame = make_frame(env, None if config.mode == "grounding" else env.hold_action())
    privileged = getattr(config.env, "privileged", None)
    names = {
        OBS_STATE: getattr(env.inner, "state_names", None),
        ACTION: getattr(env.inner, "action_names", None),
        OBS_ENV_STATE: privileged and privileged.names,
    }
    features: dict[str, dict[str, Any]] = {}
    for name, value in frame.items():
        if name in names:
            known = names[name] or [f"{name.rpartition('.')[2]}_{i}" for i in range(len(value))]
            features[name] = {"dtype": "float32", "shape": value.shape, "names": list(known)}
        elif name != "task":
            features[name] = {
                "dtype": "image",
                "shape": value.shape,
                "names": ["height", "width", "channels"],
            }
    return features


def attempt_rng(seed: int, mode: str) -> np.random.Generator:
    """The random source of an attempt's perturbations: a function of seed and mode only."""
    return np.random.default_rng([seed, sum(mode.encode())])


def expert_steps(env: Environment) -> Iterator[tuple[Frame, bool]]:
    """Run the expert without end; yield every frame and whether its action solved the task."""
    while True:
        action = env.expert_action()
        frame = make_frame(env, action)
        yield frame, env.advance(action)


def expert_attempt(env: Environment, seed: int, config: RecordConfig) -> Attempt:
    """Run the expert from reset to success.

    In mode perturb, unrecorded bursts of random steps separate the segments.
    """
    env.reset(seed, config.task(seed))
    attempt = Attempt(seed, env.task)
    rng = attempt_rng(seed, config.mode)
    segments: list[list[Frame]] = []
    perturb = config.mode == "perturb"
    limit = env.max_episode_steps
    steps = 0
    pause = 0
    if perturb:
        pause = int(rng.integers(EXCURSION_STEPS[0], EXCURSION_STEPS[1] + 1))
        pause = pause if rng.random() < config.excursion_fraction else 0
    while steps < limit and not env.finished:
        # these steps are not recorded
        solved = any(not env.finished and env.advance(env.disturbance(rng)) for _ in range(pause))
        steps += pause
        if not solved:
            until = limit - steps
            if perturb:
                until = min(int(rng.integers(BURST_EVERY[0], BURST_EVERY[1] + 1)), until)
            segments.append([])
            for frame, solved in expert_steps(env):
                segments[-1].append(frame)
                if solved or env.finished or len(segments[-1]) >= until:
                    break
            steps += len(segments[-1])
        if solved:
            attempt.outcome, attempt.segments = "recorded", segments
            break
        pause = int(rng.integers(BURST_STEPS[0], BURST_STEPS[1] + 1)) if perturb else 0
    return attempt


def grounding_scenes(env: Environment, seeds: range, config: RecordConfig) -> list[Attempt]:
    """Record action-free frames for grounding, each of another scene or arm pose.

    All frames of these seeds become one stored episode (of the first attempt), because storing one
    per scene is slow. Each frame has its own task.
    """
    frames: list[Frame] = []
    attempts = []
    for seed in seeds:
        env.reset(seed, config.task(seed))
        attempts.append(Attempt(seed, env.task, outcome="recorded"))
        rng = attempt_rng(seed, config.mode)
        for pose in range(config.poses_per_scene):
            env.rearrange("scatter", rng)
            if pose:
                env.rearrange("retarget", rng)
            frames.append(make_frame(env, None))
    if attempts:
        attempts[0].segments = [frames]
    return attempts
