"""From policy actions to joint targets: the commanded pose, and an arm's kinematics through mink."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError
from ros_nodes.robot.texts import short

try:
    import mink
    import mujoco
except ImportError as error:
    raise ConfigError(
        f"Inverse kinematics needs mink and mujoco ({error}); install them with pip install 'ceed_vla[ros2]', or use "
        "an action interface of joint positions."
    ) from error

Array = NDArray[np.float64]

_SOLVER = "daqp"
_ORIENTATION_COST = 0.3  # [m/rad]: how much one radian counts against one metre
_POSTURE_GAIN = 0.1  # share of the way home per iteration, in the null space of the task
_DAMPING = (
    1e-5,
    0.2,
)  # constant part [m^2] and share of the squared error: robust far away, quick at the end
_REACHED = (1e-4, 5e-4)  # [m], [rad]
_ITERATION_STEP = 0.3  # of a joint [rad]
_LIMIT_MARGIN = 0.02  # [rad]
_FAR_OFF = 0.01  # remaining error from which the branch of the home posture is tried [m]
_UNWIND = 0.3  # of a joint per call on the way to another branch [rad]


class ArmKinematics:
    """Kinematics of one arm of an MJCF or URDF model; every joint that is not named stays at its default.

    Args:
        model_path: MJCF or URDF file.
        tcp: Site or body of the tool centre point.
        joint_names: J joints, in the order of every array here.
        home: (J,) posture that redundancy is resolved towards [rad]; the model's default if None.
        max_joint_step: Largest change of a joint per `solve` [rad].

    Attributes:
        position_low: (J,) [rad], from the model; -inf without a limit.
        position_high: (J,) [rad].
        velocity: (J,) [rad/s], of a URDF; NaN where the model has no limit, as every MJCF.

    Raises:
        ConfigError: An unreadable model, or names that are not in it (the message lists those that are).
    """

    def __init__(
        self,
        model_path: str | Path,
        tcp: str,
        joint_names: Sequence[str],
        *,
        home: Sequence[float] | None = None,
        max_joint_step: float = 0.6,
    ) -> None:
        self.model = _arm_model(Path(model_path), joint_names)
        self._frame = (tcp, _frame_type(self.model, tcp, model_path))
        self._order = np.array([self.model.joint(name).qposadr[0] for name in joint_names])
        limited = self.model.jnt_limited.astype(bool)[:, None]
        ranges = np.where(limited, self.model.jnt_range, [-np.inf, np.inf])[
            self._order
        ]  # one position a joint
        self.position_low, self.position_high = ranges.T.copy()
        limits = _urdf_velocities(Path(model_path))
        self.velocity = np.array([limits.get(name, np.nan) for name in joint_names])
        self.home = self.model.qpos0[self._order] if home is None else np.array(home, dtype=np.float64)
        if self.home.shape != (len(joint_names),) or not max_joint_step > 0:
            raise ConfigError(
                f"home has shape {self.home.shape} for {len(joint_names)} joints, and max_joint_step is "
                f"{max_joint_step}; give one position a joint and a positive step."
            )
        self._max_step = max_joint_step
        self._configuration = mink.Configuration(self.model)
        self._pose_task = mink.FrameTask(*self._frame, position_cost=1.0, orientation_cost=_ORIENTATION_COST)
        self._posture_task = mink.PostureTask(self.model, cost=1.0, gain=_POSTURE_GAIN)
        self._posture_task.set_target(self._full(self.home))
        margin = min(_LIMIT_MARGIN, 0.1 * float((self.position_high - self.position_low).min()))
        self._limits = [mink.ConfigurationLimit(self.model, gain=1.0, min_distance_from_limits=margin)]

    def forward(self, q: Array) -> tuple[Array, Array]:
        """TCP position (3,) [m] and quaternion wxyz (4,), w >= 0, at joint positions `q` (J,) [rad]."""
        self._configuration.update(self._full(q))
        pose = self._pose()
        quaternion = pose.rotation().wxyz
        return pose.translation().copy(), quaternion * np.copysign(1.0, quaternion[0])

    def solve(self, q: Array, position: Array, quaternion: Array) -> Array:
        """Joint positions that bring the TCP to a pose, or as near as the limits allow.

        Args:
            q: Start (J,) [rad]; the last commanded ones keep the motion continuous.
            position: (3,) [m].
            quaternion: wxyz (4,).

        Returns:
            (J,) inside the limits of the model, at most `max_joint_step` from `q` [rad].
        """
        target = mink.SE3.from_rotation_and_translation(
            mink.SO3(np.asarray(quaternion)), np.asarray(position)
        )
        q = np.asarray(q, dtype=np.float64)
        wanted, error = self._descend(q, target, 12)
        step = self._max_step
        if (
            error > _FAR_OFF
        ):  # wound up against joint limits: go towards the branch of home, a little per call
            other, other_error = self._descend(self.home, target, 40)
            if other_error < 0.5 * error:
                wanted, step = other, min(_UNWIND, step)
        return q + np.clip(wanted - q, -step, step)

    def _descend(self, q: Array, target: mink.SE3, iterations: int) -> tuple[Array, float]:
        """Iterate from `q`; the positions (J,) and the size of the error that remains, 0 if it is negligible [m]."""
        self._pose_task.set_target(target)
        self._configuration.update(self._full(q))
        for left in reversed(range(iterations + 1)):
            shift, turn = self._error(target)
            if np.abs(shift).max() < _REACHED[0] and np.abs(turn).max() < _REACHED[1]:
                return self._positions(), 0.0
            error = float(np.hypot(np.linalg.norm(shift), _ORIENTATION_COST * np.linalg.norm(turn)))
            if left:
                self._iterate(error)
        return self._positions(), error

    def _iterate(self, error: float) -> None:
        """One step of damped least squares about the pull towards home, inside the joint limits.

        With the posture's weight c, min |J v - e|^2 + c^2 |v - p|^2 leaves p untouched in the null space of J and damps
        the rest by c^2, so the weight is the damping.
        """
        self._posture_task.set_cost(np.sqrt(_DAMPING[0] + _DAMPING[1] * error**2))
        tasks = [self._pose_task, self._posture_task]
        step = mink.solve_ik(self._configuration, tasks, 1.0, _SOLVER, limits=self._limits)
        self._configuration.integrate_inplace(step * min(1.0, _ITERATION_STEP / np.abs(step).max()), 1.0)

    def _error(self, target: mink.SE3) -> tuple[Array, Array]:
        """Translation (3,) [m] and rotation vector (3,) [rad] from the TCP to `target`, in the base frame."""
        pose = self._pose()
        turn = target.rotation() @ pose.rotation().inverse()
        return target.translation() - pose.translation(), turn.log()

    def _pose(self) -> mink.SE3:
        return self._configuration.get_transform_frame_to_world(*self._frame)

    def _full(self, q: Array) -> Array:
        full = np.empty(self.model.nq)
        full[self._order] = q
        return full

    def _positions(self) -> Array:
        return self._configuration.data.qpos[self._order].copy()


@dataclass(frozen=True)
class PoseLimits:
    """How EE-delta actions move the commanded pose, and where it may be.

    Attributes:
        position_scale: Translation of a full action [m].
        rotation_scale: Rotation of a full action [rad].
        workspace_low: (3,) [m].
        workspace_high: (3,) [m].
        max_tilt: Largest commanded |roll| and |pitch| [rad].
        max_yaw: Largest commanded |yaw| [rad].
        position_slack: Distance of the arm's target from the commanded pose at which the command gives way [m].
        rotation_slack: The same for roll, pitch and yaw [rad].

    Raises:
        ConfigError: An empty workspace, or a value that is not positive.
    """

    position_scale: float
    rotation_scale: float
    workspace_low: Array
    workspace_high: Array
    max_tilt: float
    max_yaw: float
    position_slack: float = 0.005
    rotation_slack: float = 0.05

    def __post_init__(self) -> None:
        low, high = np.array(self.workspace_low, dtype=float), np.array(self.workspace_high, dtype=float)
        if low.shape != (3,) or high.shape != (3,) or not (low < high).all():
            raise ConfigError(
                f"The workspace [{low.tolist()}, {high.tolist()}] must have three lows below three highs [m]."
            )
        object.__setattr__(self, "workspace_low", low)
        object.__setattr__(self, "workspace_high", high)
        for name in (
            "position_scale",
            "rotation_scale",
            "max_tilt",
            "max_yaw",
            "position_slack",
            "rotation_slack",
        ):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive and finite.")
        if self.max_tilt >= np.pi / 2:
            raise ConfigError(
                f"max_tilt is {self.max_tilt} rad; roll, pitch and yaw are unique below pi / 2 only."
            )


class CommandedPose:
    """The TCP pose that EE-delta actions accumulate to: at a step's start, the end target of the step before.

    Args:
        limits: Scales and limits.

    Attributes:
        position: (3,) [m].
        rpy: Roll, pitch, yaw (3,): ``Rz(yaw) Ry(pitch) Rx(roll)`` [rad].
    """

    def __init__(self, limits: PoseLimits) -> None:
        self.limits = limits
        self.position: Array = 0.5 * (limits.workspace_low + limits.workspace_high)
        self.rpy: Array = np.zeros(3)
        self._rpy_limit = np.array([limits.max_tilt, limits.max_tilt, limits.max_yaw])

    @property
    def quaternion(self) -> Array:
        """Orientation wxyz (4,)."""
        return mink.SO3.from_rpy_radians(*self.rpy).wxyz

    def reset(self, position: Array, quaternion: Array) -> None:
        """Start from the pose where the arm is, position (3,) [m] and quaternion wxyz (4,)."""
        self.position, self.rpy = np.array(position, dtype=np.float64), _rpy(quaternion)

    def advance(self, action: Array) -> None:
        """Add one EE-delta action.

        Args:
            action: (6,) translation and rotation vector in the base frame; clipped to [-1, 1].

        Raises:
            ConfigError: Another shape, or not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (6,) or not np.isfinite(action).all():
            raise ConfigError(f"The EE-delta action is {action.tolist()}; give six finite numbers.")
        action, limits = np.clip(action, -1.0, 1.0), self.limits
        moved = self.position + limits.position_scale * action[:3]
        self.position = np.clip(moved, limits.workspace_low, limits.workspace_high)
        turned = mink.SO3.exp(limits.rotation_scale * action[3:]) @ mink.SO3.from_rpy_radians(*self.rpy)
        self.rpy = np.clip(_rpy(turned.wxyz), -self._rpy_limit, self._rpy_limit)

    def follow(self, position: Array, quaternion: Array) -> None:
        """Give way to the pose of the joint targets where it differs: the command never runs away from the arm."""
        rpy = _rpy(quaternion)
        if np.abs(position - self.position).max() > self.limits.position_slack:
            self.position = np.array(position, dtype=np.float64)
        if np.abs(rpy - self.rpy).max() > self.limits.rotation_slack:
            self.rpy = rpy


