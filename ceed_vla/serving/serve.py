"""``ceed-vla serve``: serve a policy to clients over a network."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import signal
import ssl
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ceed_vla import __version__
from ceed_vla.discovery import discovered
from ceed_vla.errors import ConfigError, raised_as
from ceed_vla.fields import THREADS, Checked, chosen, ranged
from ceed_vla.files import read_text
from ceed_vla.folders import EXPORT, is_export, resolve_served
from ceed_vla.scheduling import Placement
from ceed_vla.serving.data_ranges import ACTION, read_ranges
from ceed_vla.serving.predictor import Predictor
from ceed_vla.serving.predictor_loading import declared_spec
from ceed_vla.serving.predictor_types import ENGINES, PolicySpec, PredictorSettings
from ceed_vla.serving.protocols import WireProtocol, mapped_keys

PROTOCOLS = ("openpi", "vla_eval")  # each the module of this name, whose `PROTOCOL` is the class
SHORTEST_KEY = 16  # characters


@dataclass
class ServeConfig(Checked):
    """Settings of ``ceed-vla serve``.

    Attributes:
        policy_path: Checkpoint folder of any LeRobot policy, an export, or "student" or "teacher".
        protocol: Wire protocol of the clients.
        host: Address to listen on; any other than this machine's own needs an API key.
        port: Port; 0 for a free one.
        map: Keys of the clients' observations as KEY=FEATURE pairs, separated by commas; KEY= is
            ignored. Features without a pair have their own name.
        control_rate: Steps of the robot per second [Hz], which robots compare with their own; 0 for
            that of the checkpoint's training data, if it is known.
        action_names: Names of the action's dimensions, separated by commas; empty for those of the
            training data, if they are known.
        units: Their units, separated by commas, or one for all: rad, deg, m, ...; empty if unknown.
        decoding: Decoder name, unless a request names another one.
        chunk_deadline: Time limit by which the decoding plan selects among the plans [s]; 0 for one
            step of the robot, or 1 s if its rate is not known.
        engine: Engine of the policy: eager, compiled, edge (an export), or auto (edge on a CPU if
            the policy can be exported, else eager).
        threads: CPU threads of inference; 0 for one per core.
        pin: Cores of these threads: auto, none, or one core for each thread, such as 2,3.
        device: Device of the policy.
        api_key_file: File with the key that clients must send; empty for none.
        certificate: TLS certificate (PEM); empty for no TLS.
        private_key: Its private key (PEM).
        max_message_mb: Largest message of a client [MB].
        max_connections: Open connections.
        max_rate: Requests per second of a connection; faster ones wait.
        max_batch: Requests of different clients that are decoded together at most, if they have the
            same decoding and steps; for CEED-VLA checkpoints with the engine eager.
        max_wait_ms: Time that the first of them waits for others [ms].
        latency_ms: Time from the arrival of a request before which its chunk is not sent [ms], to
            measure what latency costs.
    """

    policy_path: str
    protocol: str = chosen("openpi", PROTOCOLS)
    host: str = "127.0.0.1"
    port: int = ranged(8000, "[0, 65535]")
    map: str = ""
    control_rate: float = ranged(0.0, "[0, 10000]")
    action_names: str = ""
    units: str = ""
    decoding: str = "ceed"
    chunk_deadline: float = ranged(0.0, "[0, 3600]")
    engine: str = chosen("auto", ENGINES)
    threads: int = ranged(1, THREADS)
    pin: str = "auto"
    device: str = "cpu"
    api_key_file: str = ""
    certificate: str = ""
    private_key: str = ""
    max_message_mb: float = ranged(16.0, "(0, 1024]")
    max_connections: int = ranged(64, "[1, 10000]")
    max_rate: float = ranged(200.0, "(0, 100000]")
    max_batch: int = ranged(1, "[1, 256]")
    max_wait_ms: float = ranged(2.0, "[0, 1000]")
    latency_ms: float = ranged(0.0, "[0, 60000]")


def serve(config: ServeConfig) -> str:
    """Serve a policy until SIGTERM or SIGINT; returns a summary.

    Raises:
        ConfigError: The address is open to others without a key, a file is missing, or msgpack or
            websockets is not installed.
        CheckpointError: The policy cannot be loaded.
    """
    missing = "pip install msgpack websockets"
    with raised_as(ConfigError, "The server cannot be imported", missing):
        from ceed_vla.serving.server import Limits, PolicyServer

    limits = Limits(
        message_bytes=int(config.max_message_mb * 1e6),
        connections=config.max_connections,
        rate=config.max_rate,
        batch=config.max_batch,
        batch_wait_s=1e-3 * config.max_wait_ms,
        key=_key(config),
    )
    tls = _tls(config)
    resolved = str(resolve_served(config.policy_path))
    declared = _declared(config, declared_spec(resolved))
    protocol = _protocol(config, declared)
    step = 1.0 / declared.control_rate if declared.control_rate else 1.0
    settings = PredictorSettings(
        resolved,
        discover_packages=",".join(discovered()),
        decoding=config.decoding,
        chunk_deadline=config.chunk_deadline or step,
        threads=config.threads or Placement(0, config.pin).threads,
        pin=config.pin,
        device=config.device,
        engine="eager" if config.max_batch > 1 and config.engine == "auto" else config.engine,
    )

    def load() -> Predictor:
        predictor = Predictor(settings)
        # Clients need not know where it is on this machine.
        predictor.spec = replace(
            predictor.spec,
            checkpoint=Path(config.policy_path).name,
            control_rate=declared.control_rate,
            action_names=declared.action_names,
            units=declared.units,
        )
        return predictor

    async def main() -> None:
        server = PolicyServer(load, protocol, limits, tls, 1e-3 * config.latency_ms)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        scheme = "ws" if tls is None else "wss"

        def opened(port: int) -> None:
            address = url(scheme, config.host, port)
            print(f"Listening on {address} ({config.protocol})", flush=True)

        try:
            await server.run(config.host, config.port, opened)
        except OSError as error:
            raise ConfigError(
                f"{config.host}:{config.port} cannot be listened on ({error.strerror}); name "
                "another one."
            ) from error

    asyncio.run(main())
    return "Stopped."


def url(scheme: str, host: str, port: int) -> str:
    """Return the address of a server for its clients; one of IPv6 stands in brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _protocol(config: ServeConfig, declared: PolicySpec) -> WireProtocol:
    """The protocol that the settings name."""
    kind = import_module(f"ceed_vla.serving.{config.protocol}").PROTOCOL
    keys = mapped_keys(config.map, declared, kind.options)
    metadata: dict[str, Any] = {
        "server": f"ceed_vla {__version__}",
        "checkpoint_hash": _hash(config.policy_path),
        "settings_hash": _settings_hash(resolve_served(config.policy_path)),
        "latency_ms": config.latency_ms,
    }
    lengths = {**declared.states, ACTION: declared.action_dim}
    protocol: WireProtocol = kind(keys, metadata, read_ranges(declared.checkpoint, lengths))
    return protocol


