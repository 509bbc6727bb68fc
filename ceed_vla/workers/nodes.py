"""The nodes of a Ray cluster: connecting, and which of them give the same episodes as this one."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.extras import require
from ceed_vla.workers import node_facts

logger = logging.getLogger(__name__)

CONNECT_S = 5  # for a cluster to accept a connection [s]
PROBE_S = 60  # for a node to answer [s]
# Environment variables that workers need as this process has them.
PASSED = (
    "HF_HUB_OFFLINE",
    "MUJOCO_GL",
    "MUJOCO_EGL_DEVICE_ID",
    "EGL_PLATFORM",
    "PYTHONWARNINGS",
)
# Ray's own settings; they must be set before it is imported.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # print nothing of other processes
}


@dataclass(frozen=True)
class Node:
    """A node that fits.

    Attributes:
        id: Ray's identifier.
        name: Its name, for messages.
        cpus: Number of its CPUs.
    """

    id: str
    name: str
    cpus: int


def connect(address: str, workers: int) -> Any:
    """Connect this process to a cluster, unless it is connected, and return the module ``ray``.

    Args:
        address: "local", "auto" or HOST:PORT.
        workers: CPUs of a cluster that is started, which is local; 0: all of this machine.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not accept the connection.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _use_token()
    require(f"--cluster.address {address}", "cluster")
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"runtime_env": {"env_vars": _variables()}}
    if address == "local":
        options |= {"num_cpus": workers or None, "include_dashboard": False}
    elif address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if ":" in address and "://" not in address:
        _check_listening(address)
    if address != "local":
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(CONNECT_S))
    with _handlers_stay(), _without_messages():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:
            raise ConfigError(
                f"The Ray cluster {address} cannot be joined: {_explained(error)}"
            ) from error
    return ray


def _explained(error: BaseException) -> str:
    """Reason and remedy of a failed connection."""
    texts = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        texts.append(str(error))
    if any("InvalidAuthToken" in text or "auth_token" in text for text in texts):
        return (
            "it refuses the token of this machine, or this machine has none. Set RAY_AUTH_TOKEN "
            "to the head's token, which `ray get-auth-token` prints there."
        )
    reason = texts[-1].strip().splitlines()[0][:300]
    return (
        f"{reason} Start it with `ray start --head`, correct --cluster.address (or RAY_ADDRESS), "
        "and install the same versions of Ray and Python on both sides."
    )


@contextmanager
def _without_messages() -> Iterator[None]:
    """Discard what libraries write to standard error: Ray repeats a failure every second."""
    sys.stderr.flush()
    own = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)


@contextmanager
def _handlers_stay() -> Iterator[None]:
    """Keep this program's own handler of SIGTERM, which Ray replaces."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(own) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


def _use_token() -> None:
    """Use the token of this user, if there is one: Ray itself uses it only where it starts."""
    default = Path.home() / ".ray" / "auth_token"
    known = default.exists() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if known and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"


def _variables() -> dict[str, str]:
    """Environment variables of the workers."""
    found = {name: os.environ[name] for name in PASSED if name in os.environ}
    return {**found, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}


def _check_listening(address: str) -> None:
    """Raise `ConfigError` if nothing listens at HOST:PORT; Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:  # the last one from RAY_ADDRESS
        raise ConfigError(
            f"No Ray cluster listens at {address} ({error}). Start it there with `ray start "
            "--head`, or correct --cluster.address, or RAY_ADDRESS for auto."
        ) from error


class Nodes:
    """The nodes of a cluster that fit.

    Args:
        ray: The connected module.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._own = node_facts.facts()
        self._known: dict[str, Node | None] = {}  # None: it does not fit
        ray.cloudpickle.register_pickle_by_value(node_facts)
        self._probe = ray.remote(num_cpus=0)(node_facts.facts)

    def fitting(self) -> list[Node]:
        """The running nodes that fit; the first time that one does not, a warning says why."""
        running = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
        new = {
            name: self._probe.options(scheduling_strategy=self.only_on(name)).remote()
            for name in running
            if name not in self._known
        }
        for name, reference in new.items():
            self._known[name] = self._checked(running[name], reference)
        return [node for name in running if (node := self._known[name]) is not None]

    def only_on(self, name: str) -> Any:
        """Ray's strategy for work that runs on this node or not at all."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(name, soft=False)

    def forget_if_gone(self, node: Node) -> None:
        """Use a node no longer if it does not answer."""
        try:
            reference = self._probe.options(scheduling_strategy=self.only_on(node.id)).remote()
            self._ray.get(reference, timeout=PROBE_S)
        except self._ray.exceptions.RayError:
            self._known[node.id] = None

    def _checked(self, found: Mapping[str, Any], reference: Any) -> Node | None:
        """The node, if it answers and fits."""
        name = found["NodeName"]
        if name == found["NodeManagerAddress"]:
            name = f"{found['NodeManagerHostname']} ({name})"
        try:
            theirs = self._ray.get(reference, timeout=PROBE_S)
        except self._ray.exceptions.RayError as error:
            logger.warning("Node %s is not used: it does not answer (%s).", name, error)
            return None
        if differences := [
            f"{key} {theirs.get(key, 'none')} instead of {value}"
            for key, value in self._own.items()
            if value != node_facts.NONE and theirs.get(key) != value
        ]:
            logger.warning(
                "Node %s is not used: it has %s. Install what this machine has.",
                name,
                ", ".join(differences),
            )
            return None
        return Node(found["NodeID"], name, int(found["Resources"].get("CPU", 0)))