def _rpy(quaternion: Array) -> Array:
    """Roll, pitch, yaw (3,) [rad] of a quaternion wxyz (4,)."""
    angles = mink.SO3(np.asarray(quaternion, dtype=np.float64)).as_rpy_radians()
    return np.array([angles.roll, angles.pitch, angles.yaw], dtype=np.float64)


def _arm_model(path: Path, joint_names: Sequence[str]) -> mujoco.MjModel:
    """The model without the joints that are not named, and without what may refer to them."""
    try:
        spec = mujoco.MjSpec.from_file(str(path))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"The robot model {path} cannot be read ({error}); give an MJCF or URDF file."
        ) from error
    have = [joint.name for joint in spec.joints]
    missing = [name for name in joint_names if name not in have]
    if missing or not joint_names or len(set(joint_names)) != len(joint_names):
        raise ConfigError(
            f"The joints {list(joint_names)} must be different joints of {path.name}, which has "
            f"{', '.join(name for name in have if name)}."
        )
    for part in ("keys", "sensors", "actuators", "tendons", "equalities"):
        for element in list(getattr(spec, part)):
            spec.delete(element)
    for joint in list(spec.joints):
        if joint.name not in joint_names:
            spec.delete(joint)
    spec.compiler.fusestatic = False  # a URDF's fixed links would lose their names, the TCP's among them
    try:
        model = spec.compile()
    except ValueError as error:
        raise ConfigError(f"The robot model {path} cannot be used ({short(error)}).") from error
    if model.nq != len(joint_names):
        raise ConfigError(f"The joints {list(joint_names)} of {path.name} must have one position each.")
    return model


