"""Lifecycle node that drives an arm with a LeRobot policy: it subscribes to topics and sends
commands at a fixed rate.

`PolicyController` defines the behaviour; this file connects it to ROS.
docs/reference/policy-node.md lists topics and parameters.
"""

# ceed_vla.ros_nodes.robot.messages is imported first, because its error explains a missing ROS.
from __future__ import annotations  # noqa: I001

import gc
import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from ceed_vla.ros_nodes.robot.messages import (
    COMMAND,
    LATCHED,
    clock_time,
)

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.discovery import discover
from ceed_vla.errors import CeedVLAError, NodeError
from ceed_vla.ros_nodes.robot import parameters
from ceed_vla.ros_nodes.robot.autostart import Autostart
from ceed_vla.ros_nodes.robot.diagnostics import (
    ClampWatch,
    level_of,
    running_values,
    status_message,
)
from ceed_vla.ros_nodes.robot.lifecycle import SafeLifecycleNode
from ceed_vla.ros_nodes.robot.mode import LOADING, Mode, State
from ceed_vla.ros_nodes.robot.policy_inputs import PolicyInputs
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import PolicySetup, make_setup
from ceed_vla.ros_nodes.robot.safety import NOT_ENABLED, UNSETTLED, Hold
from ceed_vla.ros_nodes.robot.spinning import end_process, keep_memory, run
from ceed_vla.ros_nodes.robot.step_grid import SLEW
from ceed_vla.ros_nodes.robot.streaming import Streaming
from ceed_vla.ros_nodes.robot.tasks.runner import Refusal
from ceed_vla.ros_nodes.robot.tasks.topics import NodeControls, TaskTopics
from ceed_vla.serving.faults import LOST, SILENT
from ceed_vla.scheduling import raise_priority
from ceed_vla.texts import instruction_problem, short

LONGEST_FAILURE = 500  # characters: the value, the rule and the remedy


