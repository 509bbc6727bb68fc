"""The environment interface: LeRobot's `EnvConfig` plus the optional members listed here.

Every environment that LeRobot or a discovered package registers can be evaluated and shown. It
returns LeRobot's observations (``pixels``, ``agent_pos``) and the boolean ``info["is_success"]``.
Everything else is optional and found by its name.

On the configuration:

    tasks() -> list[str]         tasks to cycle; ``reset(options={"task": name})`` selects one
    split: str                   a field: the combinations to draw, "train" or "heldout"
    episode_length: int          a field: step limit of an episode
    act(env) -> (A,)             expert action in the state of the unwrapped `env`; for `record`
    privileged: Privileged       the meaning of `privileged_state`; for the auxiliary target
    sides: tuple[str, str]       labels of the first camera's left and right border; for clips
    most_envs: int               environments that fit into the memory of a process; default: any
    distinct_episodes: int       different episodes, if they are a list; default: seeds draw them
    evaluation_only: bool        nothing may be learned or chosen in it; default: False

On the unwrapped environment:

    task_description: str        the instruction (LeRobot's name)
    state_names, action_names    names of the dimensions, for datasets
    privileged_state() -> (E,)   simulator state that the policy does not receive
    hold_action() -> (A,)        makes the robot hold, for `eval --delay_ms`; default: zeros
    disturbance(rng) -> (A,)     a random action of `record --mode perturb`; default: uniform
    scatter(rng), retarget(rng)  a random pose, another instruction; for grounding, with `observe`
    observe(), advance(action), is_success()     a step that renders on demand; all three or none
    snapshot() -> Any, restore(snapshot)      the complete state; for `reinforce`, with these three

With the task "mixed" the environment draws a task at every reset; recordings still cycle.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import (
    NEW_ROLLOUT_OPTION,
    close_envs,
    env_to_policy_features,
    preprocess_observation,
)
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError, SimulationError, raised_as, root_cause
from ceed_vla.fields import short
from ceed_vla.sim.env_tasks import MIXED, at_once, has_tasks
from ceed_vla.sim.seeds import EVALUATION_SEEDS as EVALUATION_SEEDS
from ceed_vla.sim.seeds import RECORDING_SEEDS as RECORDING_SEEDS
from ceed_vla.sim.seeds import TAKEOVER_SEEDS as TAKEOVER_SEEDS
from ceed_vla.sim.seeds import VALIDATION_SEED as VALIDATION_SEED
from ceed_vla.sim.seeds import check_choice as check_choice
from ceed_vla.sim.suites import suites as suites

logger = logging.getLogger(__name__)

# policy, preprocessor, postprocessor, as `ceed_vla.load` returns them
Bundle = tuple[Any, Any, Any]
Observation = dict[str, Any]


@dataclass(frozen=True)
class Privileged:
    """The meaning of an environment's `privileged_state` (E,).

    Attributes:
        names: Names of the values (E,).
        scale: Factors of the leading values in the auxiliary regression, which bring them to the
            order of 1.
        named: Number of leading values that describe the objects named in the instruction; only
            these are regressed while actions are trained.
        positions: Positions relative to the robot's tool [m]: name -> start and stop index.
            `ceed-vla grounding` sorts by the distance of the first one.
    """

    names: tuple[str, ...]
    scale: tuple[float, ...]
    named: int = 0
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)


def register_installed() -> None:
    """Register our environments and those of installed ``lerobot_env_*`` distributions."""
    for folder in Path(__file__).parent.glob("*/lerobot_env.py"):
        import_module(f"ceed_vla.sim.{folder.parent.name}.lerobot_env")
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").replace("-", "_")
        if name.startswith("lerobot_env_"):
            try:
                import_module(name)
            except Exception as error:  # an external package may raise anything
                logger.warning("%s cannot be imported: %s", name, root_cause(error))


def flags(config: EnvConfig) -> list[str]:
    """Flags ``--env.type=... --env.<field>=...`` that reproduce `config`."""
    names = [item.name for item in fields(config) if item.init]
    # most configurations derive these from the other fields, so they are compared last
    derived = [name for name in names if name in ("features", "features_map")]
    changed: dict[str, Any] = {}
    for name in sorted(names, key=derived.count):
        value = getattr(config, name)
        if value != getattr(type(config)(**changed), name):
            changed[name] = value
    texts = {
        name: v if isinstance(v, str) else json.dumps(draccus.encode(v))
        for name, v in changed.items()
    }
    return [f"--env.type={config.type}", *(f"--env.{name}={text}" for name, text in texts.items())]


class Environment:
    """A uniform interface to one environment; a non-empty `instruction` overrides its own.

    Attributes:
        task: Task of the episode; ``info["task"]`` of the reset if present.
        success: Whether the episode is solved now.
        finished: Whether the environment has ended the episode.

    Raises:
        SimulationError: The environment cannot be created, fails, or does not report success.
    """

    def __init__(self, config: EnvConfig, instruction: str = "") -> None:
        self.config, self._instruction = config, instruction
        with raised_as(
            SimulationError,
            f"--env.type={config.type} cannot be created",
            "check its fields and its package.",
        ):
            # With a task list one environment serves all tasks; otherwise LeRobot creates one per
            # task.
            make = EnvConfig.create_envs if has_tasks(config) else make_env
            self._suites = make(config, n_envs=1)
            self._envs = []
            for suite, vectors in self._suites.items():
                self._envs += [(f"{suite}/{n}", own.envs[0]) for n, own in vectors.items()]
        if not self._envs:
            raise SimulationError(
                f"--env.type={config.type} has no environments: its package creates none. "
                "Check its fields, such as env.task, or its package."
            )
        self._env = self._envs[0][1]
        self._quick = all(
            hasattr(self.inner, name) for name in ("observe", "advance", "is_success")
        )
        self._observation: Observation | None = None
        self.task = ""
        self.success = False
        self.finished = False

    @property
    def inner(self) -> Any:
        """The unwrapped environment."""
        return self._env.unwrapped

    @property
    def simulations(self) -> int:
        """Simulations that it creates, each for other tasks."""
        return len(self._envs)

    @property
    def max_episode_steps(self) -> int:
        """The step limit of the present episode."""
        return self._limit(self._env)

    @property
    def longest(self) -> int:
        """The longest step limit of an episode."""
        return max(self._limit(env) for _, env in self._envs)

    @property
    def distinct(self) -> int | None:
        """Number of different episodes; None if seeds draw them."""
        official = getattr(self.config, "distinct_episodes", None)  # of one that serves all tasks
        if official is None:  # LeRobot's libero
            states = [getattr(env.unwrapped, "_init_states", None) for _, env in self._envs]
            counts = [0 if own is None else len(own) for own in states]
            official = len(counts) * min(counts) or None
        return official

    def _limit(self, env: Any) -> int:
        limit = getattr(self.config, "episode_length", None)
        for place in (env, env.unwrapped):
            limit = limit or getattr(place, "_max_episode_steps", None)
            limit = limit or getattr(place.spec, "max_episode_steps", None)
        if not limit:
            raise SimulationError(
                f"--env.type={self.config.type} has no step limit; set its field episode_length."
            )
        return int(limit)

    @property
    def instruction(self) -> str:
        own = getattr(self.inner, "task_description", None) or getattr(self.inner, "task", None)
        return str(self._instruction or own or self.task)

    def reset(self, seed: int, task: str = MIXED) -> None:
        options: dict[str, Any] = {} if task == MIXED else {"task": task}
        if not has_tasks(self.config):
            options[NEW_ROLLOUT_OPTION] = True
        name, self._env = self._envs[seed % len(self._envs)]
        if hasattr(self.inner, "init_state_id"):  # LeRobot's libero counts its resets instead
            self.inner.init_state_id = seed // len(self._envs)
        with self._fails_in(f"reset to seed {seed}"):
            self._observation, info = self._env.reset(seed=int(seed), options=options)
            reported = info.get("task")
        own = self.config.task or self.config.type
        found = str(reported or (own if len(self._envs) == 1 else name))
        self.task = task if task != MIXED and has_tasks(self.config) else found
        self.success = self.finished = False

    def observe(self) -> Observation:
        if self._observation is None:
            with self._fails_in("observe()"):
                self._observation = self.inner.observe()
        return self._observation

    def advance(self, action: NDArray[np.floating]) -> bool:
        """Run one control step; return whether the episode is solved now."""
        if self._quick:
            with self._fails_in("advance(action)"):
                self.inner.advance(action)
                solved = self.inner.is_success()
            self._observation = None
            self.success = self._checked(solved, "is_success()")
            return self.success
        with self._fails_in("step(action)"):
            self._observation, _, terminated, truncated, info = self._env.step(action)
            silent = "is_success" not in info
        if silent:
            raise SimulationError(
                f"--env.type={self.config.type} returns no info['is_success']; it must report "
                "whether the episode is solved. Add it to the environment's step()."
            )
        self.success = self._checked(info["is_success"], "info['is_success']")
        self.finished = bool(terminated or truncated)
        return self.success

    def _fails_in(self, what: str) -> AbstractContextManager[None]:
        """Re-raise the environment's errors as a `SimulationError` that names it and the call."""
        failed = f"--env.type={self.config.type} fails in {what}"
        return raised_as(SimulationError, failed, "this is an error of that environment's package.")

    def _checked(self, solved: Any, name: str) -> bool:
        """Return the success flag, which must be a boolean: "no" and NaN would count as true."""
        if not isinstance(solved, bool | np.bool_):
            value = f"{short(solved)} ({type(solved).__name__})"
            raise SimulationError(
                f"--env.type={self.config.type}: {name} is {value}; it must be a boolean, True or "
                "False. Return bool(...) in the environment."
            )
        return bool(solved)

    def expert_action(self) -> NDArray[np.float32]:
        """Action (A,) of the expert in the current state."""
        return np.asarray(self.config.act(self.inner), dtype=np.float32)  # type: ignore[attr-defined]

    def hold_action(self) -> NDArray[np.float32]:
        zeros = np.zeros(self._env.action_space.shape, dtype=np.float32)
        return self.inner.hold_action() if hasattr(self.inner, "hold_action") else zeros

    def disturbance(self, rng: np.random.Generator) -> NDArray[np.float32]:
        if hasattr(self.inner, "disturbance"):
            return self.inner.disturbance(rng)
        space = self._env.action_space
        if not np.isfinite([space.low, space.high]).all():
            self.needs("mode perturb with unbounded actions", "disturbance")
        return rng.uniform(space.low, space.high).astype(np.float32)

    def follow(self, other: Environment) -> None:
        """Take over the state of another environment with the same configuration."""
        self.inner.restore(other.inner.snapshot())
        self._observation = None
        self.task = other.task
        self.success = other.success
        self.finished = other.finished

    def rearrange(self, how: str, rng: np.random.Generator) -> None:
        """Call `scatter` or `retarget` of the unwrapped environment."""
        getattr(self.inner, how)(rng)
        self._observation = None

    def needs(self, purpose: str, *names: str) -> None:
        """Raise `SimulationError` unless the unwrapped environment has these methods."""
        missing = [f"{name}()" for name in names if not hasattr(self.inner, name)]
        if missing:
            raise SimulationError(
                f"--env.type={self.config.type} lacks {' and '.join(missing)}, which {purpose} "
                "needs. Add the missing methods to the environment's class; sim/environment.py "
                "describes them."
            )

    def close(self) -> None:
        close_envs(self._suites)


