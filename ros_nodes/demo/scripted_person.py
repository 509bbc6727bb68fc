"""A round of HG-DAgger: ``python -m ceed_vla.ros_nodes.demo.scripted_person``.

A policy drives the simulated robot. In an episode that it has not solved after `patience` seconds,
the scripted expert takes over through the node's intervention, as a person with a gamepad would; a
record node records all of it. Episodes that the policy solves alone are discarded, because there is
nothing in them to imitate.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from sensor_msgs.msg import Joy
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.errors import NodeError
from ceed_vla.ros_nodes.demo.measuring import print_results
from ceed_vla.ros_nodes.demo.session import Session
from ceed_vla.ros_nodes.robot.messages import COMMAND, LATCHED
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config

BUTTON = 2  # of the gamepad: takes over while it is pressed
FULL = {"linear": 0.5, "angular": 2.5}  # speed of a full action of the tabletop's robot file
_STORE = 60.0  # longest time until an episode is stored [s]


class Person:
    """Passes the expert's gamepad on, and presses the button that takes over.

    Attributes:
        pressed: Whether the button is pressed.
    """

    def __init__(self, node: Any) -> None:
        self.pressed = False
        self._publisher = node.create_publisher(Joy, "/joy", COMMAND)
        node.create_subscription(Joy, "/sim/expert", self._pass_on, COMMAND)

    def _pass_on(self, message: Joy) -> None:
        message.buttons = [*message.buttons, int(self.pressed)]
        self._publisher.publish(message)


def robot_file(folder: Path) -> Path:
    """Write the packaged robot's file with a gamepad into `folder`, and return its path."""
    packaged = packaged_config()
    values = yaml.safe_load(packaged.read_text(encoding="utf-8"))
    values["arm"]["model"] = str(packaged.with_name(values["arm"]["model"]))
    axes = {name: index for index, name in enumerate(("x", "y", "z", "roll", "pitch", "yaw"))}
    values["intervention"] = {
        "kind": "joy",
        "topic": "joy",
        "axes": axes,
        "button": BUTTON,
        "open": 0,
        "close": 1,
        "threshold": 0.01,
        **FULL,
    }
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Round:
    """Episodes with a scripted person.

    Args:
        session: The simulated robot and the policy node.
        task: Task family of the episodes, or "mixed".
        patience: Time after which the person takes over [s].
        limit: Longest time of an episode [s].
    """

    def __init__(self, session: Session, task: str, patience: float, limit: float) -> None:
        self._session = session
        self._task = task
        self._patience = patience
        self._limit = limit
        self._person = Person(session.node)
        self._state = ""
        session.node.create_subscription(String, "/record/state", self._on_state, LATCHED)

    def _on_state(self, message: String) -> None:
        self._state = message.data

    def wait(self, state: str, seconds: float) -> None:
        """Wait for a state of the recorder; `NodeError`: It does not come."""
        if not self._session.spin(seconds, lambda: self._state.startswith(state)):
            raise NodeError(f"The recorder is {self._state or 'silent'}, not {state}.")

    def episode(self, seed: int) -> str:
        """Run an episode; return "alone", "helped" or "failed"."""
        session = self._session
        session.reset_episode(seed, self._task)
        session.call("/record/start", Trigger, Trigger.Request())
        session.enable(True)
        if session.spin(self._patience, lambda: session.solved):
            session.enable(False)
            session.call("/record/discard", Trigger, Trigger.Request())
            return "alone"
        self._person.pressed = True
        solved = session.spin(self._limit - self._patience, lambda: session.solved)
        self._person.pressed = False
        session.call("/record/stop", SetBool, SetBool.Request(data=solved))
        session.spin(0.2)
        session.enable(False)
        self.wait("idle", _STORE)
        return "helped" if solved else "failed"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run a round; returns counts."""
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    file = robot_file(output)
    common = ["-p", f"robot_config:={file}"]
    policy = [
        *common,
        "-p",
        f"checkpoint:={options.checkpoint}",
        "-p",
        f"decoding:={options.decoding}",
    ]
    policy += ["-p", f"engine:={options.engine}"]
    interface = load_robot_config(file).interface("forward_position")
    outcomes: Counter[str] = Counter()
    with ExitStack() as stack:
        session = Session(
            output, options.domain, interface, policy, ["-p", "publish_expert:=true"], bag=False
        )
        stack.callback(session.close)
        record = [*common, "-p", f"root:={output / 'data'}", "-p", "autostart:=true"]
        record += [
            "-p",
            f"checkpoint:={options.checkpoint}",
            "-p",
            f"format:={options.format}",
            "-r",
            "~/instruction:=/policy/instruction",
        ]
        session.start("record", "ceed_vla.ros_nodes.record.record_node", record)
        one = Round(session, options.task, options.patience, options.limit)
        session.wait_until_ready()
        one.wait("idle", _STORE)
        began = time.monotonic()
        for seed in range(options.seed, options.seed + options.episodes):
            outcome = one.episode(seed)
            outcomes[outcome] += 1
            print(f"seed {seed}: {outcome}", flush=True)
        took = time.monotonic() - began
    return {**outcomes, "minutes": round(took / 60, 1), "data": str(output / "data")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of `run` as JSON."""
    from ceed_vla.ros_nodes.demo.ros_demo import free_domain

    about = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="scripted_person", description=about)
    parser.add_argument("--checkpoint", default="student")
    parser.add_argument("--decoding", default="ceed")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--task", default="mixed", help="task family of the episodes")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=30000, help="first seed; those of takeovers")
    parser.add_argument("--patience", type=float, default=8.0, help="until the person acts [s]")
    parser.add_argument("--limit", type=float, default=30.0, help="of an episode [s]")
    parser.add_argument("--format", default="png", help="of the recording")
    parser.add_argument("--output_dir", default="outputs/hg_dagger")
    options = parser.parse_args(arguments)
    options.domain = free_domain()
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return print_results("scripted_person", lambda: [run(options)])


if __name__ == "__main__":
    sys.exit(main())
