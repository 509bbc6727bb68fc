"""Lifecycle node that records a robot's topics as a LeRobotDataset.

`Recorder` defines the behaviour; this file connects it to ROS. docs/reference/record-node.md lists
topics, services and parameters.
"""

# ceed_vla.ros_nodes.robot.messages is imported first, because its error explains a missing ROS.
from __future__ import annotations  # noqa: I001

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ceed_vla.ros_nodes.robot.messages import COMMAND, JOINT_STATES, LATCHED, clock_time

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.discovery import discover
from ceed_vla.errors import CeedVLAError, ConfigError, NodeError
from ceed_vla.ros_nodes.record.episode import EpisodeRows
from ceed_vla.ros_nodes.record.parameters import RECORD_PARAMETERS
from ceed_vla.ros_nodes.record.plan import make_plan
from ceed_vla.ros_nodes.record.recorder import Answer, Phase, Recorder
from ceed_vla.ros_nodes.record.worker import RecordWorker
from ceed_vla.ros_nodes.robot import parameters
from ceed_vla.ros_nodes.robot.autostart import Autostart
from ceed_vla.ros_nodes.robot.diagnostics import status_message
from ceed_vla.ros_nodes.robot.lifecycle import SafeLifecycleNode
from ceed_vla.ros_nodes.robot.arm_model import arm_model
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, with_topics
from ceed_vla.ros_nodes.robot.spinning import end_process, keep_memory, run
from ceed_vla.serving.predictor import declared_spec
from ceed_vla.texts import instruction_problem, short

LOOK = 0.02  # time between two looks for complete frames [s]
# A recording needs every image, a policy only the newest.
IMAGES = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)


@dataclass(frozen=True)
class RecordSetup:
    """The parts that the node creates when it is configured."""

    robot: RobotConfig
    rows: EpisodeRows
    worker: RecordWorker
    recorder: Recorder


