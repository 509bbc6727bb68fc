"""One attempt of the scripted expert: which frames it yields, and which it must not.

An attempt ends in success or yields nothing. A segment is what becomes one stored episode: consecutive expert
steps without anything in between, so that every action chunk cut from it is what the expert did next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sim.recording.config import RecordConfig
from sim.rollout import advance

Frame = dict[str, Any]

EXCURSION_STEPS = (0, 5)  # random steps before the expert starts
BURST_STEPS = (1, 3)  # random steps of one perturbation burst


@dataclass
class Attempt:
    """What one seed yielded.

    Attributes:
        seed: The environment's seed.
        task: Task family.
        outcome: "recorded"; "failed" (the expert did not finish); "unfinished" (not after the takeover);
            "solved" (the policy finished before the expert took over).
        segments: Frames of each stored episode; empty unless recorded.
        steps: Control steps executed.
    """

    seed: int
    task: str
    outcome: str = "failed"
    segments: list[list[Frame]] = field(default_factory=list)
    steps: int = 0


def make_frame(env: Any, action: np.ndarray | None, observation: dict | None = None) -> Frame:
    """One data set frame of the environment's present state.

    Args:
        env: Unwrapped tabletop environment.
        action: Expert action (A,) for this state; None for action-free frames.
        observation: What `env.observe()` returned for this state, if that is known already.
    """
    observation = env.observe() if observation is None else observation
    frame: Frame = {f"observation.images.{name}": image for name, image in observation["pixels"].items()}
    frame["observation.state"] = np.asarray(observation["agent_pos"], dtype=np.float32)
    frame["observation.environment_state"] = np.asarray(env.privileged_state(), dtype=np.float32)
    if action is not None:
        frame["action"] = np.asarray(action, dtype=np.float32)
    frame["task"] = env.instruction
    return frame


def frame_features(env: Any, *, with_action: bool) -> dict[str, dict[str, Any]]:
    """LeRobot features of `make_frame(env, ...)`."""
    from sim.tabletop.env import ACTION_NAMES, PRIVILEGED_NAMES, STATE_NAMES

    space = env.observation_space
    features: dict[str, dict[str, Any]] = {
        f"observation.images.{name}": {
            "dtype": "image",
            "shape": tuple(box.shape),
            "names": ["height", "width", "channels"],
        }
        for name, box in space["pixels"].spaces.items()
    }

    def vector(names: tuple[str, ...]) -> dict[str, Any]:
        return {"dtype": "float32", "shape": (len(names),), "names": list(names)}

    features["observation.state"] = vector(STATE_NAMES)
    features["observation.environment_state"] = vector(PRIVILEGED_NAMES)
    if with_action:
        features["action"] = vector(ACTION_NAMES)
    return features


def attempt_rng(seed: int, mode: str) -> np.random.Generator:
    """The random source of an attempt's perturbations: a function of seed and mode only."""
    return np.random.default_rng([seed, sum(mode.encode())])


def random_action(rng: np.random.Generator, gripper: float) -> np.ndarray:
    """A disturbance (7,): any translation, moderate rotation, and now and then the wrong gripper command.

    Args:
        rng: Random source.
        gripper: Present gripper command (+1 open, -1 closed).
    """
    flip = -1.0 if rng.random() < 0.1 else 1.0
    return np.concatenate([rng.uniform(-1, 1, 3), rng.uniform(-0.3, 0.3, 3), [gripper * flip]]).astype(
        np.float32
    )


def disturb(env: Any, rng: np.random.Generator, steps: int) -> bool:
    """Execute random actions, unrecorded. Returns whether the task is solved now."""
    return any(advance(env, random_action(rng, 1.0 if env.gripper_open else -1.0)) for _ in range(steps))


def expert_steps(env: Any, rng: np.random.Generator, noise: float = 0.0) -> Iterator[tuple[Frame, bool]]:
    """Let the expert act, endlessly; yields every frame and whether the task is solved after its action.

    Args:
        env: Unwrapped tabletop environment.
        rng: Random source of the noise.
        noise: Standard deviation added to the executed action; the frame holds the clean one.
    """
    while True:
        action = np.asarray(env.expert_action(), dtype=np.float32)
        frame = make_frame(env, action)
        executed = np.clip(action + rng.normal(0.0, noise, action.shape), -1, 1) if noise else action
        yield frame, advance(env, executed)


def clean_attempt(env: Any, seed: int, config: RecordConfig) -> Attempt:
    """The expert from reset to success: one segment."""
    attempt = Attempt(seed, config.family(seed))
    env.reset(seed=seed, options={"task": attempt.task})
    rng = attempt_rng(seed, config.mode)
    frames: list[Frame] = []
    for frame, solved in expert_steps(env, rng, config.action_noise):
        frames.append(frame)
        attempt.steps += 1
        if solved:
            attempt.outcome, attempt.segments = "recorded", [frames]
        if solved or attempt.steps >= config.max_steps:
            return attempt
    raise AssertionError("expert_steps is endless")


def perturb_attempt(env: Any, seed: int, config: RecordConfig) -> Attempt:
    """The expert with bursts of random steps between its segments; bursts are not recorded."""
    attempt = Attempt(seed, config.family(seed))
    env.reset(seed=seed, options={"task": attempt.task})
    rng = attempt_rng(seed, config.mode)
    segments: list[list[Frame]] = []
    pause = int(rng.integers(EXCURSION_STEPS[0], EXCURSION_STEPS[1] + 1))
    if rng.random() >= config.excursion_fraction:
        pause = 0
    while attempt.steps < config.max_steps:
        solved = disturb(env, rng, pause)
        attempt.steps += pause
        if not solved:
            segments.append([])
            until = min(
                int(rng.integers(config.burst_every_min, config.burst_every_max + 1)),
                config.max_steps - attempt.steps,
            )
            for frame, solved in expert_steps(env, rng):
                segments[-1].append(frame)
                if solved or len(segments[-1]) >= until:
                    break
            attempt.steps += len(segments[-1])
        if solved:
            attempt.outcome, attempt.segments = "recorded", segments
            break
        pause = int(rng.integers(BURST_STEPS[0], BURST_STEPS[1] + 1))
    return attempt


def grounding_scenes(env: Any, seeds: range, config: RecordConfig) -> list[Attempt]:
    """Action-free frames for learning where things are, each of another scene or arm pose, with its own task.

    All frames of these seeds become one stored episode (of the first attempt): storing one per scene is slow.
    """
    frames: list[Frame] = []
    attempts = []
    for seed in seeds:
        attempt = Attempt(seed, config.family(seed), outcome="recorded")
        rng = attempt_rng(seed, config.mode)
        env.reset(seed=seed, options={"task": attempt.task})
        for pose in range(config.poses_per_scene):
            env.scatter_arm(rng)
            if pose:
                env.retarget(rng)
            frames.append(make_frame(env, None))
        attempts.append(attempt)
    if attempts:
        attempts[0].segments = [frames]
    return attempts