class PolicyNode(SafeLifecycleNode):
    """The policy node; see the module. `ConfigError`: A parameter has an invalid value."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__("policy", **node_options)
        parameters.declare_parameters(self, POLICY_PARAMETERS[:1])
        discover(self.get_parameter("discover_packages").value, "discover_packages")
        parameters.declare_parameters(self, POLICY_PARAMETERS[1:])
        parameters.refuse_unknown(self)
        self.add_on_set_parameters_callback(
            lambda changes: parameters.refusal(
                POLICY_PARAMETERS, changes, configured=self._setup is not None
            )
        )
        self.add_post_set_parameters_callback(self._take_parameters)
        self._setup: PolicySetup | None = None
        self._active: Streaming | None = None
        self._failure = ""  # why the last transition failed
        self._absent = False  # whether it failed because the policy's server cannot be reached
        self._autostart: Autostart | None = None
        self._told: tuple[Mode, str] | None = None  # the last state on ~/state
        self._clamp_watch = ClampWatch()
        self._announced = False  # whether the end of loading was logged
        self._scheduling = "normal"
        self._forbidden = False  # an operator forbade motion, and has not allowed it since
        self._goes_home = False  # an operator has just sent the arm home
        self._stopped_early: str | None = None  # an emergency stop before the node was configured
        self._inputs: PolicyInputs | None = None
        # independent of changes of the system's time
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._answered = self.create_guard_condition(self._on_answer)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", COMMAND)
        self._states = self.create_publisher(String, "~/state", LATCHED)
        self.create_timer(1.0, self._publish_diagnostics, clock=self._steady)
        self.create_subscription(String, "~/instruction", self._on_instruction, LATCHED)
        self.create_service(Trigger, "~/estop", self._on_estop)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.create_service(Trigger, "~/go_home", self._on_go_home)
        controls = NodeControls(self._state, self._begin_task, self._end_task)
        self._tasks = TaskTopics(self, self._steady, controls)
        self.get_logger().info(
            f"ROS domain {self.context.get_domain_id()}, discovery range "
            f"{os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE') or 'not set, which is SUBNET'}"
        )
        if self.get_parameter("autostart").value:
            self._autostart = Autostart(
                self,
                self._steady,
                lambda: None if self._setup is None else self._setup.worker,
                lambda: (self._failure, self._absent),
            )
        self.show_state()

    # ---- lifecycle -------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to load the checkpoint; fail, and log why, if robot and config.json do not fit."""
        self._failure = ""
        self._absent = False
        self._announced = False
        try:
            setup = make_setup(
                parameters.values(self, POLICY_PARAMETERS),
                notify=self._answered.trigger,
                slew=0.0 if self.get_parameter("use_sim_time").value else SLEW,
            )
        except Exception as error:  # mujoco raises many types for a model's file
            self._absent = getattr(error, "code", "") in (LOST, SILENT)
            return self._fail("configure", error)
        self._setup = setup
        for warning in setup.warnings:
            self.get_logger().warning(warning)
        if self._stopped_early is not None:
            setup.controller.estop(self._stopped_early)
        try:
            self._inputs = PolicyInputs(self, setup, self._now, self._observed)
        except Exception as error:  # such as a topic that another node has with another type
            self._release()
            return self._fail("configure", error)
        keep_memory()
        self.show_state()
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold the measured pose, then stream commands; hold while the policy loads."""
        assert self._setup is not None
        if self._setup.worker.failed is not None:
            return self._fail(
                "activate", NodeError(f"{self._setup.worker.failed} Clean up and configure again.")
            )
        try:
            self._start(self._setup)
        except Exception as error:  # such as an interface whose message package is missing
            self._end_stream()
            return self._fail("activate", error)
        return super().on_activate(state)

    def _start(self, setup: PolicySetup) -> None:
        """Begin to stream."""
        self._active = Streaming(self, setup, self._steady, self.show_state)
        if self.get_parameter("start_enabled").value and self._forbidden:
            self.get_logger().warning(
                "start_enabled has no effect, because an operator forbade motion; call ~/enable."
            )
        elif self.get_parameter("start_enabled").value:
            setup.controller.enable(clock_time(self), insist=True)
        gc.collect()
        gc.freeze()  # a full collection takes longer than a tick
        self._scheduling = raise_priority(
            self.get_parameter("realtime_priority").value,
            only_this_thread=self.get_parameter("inference_mode").value == "thread",
            second=setup.worker.thread,
        )
        if "(" in self._scheduling:
            self.get_logger().warning(
                f"Scheduling is {self._scheduling}: commands may be late on a busy machine; see "
                "docs/how-to/send-commands-on-time.md."
            )

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold once more, then send nothing."""
        self._end_stream()
        self.show_state()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold once more, and release robot and checkpoint."""
        self._release()
        self.show_state()
        return TransitionCallbackReturn.SUCCESS

    on_shutdown = on_cleanup

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Return to unconfigured."""
        self._failure = self._failure or "a transition raised an error; the log has it"
        return self.on_cleanup(state)

    def destroy_node(self) -> None:
        self._release()
        super().destroy_node()

    @property
    def _starting(self) -> bool:
        """Whether the node starts itself, which ends the process if it fails."""
        return self._autostart is not None and self._autostart.running

    def _fail(self, transition: str, error: Exception) -> TransitionCallbackReturn:
        """Store, log and publish why a transition failed."""
        kind = "" if isinstance(error, CeedVLAError) else f"{type(error).__name__}: "
        self._failure = short(f"{transition} failed: {kind}{error}", LONGEST_FAILURE)
        if not self._starting:  # otherwise the process prints it as it ends
            self.get_logger().error(self._failure)
        self.show_state()
        return TransitionCallbackReturn.FAILURE

    def _end_stream(self) -> None:
        if self._active is not None:
            self._active.end()
            self._active = None

    def _release(self) -> None:
        self._end_stream()
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        if self._setup is not None:
            self._stopped_early = self._setup.safety.stopped
            self._setup.worker.close()
            self._setup = None

    # ---- inputs ----------------------------------------------------------------------------------

    def _observed(self) -> None:
        """Handle a new image."""
        if self._setup is not None and self._active is not None:
            self._setup.controller.observed(self._active.now())

    def _on_answer(self) -> None:
        if self._setup is None:
            return
        worker = self._setup.worker
        if not self._announced:  # it is loaded, or has failed
            self._announced = True
            if worker.failed is None:
                spec = worker.spec
                how = ", ".join(filter(None, (spec.decoding, spec.engine)))
                chunk = (
                    f"chunks of {spec.chunk_steps} steps, {1e3 * spec.warmup_s:.0f} ms for one "
                    f"({how})"
                )
                self.get_logger().info(f"{spec.checkpoint}: {spec.policy_type}, {chunk}")
            elif not self._starting:
                self.get_logger().error(worker.failed)
            self.show_state()
        if self._active is not None:
            self._setup.controller.receive(self._active.now())

    def _on_instruction(self, message: String) -> None:
        problem = instruction_problem(message.data)
        self.set_parameters([Parameter("instruction", value="" if problem else message.data)])
        if problem:
            self.get_logger().warning(f"Bad instruction: {problem}", throttle_duration_sec=1.0)
            if self._setup is not None:
                self._setup.controller.stream.instruct(message.data)

    def _take_parameters(self, changes: list[Parameter]) -> None:
        for change in changes:
            if change.name == "instruction" and self._setup is not None:
                self._setup.controller.stream.instruct(change.value)

    def _on_estop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._setup is not None:
            self._setup.controller.estop("~/estop")
        else:
            self._stopped_early = "~/estop"
        self._forbid("~/estop")  # after the stop, which nothing may delay
        self.get_logger().error(
            "Emergency stop; ~/reset unlatches it, then ~/enable allows motion."
        )
        return self._answer(response, True)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._stopped_early = None
        if self._setup is not None:
            accepted = self._setup.controller.reset()
            if accepted:
                self.get_logger().warning(f"~/reset accepts another pose: {accepted}.")
        return self._answer(response, True)

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if not request.data:
            if self._setup is not None and self._active is not None:
                self._setup.controller.disable()
            self._forbid("~/enable with false")
            return self._answer(response, True)
        if self._setup is None or self._active is None:
            return self._answer(response, False)
        refused = self._setup.controller.enable(clock_time(self))
        self._forbidden = self._forbidden and refused is not None
        return self._answer(response, refused is None, refused)

    def _forbid(self, why: str) -> None:
        """Note that an operator forbade motion: no waiting task and no activation allows it."""
        self._forbidden = True
        self._tasks.forbid(f"an operator forbade motion: {why}")

    def _now(self) -> float:
        """Time of the controller's ticks [s]: steady, or the simulation's."""
        simulated = self.get_parameter("use_sim_time").value
        return clock_time(self) if simulated else time.monotonic()

    def _begin_task(self, instruction: str) -> Refusal | None:
        """Give the policy an instruction and allow motion; return why that is refused."""
        if self._setup is None or self._active is None:
            return Refusal(f"the node is {self._state().mode}; configure and activate it first")
        self.set_parameters([Parameter("instruction", value=instruction)])
        refused = self._setup.controller.enable(clock_time(self))
        self.show_state()
        if refused is None:
            return None
        return Refusal(f"{refused.code}: {refused.detail}", refused.code in ("stale", UNSETTLED))

    def _end_task(self) -> None:
        if self._setup is not None and not self._goes_home:
            self._setup.controller.disable()
            self.show_state()

    def _on_go_home(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._setup is None or self._active is None:
            return self._answer(response, False)
        home = self._setup.robot.arm.home
        nowhere = Hold("no_home", "the robot's file has no arm.home")
        refused = self._setup.controller.enable(clock_time(self), home=home) if home else nowhere
        # The task that runs ends now: later, its end would stop the arm on its way.
        self._goes_home = refused is None
        end = self._tasks.forbid if self._goes_home else self._tasks.cancel_waiting
        try:
            end("an operator called ~/go_home")
        finally:
            self._goes_home = False
        return self._answer(response, refused is None, refused)

    def _answer(self, response: Any, success: bool, refused: Hold | None = None) -> Any:
        """Fill a service's response with the present state, and with the reason for a refusal."""
        state = self._state()
        response.success = success
        response.message = str(state)
        if refused is not None:
            response.message = f"{refused.code}: {refused.detail} ({state.mode})"
        elif not success:
            response.message = (
                f"{state.mode}: the node is not active; configure and activate it first"
            )
        self.show_state()
        return response

    # ---- diagnostics -----------------------------------------------------------------------------

    def _publish_diagnostics(self) -> None:
        state = self._state()
        setup = self._setup
        clock = clock_time(self)
        values: dict[str, Any] = {"state": state.mode, "hold_reason": state.reason}
        blank: list[str] = []
        if setup is not None:
            values |= {f"observation_age_s.{k}": v for k, v in setup.controller.ages(clock).items()}
            values |= {f"images.{c.source.name}": c.received for c in setup.observations.cameras}
            blank = [camera.source.name for camera in setup.observations.cameras if camera.blank]
        clamps = ""
        if setup is not None and self._active is not None:
            values |= running_values(setup.controller, setup.safety, self._active.now())
            clamps = self._clamp_watch.look(setup.controller.statistics.ticks, setup.safety)
        if setup is not None and setup.person is not None:
            values["intervention"] = setup.person.refused or setup.person.charge
            values |= {f"intervention.{name}": n for name, n in setup.person.counts.items()}
        warning = f"all pixels of {', '.join(blank)} are equal" if blank else clamps
        warning = (self._inputs.take_warnings() if self._inputs is not None else "") or warning
        message = state.reason or warning or state.mode
        shown_parameters = ("checkpoint", "inference_url", "action_interface", "dry_run")
        values |= {name: self.get_parameter(name).value for name in shown_parameters}
        if values["inference_url"]:
            ready = setup is not None and setup.worker.ready
            values["checkpoint"] = setup.worker.spec.checkpoint if setup and ready else ""
        if values["dry_run"]:
            message = f"dry run, nothing is sent to the arm: {message}"
        values["scheduling"] = self._scheduling
        values |= self._tasks.values
        hardware = self.get_parameter("robot_config").value or "tabletop"
        level = level_of(state, warn=bool(warning))
        name = f"{self.get_fully_qualified_name()}: policy"
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(status_message(name, hardware, level, message, values, stamp))

    def _state(self) -> State:
        if self._setup is None:
            mode = State(Mode.UNCONFIGURED, detail=self._failure)
            return (
                State(Mode.STOPPED, "estop", "before the node was configured")
                if self._stopped_early
                else mode
            )
        if self._active is not None or self._setup.safety.stopped is not None:
            return self._setup.controller.state
        loading = "" if self._setup.worker.ready else LOADING
        return State(Mode.INACTIVE, detail=self._failure or self._setup.worker.failed or loading)

    def show_state(self) -> None:
        """Publish a changed state on ~/state, and log it, which publishes it on /rosout too."""
        state = self._state()
        key = (state.mode, state.code or state.detail)
        if key == self._told:
            return
        self._told = key
        self._states.publish(String(data=str(state)))
        forbidden = state.mode == Mode.DISABLED and state.detail != NOT_ENABLED
        faulty = (
            state.mode == Mode.HOLDING and level_of(state, warn=False) == DiagnosticStatus.ERROR
        )
        if forbidden or faulty or state.mode == Mode.STOPPED:
            self.get_logger().warning(f"State: {state}")
        else:
            self.get_logger().info(f"State: {state}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; arguments and result are as in `run`."""
    return run(PolicyNode, "policy_node", arguments)


def program() -> NoReturn:
    """Run the node as this process; entry point of ``policy_node``."""
    end_process(main())


if __name__ == "__main__":
    program()
