"""Tasks of an environment's configuration, and what may be done in it.

See `ceed_vla.sim.environment` for the members of a configuration.
"""

from __future__ import annotations

from lerobot.envs.configs import EnvConfig

from ceed_vla.errors import ConfigError

MIXED = "mixed"


def turns(config: EnvConfig) -> list[str]:
    """Tasks that an evaluation cycles over its seeds; ["mixed"] if the environment draws them."""
    return [MIXED] if config.task == MIXED else recorded_tasks(config)


def task_of(config: EnvConfig, seed: int) -> str:
    """Task of the episode of a seed in evaluations."""
    tasks = turns(config)
    return tasks[seed % len(tasks)]


def recorded_tasks(config: EnvConfig) -> list[str]:
    """Tasks that a recording cycles over its seeds."""
    return list(config.tasks()) if has_tasks(config) else [MIXED]  # type: ignore[attr-defined]


def has_tasks(config: EnvConfig) -> bool:
    """Whether one environment serves a list of tasks."""
    return callable(getattr(config, "tasks", None))


def has_expert(config: EnvConfig) -> bool:
    """Whether the environment's configuration has an expert."""
    return callable(getattr(config, "act", None))


def at_once(config: EnvConfig, wanted: int) -> int:
    """Number of environments to run side by side in a process, of the `wanted` ones."""
    return min(wanted, getattr(config, "most_envs", wanted))


def check_open(config: EnvConfig, purpose: str) -> None:
    """Raise `ConfigError` if nothing may be learned or chosen in the environment."""
    # LeRobot's own LIBERO has the second field
    if getattr(config, "evaluation_only", getattr(config, "init_states", False)):
        raise ConfigError(
            f"{purpose} with --env.type={config.type} as it is set would use the episodes of the "
            "final evaluation. Set the field that makes it so: --env.states=sampled for "
            "ceed_libero, --env.init_states=false for LeRobot's libero."
        )


def check_expert(config: EnvConfig, purpose: str) -> None:
    """Raise `ConfigError` unless the environment has an expert."""
    if not has_expert(config):
        raise ConfigError(
            f"--env.type={config.type} has no expert, which {purpose} needs: its configuration "
            f"{type(config).__name__} lacks act(env), see sim/environment.py."
        )
