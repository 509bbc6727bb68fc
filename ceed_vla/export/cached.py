"""Exports of checkpoints in the user's cache. Free of torch, which only the export itself needs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceed_vla import __version__
from ceed_vla.backbones.vlm.kinds import SQUARE_IMAGES
from ceed_vla.checkpoint_files import base_path
from ceed_vla.checkpoints.manifest import read_config
from ceed_vla.decoding import DecodingConfig, named_config
from ceed_vla.edge.settings import FORMAT, MOST_GRAPH, built, check_decoding, only_exported
from ceed_vla.errors import CheckpointError, ConfigError, VerificationError, raised_as
from ceed_vla.extras import require
from ceed_vla.files import read_json, read_text
from ceed_vla.folders import CONFIG, EXPORT, base_folder, resolve_checkpoint

if TYPE_CHECKING:
    from ceed_vla.edge import EdgePolicy

logger = logging.getLogger(__name__)

KNOWN = ("compact", "vlm", "language")  # backbones that are exported without being asked
# Ends of errors that every other attempt would give, too.
REFUSALS = ("run it with torch.", "run the checkpoint with torch.", "report the checkpoint.")
MOST_EXPORTS = 20  # in the cache; the oldest ones are removed
_NO_SOURCES = ("sim", "training", "ros_nodes", "cli", "report")  # folders that decide no graph
_MOST_HEADER = 10**8  # of a safetensors file [bytes]
_PACKAGES = ("torch", "transformers", "lerobot", "onnx", "onnxscript")


def cache_folder() -> Path:
    """Folder of the exports: ``CEED_VLA_CACHE``, or ceed_vla in the user's cache.

    Raises:
        ConfigError: The user has no home.
    """
    named = os.environ.get("CEED_VLA_CACHE")
    if named:
        return Path(named) / "exports"
    base = os.environ.get("XDG_CACHE_HOME")
    with raised_as(ConfigError, "There is no home for the cache", "set CEED_VLA_CACHE."):
        return Path(base or Path.home() / ".cache") / "ceed_vla" / "exports"


def cached_policy(
    checkpoint: str | Path,
    threads: int = 0,
    decoders: Sequence[str] = (),
    discover_packages: str = "",
    pin: str = "auto",
) -> EdgePolicy:
    """Load the export of a checkpoint; a damaged one in the cache is made again.

    Args:
        checkpoint: Checkpoint folder or name.
        threads: See `EdgePolicy`.
        decoders: See `cached_export`.
        discover_packages: See `cached_export`.
        pin: See `EdgePolicy`.

    Raises:
        CheckpointError: There is no such checkpoint, or its new export is damaged.
        ConfigError: See `cached_export`; or onnxruntime cannot be imported.
        VerificationError: The new export does not give torch's tokens.
    """
    with raised_as(ConfigError, "onnxruntime cannot be imported", "install it again."):
        from ceed_vla.edge.policy import EdgePolicy

    folder = cached_export(checkpoint, decoders, discover_packages)
    damaged = folder.stat().st_ino
    try:
        return EdgePolicy(folder, threads, pin)
    except (CheckpointError, VerificationError) as error:
        logger.warning("%s is exported again. %s", checkpoint, error)
        _remove_damaged(folder, damaged)
        return EdgePolicy(cached_export(checkpoint, decoders, discover_packages), threads, pin)


def cached_export(
    checkpoint: str | Path, decoders: Sequence[str] = (), discover_packages: str = ""
) -> Path:
    """The export of a checkpoint; it is made by a process of its own if it is missing.

    Args:
        checkpoint: Checkpoint folder or name.
        decoders: Decoders that the export must run. "plan" stands for all plans of the checkpoint.
        discover_packages: Packages that the checkpoint needs, separated by commas.

    Raises:
        CheckpointError: There is no such checkpoint.
        ConfigError: The checkpoint cannot be exported, its export cannot run the decoders, what
            exports need is not installed, or the cache cannot be written.
    """
    source = resolve_checkpoint(checkpoint)
    config = read_config(source)
    _check(str(checkpoint), config, decoders)
    _check_size(source, config)
    folder = cache_folder() / _key(source)
    refusal = folder.with_name(f".{folder.name}.refused")
    if refusal.is_file():
        raise ConfigError(read_text(refusal))
    if not (folder / EXPORT).is_file():
        _check_packages(checkpoint)
        try:
            _export_once(source, folder, discover_packages)
            _remove_oldest(folder.parent)
        except ConfigError as error:
            if str(error).lower().endswith(REFUSALS):
                with suppress(OSError):  # then the next attempt loads the model again
                    refusal.write_text(str(error), encoding="utf-8")
            raise
        except OSError as error:
            raise _not_writable(folder.parent, error) from error
    with suppress(OSError):  # a cache that may only be read
        os.utime(folder)  # as used now
    return folder


def _not_writable(cache: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"The cache of exports {cache} cannot be written ({error.strerror}); name another folder "
        "with CEED_VLA_CACHE."
    )


def _remove_damaged(folder: Path, damaged: int) -> None:
    """Remove an export that cannot be loaded, unless another process has replaced it meanwhile.

    `damaged` is the inode of its folder.
    """
    try:
        with _locked(folder):
            if folder.exists() and folder.stat().st_ino == damaged:
                _remove(folder)
    except OSError as error:
        raise _not_writable(folder.parent, error) from error


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the lock of an export; yields its file descriptor."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _check_packages(checkpoint: str | Path) -> None:
    """Raise `ConfigError` if packages are missing that an export needs."""
    if find_spec("torch") is None:
        raise ConfigError(
            f"{checkpoint} has no export yet, and torch is not installed, which exports need; "
            "export it on another machine with `ceed-vla export`, and name that folder."
        )
    require(f"{checkpoint} has no export yet, which", "export")


def _export_once(checkpoint: Path, folder: Path, discover_packages: str) -> None:
    """Export a checkpoint, unless another process does so first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        if (folder / EXPORT).is_file():
            return
        _remove(folder)  # what an interrupted removal left
        for rest in folder.parent.glob(f".{folder.name}.*/"):  # of exports that were killed
            shutil.rmtree(rest, ignore_errors=True)
        logger.info("Exporting %s to %s, once; this may take a minute.", checkpoint, folder)
        _export(checkpoint, folder, discover_packages, lock)
        if _key(checkpoint) != folder.name:
            _remove(folder)
            raise ConfigError(
                f"{checkpoint} or ceed_vla was changed while it was exported; load it again."
            )


