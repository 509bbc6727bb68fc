"""Real-time chunking for a client whose clock does not wait, counted in its ticks.

Every observation is a tick and takes one step of the running chunk; where the chunk has ended, the
robot holds. Meanwhile the policy decodes the next chunk, which begins with the steps that the robot
executes until the answer is there:

    running chunk   | 0 1 2 3 4 5 6 7 |
    observation 4             ^           starts a call and takes step 4; the answer arrives
                                          between observations 5 and 6
    next chunk                | 0 1 2 3 4 5 6 7 |    0 and 1 are frozen: steps 4 and 5 from before
                                    ^ observation 6 takes step 2

A tick at which the robot holds takes no step. Where the running chunk has ended, the newest
observation waits for the first step of the next one. That step may come too late for its tick: the
next observation then says that the robot held, and gets the same step again.

While every answer arrives before the next observation, the observation that starts a call waits for
its own chunk and takes no step of the running one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

# Calls from which the delay of the next one is estimated. The longest counts: steps that are frozen
# needlessly only react later, but steps that are executed without being frozen make a jump.
_CALLS = 8


@dataclass(frozen=True)
class CallSteps:
    """How a call continues the running chunk.

    Attributes:
        shift_steps: Steps of the running chunk that were executed before the call's observation.
        frozen_steps: Steps behind these that will be executed until the answer arrives.
        executed_steps: Steps of the new chunk behind the frozen ones that will be executed until
            the chunk after it arrives; None while no answer is late, so that the policy decodes as
            for a client that waits.
    """

    shift_steps: int
    frozen_steps: int
    executed_steps: int | None


class LiveSteps:
    """The steps of a live episode.

    Of a tick, call `observe` and `due` first, then `take`, unless a call starts that is `prompt`;
    then `begin` if a call starts with its observation.

    Args:
        chunk_steps: Steps ``m`` of a chunk.
        replan_steps: Steps ``h`` of a chunk after which the next call is due, in [1, m].
    """

    def __init__(self, chunk_steps: int, replan_steps: int) -> None:
        self._chunk_steps, self._replan_steps = chunk_steps, replan_steps
        self._delays: deque[int] = deque([0], _CALLS)  # ticks after that of the call's observation
        self.restart()

    def restart(self) -> None:
        """Drop the running chunk, as a new episode or instruction begins."""
        self._actions: NDArray[np.float32] = np.empty((0, 0), np.float32)  # (m, A), running
        self._next = 0  # its steps before this one are executed, or their time has passed
        self._freezes = False  # whether its steps can be frozen
        self._ticks = 0  # since the call's observation
        self._taken = 0  # steps since then, with that of the observation itself
        self._sent = False  # whether the newest observation got a step

    def observe(self, *, held: bool) -> None:
        """Note a new observation, and whether the robot held in the tick before it."""
        self._ticks += 1
        if held and self._sent:  # the step came too late
            self._next -= 1
            self._taken -= 1
            self._delays[-1] = max(self._delays[-1], 1)
        self._sent = False

    @property
    def due(self) -> bool:
        """Whether the next observation should start a call."""
        return self._next >= min(self._replan_steps, len(self._actions))

    @property
    def prompt(self) -> bool:
        """Whether answers arrive before the next observation."""
        return max(self._delays) == 0

    def take(self) -> NDArray[np.float32] | None:
        """Take the next step (A,) of the running chunk for a tick; None if the robot holds."""
        if self._next >= len(self._actions):
            return None
        self._next += 1
        self._taken += 1
        self._sent = True
        return cast("NDArray[np.float32]", self._actions[self._next - 1])

    def begin(self, *, answered: bool) -> CallSteps:
        """Start a call with the newest observation, which was `answered` with a step or was not."""
        self._ticks = 0
        self._taken = int(answered)
        shift_steps = self._next - self._taken
        if self.prompt:
            return CallSteps(shift_steps, 0, None)
        expected = max(self._delays) + 1  # steps until the answer, if a chunk has so many
        left = len(self._actions) - shift_steps
        frozen = min(expected, left) if self._freezes else 0
        # The call after this one is due after `replan_steps`, and takes as long as this one.
        executed = max(self._replan_steps, frozen) + expected - frozen
        return CallSteps(shift_steps, frozen, min(executed, self._chunk_steps - frozen))

    def take_over(
        self, actions: NDArray[np.float32], *, freezes: bool, waiting: bool
    ) -> NDArray[np.float32] | None:
        """Continue with the answer to the call.

        Args:
            actions: The new chunk (m, A).
            freezes: Whether its steps can be frozen.
            waiting: Whether the newest observation has no answer yet.

        Returns:
            The step (A,) for the waiting observation; None if none waits.
        """
        self._delays.append(self._ticks)
        self._actions, self._freezes = actions, freezes
        self._next = self._taken
        return self.take() if waiting else None