def _urdf_velocities(path: Path) -> dict[str, float]:
    """Joint -> velocity limit [rad/s] of a URDF, which mujoco does not keep; an MJCF has none."""
    try:
        joints = ElementTree.parse(path).getroot().findall("joint")
    except ElementTree.ParseError:  # mujoco reads a little more than XML
        return {}
    velocities = {}
    for joint in joints:
        with suppress(AttributeError, TypeError, ValueError):  # without a limit, or not a number
            velocities[joint.get("name", "")] = float(joint.find("limit").get("velocity"))  # type: ignore
    return {name: limit for name, limit in velocities.items() if 0.0 < limit < np.inf}  # 0: not known


def _frame_type(model: mujoco.MjModel, name: str, path: str | Path) -> str:
    """Whether `name` is a "site" or a "body" of the model."""
    kinds = {"site": mujoco.mjtObj.mjOBJ_SITE, "body": mujoco.mjtObj.mjOBJ_BODY}
    for kind, code in kinds.items():
        if mujoco.mj_name2id(model, code, name) >= 0:
            return kind
    sites = [model.site(i).name for i in range(model.nsite)]
    bodies = [model.body(i).name for i in range(1, model.nbody)]
    raise ConfigError(
        f"{Path(path).name} has no site or body {name!r}; its sites are {', '.join(sites) or 'none'}, its bodies "
        f"{', '.join(bodies)}."
    )