def _check(checkpoint: str, config: Mapping[str, Any], decoders: Sequence[str]) -> None:
    """Raise `ConfigError` if a checkpoint's config.json shows that its export cannot run."""
    parts = [config.get(name) for name in ("backbone", "action_tokens", "decoding", "decodings")]
    backbone, tokens, decoding, own = (p if isinstance(p, dict) else {} for p in parts)
    check_tokens(checkpoint, str(tokens.get("type")))
    kind = str(backbone.get("type"))
    if kind not in KNOWN:
        raise ConfigError(
            f"{checkpoint} has the backbone {kind}; only {', '.join(KNOWN)} are exported "
            "without being asked. Run `ceed-vla export`, and name the export as the checkpoint."
        )
    if kind == "vlm":
        _check_vlm(checkpoint, backbone)
    plans = [name for name in own if re.fullmatch("plan.+", name)]
    for name in decoders:
        for each in plans if name == "plan" and plans else [name]:
            with only_exported():
                named = named_config(each, built(DecodingConfig, decoding, {}), own)
            check_decoding(named)


def _files(checkpoint: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that decide an export: of the checkpoint, and of the model that it refers to."""
    path = base_path(config)
    folders = [checkpoint, *([base_folder(checkpoint, path)] if path else [])]
    return [
        file
        for folder in folders
        for file in sorted(folder.glob("*"))
        if file.suffix in (".json", ".safetensors")
    ]


def _check_size(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for weights that do not fit into a graph."""
    files = [file for file in _files(checkpoint, config) if file.suffix == ".safetensors"]
    backbone = config["backbone"]
    used = backbone.get("layers") if backbone.get("type") == "language" else 0
    layers = used if isinstance(used, int) else 0
    size = 4 * sum(_numbers(file, layers) for file in files)
    if size > MOST_GRAPH:
        raise ConfigError(
            f"{checkpoint} has {size / 1e9:.1f} GB of weights; at most {MOST_GRAPH / 1e9:.1f} are "
            "exported without being asked. Run it with torch."
        )


def _numbers(file: Path, layers: int) -> int:
    """Numbers in a safetensors file; only those of the first `layers` layers, if these are set."""
    with (
        raised_as(CheckpointError, f"The weights {file} do not load", "copy them again."),
        file.open("rb") as content,
    ):
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(min(length, _MOST_HEADER)))
        return sum(
            math.prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__" and not (layers and _layer(name) >= layers)
        )


