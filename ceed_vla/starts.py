"""What `ceed-vla improve` and a simulator exchange: states of episodes, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """A partial history, from which an episode goes on.

    Attributes:
        seed: Seed of the episode.
        task: Its task.
        actions: Actions that were executed so far, (A,) each, in the environment's units.
        previous: Tokens (n,) of the chunk before, from which the next one starts; empty: none.
    """

    seed: int
    task: str
    actions: tuple[tuple[float, ...], ...] = ()
    previous: tuple[int, ...] = ()


@dataclass
class SerialGroup:
    """The states of one decode path, and the outcome of the episode from each (S-GRPO).

    Attributes:
        start: Where the chunk was decoded.
        inputs: The policy's inputs there, one row each.
        states: The guess, and the tokens after each of K forwards, (1 + K, n).
        executed: Number of leading tokens that are executed before the next chunk.
        solved: Whether the episode was solved from the state after each forward, (K,); empty if
            all states execute the same, so that no episode was run.
        steps: Control steps that were simulated for it, the repeated ones of `start` included.
        reached: States which its episodes passed, drawn at random, one for each.
    """

    start: Start
    inputs: dict[str, Tensor]
    states: Tensor
    executed: int
    solved: list[bool]
    steps: int
    reached: list[Start] = field(default_factory=list)

    def rewards(self, decay: float) -> list[float]:
        """``decay ** forwards`` for states from which the episode was solved, 0 for others."""
        return [decay**k if solved else 0.0 for k, solved in enumerate(self.solved, start=1)]