class RecordNode(SafeLifecycleNode):
    """The record node; see the module. `ConfigError`: A parameter has an invalid value."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__("record", **node_options)
        parameters.declare_parameters(self, RECORD_PARAMETERS[:1])
        discover(self.get_parameter("discover_packages").value, "discover_packages")
        parameters.declare_parameters(self, RECORD_PARAMETERS[1:])
        parameters.refuse_unknown(self)
        self.add_on_set_parameters_callback(
            lambda changes: parameters.refusal(
                RECORD_PARAMETERS, changes, configured=self._setup is not None
            )
        )
        self.add_post_set_parameters_callback(self._take_parameters)
        self._setup: RecordSetup | None = None
        self._active = False
        self._failure = ""  # why the last transition failed
        self._told = ""  # the last text on ~/state
        self._inputs: list[Any] = []
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._replied = self.create_guard_condition(self._advance)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", COMMAND)
        self._states = self.create_publisher(String, "~/state", LATCHED)
        self._events = self.create_publisher(String, "~/episode", LATCHED)
        self.create_timer(LOOK, self._advance, clock=self._steady)
        self.create_timer(1.0, self._publish_diagnostics, clock=self._steady)
        self.create_subscription(String, "~/instruction", self._on_instruction, LATCHED)
        self.create_service(Trigger, "~/start", self._on_start)
        self.create_service(SetBool, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/discard", self._on_discard)
        self._autostart: Autostart | None = None
        if self.get_parameter("autostart").value:
            self._autostart = Autostart(
                self,
                self._steady,
                lambda: None if self._setup is None else self._setup.worker,
                lambda: (self._failure, False),
            )
        self._show_state()

    # ---- lifecycle -------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start the process that stores; fail, and log why not."""
        self._failure = ""
        try:
            self._setup = self._make_setup()
        except Exception as error:  # mujoco raises many types for a model's file
            return self._fail("configure", error)
        keep_memory()
        self._subscribe(self._setup)
        self._take_instruction(self.get_parameter("instruction").value)
        self._show_state()
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Allow episodes."""
        assert self._setup is not None
        if self._setup.worker.failed is not None:
            return self._fail("activate", NodeError(self._setup.worker.failed))
        self._active = True
        self._show_state()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Discard the episode that runs, if there is one."""
        self._active = False
        if self._setup is not None:
            self._setup.recorder.discard()
        self._show_state()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the process that stores, after what it stores now."""
        self._release()
        self._show_state()
        return TransitionCallbackReturn.SUCCESS

    on_shutdown = on_cleanup

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Return to unconfigured."""
        self._failure = self._failure or "a transition raised an error; the log has it"
        return self.on_cleanup(state)

    def destroy_node(self) -> None:
        self._release()
        super().destroy_node()

    def _make_setup(self) -> RecordSetup:
        values = parameters.values(self, RECORD_PARAMETERS)
        robot = with_topics(load_robot_config(values["robot_config"]), values["topics"])
        if not values["root"]:
            raise ConfigError("root is empty; name the folder of the data set.")
        spec = declared_spec(values["checkpoint"]) if values["checkpoint"] else None
        root = Path(values["root"]).expanduser()
        plan = make_plan(robot, spec, root=root, format=values["format"], resume=values["resume"])
        rows = EpisodeRows(
            robot,
            arm_model(robot),
            patience=values["patience"],
            longest_gap=values["longest_gap"],
        )
        worker = RecordWorker(plan, notify=self._replied.trigger, python=values["python"])
        memory = values["memory_mb"] * 10**6
        recorder = Recorder(
            rows, worker, memory, lambda text: self._events.publish(String(data=text))
        )
        return RecordSetup(robot, rows, worker, recorder)

    def _subscribe(self, setup: RecordSetup) -> None:
        """Subscribe to the robot's topics."""
        robot = setup.robot
        for image in robot.images:
            message = CompressedImage if image.transport == "compressed" else Image
            take_image: Any = partial(setup.rows.take_image, image.feature)
            # raw: as bytes, because this thread has no time to convert pixels
            self._inputs.append(
                self.create_subscription(message, image.topic, take_image, IMAGES, raw=True)
            )
        for topic, prefix in robot.joint_topics.items():
            take_joints: Any = partial(setup.rows.take_joints, prefix=prefix)
            self._inputs.append(
                self.create_subscription(JointState, topic, take_joints, JOINT_STATES)
            )
        commands = robot.commands
        kind: Any = JointState
        take: Any = setup.rows.take_commands
        if commands.by_arrival:
            kind = Float64MultiArray
            take = self._on_positions
        self._inputs.append(self.create_subscription(kind, commands.topic, take, JOINT_STATES))

    def _tell(self, event: str) -> None:
        self._events.publish(String(data=event))

    def _fail(self, transition: str, error: Exception) -> TransitionCallbackReturn:
        """Store, log and publish why a transition failed."""
        kind = "" if isinstance(error, CeedVLAError) else f"{type(error).__name__}: "
        self._failure = short(f"{transition} failed: {kind}{error}", 500)
        if self._autostart is None or not self._autostart.running:
            self.get_logger().error(self._failure)
        self._show_state()
        return TransitionCallbackReturn.FAILURE

    def _release(self) -> None:
        self._active = False
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs.clear()
        if self._setup is not None:
            self._setup.recorder.finish()
            self._setup.worker.close()
            self._setup = None

    # ---- inputs ----------------------------------------------------------------------------------

    def _on_positions(self, message: Float64MultiArray) -> None:
        """Take commands without a stamp, as of now."""
        if self._setup is not None:
            self._setup.rows.take_positions(message, clock_time(self))

    def _on_instruction(self, message: String) -> None:
        problem = instruction_problem(message.data)
        if problem:
            self.get_logger().warning(f"Bad instruction: {problem}", throttle_duration_sec=1.0)
        self.set_parameters([Parameter("instruction", value="" if problem else message.data)])

    def _take_parameters(self, changes: list[Parameter]) -> None:
        for change in changes:
            if change.name == "instruction":
                self._take_instruction(change.value)

    def _take_instruction(self, instruction: str) -> None:
        if self._setup is not None:
            self._setup.recorder.instruction = instruction

    # ---- operators -------------------------------------------------------------------------------

    def _on_start(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, lambda recorder: recorder.start(clock_time(self)))

    def _on_stop(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        return self._answer(
            response, lambda recorder: recorder.stop(clock_time(self), success=request.data)
        )

    def _on_discard(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, lambda recorder: recorder.discard())

    def _answer(self, response: Any, ask: Any) -> Any:
        """Fill a service's response with what the recorder answers."""
        if self._setup is None or not self._active:
            answer = Answer(False, "the node is not active; configure and activate it first")
        else:
            answer = ask(self._setup.recorder)
        response.success = answer.accepted
        response.message = answer.text
        self._show_state()
        return response

    def _advance(self) -> None:
        if self._setup is not None:
            self._setup.recorder.advance(clock_time(self))
            self._show_state()

    # ---- diagnostics -----------------------------------------------------------------------------

    def _state(self) -> str:
        if self._setup is None:
            return f"unconfigured: {self._failure}" if self._failure else "unconfigured"
        if not self._active:
            return f"inactive: {self._failure}" if self._failure else "inactive"
        return str(self._setup.recorder)

    def _show_state(self) -> None:
        """Publish a changed state on ~/state, and log it."""
        state = self._state()
        if state == self._told:
            return
        self._told = state
        self._states.publish(String(data=state))
        bad = (Phase.ENDED, Phase.FAILED)
        if self._setup is not None and self._setup.recorder.phase in bad:
            self.get_logger().warning(f"State: {state}")
        else:
            self.get_logger().info(f"State: {state}")

    def _publish_diagnostics(self) -> None:
        values: dict[str, Any] = {"state": self._state()}
        level = DiagnosticStatus.WARN
        if self._setup is not None:
            recorder = self._setup.recorder
            rows = self._setup.rows
            losses = rows.losses
            values |= {
                "instruction": recorder.instruction,
                "episodes": recorder.episodes,
                "frames": recorder.frames,
                "frames_of_episode": rows.frames,
                **{f"missing.{name}": count for name, count in losses.repeated.items()},
                **{f"late.{name}": count for name, count in losses.late.items()},
                **{f"bad.{name}": count for name, count in rows.bad.items()},
                **{f"fault.{name}": text for name, text in rows.faults.items()},
                "clipped_actions": rows.clipped,
                "waiting_mb": self._setup.worker.waiting / 1e6,
            }
            if recorder.phase in (Phase.ENDED, Phase.FAILED):
                level = DiagnosticStatus.ERROR
            elif self._active and not rows.bad:
                level = DiagnosticStatus.OK
        values |= {"root": self.get_parameter("root").value}
        hardware = self.get_parameter("robot_config").value or "tabletop"
        name = f"{self.get_fully_qualified_name()}: record"
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(
            status_message(name, hardware, level, values["state"], values, stamp)
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; arguments and result are as in `run`."""
    return run(RecordNode, "record_node", arguments)


def program() -> NoReturn:
    """Run the node as this process; entry point of ``record_node``."""
    end_process(main())


if __name__ == "__main__":
    program()
