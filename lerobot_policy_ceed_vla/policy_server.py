"""LeRobot's asynchronous `PolicyServer` for this policy.

    python -m lerobot_policy_ceed_vla.policy_server --port=8080

LeRobot's own command imports no plugins and accepts only the policies on its list. The server
unpickles what clients send, so whoever reaches the port can run code here. It therefore listens on
this machine only, unless --insecure is set.
"""

import ipaddress
import logging
import sys
from typing import Any

from lerobot.async_inference import constants, policy_server
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import TimedAction

import lerobot_policy_ceed_vla  # noqa: F401  (registers the policy)
from ceed_vla.errors import ConfigError

INSECURE = "--insecure"

constants.SUPPORTED_POLICIES.append("ceed_vla")


class PolicyServer(policy_server.PolicyServer):
    """LeRobot's server, with action numbers that are one higher.

    LeRobot's client stamps an observation with the number of the action that it has just executed.
    LeRobot's server gives the first new action the same number, and the client then drops that
    action as done. With increments as actions, a step of every chunk is lost: one of four, here.

    Attributes:
        insecure: Whether the server may listen on an address that other machines reach.
    """

    insecure = False

    def __init__(self, config: PolicyServerConfig) -> None:
        """Check the host of `config`, from whichever source it comes.

        Raises:
            ConfigError: Other machines can reach the host, and `insecure` is not set.
        """
        if not self.insecure and not is_loopback(config.host):
            raise ConfigError(
                f"--host is {config.host!r}, which other machines can reach, and LeRobot's "
                "protocol unpickles what they send: each of them could run code here. Use "
                f"127.0.0.1, behind an SSH tunnel say, or add {INSECURE} in a network where you "
                "trust every machine."
            )
        super().__init__(config)

    def _time_action_chunk(
        self, t_0: float, action_chunk: list[Any], i_0: int
    ) -> list[TimedAction]:
        timed: list[TimedAction] = super()._time_action_chunk(t_0, action_chunk, i_0 + 1)
        return timed


policy_server.PolicyServer = PolicyServer


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:  # a name, which may be that of any machine
        return False


def main() -> None:
    """Serve until interrupted."""
    PolicyServer.insecure = INSECURE in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != INSECURE]
    logging.warning(
        "LeRobot's protocol unpickles what clients send: whoever reaches the port can run code "
        "here."
    )
    try:
        policy_server.serve()
    except ConfigError as error:
        sys.exit(f"policy_server: error: {error}")


if __name__ == "__main__":
    main()
