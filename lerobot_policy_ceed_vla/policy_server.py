"""LeRobot's asynchronous `PolicyServer` for this policy: python -m lerobot_policy_ceed_vla.policy_server --port=8080

LeRobot's own command imports no plugins and takes only the policies on its list. What clients send is unpickled:
whoever reaches the port can run code here.
"""

import logging

from lerobot.async_inference import constants, policy_server

import lerobot_policy_ceed_vla  # noqa: F401  (registers the policy)

constants.SUPPORTED_POLICIES.append("ceed_vla")


def main() -> None:
    """Serve until interrupted."""
    logging.warning("LeRobot's protocol unpickles what clients send: keep --host=127.0.0.1, or a network of your own.")
    policy_server.serve()


if __name__ == "__main__":
    main()
