"""`ceed-vla bag-to-dataset`: a LeRobotDataset from a bag, as the record node would have written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ceed_vla.errors import CeedVLAError, ConfigError, DatasetError
from ceed_vla.fields import Checked, chosen, ranged
from ceed_vla.outputs import owned_folder
from ceed_vla.ros_nodes.record.bag_topics import check_topics, opened, topics_of
from ceed_vla.ros_nodes.record.conversion import Conversion
from ceed_vla.ros_nodes.record.episode import EpisodeRows
from ceed_vla.ros_nodes.record.plan import FORMATS, make_plan
from ceed_vla.ros_nodes.record.store import EpisodeStore
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, with_topics
from ceed_vla.serving.predictor import declared_spec
from ceed_vla.texts import instruction_problem
from ceed_vla.wording import counted


@dataclass
class BagConfig(Checked):
    """Settings of `ceed-vla bag-to-dataset`.

    Attributes:
        bag: Folder or file of the bag (MCAP or sqlite3).
        root: Folder of the data set.
        robot: YAML file of the robot; empty: the simulated arm.
        namespace: Namespace of the robot's nodes.
        topics: Topics that replace those in the robot's file: "front=/camera/image_raw".
        instruction: Task of what the bag names none for.
        checkpoint: Checkpoint whose features and image sizes are stored; empty: all features of
            the robot's file, and images as the cameras sent them.
        format: Codec of the videos, or png for images without loss.
        longest_gap: Time without a message of an input after which an episode ends [s].
        resume: Append to the recording in `root`.
    """

    bag: Path
    root: Path
    robot: str = ""
    namespace: str = ""
    topics: str = ""
    instruction: str = ""
    checkpoint: str = ""
    format: str = chosen("h264", FORMATS)
    longest_gap: float = ranged(0.5, "[0.05, 60]")
    resume: bool = False


@dataclass(frozen=True)
class BagSummary:
    """Result of `bag_to_dataset`."""

    root: Path
    frames: int
    episodes: int

    def __str__(self) -> str:
        stored = f"{counted(self.episodes, 'episode')} with {counted(self.frames, 'frame')}"
        return f"{self.root}: {stored}"


def bag_to_dataset(config: BagConfig) -> BagSummary:
    """Convert a bag.

    The episodes are those that the record node announced in the bag. Without any, all of the bag is
    stored, and a gap begins a new episode.

    Raises:
        ConfigError: There is no bag, no instruction, or the robot's file is invalid.
        DatasetError: The bag or the data set cannot be read, or the disk is full; the episodes
            before are stored.
    """
    problem = instruction_problem(config.instruction)
    if problem:
        raise ConfigError(f"--instruction is invalid: {problem}.")
    robot = with_topics(load_robot_config(config.robot), config.topics)
    spec = declared_spec(config.checkpoint) if config.checkpoint else None
    plan = make_plan(robot, spec, root=config.root, format=config.format, resume=config.resume)
    rows = EpisodeRows(robot, arm_model(robot), longest_gap=config.longest_gap)
    wanted = topics_of(robot, config.namespace)
    with owned_folder("root", str(config.root)), opened(config.bag) as reader:
        check_topics(reader, config.bag, robot, wanted)
        store = EpisodeStore(plan)
        before = store.episodes
        conversion = Conversion(
            rows, store, config.instruction, by_arrival=robot.commands.by_arrival
        )
        try:
            conversion.run(reader, config.bag, wanted)
        except (CeedVLAError, OSError) as error:
            new = store.episodes - before
            kept = f" {counted(new, 'episode')} of the bag stored before it." if new else ""
            raise DatasetError(f"{error}{kept}") from error
        finally:
            store.discard()
            _show(conversion)
        return BagSummary(config.root, store.frames, store.episodes)


def _show(conversion: Conversion) -> None:
    """Print what became of every episode."""
    table = Table("frames", "outcome", "remarks", "instruction")
    for one in conversion.episodes:
        table.add_row(str(one.frames), one.outcome, "; ".join(one.remarks), one.task)
    if conversion.episodes:
        Console().print(table)
    for name, count in conversion.rows.bad.items():
        print(f"{name}: {counted(count, 'message')} not used: {conversion.rows.faults[name]}")
