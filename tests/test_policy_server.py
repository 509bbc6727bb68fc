"""LeRobot's policy server, whose protocol unpickles data: it listens on this machine only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1", "[::1]"])
def test_this_machine_alone(host: str) -> None:
    from lerobot.async_inference.configs import PolicyServerConfig

    from lerobot_policy_ceed_vla.policy_server import PolicyServer

    assert PolicyServer(PolicyServerConfig(host=host)).config.host == host


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "[::]",
        "",
        "*",
        "192.168.1.5",
        "robot.local",
        "localhost.evil",
        "127.0.0.1,0.0.0.0",
        "::ffff:10.0.0.1",
        "unix:/tmp/x",
        "2130706433",
    ],
)
def test_where_others_reach_it(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.async_inference.configs import PolicyServerConfig

    from ceed_vla.errors import ConfigError
    from lerobot_policy_ceed_vla.policy_server import PolicyServer

    with pytest.raises(ConfigError, match="--insecure"):
        PolicyServer(PolicyServerConfig(host=host))
    monkeypatch.setattr(PolicyServer, "insecure", True)
    assert PolicyServer(PolicyServerConfig(host=host)).config.host == host


@pytest.mark.parametrize("form", ["equals", "words", "file", "file in words"])
def test_however_the_host_is_given(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot_policy_ceed_vla import policy_server

    (tmp_path / "server.yaml").write_text("host: 0.0.0.0\nport: 8123\n")
    words = {
        "equals": ["--host=0.0.0.0"],
        "words": ["--host", "0.0.0.0"],
        "file": [f"--config_path={tmp_path / 'server.yaml'}"],
        "file in words": ["--config_path", str(tmp_path / "server.yaml")],
    }[form]
    monkeypatch.setattr(sys, "argv", ["policy_server", *words])
    with pytest.raises(SystemExit, match="other machines can reach"):
        policy_server.main()


def test_who_insists_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot_policy_ceed_vla import policy_server

    served = []
    monkeypatch.setattr(policy_server.policy_server, "serve", lambda: served.append(sys.argv[1:]))
    monkeypatch.setattr(policy_server.PolicyServer, "insecure", False)
    monkeypatch.setattr(sys, "argv", ["policy_server", "--insecure", "--host=0.0.0.0"])
    policy_server.main()
    assert policy_server.PolicyServer.insecure
    assert served == [["--host=0.0.0.0"]]  # flags of LeRobot's parser
