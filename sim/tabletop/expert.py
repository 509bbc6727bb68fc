"""The scripted expert: a pure function of the simulator state, so it can take over at any moment.

There is no phase variable. The positions of arm and cube and the state of the fingers determine the
next action:

    fingers closed on the target    -> carry it down a funnel to the goal, then open
    cube in place                   -> open and rise
    fingers closed on nothing       -> open while approaching
    otherwise                       -> approach down a funnel, fingers open, then close (or push)

A *funnel* is a target height that grows with the horizontal error: far away the gripper travels
high, near the target it comes down. Moves are proportional and saturate, so the motion is smooth
and never pauses for something that a policy cannot observe.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from ceed_vla.sim.tabletop import tasks
from ceed_vla.sim.tabletop.tasks import CUBE_HALF, Command, Situation

Array = NDArray[np.float64]

_POSITION_STEP, _ROTATION_STEP = 0.05, 0.25  # of a full action [m], [rad]
_GAIN = 0.6  # share of the remaining way per step
_SPEED = 0.55  # largest horizontal and vertical action
_FUNNEL_SLOPE = 4.0  # height per horizontal error
_FUNNEL_FLOOR = 0.014  # horizontal error without extra height [m]
_APPROACH_HEIGHT = 0.085  # above the grasp [m]: the finger tips clear other cubes
_TRAVEL_HEIGHT = 0.105  # TCP height from which a carried cube clears everything [m]
# largest error across and along the opening axis when closing [m]
_GRASP_ACROSS = 0.011
_GRASP_ALONG = 0.016
# height below and above the grasp [m], yaw error [rad]
_GRASP_LOW = 0.008
_GRASP_HIGH = 0.012
_GRASP_YAW = 0.2
_HELD_OPENING = (0.038, 0.055)  # finger opening while a cube is held [m]
_HELD_DISTANCE = 0.028  # largest distance of a held cube from the TCP [m]
_PUSH_SPEED = 0.4  # largest push action
_PUSH_LIMIT_X = 0.555  # beyond it an open finger may land on the bin [m]
_LANE = 0.06  # half width of the strip that a push needs free [m]
# Height above the rest position and horizontal error at which a cube is let go [m].
_PLACEMENTS = {"cube_in_bin": (0.025, 0.022), "cube_on_plate": (0.004, 0.015)}
_GRASP_SHIFTS = (0.0, -0.008, 0.008, -0.016, 0.016, -0.022, 0.022)  # along the opening axis [m]
_ENOUGH_ROOM = 0.004  # around an open finger [m]
# Of an open finger: distance from the TCP, half thickness with margin [m].
_FINGER_CENTRE, _FINGER_HALF = 0.056, 0.009
_PAD_OFFSET = 0.05 - CUBE_HALF  # TCP to centre of a cube that touches an open finger [m]


def expert_action(command: Command, now: Situation) -> NDArray[np.float32]:
    """Action of the expert in the current state (7,) in [-1, 1]."""
    action = _push(command, now) if command.family == "push_cube" else _pick_and_place(command, now)
    return np.clip(action, -1.0, 1.0).astype(np.float32)


def is_holding(command: Command, now: Situation) -> bool:
    """Whether the closed fingers hold the target cube."""
    low, high = _HELD_OPENING
    near = np.linalg.norm(now.cubes[command.target] - now.tcp) < _HELD_DISTANCE
    return bool(not now.gripper_open and low < now.opening < high and near)


def _pick_and_place(command: Command, now: Situation) -> Array:
    cube = now.cubes[command.target]
    goal = tasks.goal_position(command, now)
    if is_holding(command, now):
        return _carry(command, now, cube, goal)
    if tasks.in_place(command, now):
        return _release(now)
    yaw, point = _grasp(command, now, cube)
    return (
        _action(now, point, yaw, gripper_open=False)
        if _may_close(now, point, yaw)
        else _descend(now, point, yaw)
    )


def _carry(command: Command, now: Situation, cube: Array, goal: Array) -> Array:
    """Lift the held cube, bring it over the goal, lower it and open the fingers."""
    drop, tolerance = _PLACEMENTS.get(command.family, (0.003, 0.009))
    offset = goal[:2] - cube[:2]
    far = float(np.hypot(*offset))
    grip = now.tcp[2] - cube[2]  # the cube may sit a little off the TCP
    place = goal[2] + drop + grip
    height = place + np.clip(
        _FUNNEL_SLOPE * (far - tolerance), 0.0, max(_TRAVEL_HEIGHT - place, 0.03)
    )
    if far < tolerance and cube[2] + grip - place < 0.008:
        return _action(now, now.command_position, 0.0, gripper_open=True)
    # distance by which the arm lags behind its command
    lag = now.command_position[:2] - now.tcp[:2]
    target = np.array([*(now.command_position[:2] + offset - lag), height])
    return _action(now, _slow_below(now, target), _goal_yaw(command, now), gripper_open=False)


def _goal_yaw(command: Command, now: Situation) -> float:
    """Yaw of the gripper at which the cube is laid down [rad]."""
    if command.family != "stack_cubes":
        return 0.0
    held = now.cube_yaws[command.target] - now.tcp_yaw
    return _nearest_quarter(now.cube_yaws[command.base] - held, now.command_rpy[2])


def _release(now: Situation) -> Array:
    """Open, and rise once the fingers are apart."""
    target = now.command_position.copy()
    target[2] += 0.04 if now.opening > 0.06 else 0.0
    return _action(now, target, now.command_rpy[2], gripper_open=True)


def _may_close(now: Situation, point: Array, yaw: float) -> bool:
    """Whether the fingers are around the cube; more lenient once they have begun to close."""
    along, across = _in_gripper(now, point)
    above = now.tcp[2] - point[2]
    if not now.gripper_open:
        near = abs(across) < 1.5 * _GRASP_ACROSS and abs(along) < 1.5 * _GRASP_ALONG
        return bool(
            now.opening > _HELD_OPENING[0] and near and -2 * _GRASP_LOW < above < 2 * _GRASP_HIGH
        )
    near = abs(across) < _GRASP_ACROSS and abs(along) < _GRASP_ALONG
    ready = now.opening > 0.085 and abs(now.tcp_yaw - yaw) < _GRASP_YAW
    return bool(near and ready and -_GRASP_LOW < above < _GRASP_HIGH)


def _descend(now: Situation, point: Array, yaw: float) -> Array:
    """One step down the funnel that ends at a TCP position, with open fingers.

    The funnel raises the final height in proportion to the horizontal error, the yaw error and the
    missing opening of the fingers.
    """
    error = float(np.hypot(*(point - now.tcp)[:2]))
    turn = abs(now.tcp_yaw - yaw)
    extra = _FUNNEL_SLOPE * max(error - _FUNNEL_FLOOR, 0.0) + 0.15 * max(turn - 0.15, 0.0)
    extra += 2.0 * max(0.085 - now.opening, 0.0)
    height = point[2] + min(extra, _APPROACH_HEIGHT)
    return _action(now, _slow_below(now, np.array([*point[:2], height])), yaw, gripper_open=True)


def _in_gripper(now: Situation, cube: Array) -> tuple[float, float]:
    """Position of a cube along and across the opening axis of the gripper [m]."""
    offset = cube - now.tcp
    sine = np.sin(now.tcp_yaw)
    cosine = np.cos(now.tcp_yaw)
    return float(cosine * offset[1] - sine * offset[0]), float(
        cosine * offset[0] + sine * offset[1]
    )


def _push(command: Command, now: Situation) -> Array:
    """Straddle the cube with open fingers and move it sideways with the trailing one.

    A cube that cannot be pushed (on something, among the far objects, or with something in its way)
    is carried.
    """
    cube = now.cubes[command.target]
    goal = tasks.goal_position(command, now)
    pushable = _can_push(command, now, cube, goal)
    if not pushable or (is_holding(command, now) and cube[2] > CUBE_HALF + 0.008):
        return _pick_and_place(command, now)
    along, across = _in_gripper(now, cube)
    low = now.tcp[2] < cube[2] + 0.018
    if not (
        now.gripper_open
        and low
        and abs(along) < 0.045
        and abs(across) < 0.024
        and now.opening > 0.075
    ):
        yaw = _nearest_quarter(now.cube_yaws[command.target], _sticky(now))
        return _descend(now, np.array([*cube[:2], CUBE_HALF - 0.003]), yaw)
    stop = goal[1] + np.sign(goal[1] - cube[1]) * _PAD_OFFSET
    action = _action(now, np.array([cube[0], stop, CUBE_HALF - 0.003]), 0.0, gripper_open=True)
    action[1] = np.clip(action[1], -_PUSH_SPEED, _PUSH_SPEED)
    return action


def _can_push(command: Command, now: Situation, cube: Array, goal: Array) -> bool:
    """Whether the cube stands on the table in the near band and its way to the goal is free."""
    if cube[2] > CUBE_HALF + 0.004 or not tasks.ZONE_X[0] < cube[0] < _PUSH_LIMIT_X:
        return False
    way = np.sign(goal[1] - cube[1])
    for index, other in enumerate(now.cubes):
        ahead = way * (other[1] - cube[1])
        in_lane = (
            abs(other[0] - cube[0]) < _LANE and -CUBE_HALF < ahead < abs(goal[1] - cube[1]) + 0.08
        )
        if index != command.target and other.any() and in_lane:
            return False
    return True


def _slow_below(now: Situation, target: Array) -> Array:
    """Reduce horizontal motion while the gripper is clearly too low: rise first, then travel."""
    missing = target[2] - now.tcp[2]
    share = np.clip(1.0 - (missing - 0.01) / 0.04, 0.0, 1.0)
    horizontal = now.command_position[:2] + share * (target[:2] - now.command_position[:2])
    return np.array([*horizontal, target[2]])


def _grasp(command: Command, now: Situation, cube: Array) -> tuple[float, Array]:
    """Choose the gripper yaw [rad] and the TCP position (3,) [m] of a grasp.

    The grasp is centred, with a yaw near zero, if the fingers have room. Next to a wall or another
    cube it moves along the opening axis or uses the other pair of faces.
    """
    first = _nearest_quarter(now.cube_yaws[command.target], _sticky(now))
    best, choice = -np.inf, (first, cube[:2])
    for yaw, shift in product((first, first - np.copysign(np.pi / 2, first)), _GRASP_SHIFTS):
        axis = np.array([-np.sin(yaw), np.cos(yaw)])
        centre = cube[:2] + shift * axis
        room = min(
            _finger_room(command, now, cube[2], centre + end * _FINGER_CENTRE * axis)
            for end in (-1, 1)
        )
        if room > best + 1e-3:
            best, choice = room, (yaw, centre)
        if best >= _ENOUGH_ROOM:
            break
    yaw, centre = choice
    return yaw, np.array([*centre, max(cube[2], CUBE_HALF - 0.003)])


def _finger_room(command: Command, now: Situation, height: float, tip: Array) -> float:
    """Clearance [m] of an open finger in a grasp at `height`, at most `_ENOUGH_ROOM`."""
    room = _ENOUGH_ROOM
    for index, other in enumerate(now.cubes):
        if index != command.target and other.any() and abs(other[2] - height) < 2 * CUBE_HALF:
            room = min(room, float(np.hypot(*(tip - other[:2]))) - 0.036)
    if height < tasks.BIN_HEIGHT + 0.01:
        depth = float(np.abs(tip - now.bin[:2]).max())
        inside = tasks.BIN_INNER_HALF - depth - _FINGER_HALF
        outside = depth - tasks.BIN_INNER_HALF - tasks.BIN_WALL - _FINGER_HALF
        room = min(room, max(inside, outside))
    return room


def _sticky(now: Situation) -> float:
    """Reference yaw [rad] that stabilizes the choice of a pair of faces near 45 degrees."""
    return float(np.clip(now.command_rpy[2], -0.2, 0.2))


def _nearest_quarter(angle: float, reference: float) -> float:
    """The angle equal to `angle` modulo a quarter turn that is nearest to `reference` [rad]."""
    quarter = np.pi / 2
    return float(reference + (angle - reference + quarter / 2) % quarter - quarter / 2)


def _action(now: Situation, target: Array, yaw: float, gripper_open: bool) -> Array:
    """Proportional step of the commanded pose towards a target; straight, level, saturating."""
    way = _GAIN * (target - now.command_position) / _POSITION_STEP
    way[:2] *= min(1.0, _SPEED / max(float(np.hypot(way[0], way[1])), 1e-9))
    way[2] = np.clip(way[2], -_SPEED, _SPEED)
    turn = _GAIN * (np.array([0.0, 0.0, yaw]) - now.command_rpy) / _ROTATION_STEP
    return np.array([*way, *turn, 1.0 if gripper_open else -1.0])
