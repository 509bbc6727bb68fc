"""Options of `ceed-vla record`, and all checks that need no simulator."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from lerobot.envs.configs import EnvConfig

from ceed_vla.decoding.names import named_config
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, SEEDS, check_fields, chosen, ranged
from ceed_vla.sim.env_tasks import at_once, check_expert, check_open, recorded_tasks
from ceed_vla.sim.environment import RECORDING_SEEDS, TAKEOVER_SEEDS, flags
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv
from ceed_vla.workers import MOST, ClusterConfig

MODES = ("clean", "perturb", "grounding", "takeover")
STEPS = "[1, 1e6]"

# Fields that a resumed run may change; all others decide what is recorded.
_FREE = (
    "root",
    "episodes",
    "max_minutes",
    "resume",
    "commit_frames",
    "progress",
    "workers",
    "cluster",
)


@dataclass
class RecordConfig:
    """Record demonstrations of the scripted expert into one LeRobotDataset v3 folder.

    Change first: `env.task`, `episodes`, `mode`, `root`. Every attempt has its own seed, `seed +
    i`, and the tasks cycle over the seeds, so an interrupted dataset is balanced. **Sharding:**
    machines with disjoint ranges `[seed, seed + episodes)` and different roots record disjoint
    data; training reads several roots.

    Attributes:
        root: Folder of the dataset; must not exist, unless `resume` is set.
        env: The environment; must have an expert, see `ceed_vla.sim.environment`.
        episodes: Number of attempts (scenes, in mode grounding), one seed each. Failed attempts are
            counted but not recorded, so a dataset may have fewer episodes (or more: mode perturb
            splits an attempt at its bursts).
        mode: clean (the expert alone), perturb (with bursts of random steps), grounding (scenes
            without actions) or takeover (the policy drives first, then the expert).
        seed: First seed; default 0, or 30000 in mode takeover.
        resume: Continue an interrupted or finished dataset; a missing one is started.
        excursion_fraction: Share of perturb attempts that begin with 0-5 unrecorded random steps.
        poses_per_scene: Arm poses (frames) per grounding scene.
        scenes_per_episode: Grounding scenes per stored episode (storing an episode has a fixed
            cost).
        instruction: Instruction to record, if the environment has none or other words are wanted.
        policy_path: Checkpoint folder of the policy that drives in mode takeover.
        decoding: Decoder of that policy, a name as for `ceed-vla eval`: ar, ceed, cap1 and so on.
        executed_steps: Actions executed per chunk in mode takeover; None: the policy's own.
        batch: Environments driven in lock step in mode takeover.
        workers: Processes that share the attempts; the data do not depend on their number.
        cluster: Ray cluster that makes the attempts instead; this machine writes the dataset.
        max_chunks: The policy drives 1 to `max_chunks` chunks before the expert takes over.
        takeover_steps: Control steps within which the expert must finish after the takeover.
        max_minutes: Time limit [min]; recorded episodes stay. 0: no limit.
        commit_frames: Frames between two commits of the dataset to disk. A killed process loses at
            most this many; an interrupt, an error or a full disk loses fewer.
        progress: Show a progress bar.
    """

    moved: ClassVar[dict[str, str]] = {
        "tasks": "env.task",
        "image_size": "env.image_size",
        "max_steps": "env.episode_length",
    }

    root: Path
    env: EnvConfig = field(default_factory=CeedTabletopEnv)
    episodes: int = ranged(100, "[1, 1e6]")
    mode: str = chosen("clean", MODES)
    seed: int | None = ranged(None, SEEDS)
    resume: bool = False
    excursion_fraction: float = ranged(0.25, "[0, 1]")
    poses_per_scene: int = ranged(2, STEPS)
    scenes_per_episode: int = ranged(200, STEPS)
    instruction: str = ""
    policy_path: Path | None = None
    decoding: str = "ar"
    executed_steps: int | None = ranged(None, "[1, 4096]")
    batch: int = ranged(16, "[1, 1000]")
    workers: int = ranged(1, MOST)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    max_chunks: int = ranged(15, STEPS)
    takeover_steps: int = ranged(60, STEPS)
    max_minutes: float = ranged(0.0, "[0, 1e6]")
    commit_frames: int = ranged(3000, COUNTS)
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.root = Path(self.root)
        if self.root == Path():
            raise ConfigError(f"root is {str(self.root)!r}; choose a new folder for the dataset.")
        if named_config(self.decoding).deadline_s is not None and self.mode == "takeover":
            raise ConfigError(
                f"decoding is {self.decoding}, which has a deadline; attempts share batches, but "
                "a deadline applies to a chunk alone. Choose another decoder."
            )
        if self.seed is None:
            self.seed = TAKEOVER_SEEDS[0] if self.mode == "takeover" else RECORDING_SEEDS[0]
        if self.mode != "grounding":
            check_expert(self.env, f"mode {self.mode}")
        check_open(self.env, "Recording")
        self.batch = at_once(self.env, self.batch)
        self._check_seeds()

    def _check_seeds(self) -> None:
        low, high = TAKEOVER_SEEDS if self.mode == "takeover" else RECORDING_SEEDS
        first = self.first_seed
        last = self.first_seed + self.episodes - 1
        if first < low or last >= high:
            raise ConfigError(
                f"seeds {first}..{last} are not all in [{low}, {high}), the range of mode "
                f"{self.mode!r}; seeds from 40000 are for validation, from 50000 for evaluation, "
                "and are never recorded. Lower --seed or --episodes"
            )

    @property
    def first_seed(self) -> int:
        return int(self.seed or 0)

    @property
    def unit_size(self) -> int:
        """Seeds per unit of work, which is stored completely or, after an interrupt, repeated."""
        return {"grounding": self.scenes_per_episode, "takeover": self.batch}.get(self.mode, 1)

    def task(self, seed: int) -> str:
        """Task of one seed (round robin)."""
        tasks = recorded_tasks(self.env)
        return tasks[(seed - self.first_seed) % len(tasks)]

    def identity(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the first, as plain JSON types."""
        names = [item.name for item in fields(self) if item.name not in (*_FREE, "env")]
        values = {name: getattr(self, name) for name in names if getattr(self, name) != ""}
        values = {
            name: str(value) if isinstance(value, Path) else value for name, value in values.items()
        }
        return {**values, "env": flags(self.env)}
