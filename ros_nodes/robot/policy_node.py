"""A lifecycle node that drives an arm with a LeRobot policy: topics in, commands at a fixed rate out.

Behaviour is in `PolicyController`; this file is its connection to ROS. docs/robots.md lists topics and parameters.
"""

from __future__ import annotations  # noqa: I001 - ros_nodes.robot.messages comes first: it explains absent ROS

import gc
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from ros_nodes.robot.messages import COMMAND, LATCHED, SENSOR, clock_time, seconds

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rcl_interfaces.msg import SetParametersResult
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.discovery import discover
from ceed_vla.errors import CeedVLAError, NodeError
from ros_nodes.robot import parameters
from ros_nodes.robot.diagnostics import running_status, status_message
from ros_nodes.robot.observations import Camera
from ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ros_nodes.robot.policy_setup import PolicySetup, make_setup
from ros_nodes.robot.spinning import StopSignal, raise_priority, run
from ros_nodes.robot.step_grid import SLEW
from ros_nodes.robot.streaming import Streaming
from ros_nodes.robot.texts import instruction_problem, short

LONGEST_FAILURE = 500  # characters: what is wrong, what is allowed and what to do


class PolicyNode(LifecycleNode):
    """See the module; `stop` ends a configuration under way. Raises `ConfigError` for a parameter's bad value."""

    def __init__(self, stop: StopSignal | None = None, **node_options: Any) -> None:
        super().__init__("policy", **node_options)
        parameters.declare_parameters(self, POLICY_PARAMETERS[:1])
        discover(self.get_parameter("discover_packages").value, "discover_packages")
        parameters.declare_parameters(self, POLICY_PARAMETERS[1:])
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._take_parameters)
        self._stop = stop
        self._setup: PolicySetup | None = None
        self._active: Streaming | None = None
        self._failure = ""  # why the last transition failed
        self._starting = False  # by itself: then nobody could set right what fails
        self._scheduling = "normal"
        self._stopped_early: str | None = None  # an emergency stop while there was nothing to stop
        self._inputs: list[Any] = []
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)  # runs on when the system's time is set
        self._answered = self.create_guard_condition(self._on_answer)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", COMMAND)
        self.create_timer(1.0, self._publish_diagnostics, clock=self._steady)
        self.create_subscription(String, "~/instruction", self._on_instruction, LATCHED)
        self.create_service(Trigger, "~/estop", self._on_estop)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.get_logger().info(
            f"ROS domain {self.context.get_domain_id()}, discovery range "
            f"{os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE') or 'not set, which is SUBNET'}"
        )
        if self.get_parameter("autostart").value:
            self._autostart = self.create_timer(0.0, self._start, clock=self._steady)

    # ---- lifecycle ----------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load robot and checkpoint; stays unconfigured, and says why, if they do not fit."""
        self._failure = ""
        self._publish(DiagnosticStatus.WARN, "configuring", {"state": "configuring"})
        try:
            setup = make_setup(
                parameters.values(self, POLICY_PARAMETERS),
                cancelled=lambda: self._stopping,
                notify=self._answered.trigger,
                slew=0.0 if self.get_parameter("use_sim_time").value else SLEW,
            )
        except Exception as error:  # a model's file may make mujoco raise anything
            return self._fail("configure", error)
        self._setup = setup
        if self._stopped_early is not None:
            setup.controller.estop(self._stopped_early)
        inputs = [(JointState, setup.robot.joint_states, self._on_joint_states)]
        for camera in setup.observations.cameras:
            kind = CompressedImage if camera.source.transport == "compressed" else Image
            inputs.append((kind, camera.source.topic, partial(self._on_image, camera)))
        self._inputs = [self.create_subscription(*listened, SENSOR) for listened in inputs]
        spec = setup.worker.spec
        self.get_logger().info(
            f"{spec.checkpoint}: {spec.policy_type}, chunks of {spec.chunk_steps} steps, "
            f"{1e3 * spec.warmup_s:.0f} ms for one" + (f" ({spec.decoding})" if spec.decoding else "")
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold the measured pose, then stream."""
        assert self._setup is not None
        try:
            self._active = Streaming(self, self._setup, self._steady)
        except CeedVLAError as error:
            return self._fail("activate", error)
        if self.get_parameter("start_enabled").value:
            self._setup.controller.enable(clock_time(self), insist=True)
        gc.collect()
        gc.freeze()  # a full collection takes longer than a tick
        self._scheduling = raise_priority(
            self.get_parameter("realtime_priority").value,
            only_this_thread=self.get_parameter("inference_mode").value == "thread",
        )
        if "(" in self._scheduling:
            self.get_logger().warning(
                f"Scheduling is {self._scheduling}: commands may be late on a busy machine; see docs/robots.md."
            )
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold, then send nothing."""
        self._end_stream()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold, and forget robot and checkpoint."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    on_shutdown = on_cleanup

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured."""
        self._failure = self._failure or "a transition raised an error; the log has it"
        return self.on_cleanup(state)

    def destroy_node(self) -> None:
        self._release()
        super().destroy_node()

    def _start(self) -> None:
        """Configure and activate, once; if that fails, a launch file or a service manager sees the node gone."""
        self._autostart.cancel()
        self._starting = True
        for transition in (self.trigger_configure, self.trigger_activate):
            if transition() != TransitionCallbackReturn.SUCCESS:
                if self._stopping:
                    return
                raise NodeError(self._failure or "the node does not start")
        self._starting = False

    @property
    def _stopping(self) -> bool:
        return self._stop is not None and self._stop.received

    def _fail(self, transition: str, error: Exception) -> TransitionCallbackReturn:
        """A transition cannot be done; the log and the diagnostics say why."""
        kind = "" if isinstance(error, CeedVLAError) else f"{type(error).__name__}: "
        self._failure = short(f"{transition} failed: {kind}{error}", LONGEST_FAILURE)
        if not self._starting:  # else it is the last thing that is said
            self.get_logger().error(self._failure)
        return TransitionCallbackReturn.FAILURE

    def _end_stream(self) -> None:
        if self._active is not None:
            self._active.end()
            self._active = None

    def _release(self) -> None:
        self._end_stream()
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs.clear()
        if self._setup is not None:
            self._stopped_early = self._setup.safety.stopped
            self._setup.worker.close()
            self._setup = None

    # ---- inputs -------------------------------------------------------------------------------------------------

    def _on_joint_states(self, message: JointState) -> None:
        assert self._setup is not None
        self._setup.safety.measure(message.name, message.position, seconds(message.header.stamp))
        self._setup.observations.take_joints(message)

    def _on_image(self, camera: Camera, message: Image | CompressedImage) -> None:
        assert self._setup is not None
        camera.take(message)
        if self._active is not None:
            self._setup.controller.observed(self._active.now())

    def _on_answer(self) -> None:
        if self._setup is not None and self._active is not None:
            self._setup.controller.receive(self._active.now())

    def _on_instruction(self, message: String) -> None:
        problem = instruction_problem(message.data)
        self.set_parameters([Parameter("instruction", value="" if problem else message.data)])
        if problem:
            self.get_logger().warning(f"Bad instruction: {problem}", throttle_duration_sec=1.0)
            if self._setup is not None:
                self._setup.controller.stream.instruct(message.data)

    def _check_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        return parameters.refusal(POLICY_PARAMETERS, changes, configured=self._setup is not None)

    def _take_parameters(self, changes: list[Parameter]) -> None:
        for change in changes:
            if change.name == "instruction" and self._setup is not None:
                self._setup.controller.stream.instruct(change.value)

    def _on_estop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._setup is not None:
            self._setup.controller.estop("~/estop")
        else:
            self._stopped_early = "~/estop"
        self.get_logger().error("Emergency stop; ~/reset unlatches it, then ~/enable allows motion.")
        response.success, response.message = True, "stopped; ~/reset, then ~/enable"
        return response

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._stopped_early = None
        if self._setup is not None:
            self._setup.controller.reset()
        response.success, response.message = True, "disabled; ~/enable allows motion"
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self._setup is None or self._active is None:
            response.success = not request.data
            response.message = "the node is not active; configure and activate it first"
            return response
        controller = self._setup.controller
        if request.data:
            refused = controller.enable(clock_time(self))
            response.success = refused is None
            response.message = "enabled" if refused is None else f"{refused.code}: {refused.detail}"
        else:
            controller.disable()
            response.success, response.message = True, "disabled"
        return response

    # ---- diagnostics --------------------------------------------------------------------------------------------

    def _publish_diagnostics(self) -> None:
        setup = self._setup
        if setup is not None and self._active is not None:
            now = self._active.now()
            self._publish(*running_status(setup.controller, setup.safety, now, clock_time(self)))
            return
        state = "unconfigured" if setup is None else "inactive"
        level = DiagnosticStatus.ERROR if self._failure else DiagnosticStatus.WARN
        values: dict[str, Any] = {"state": state, "hold_reason": self._failure}
        if setup is not None:
            values |= {f"observation_age_s.{k}": v for k, v in setup.controller.ages(clock_time(self)).items()}
        self._publish(level, self._failure or state, values)

    def _publish(self, level: bytes, message: str, values: dict[str, Any]) -> None:
        shown = {name: self.get_parameter(name).value for name in ("checkpoint", "action_interface")}
        shown["scheduling"] = self._scheduling
        hardware = self.get_parameter("robot_config").value or "tabletop"
        stamp = self.get_clock().now().to_msg()
        name = f"{self.get_fully_qualified_name()}: policy"
        self._diagnostics.publish(status_message(name, hardware, level, message, values | shown, stamp))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; the console script ``policy_node``. Arguments and result as in `run`."""
    stop = StopSignal()
    return run(lambda: PolicyNode(stop), "policy_node", arguments, stop)


if __name__ == "__main__":
    sys.exit(main())
