"""LeRobot's asynchronous `PolicyServer` for this policy: python -m lerobot_policy_ceed_vla.policy_server --port=8080

LeRobot's own command imports no plugins and takes only the policies on its list. What clients send is unpickled:
whoever reaches the port can run code here.
"""

import logging
from typing import Any

from lerobot.async_inference import constants, policy_server
from lerobot.async_inference.helpers import TimedAction

import lerobot_policy_ceed_vla  # noqa: F401  (registers the policy)

constants.SUPPORTED_POLICIES.append("ceed_vla")


class PolicyServer(policy_server.PolicyServer):
    """LeRobot's, with every chunk one step later.

    LeRobot's client stamps an observation with the action that it has just executed, its server gives the first new
    action the same number, and the client then drops that action as done. A policy of increments loses a step of every
    chunk by that: one of four, here.
    """

    def _time_action_chunk(self, t_0: float, action_chunk: list[Any], i_0: int) -> list[TimedAction]:
        timed: list[TimedAction] = super()._time_action_chunk(t_0, action_chunk, i_0 + 1)
        return timed


policy_server.PolicyServer = PolicyServer


def main() -> None:
    """Serve until interrupted."""
    logging.warning("LeRobot's protocol unpickles what clients send: keep --host=127.0.0.1, or a network of your own.")
    policy_server.serve()


if __name__ == "__main__":
    main()