class EnvPool(AbstractContextManager["EnvPool"]):
    """A fixed number of environments, created on first use and reused."""

    def __init__(self, size: int, config: EnvConfig, instruction: str = "") -> None:
        self.size = at_once(config, size)
        self.config = config
        self._instruction = instruction
        self._envs: list[Environment] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings only: another process creates its own environments."""
        return EnvPool, (self.size, self.config, self._instruction)

    def env(self, slot: int) -> Environment:
        """The environment of a slot (0 <= slot < size)."""
        while len(self._envs) <= slot:
            self._envs.append(Environment(self.config, self._instruction))
        return self._envs[slot]

    @property
    def side_by_side(self) -> int:
        """Episodes that run at once: one where an environment keeps a simulation per task."""
        return 1 if self.env(0).simulations > 1 else self.size

    @property
    def max_episode_steps(self) -> int:
        """The longest step limit of an episode."""
        return self.env(0).longest

    def __exit__(self, *_: object) -> None:
        while self._envs:
            self._envs.pop().close()


# ---- observations --------------------------------------------------------------------------------


def images_of(observation: Observation) -> dict[str, NDArray[np.uint8]]:
    """Camera images (H, W, 3) by feature name."""
    pixels = observation.get("pixels", {})
    if not isinstance(pixels, dict):
        return {OBS_IMAGE: pixels}
    return {f"{OBS_IMAGES}.{camera}": image for camera, image in pixels.items()}


def observation_batch(
    observations: Sequence[Observation], instructions: Sequence[str]
) -> dict[str, Any]:
    """Convert B raw observations to a LeRobot batch.

    Returns:
        Images (B, 3, H, W) in [0, 1], state (B, D) and a list of tasks.
    """
    batch = preprocess_observation(_stacked(observations))
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            # The memory layout of training: kernels round differently for another one.
            batch[name] = value.contiguous(memory_format=torch.channels_last)
    return {**batch, "task": list(instructions)}


def _stacked(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _stacked([value[name] for value in values]) for name in values[0]}
    return np.stack([np.asarray(value) for value in values])


def joined(bundle: Bundle, config: EnvConfig) -> Bundle:
    """Add the environment's processors to those of a policy.

    Raises:
        ConfigError: The policy reads or writes features that the environment does not have.
    """
    policy, pre, post = bundle
    check_features(policy.config, config)
    before, after = config.get_env_processors()
    if before.steps:
        pre = partial(_chained, before, pre)
    if after.steps:
        post = partial(_chained, post, lambda actions: after({ACTION: actions})[ACTION])
    return policy, pre, post


def _chained(first: Any, second: Any, value: Any) -> Any:
    return second(first(value))


def check_features(policy: Any, config: EnvConfig) -> None:
    """Raise `ConfigError` unless the environment has all features of a policy's configuration."""
    if not config.features or config.get_env_processors()[0].steps:
        return  # they are unknown until an observation has passed the processors
    have = {name: tuple(feature.shape) for name, feature in env_to_policy_features(config).items()}
    wanted = {name: tuple(feature.shape) for name, feature in (policy.input_features or {}).items()}
    wanted |= {ACTION: tuple(policy.action_feature.shape)}
    for name, shape in wanted.items():
        # images of another size are resized
        resized = len(shape) == 3 and (name in have or ".empty_camera_" in name)
        if name != OBS_ENV_STATE and have.get(name) != shape and not resized:
            raise ConfigError(
                f"The policy reads or writes {name} {shape}, --env.type={config.type} has "
                f"{', '.join(f'{n} {s}' for n, s in have.items())}."
            )


register_installed()
