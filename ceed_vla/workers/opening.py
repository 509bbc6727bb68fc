"""Where the work of a command is done, by its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.fields import Checked, ranged, short
from ceed_vla.workers.interface import InProcess, Make, Workers
from ceed_vla.workers.local import LocalCrew
from ceed_vla.workers.schedule import Scheduled

MOST = "[1, 64]"  # range of the setting `workers`


@dataclass
class ClusterConfig(Checked, prefix="--cluster."):
    """Options of a Ray cluster.

    Attributes:
        address: Where the work is done: local starts Ray on this machine, auto joins a running
            cluster (the address in RAY_ADDRESS, or one on this machine), HOST:PORT joins that one.
            Empty: processes of this machine (`--workers`). Needs the extra `cluster`.
        workers: Workers, with one CPU each; 0: as many as the cluster has CPUs.
        timeout_s: Time without a result [s] after which a worker counts as hanging and its work
            goes to another one.
    """

    address: str = ""
    workers: int = ranged(0, "[0, 10000]")
    timeout_s: float = ranged(900.0, "[1, 1e6]")

    def __post_init__(self) -> None:
        super().__post_init__()
        host, _, port = self.address.rpartition(":")
        if self.address not in ("", "local", "auto") and not (host and port.isdecimal()):
            raise ConfigError(
                f"--cluster.address is {short(self.address)}; it must be local, auto or HOST:PORT, "
                "such as 10.0.0.1:6379."
            )
        if self.workers and not self.address:
            raise ConfigError(
                f"--cluster.workers is {self.workers}, and no cluster is chosen. Set "
                "--cluster.address, or use --workers for processes of this machine."
            )

    @property
    def chosen(self) -> bool:
        """Whether the work is done by a cluster."""
        return bool(self.address)


def open_workers(
    count: int,
    cluster: ClusterConfig,
    make: Make,
    *arguments: Any,
    checkpoints: Sequence[str] = (),
) -> Workers:
    """Start workers; each calls ``make(*arguments)`` and gets the function that it runs.

    Args:
        count: Processes of this machine; 1: this process does the work. Without effect if a cluster
            is chosen.
        cluster: The cluster, if any.
        make: Makes the function; pickled by its name.
        arguments: Arguments of `make`; pickled.
        checkpoints: Checkpoints that `make` loads by these paths. Nodes of a cluster receive them;
            models that they refer to must be there under the same absolute path.

    Raises:
        ConfigError: The cluster cannot be reached, or has no node that fits.
    """
    if cluster.chosen:
        from ceed_vla.workers.cluster import RayCrew  # Ray is an extra

        crew = RayCrew(cluster.address, cluster.workers, make, arguments, checkpoints)
        return Scheduled(crew, cluster.timeout_s)
    if count == 1:
        return InProcess(make, arguments)
    return Scheduled(LocalCrew(count, make, arguments))