def _layer(name: str) -> int:
    """The layer of a weight; -1 for a weight outside the layers."""
    match = re.search(r"\blayers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def check_tokens(checkpoint: str, tokens: str) -> None:
    """Raise `ConfigError` unless policies with these action tokens can be exported."""
    if tokens != "uniform":
        raise ConfigError(
            f"{checkpoint} has {tokens} action tokens; exports support uniform ones. Run it with "
            "torch."
        )


def _check_vlm(checkpoint: str, backbone: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an image-text-to-text model that cannot be exported."""
    with raised_as(CheckpointError, f"The backbone of {checkpoint} is damaged", "copy it again."):
        kind = str(json.loads(str(backbone.get("architecture"))).get("model_type"))
    if kind not in SQUARE_IMAGES or backbone.get("dtype", "float32") != "float32":
        raise ConfigError(
            f"{checkpoint} has a {kind} of {backbone.get('dtype')}; exports support "
            f"{' and '.join(SQUARE_IMAGES)} of float32. Run it with torch."
        )


def _key(checkpoint: Path) -> str:
    """Hash of everything that decides an export."""
    digest = hashlib.sha256(f"{__version__} {FORMAT} {_machine()}".encode())
    package = Path(__file__).parents[1]
    sources = [
        file
        for file in sorted(package.rglob("*.py"))
        if file.relative_to(package).parts[0] not in _NO_SOURCES
    ]
    for file in (*sources, *_files(checkpoint, read_json(checkpoint / CONFIG))):
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _machine() -> str:
    """What else decides the tokens of an export: the processor, and versions of packages."""
    import onnxruntime

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            kinds.add(f"{package} {version(package)}")
    return f"{platform.machine()} {sorted(kinds)} {onnxruntime.__version__}"


def _export(checkpoint: str | Path, folder: Path, discover_packages: str, lock: int) -> None:
    """Run ``ceed-vla export`` as a process; raise `ConfigError` with its message if it fails.

    The process inherits the `lock`, and holds it if this one is killed.
    """
    command = [sys.executable, "-m", "ceed_vla.cli", "export"]
    command += [f"--policy.path={checkpoint}", f"--output_dir={folder}"]
    if discover_packages:
        command += [f"--discover_packages_path={discover_packages}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command,
        env=environment,
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        mark = "ceed-vla export: error: "
        errors = [line for line in done.stderr.splitlines() if line.startswith(mark)]
        if errors:
            raise ConfigError(errors[-1].removeprefix(mark))
        killed = ", killed, perhaps for memory" if done.returncode < 0 else ""
        raise ConfigError(
            f"The export of {checkpoint} ended with exit code {done.returncode}{killed}; export it "
            "with `ceed-vla export` to see why."
        )


def _remove(folder: Path) -> None:
    """Remove an export: it disappears at once, its files then."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _remove_oldest(cache: Path) -> None:
    """Keep the newest `MOST_EXPORTS` exports."""
    exports = sorted(
        (f for f in cache.iterdir() if (f / EXPORT).is_file()), key=lambda f: f.stat().st_mtime
    )
    for folder in exports[:-MOST_EXPORTS]:
        _remove(folder)
