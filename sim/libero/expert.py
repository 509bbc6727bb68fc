"""The scripted expert: grasps the object of the instruction and puts it at the target.

It reads the simulator's state and has no memory of earlier steps, so it can take over from any
state that a policy has reached.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ceed_vla.sim.libero.scene import Scene

STEP = 0.05  # motion of a full action along one axis [m]
GAIN = 0.6  # share of the remaining way per control step
TURN = 0.5  # rotation of a full action about one axis [rad]
ALIGNED = 0.012  # horizontal error below which the hand is lowered or opened [m]
CLEARANCE = 0.09  # of the fingertips above the object on the way to it [m]
CARRY = 0.04  # of the object's lowest point above the target's rim [m]
LAID = 0.008  # of an object above a flat target when it is let go [m]
FLAT = 0.04  # height of a target below which nothing is dropped into it [m]
REACHED = 0.008  # vertical error below which the fingers close [m]
DEPTH = 0.025  # of the fingertips below an object's top [m]
FLOOR = 0.004  # least height of the fingertips above the ground [m]
LEVEL = 0.06  # tilt that is not corrected: steps without rotation are easy to learn [rad]
OPEN, CLOSED = -1.0, 1.0
SHUT = 0.002  # finger opening of an empty closed hand [m]
WIDE = 0.07  # finger opening to grasp from [m]
FINGERS = 0.05  # of the middle of an open finger from that of the hand [m]
RIM = 0.004  # of the middle between the fingers from an object's edge, inwards [m]
MARGIN = 0.012  # least part of an object between the fingers, and of room beside it [m]
SHIFT = 0.025  # largest distance of a grasp from the middle of an object, along one axis [m]
ROOM = 0.03  # beside a finger that is enough [m]
STILL = 0.02  # finger speed below which a grasp is complete [m/s]


class Expert:
    """Acts in one scene; takes the first object of interest to the second."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.item, self.target = scene.world.obj_of_interest[:2]

    def action(self) -> NDArray[np.float32]:
        """Action (7,) in the present state."""
        hand = self.scene.hand
        low, high = self.scene.box(self.item)
        opening, speed = self.scene.fingers
        place = self._grasp(low, high)
        over = float(np.linalg.norm(place - hand[:2]))
        near = over < 2.5 * ALIGNED and hand[2] < high[2] + 0.01
        if near and opening > SHUT and self.scene.closing:
            if abs(speed) < STILL and self.scene.touched(self.item):
                return self._carry(hand, low, (low + high) / 2)
            return self._move(hand, hand, CLOSED)
        if over > ALIGNED:
            height = high[2] + CLEARANCE
            up = hand[2] < high[2] + 0.5 * CLEARANCE and over > 3 * ALIGNED
            # first up, so that nothing is pushed away
            goal = np.array([*(hand[:2] if up else place), height])
            return self._move(hand, goal, OPEN)
        if opening < WIDE:
            return self._move(hand, np.array([*place, max(hand[2], high[2] + 0.03)]), OPEN)
        depth = max(high[2] - DEPTH, low[2] + FLOOR)
        reached = hand[2] - depth < REACHED
        return self._move(hand, np.array([*place, depth]), CLOSED if reached else OPEN)

    def _grasp(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
        """Place (2,) of the hand at which the open fingers have room beside the other objects.

        An object that is too wide for the hand is taken at its rim, between the fingers.
        """
        half = (high - low)[:2] / 2
        if half[1] + MARGIN > FINGERS:
            offsets = np.array([(0.0, side * (half[1] - RIM)) for side in (1, -1)])
        else:
            shifts = np.array([(x, y) for y in (0, -1, 1) for x in (0, -1, 1)], dtype=float)
            room = np.maximum([half[0] - MARGIN, FINGERS - half[1] - MARGIN], 0.0)
            offsets = shifts * np.minimum(room, SHIFT)
        places = (low + high)[:2] / 2 + offsets  # (P, 2)
        fingers = places[:, None] + [(0.0, FINGERS), (0.0, -FINGERS)]  # (P, 2, 2)
        gaps = np.full(len(places), ROOM)
        for name in self.scene.movable:
            if name != self.item:
                least, most = self.scene.box(name)
                if most[2] > low[2] + FLOOR:
                    gap = np.maximum(least[:2] - fingers, fingers - most[:2]).max(-1)  # (P, 2)
                    gaps = np.minimum(gaps, gap.min(1))
        return places[np.argmax(gaps - 0.1 * np.linalg.norm(offsets, axis=1))]

    def _carry(
        self, hand: NDArray[np.float64], low: NDArray[np.float64], centre: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Bring what the hand holds over the target, and let it go."""
        base, rim = self.scene.box(self.target)
        away = ((base + rim) / 2 - centre)[:2]
        lift = rim[2] + CARRY - low[2]
        if np.linalg.norm(away) < ALIGNED:
            drop = low[2] - rim[2] - LAID
            flat = rim[2] - base[2] < FLAT
            if flat and drop > REACHED:
                return self._move(hand, hand - np.array([0.0, 0.0, drop]), CLOSED)
            return self._move(hand, hand, OPEN)
        if lift > 0.05 and np.linalg.norm(away) > 0.08:
            away = away * 0.0
        return self._move(hand, hand + np.array([*away, lift]), CLOSED)

    def _move(
        self, hand: NDArray[np.float64], goal: NDArray[np.float64], gripper: float
    ) -> NDArray[np.float32]:
        """Action (7,) towards a place of the hand, upright."""
        action = np.zeros(7, dtype=np.float32)
        action[:3] = np.clip(GAIN * (goal - hand) / STEP, -1.0, 1.0)
        tilt = self.scene.tilt
        if np.abs(tilt).max() > LEVEL:
            action[3:6] = np.clip(GAIN * tilt / TURN, -1.0, 1.0)
        action[6] = gripper
        return action
