"""Episodes as recordings for Rerun: ``--rerun`` of ``eval`` and ``show``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ceed_vla.sim.environment import images_of, observation_batch
from ceed_vla.sim.rollout import PolicyRunner, Replan, stack_previous
from ceed_vla.viz import RerunLog


def log_episode(
    log: RerunLog, name: str, runner: PolicyRunner, replans: Iterable[Replan], fps: int
) -> None:
    """Log the replans of an episode below the entity `name`, at their control steps.

    These are the camera images, the state, the chunk (m, A), the Jacobi states (k, n) of its
    tokens, its forwards and latency, and the rule that ended decoding. Random guesses are not drawn
    again, so such decoders have no Jacobi states.
    """
    for replan in replans:
        log.at(replan.step / fps, replan.step)
        for camera, pixels in images_of(replan.observation).items():
            log.image(f"{name}/{camera.rpartition('.')[2]}", pixels)
        if "agent_pos" in replan.observation:  # environments may have other states, or none
            log.scalars(f"{name}/state", replan.observation["agent_pos"])
        if replan.chunk.actions is not None:
            log.tensor(f"{name}/chunk", replan.chunk.actions, ("step", "action"))
        decoding = runner.policy.config.named(runner.decoding)
        if decoding.method == "jacobi" and decoding.guess != "random":
            log.tensor(f"{name}/jacobi_states", jacobi_states(runner, replan), ("forward", "token"))
        log.scalars(f"{name}/forwards", [replan.chunk.forwards])
        taken = [value for key, value in replan.chunk.seconds.items() if key != "rows"]
        log.scalars(f"{name}/latency_ms", [1000 * sum(taken)])
        log.text(f"{name}/exit", replan.chunk.exit_reason)


@torch.inference_mode()
def jacobi_states(runner: PolicyRunner, replan: Replan) -> np.ndarray:
    """Decode the observation of a replan again; return the states (k, n) from guess to result."""
    batch = runner.preprocessor(observation_batch([replan.observation], [replan.instruction]))
    result = runner.policy.decode(
        batch,
        runner.decoding,
        previous=stack_previous([replan.previous]),
        shift_steps=0 if runner.continues else runner.executed_steps,
        executed_steps=runner.executed_steps,
        record_states=True,
        read=False,
    )
    return torch.cat(result.states).cpu().numpy()
