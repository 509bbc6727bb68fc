"""``ceed-vla doctor``: what this installation has, and what to do about what it lacks.

What may be broken is tried in processes of its own, all at once and for `LIMIT_S` seconds at most: a package that
crashes or hangs is a finding, not the end of the list. (So nothing here imports torch, either.)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ceed_vla.errors import ConfigError

LIMIT_S = 17.0
SHIPPED = Path(__file__).parent / "pretrained"
ALWAYS_SHOWN = ("torch", "transformers", "lerobot", "mujoco", "gymnasium", "numpy")
PLUGIN = "lerobot_policy_ceed_vla"
LEAST_FREE_GB, WANTED_FREE_GB = 0.2, 5.0
INSTALL = "run `make install`"
RANGE = "ROS_AUTOMATIC_DISCOVERY_RANGE"

# Each prints one line of JSON. The word in front says what is tried.
_PROBES = {
    "torch": """
import json, os, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
half = bool(cuda) and torch.cuda.is_bf16_supported(including_emulation=False)
print(json.dumps({"threads": torch.get_num_threads(), "cores": os.cpu_count(), "cuda": cuda, "bfloat16": half,
    "built": torch.version.cuda}))""",
    "gl": """
import json, mujoco
xml = '<mujoco><worldbody><light pos="0 0 3"/><geom type="plane" size="1 1 .1" rgba=".9 .9 .9 1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(xml)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
print(json.dumps({"brightest": int(renderer.render().max())}))""",
    "ros": """
import json, rclpy
print(json.dumps({"rmw": rclpy.get_rmw_implementation_identifier()}))""",
    "lerobot": f"""
import json, {PLUGIN}
from lerobot.configs.policies import PreTrainedConfig
print(json.dumps({{"known": "ceed_vla" in PreTrainedConfig.get_known_choices()}}))""",
}


@dataclass
class DoctorConfig:
    """Look at this installation: one line for each thing, and what to do where it is not as it should be."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: What was looked at.
        found: What is there.
        remedy: What to do; empty where nothing is to be done.
        needed: Whether the package works without it only in part.
    """

    what: str
    found: str
    remedy: str = ""
    needed: bool = True

    @property
    def state(self) -> str:
        """One of "ok", "note" and "missing"."""
        return "ok" if not self.remedy else "missing" if self.needed else "note"


def doctor(config: DoctorConfig, console: Console | None = None) -> dict[str, Any]:
    """Print the table.

    Args:
        config: No options yet.
        console: Where it goes; the terminal if None.

    Returns:
        The findings.

    Raises:
        ConfigError: Something needed is missing.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=160, file=console.file)
    probes = _run_probes()
    checks: dict[str, Callable[[], list[Finding]]] = {
        "Python": _python,
        "packages": _packages,
        "devices": lambda: _devices(probes["torch"]),
        "rendering": lambda: _rendering(probes["gl"]),
        "LeRobot": lambda: _discovery(probes["lerobot"]),
        "ROS 2": lambda: _ros(probes["ros"]),
        "disk": _disk,
        "checkpoints": _checkpoints,
    }
    findings = [finding for what, check in checks.items() for finding in _guarded(what, check)]
    table = Table("what", "found", "", "what to do", title="ceed-vla doctor", title_justify="left")
    colors = {"ok": "green", "note": "yellow", "missing": "bold red"}
    for finding in findings:
        state = f"[{colors[finding.state]}]{finding.state}[/]"
        table.add_row(
            *(text.replace("[", r"\[") for text in (finding.what, finding.found)), state, finding.remedy
        )
    console.print(table)
    missing = [finding.what for finding in findings if finding.state == "missing"]
    if missing:
        raise ConfigError(f"Not as needed: {', '.join(missing)}; the table says what to do.")
    return {"findings": [asdict(finding) for finding in findings]}


