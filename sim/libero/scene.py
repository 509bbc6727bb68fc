"""One LIBERO task as a simulation that is reset without being rebuilt and rendered on demand.

LIBERO renders both cameras in every control step. A policy reads the images of every fourth or
eighth step only. Therefore the state is copied whenever LIBERO samples its sensors, which is after
the first of the 25 simulation steps of a control step, and the copy is rendered on demand.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from xml.etree.ElementTree import Element

import mujoco
import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError
from ceed_vla.sim.libero.installation import file_of, libero, root
from ceed_vla.sim.libero.tasks import CONTROL_RATE, SETTLING_STEPS

RESETS = 100  # attempts to draw an initial state
IK_STEPS = 60
IK_STEP = 0.2  # largest change of a joint per step [rad]
DAMPING = 1e-4
ARM_NOISE = 0.02  # of the initial joints, as in the official states [rad]
NO_MOTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # with an open gripper


class Scene:
    """The simulation of one task.

    Attributes:
        observation: LIBERO's observation after the last control step, without images.
        closing: Whether the last action closes the fingers.
        sampled: The state at the last sampling of the sensors, for rendering.
    """

    def __init__(self, suite: str, number: int) -> None:
        libero()
        file = root() / "bddl_files" / suite / f"{file_of(suite, number)}.bddl"
        make = import_module("libero.libero.envs.env_wrapper").ControlEnv
        with _own_randomness(0):
            self._env: Any = make(
                bddl_file_name=str(file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,
                ignore_done=True,
                control_freq=CONTROL_RATE,
            )
        self.sampled = mujoco.MjData(self.model)
        self._lights = self.model.site_rgba.copy()
        self._copy_when_sampled()
        self._no_room = import_module("robosuite.utils.errors").RandomizationError
        self._furniture = {
            self.world.obj_body_id[name]: _place_in(self.world.model.root, item.root_body)
            for name, item in self.world.fixtures_dict.items()
        }
        self.observation: dict[str, Any] = {}
        self.closing = False
        self._site = self.world.robots[0].eef_site_id
        self._upright = self.data.site_xmat[self._site].reshape(3, 3).copy()
        self._pads = [
            {
                geom
                for geom in range(self.model.ngeom)
                if f"gripper0_{side}finger" in self.model.body(self.model.geom_bodyid[geom]).name
                or self.model.geom(geom).name.startswith(f"gripper0_finger{number}")
            }
            for number, side in ((1, "left"), (2, "right"))
        ]

    @property
    def model(self) -> mujoco.MjModel:
        return self._env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        return self._env.sim.data._data

    @property
    def world(self) -> Any:
        """LIBERO's environment."""
        return self._env.env

    def draw(self, seed: int) -> None:
        """Reset to an initial state that LIBERO draws with a seed, and let it settle.

        Raises:
            SimulationError: The objects that it draws do not fit in.
        """
        self._reset(seed, ARM_NOISE)
        self._settle()

    def start(self, state: NDArray[np.float64], seed: int = 0) -> None:
        """Reset to an initial state (S,), and let it settle.

        A state does not contain the place of furniture; the seed determines it.
        """
        self._reset(seed, 0.0)
        self.observation = self._env.set_init_state(state)
        self._settle()

    def step(self, action: NDArray[np.floating]) -> bool:
        """Run one control step of an action (7,); return whether the task is solved."""
        self.observation, _, solved, _ = self._env.step(action)
        self.closing = bool(action[6] > 0)
        return bool(solved)

    def solved(self) -> bool:
        """Whether LIBERO's goal holds now."""
        return bool(self._env.check_success())

    @contextlib.contextmanager
    def lights_as_sampled(self) -> Iterator[None]:
        """Show lights, such as that of a stove, as they were when the sensors were sampled."""
        now = self.model.site_rgba.copy()
        self.model.site_rgba[:] = self._lights
        try:
            yield
        finally:
            self.model.site_rgba[:] = now

    def close(self) -> None:
        self._env.close()

    # -------------------------------------------------------------- for the expert and recordings

    def put_hand(self, place: NDArray[np.float64]) -> None:
        """Put the hand at a place (3,) [m], upright and open, as near as the joints allow."""
        model, data = self.model, self.data
        joints = self.world.robots[0]._ref_joint_pos_indexes
        columns = self.world.robots[0]._ref_joint_vel_indexes
        low, high = model.jnt_range[self.world.robots[0]._ref_joint_indexes].T
        jacobian = np.zeros((6, model.nv))
        data.qpos[joints] = self.world.robots[0].init_qpos
        for _ in range(IK_STEPS):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._site)
            error = np.concatenate([place - self.hand, self.tilt])
            own = jacobian[:, columns]
            change = own.T @ np.linalg.solve(own @ own.T + DAMPING * np.eye(6), error)
            change *= min(1.0, IK_STEP / np.abs(change).max())
            data.qpos[joints] = np.clip(data.qpos[joints] + change, low, high)
        data.qvel[:] = 0.0
        mujoco.mj_forward(model, data)
        self._env._update_observables(force=True)
        self.observation = self.world._get_observations()

    @property
    def hand(self) -> NDArray[np.float64]:
        """Position (3,) between the fingertips [m]."""
        return self.data.site_xpos[self._site].copy()

    @property
    def tilt(self) -> NDArray[np.float64]:
        """Rotation (3,) that would bring the hand upright, as axis times angle [rad]."""
        turned = self.data.site_xmat[self._site].reshape(3, 3)
        rotation = np.zeros(4)
        mujoco.mju_mat2Quat(rotation, (self._upright @ turned.T).ravel())
        vector = np.zeros(3)
        mujoco.mju_quat2Vel(vector, rotation, 1.0)
        return vector

    @property
    def fingers(self) -> tuple[float, float]:
        """Opening between the fingers [m] and its speed [m/s]."""
        robot = self.world.robots[0]
        places = self.data.qpos[robot._ref_gripper_joint_pos_indexes]
        speeds = self.data.qvel[robot._ref_gripper_joint_vel_indexes]
        return float(places[0] - places[1]), float(speeds[0] - speeds[1])

    def touched(self, name: str) -> bool:
        """Whether both fingers touch an object."""
        body = self.world.obj_body_id[name]
        item = set(np.flatnonzero(self.model.geom_bodyid == body))
        pairs = [{int(a), int(b)} for a, b in self.data.contact.geom[: self.data.ncon]]
        touched = {geom for pair in pairs if pair & item for geom in pair - item}
        return all(touched & pads for pads in self._pads)

    @property
    def ground(self) -> NDArray[np.float64]:
        """Middle (3,) of the ground or of the table's top [m]."""
        return np.array(self.world.workspace_offset, dtype=np.float64)

    @property
    def movable(self) -> list[str]:
        """Names of the objects, without the furniture."""
        return list(self.world.objects_dict)

    def box(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest corner (3,) of the box around an object [m]."""
        model, data = self.model, self.data
        body = self.world.obj_body_id[name]
        geoms = (model.geom_bodyid == body) & (model.geom_contype > 0)
        sizes = model.geom_aabb[geoms]  # (G, 6)
        turned = data.geom_xmat[geoms].reshape(-1, 3, 3)
        centres = data.geom_xpos[geoms] + np.einsum("gij,gj->gi", turned, sizes[:, :3])
        reach = np.einsum("gij,gj->gi", np.abs(turned), sizes[:, 3:])
        return (centres - reach).min(0), (centres + reach).max(0)

    def _reset(self, seed: int, arm_noise: float) -> None:
        """Reset LIBERO, and what it resets only when it builds the simulation again."""
        mujoco.mj_resetData(self.model, self.data)
        robot = self.world.robots[0]
        robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        robot.initialization_noise["magnitude"] = arm_noise
        for body, (place, rotation) in self._furniture.items():
            self.model.body_pos[body] = place
            self.model.body_quat[body] = rotation
        with _own_randomness(seed):
            for attempt in range(1, RESETS + 1):
                try:
                    self.observation = self.world.reset()
                    break
                except self._no_room as error:  # the objects drawn do not fit
                    if attempt == RESETS:
                        raise SimulationError(f"No initial state was found ({error}).") from error
        self.closing = False

    def _settle(self) -> None:
        for _ in range(SETTLING_STEPS):
            self.step(np.array(NO_MOTION))

    def _copy_when_sampled(self) -> None:
        """Copy the state whenever LIBERO samples its sensors."""
        observables = import_module("robosuite.utils.observables")

        @observables.sensor(modality="state")
        def copy(_: Any) -> float:
            mujoco.mj_copyData(self.sampled, self.model, self.data)
            self._lights[:] = self.model.site_rgba
            return 0.0

        self.world.add_observable(
            observables.Observable(name="state_copy", sensor=copy, sampling_rate=CONTROL_RATE)
        )


def _place_in(root: Element, body: str) -> tuple[list[float], list[float]]:
    """Return position and quaternion of a body in a model's XML, before anything was placed."""
    found = next(part for part in root.iter("body") if part.get("name") == body)
    place = [float(value) for value in found.get("pos", "0 0 0").split()]
    rotation = [float(value) for value in found.get("quat", "1 0 0 0").split()]
    return place, rotation


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO draws from, restore it afterwards, and keep
    LIBERO's messages from the screen.
    """
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(before)
