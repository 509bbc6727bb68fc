"""Kinematics of the arm in an MJCF or URDF file, through MuJoCo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mujoco
import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import ArmKinematics, Array
from ceed_vla.ros_nodes.robot.model_file import read_model, text_of, urdf_velocities
from ceed_vla.texts import short


class ModelArm(ArmKinematics):
    """One arm of an MJCF or URDF model; other joints stay at their defaults.

    Args:
        tcp: Site or body of the tool centre point.
        joint_names: J joints, in the order of every array here.
        home: As in `ArmKinematics`; the model's default if it is empty.

    Attributes:
        low, high: Position limits (J,) [rad] from the model; infinite without a limit.
        velocity: Velocity limits (J,) [rad/s] of a URDF; NaN without a limit, as in every MJCF.

    `ConfigError`: The model cannot be read, or lacks a name (the message lists the names that it
    has).
    """

    def __init__(
        self,
        model_path: str | Path,
        tcp: str,
        joint_names: Sequence[str],
        *,
        home: Sequence[float] = (),
        max_joint_step: float = 0.6,
    ) -> None:
        kinematics = read_model(Path(model_path))
        self._model = _arm_model(Path(model_path), kinematics, joint_names)
        self._data = mujoco.MjData(self._model)
        self._tcp, self._body = _frame(self._model, self._data, tcp, model_path)
        # each with one position and one velocity
        joints = [self._model.joint(name) for name in joint_names]
        self._positions = np.array([joint.qposadr[0] for joint in joints])
        self._velocities = np.array([joint.dofadr[0] for joint in joints])
        limited = self._model.jnt_limited.astype(bool)[:, None]
        ranges = np.where(limited, self._model.jnt_range, [-np.inf, np.inf])[self._positions]
        default = self._model.qpos0[self._positions]
        low, high = ranges.T.copy()
        super().__init__(low, high, np.array(home) if len(home) else default, max_joint_step)
        limits = urdf_velocities(kinematics)
        self.velocity = np.array([limits.get(name, np.nan) for name in joint_names])

    def pose(self, q: Array) -> tuple[Array, Array]:
        self._data.qpos[self._positions] = q
        mujoco.mj_kinematics(self._model, self._data)
        return self._tcp.xpos.copy(), self._tcp.xmat.reshape(3, 3).copy()

    def jacobian(self) -> tuple[Array, Array]:
        both = np.zeros((2, 3, self._model.nv))
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jac(self._model, self._data, *both, self._tcp.xpos, self._body)
        linear, angular = both[:, :, self._velocities]
        return linear, angular

    @staticmethod
    def quaternion(matrix: Array) -> Array:
        """Return the orientation (3, 3) as a quaternion wxyz (4,) with w >= 0."""
        found = np.empty(4)
        mujoco.mju_mat2Quat(found, matrix.ravel())
        return found * np.copysign(1.0, found[0])


def _arm_model(
    path: Path,
    kinematics: ElementTree.Element,
    joint_names: Sequence[str],
) -> mujoco.MjModel:
    """Return the model with only the named joints."""
    try:
        spec = mujoco.MjSpec.from_string(text_of(kinematics))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"The robot model {path} cannot be read ({short(error)}); give an MJCF or URDF file."
        ) from error
    have = [joint.name for joint in spec.joints]
    missing = [name for name in joint_names if name not in have]
    if missing or not joint_names or len(set(joint_names)) != len(joint_names):
        raise ConfigError(
            f"The joints {list(joint_names)} must be different joints of {path.name}, which has "
            f"{short(', '.join(name for name in have if name))}."
        )
    for joint in list(spec.joints):
        if joint.name not in joint_names:
            spec.delete(joint)
    for body in spec.bodies[1:]:  # kinematics needs no shapes, and any mass is valid
        body.mass = 1.0
        body.inertia = [1.0] * 3
        body.fullinertia = [np.nan] * 6
        body.explicitinertial = True
    # Otherwise a URDF's fixed links, such as the TCP, would lose their names.
    spec.compiler.fusestatic = False
    try:
        model = spec.compile()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"The robot model {path} cannot be used ({short(error)}).") from error
    if model.nq != len(joint_names):
        raise ConfigError(
            f"The joints {list(joint_names)} of {path.name} must have one position each."
        )
    return model


def _frame(
    model: mujoco.MjModel, data: mujoco.MjData, name: str, path: str | Path
) -> tuple[Any, int]:
    """Return the site or body `name`, for its pose, and the id of the body that it moves with."""
    sites = [model.site(i).name for i in range(model.nsite)]
    bodies = [model.body(i).name for i in range(1, model.nbody)]
    if name in sites:
        return data.site(name), model.site(name).bodyid[0]
    if name in bodies:
        return data.body(name), model.body(name).id
    raise ConfigError(
        f"{Path(path).name} has no site or body {name!r}; its sites are "
        f"{short(', '.join(sites)) or 'none'}, its bodies {short(', '.join(bodies))}."
    )