def _guarded(what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:
        return [Finding(what, f"cannot be looked at: {_short(f'{type(error).__name__}: {error}')}", INSTALL)]


def _run_probes() -> dict[str, dict[str, Any]]:
    """What every process of `_PROBES` printed, or its "error"."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for name, script in _PROBES.items():
            with (Path(folder) / name).open("wb") as output:
                command = [sys.executable, "-c", script]
                started[name] = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
        end = time.monotonic() + LIMIT_S
        return {name: _answer(process, Path(folder) / name, end) for name, process in started.items()}


def _answer(process: subprocess.Popen[bytes], output: Path, end: float) -> dict[str, Any]:
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"error": f"no answer in {LIMIT_S:.0f} s (is the machine busy? then try again)"}
    lines = output.read_text(errors="replace").strip().splitlines()
    answers = [line for line in lines if line.startswith("{")]  # packages print remarks before and behind
    if answers and process.returncode == 0:
        return dict(json.loads(answers[-1]))
    signal = f"died of signal {-process.returncode}: " if process.returncode < 0 else ""
    return {"error": _short(signal + (lines or ["no message"])[-1])}


# ---- what is looked at ------------------------------------------------------------------------------------------


def _python() -> list[Finding]:
    found = f"{platform.python_version()}, {sys.executable}"
    fits = sys.version_info[:2] in ((3, 12), (3, 13))
    return [Finding("Python", found, "" if fits else f"3.12 or 3.13 is needed; install one and {INSTALL}")]


def _packages() -> list[Finding]:
    """Packages that decide the results, others only where their version is not supported; extras in a line each."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("ceed_vla") or ()]
    except metadata.PackageNotFoundError:
        return [Finding("ceed_vla", "runs from a folder, is not installed", INSTALL, needed=False)]
    findings, lacking = [], dict[str, list[str]]()
    for requirement in requirements:
        name, wanted = requirement.name, str(requirement.specifier)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            if name in ALWAYS_SHOWN or not fits:
                remedy = "" if fits else f"{name}{wanted} is needed; {INSTALL}"
                findings.append(Finding(name, version or "not installed", remedy))
        elif not fits:
            for extra in metadata.metadata("ceed_vla").get_all("Provides-Extra") or ():
                if requirement.marker.evaluate({"extra": extra}):
                    lacking.setdefault(extra, []).append(f"{name} {version}".strip())
    for extra, names in lacking.items():
        if extra in ("ros2", "vlm"):
            remedy = f"only for {_EXTRAS[extra]}: `pip install -e '.[{extra}]'`"
            findings.append(
                Finding(f"extra {extra}", f"lacks {_short(', '.join(names))}", remedy, needed=False)
            )
    return findings


_EXTRAS = {"ros2": "ROS 2 without a distribution of it", "vlm": "OpenVLA, pi0-FAST and image-text models"}


def _devices(probe: dict[str, Any]) -> list[Finding]:
    if "error" in probe:
        return [Finding("devices", f"torch does not run: {probe['error']}", INSTALL)]
    cpu = Finding("CPU", f"{probe['cores']} cores, torch uses {probe['threads']} threads")
    if probe["cuda"]:
        bfloat16 = "computes" if probe["bfloat16"] else "does not compute"
        return [cpu, Finding("CUDA", f"{', '.join(probe['cuda'])}; {bfloat16} in bfloat16")]
    remedy = "nothing without an NVIDIA GPU; with one, its driver" + (
        "" if probe["built"] else " and a torch for CUDA"
    )
    return [cpu, Finding("CUDA", "no device", remedy, needed=False)]


def _rendering(probe: dict[str, Any]) -> list[Finding]:
    how = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}"
    if probe.get("brightest"):
        return [Finding("rendering", f"MuJoCo renders, {how}")]
    remedy = (
        "`apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1` for MUJOCO_GL=egl, or `apt-get install -y "
        "libosmesa6` for MUJOCO_GL=osmesa"
    )
    return [Finding("rendering", f"{how}: {probe.get('error', 'the picture is black')}", remedy)]


def _discovery(probe: dict[str, Any]) -> list[Finding]:
    try:
        version = metadata.version(PLUGIN)
    except metadata.PackageNotFoundError:
        version = ""
    if version and probe.get("known"):
        return [Finding("LeRobot's tools", f"find this policy through {PLUGIN} {version}")]
    found = probe.get("error", "do not know the policy") if version else f"{PLUGIN} is not installed"
    return [
        Finding("LeRobot's tools", found, f"only for lerobot-train and lerobot-eval: {INSTALL}", needed=False)
    ]


def _ros(probe: dict[str, Any]) -> list[Finding]:
    distribution = os.environ.get("ROS_DISTRO", "")
    if "error" in probe:
        remedy = (
            "only for robots: `source /opt/ros/<distribution>/setup.bash`, or `make ros-demo` installs wheels"
        )
        return [Finding("ROS 2", probe["error"], remedy, needed=False)]
    try:
        version = f" {metadata.version('ros-rclpy')} (wheel)"
    except metadata.PackageNotFoundError:
        version = f" of {distribution}" if distribution else ""
    findings = [Finding("ROS 2", f"rclpy{version}, {probe['rmw']}")]
    domain, reach = os.environ.get("ROS_DOMAIN_ID") or "0", os.environ.get(RANGE) or "SUBNET"
    remedy = ""
    if not (domain.isdigit() and int(domain) <= 232):
        remedy = "ROS_DOMAIN_ID must be a whole number from 0 to 232"
    elif reach != "LOCALHOST":
        remedy = f"nodes of other machines in the network are found; for the simulated robot `export {RANGE}=LOCALHOST`"
    return [*findings, Finding("ROS 2 network", f"domain {domain}, range {reach}", remedy, needed=False)]


def _disk() -> list[Finding]:
    findings = []
    for what, folder in (
        ("disk here", Path.cwd()),
        ("disk for temporary files", Path(tempfile.gettempdir())),
    ):
        free = shutil.disk_usage(folder).free / 1e9
        remedy = (
            ""
            if free > WANTED_FREE_GB
            else f"make room: {WANTED_FREE_GB:.0f} GB are good for data and checkpoints"
        )
        if not os.access(folder, os.W_OK):
            remedy = "work in a folder that you may write to"
        findings.append(Finding(what, f"{free:.1f} GB free, {folder}", remedy, needed=free < LEAST_FREE_GB))
    return findings


def _checkpoints() -> list[Finding]:
    findings = []
    for name in ("teacher", "student"):
        try:
            found, remedy = f"{_weights(SHIPPED / name / 'model.safetensors')} tensors", ""
        except Exception as error:
            found, remedy = _short(str(error)), "install again from a complete copy of the repository"
        findings.append(Finding(f"checkpoint {name}", found, remedy))
    return findings


def _weights(file: Path) -> int:
    """How many tensors a complete safetensors file has."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 0 < length < size:
            raise ConfigError(f"{file.name} is no file of weights")
        header = json.loads(content.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if end != size:
        raise ConfigError(f"{file.name} has {size} bytes instead of {end}")
    return len(header)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:160]} ..."