def _declared(config: ServeConfig, spec: PolicySpec) -> PolicySpec:
    """The specification with what the settings say of its actions."""
    names = _listed(config.action_names)
    units = _listed(config.units)
    if len(units) == 1:
        units *= spec.action_dim
    for flag, values in (("action_names", names), ("units", units)):
        if values and len(values) != spec.action_dim:
            raise ConfigError(
                f"{flag} has {len(values)} entries; the policy has {spec.action_dim} action "
                "dimensions."
            )
    return replace(
        spec,
        control_rate=config.control_rate or spec.control_rate,
        action_names=names or spec.action_names,
        units=units or spec.units,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _hash(path: str) -> str:
    """Hash of a checkpoint's or an export's weights."""
    if is_export(path):
        return hashlib.sha256((Path(path) / EXPORT).read_bytes()).hexdigest()[:12]
    from ceed_vla.checkpoints import weights_hash

    return weights_hash(path)


def _settings_hash(folder: Path) -> str:
    """Hash of a checkpoint's or an export's files beside the weights."""
    files = sorted({*folder.glob("*.json"), *folder.glob("policy_*processor*.safetensors")})
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def _key(config: ServeConfig) -> str:
    """The API key; "" for none."""
    if not config.api_key_file:
        if not _is_loopback(config.host):
            raise ConfigError(
                f"host is {config.host}, which other machines can reach; set --api_key_file to a "
                "file with a key that clients must send."
            )
        return ""
    key = read_text(Path(config.api_key_file)).strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{config.api_key_file} has a key of {len(key)} characters; it must have at least "
            f"{SHORTEST_KEY}, all printable ASCII without spaces."
        )
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(config: ServeConfig) -> ssl.SSLContext | None:
    """The TLS settings; None without a certificate."""
    if bool(config.certificate) != bool(config.private_key):
        raise ConfigError("certificate and private_key must be set together.")
    if not config.certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    what = f"{config.certificate} and {config.private_key} cannot be used"
    with raised_as(ConfigError, what, "give a certificate and its key as PEM files."):
        context.load_cert_chain(config.certificate, config.private_key)
    return context
