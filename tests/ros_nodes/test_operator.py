"""The operator's view between real processes: a dry run, true answers, stuck sensors, loading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from lifecycle_msgs.msg import Transition
from rcl_interfaces.msg import Log
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from ceed_vla.ros_nodes.robot.messages import LATCHED
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config
from tests.ros_nodes.conftest import Graph, Status
from tests.ros_nodes.test_policy_node import ARM, COMMANDS, change_state, start, tabletop

pytestmark = [pytest.mark.slow, pytest.mark.realtime]
ON, OFF = SetBool.Request(data=True), SetBool.Request(data=False)


class Cell:
    """A robot whose arm and gripper publish separate messages, a policy node, and the messages of
    both.
    """

    def __init__(self, graph: Graph, **parameters: Any) -> None:
        self.graph, self.robot, self.status = graph, tabletop(graph), Status(graph)
        self.robot.split = True
        self.commands: list[Float64MultiArray] = graph.listen(COMMANDS, Float64MultiArray)
        self.states: list[String] = graph.listen("/policy/state", String, LATCHED)
        # faults may last long on a busy machine
        start(graph, **{"resume_within": 60.0, **parameters})

    def enable(self, request: SetBool.Request = ON) -> Any:
        return self.ask("/policy/enable", SetBool, request)

    def ask(self, service: str, kind: Any, request: Any = None) -> Any:
        """Call a service; call it again if this process, which is the robot, was too slow to be
        trusted.
        """
        for _ in range(20):
            answer = self.graph.call(service, kind, request)
            if not answer.message.startswith(("stale", "unsettled_pose")):
                break
            self.graph.spin(0.3)
        return answer

    def said(self, text: str, since: int = 0) -> None:
        """Wait until a state since the `since`-th had this text."""

        def said() -> list[str]:
            return [state.data for state in self.states[since:]]

        self.graph.wait(
            lambda: any(text in state for state in said()), f"the state {text!r}", 90.0, said
        )


def workers(graph: Graph) -> list[int]:
    """Return the process ids of the policy node's inference."""
    tasks = Path(f"/proc/{graph.processes['policy_node'].pid}/task").iterdir()
    children = {pid for task in tasks for pid in (task / "children").read_text().split()}
    return [
        int(pid)
        for pid in children
        if b"ceed_vla.ros_nodes.robot.local_policy" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.fixture(scope="module")
def shared_cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    """The processes of `cell`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        graph = Graph(tmp_path_factory.mktemp("cell"))
        try:
            made = Cell(graph, frozen_image_timeout=0.5)
            made.status.state("moving")  # although no joint state has all joints
            yield made
        finally:
            graph.close()


@pytest.fixture
def cell(shared_cell: Cell) -> Cell:
    """One session of processes for several tests; each test starts with the robot in motion."""
    robot = shared_cell.robot
    robot.images = robot.alive = robot.powered = True
    robot.blank = False
    if not shared_cell.states[-1].data.startswith("moving"):
        assert shared_cell.enable().success
        shared_cell.status.state("moving")
    return shared_cell


def test_a_reset_says_what_is_true(cell: Cell) -> None:
    answer = cell.graph.call("/policy/reset", Trigger)
    assert answer.message == "moving"  # no stop was latched, and the arm continues
    before = len(cell.commands)
    cell.graph.wait(lambda: len(cell.commands) > before + 20, "commands")
    assert cell.graph.call("/policy/estop", Trigger).message.startswith("stopped: estop")
    refused = cell.graph.call("/policy/go_home", Trigger)
    assert not refused.success
    assert refused.message.startswith("estop: the emergency stop is latched")
    assert cell.graph.call("/policy/reset", Trigger).message.startswith("disabled")
    answer = cell.enable()
    assert answer.success
    assert answer.message.startswith("waiting")
    cell.status.state("moving")
    assert cell.enable(OFF).message.startswith("disabled")
    assert cell.enable().success
    cell.status.state("moving")


def test_short_holds_are_told_and_logged(cell: Cell) -> None:
    logged = cell.graph.listen("/rosout", Log)
    cell.graph.spin(1.0)  # what is logged before the two have found each other is lost
    since = len(cell.states)
    cell.robot.images = False
    told = "holding: stale: front is 0."  # and its age when the node saw it [s]
    cell.said(told, since)
    cell.robot.images = True
    cell.graph.wait(lambda: cell.states[-1].data == "moving", "motion")
    assert len(cell.states) - since < 12  # changes, not ticks
    cell.graph.wait(lambda: any(line.msg == "State: moving" for line in logged), "the log")
    holds = [line for line in logged if line.msg.startswith(f"State: {told}")]
    assert len(holds) == 1
    assert holds[0].level == 30  # WARN
    assert f"State: {told}" in cell.graph.output("policy_node")


def test_a_camera_that_repeats_itself_holds_and_a_blank_one_is_warned_of(cell: Cell) -> None:
    cell.robot.alive = False
    cell.status.state("holding", "frozen_image", "repeats the same image")
    cell.graph.spin(1.5)
    held = np.array(cell.commands[-1].data)
    cell.graph.spin(0.3)
    np.testing.assert_array_equal(cell.commands[-1].data, held)
    cell.robot.alive = cell.robot.blank = True
    cell.status.wait(
        lambda said, values: "are equal" in said and values["state"] == "moving", "the warning"
    )
    cell.robot.blank = False
    cell.status.wait(lambda said, values: said == "moving", "the end of the warning")


def test_joint_states_that_do_not_follow_hold(cell: Cell) -> None:
    cell.robot.powered = False
    cell.status.state("holding", "frozen_joint_states", "the same for")
    cell.robot.powered = True
    cell.graph.spin(0.5)  # this arm jumps to the command, as an operator would see before enabling
    assert cell.enable().success
    cell.status.state("moving")


def test_home_is_reached_slowly_and_ends_in_rest(cell: Cell) -> None:
    home = load_robot_config().arm.home
    cell.robot.images = False  # this state needs no images
    assert cell.ask("/policy/go_home", Trigger).success
    cell.status.state("disabled")
    reached = [cell.robot.state[name] for name in ARM]
    np.testing.assert_allclose(reached, home, atol=1e-3)
    cell.robot.images = True
    assert cell.enable().success
    cell.status.state("moving")


def test_time_cannot_become_simulated_at_run_time(cell: Cell) -> None:
    (result,) = cell.graph.set_parameters("/policy", use_sim_time=True)
    assert not result.successful
    assert "only at the start" in result.reason


def test_with_a_dead_policy_enable_is_refused_and_motion_disabled(graph: Graph) -> None:
    cell = Cell(graph)
    cell.status.state("moving")
    os.kill(workers(graph)[-1], signal.SIGKILL)
    cell.status.state("holding", "inference_failed")
    answer = cell.enable()
    assert not answer.success
    assert answer.message.startswith("inference_failed: The inference process ended (exit code -9)")
    assert answer.message.endswith("(disabled)")
    cell.graph.spin(0.2)
    before = len(cell.commands)
    cell.graph.spin(0.5)
    assert len(cell.commands) == before
    assert graph.stop("policy_node") == 0


def test_a_dry_run_commands_nothing_and_shows_everything(graph: Graph) -> None:
    gripper = graph.listen("/gripper_controller/commands", Float64MultiArray)
    planned = graph.listen("/policy/planned", JointTrajectory)
    preview = graph.listen("/policy/preview_command", Float64MultiArray)
    cell = Cell(graph, dry_run=True)
    before = dict(cell.robot.state)
    graph.wait(lambda: len(planned) > 3 and len(preview) > 200, "previews", 120.0)
    cell.status.state("moving")
    assert not cell.commands
    assert not gripper
    assert not graph.node.count_publishers(COMMANDS)
    assert not graph.node.count_publishers("/gripper_controller/commands")
    assert cell.robot.state == before
    assert planned[0].joint_names == [*ARM, "gripper"]
    path = np.array([point.positions for point in planned[0].points])
    assert path.shape[0] in (7, 8)  # the steps that remain when it takes over
    assert path.shape[1] == 8
    assert np.isfinite(path).all()
    assert np.ptp(path[:, :7], axis=0).max() > 1e-3
    assert set(path[:, 7]) <= {0.0, 0.1}
    # limits.step
    assert np.abs(np.array(preview[-1].data) - [before[name] for name in ARM]).max() <= 0.3 + 1e-9
    values = cell.status.state("moving")
    assert values["dry_run"] == "True"
    assert values["message"].startswith("dry run, nothing is sent to the arm: ")
    assert graph.stop("policy_node") == 0


def test_while_a_checkpoint_loads_services_answer_and_what_does_not_fit_is_said_first(
    graph: Graph, tmp_path: Path
) -> None:
    values = yaml.safe_load(packaged_config().read_text())
    values["arm"]["model"] = str(packaged_config().parent / values["arm"]["model"])
    del values["images"]["observation.images.wrist"]
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(values))
    file = str(tmp_path / "robot.yaml")
    # Torch takes seconds to load, an export does not.
    cell = Cell(graph, autostart=False, robot_config=file, engine="eager")
    assert not change_state(graph, Transition.TRANSITION_CONFIGURE)
    cell.said("unconfigured: configure failed: The policy needs 'observation.images.wrist'")
    assert not workers(graph)  # so no process began to load
    assert "being loaded" not in " ".join(state.data for state in cell.states)
    cell.status.state("unconfigured", "The policy needs")
    assert graph.set_parameters("/policy", robot_config="")[0].successful
    assert change_state(graph, Transition.TRANSITION_CONFIGURE)
    cell.said("inactive: the policy is being loaded")
    graph.wait(lambda: workers(graph), "the inference process")
    cell.status.state("inactive", "being loaded")  # diagnostics are published meanwhile
    assert change_state(graph, Transition.TRANSITION_ACTIVATE)
    cell.said("waiting: for the policy, which is being loaded")
    cell.status.state("waiting", "being loaded")
    assert graph.call("/policy/estop", Trigger).message.startswith("stopped")
    assert graph.call("/policy/reset", Trigger).message.startswith("disabled")
    assert "chunks of" not in graph.output("policy_node")  # the policy was still being loaded
    assert cell.enable().message.startswith("waiting")
    cell.status.state("moving")
    assert graph.stop("policy_node") == 0


NO_TORCH = (
    "for name in ('torch', 'lerobot', 'transformers', 'draccus', 'safetensors'): sys.modules[name] "
    "= None"
)


def drives_from(python: Path | str, graph: Graph, first: str = "") -> None:
    """Run the node with `python`, after the statement `first`, and drive the robot with a policy in
    another environment.
    """
    cell = Cell.__new__(Cell)
    cell.graph, cell.robot, cell.status = graph, tabletop(graph), Status(graph)
    main = (
        "from ceed_vla.ros_nodes.robot.policy_node import main\nsys.exit(main(['policy_node', "
        "*sys.argv[1:]]))"
    )
    flags = [
        "-p",
        "autostart:=true",
        "-p",
        "instruction:=push the cube",
        "-p",
        f"inference_python:={sys.executable}",
    ]
    environment = os.environ | {
        "ROS_DOMAIN_ID": str(graph.domain),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with (graph.folder / "policy_node.txt").open("wb") as output:
        graph.processes["policy_node"] = subprocess.Popen(
            [python, "-c", f"import sys\n{first}\n{main}", "--ros-args", *flags],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    cell.status.state("moving")
    assert graph.stop("policy_node") == 0


def test_the_node_needs_no_torch_where_another_python_has_it(graph: Graph) -> None:
    drives_from(sys.executable, graph, NO_TORCH)


@pytest.mark.external  # needs a package index
def test_the_node_runs_on_the_numpy_of_apt(graph: Graph, tmp_path: Path) -> None:
    """The environment has only rclpy, numpy 1.26 (for which Jazzy's packages are built), PyYAML and
    mujoco.
    """
    python, uv = tmp_path / "bin" / "python", Path(sys.executable).with_name("uv")
    wheels = [
        str(d) for d in requires("ceed_vla") or () if "ros2" in d and not d.startswith("mcap")
    ]
    needed = [wheel.partition(";")[0].strip() for wheel in wheels]
    subprocess.run([uv, "venv", "--python", sys.executable, "--clear", tmp_path], check=True)
    subprocess.run(
        [uv, "pip", "install", "--python", python, *needed, "numpy==1.26.4", "pyyaml", "mujoco"],
        check=True,
    )
    asked = (
        "import importlib.util, numpy; print(numpy.__version__, importlib.util.find_spec('torch'))"
    )
    assert subprocess.check_output([python, "-c", asked], text=True).split() == ["1.26.4", "None"]
    drives_from(python, graph)
