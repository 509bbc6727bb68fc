"""``ceed-vla doctor``: report what this installation has, and how to fix what it lacks.

Each package is probed in a separate process, in parallel, for at most `LIMIT_S` seconds. If a
package crashes or hangs, that is one finding, and the other checks still run. For the same reason
this module does not import torch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ceed_vla import extras
from ceed_vla.errors import ConfigError
from ceed_vla.extras import EXTRAS
from ceed_vla.folders import PRETRAINED

LIMIT_S = 90.0  # a first start compiles thousands of modules of torch, transformers and LeRobot
SHIPPED = Path(__file__).parent / "pretrained"
ALWAYS_SHOWN = ("torch", "transformers", "lerobot", "mujoco", "gymnasium", "numpy")
PLUGIN = "lerobot_policy_ceed_vla"
LEAST_FREE_GB, WANTED_FREE_GB = 0.2, 5.0
LATE = (
    "run `ceed-vla doctor` again when the machine is idle: the first start after an installation "
    "is slow, later ones are not; if it stays slow, a package hangs"
)
RANGE = "ROS_AUTOMATIC_DISCOVERY_RANGE"

# What is tested -> a script that prints one line of JSON.
_PROBES = {
    "torch": (
        """import json, os, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
cuda = [torch.cuda.get_device_name(i) for i in range(count)]
half = bool(cuda) and torch.cuda.is_bf16_supported(including_emulation=False)
print(json.dumps({"threads": torch.get_num_threads(), "cores": os.cpu_count(), "cuda": cuda,
    "bfloat16": half,
    "built": torch.version.cuda}))"""
    ),
    "gl": (
        """import json, mujoco
plane = '<geom type="plane" size="1 1 .1" rgba=".9 .9 .9 1"/>'
xml = f'<mujoco><worldbody><light pos="0 0 3"/>{plane}</worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(xml)
data, renderer = mujoco.MjData(model), mujoco.Renderer(model, 32, 32)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
print(json.dumps({"brightest": int(renderer.render().max())}))"""
    ),
    "ros": (
        "import json, rclpy; print(json.dumps({'rmw': rclpy.get_rmw_implementation_identifier()}))"
    ),
    "lerobot": (
        f"""import json, {PLUGIN}
from lerobot.configs.policies import PreTrainedConfig
print(json.dumps({{"known": "ceed_vla" in PreTrainedConfig.get_known_choices()}}))"""
    ),
}


@dataclass
class DoctorConfig:
    """Check this installation: one line for each item, and a remedy for each problem."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str  # the item
    found: str
    remedy: str = ""  # empty if nothing needs to be done
    needed: bool = True  # whether a problem is an error rather than a note

    @property
    def state(self) -> str:
        return "ok" if not self.remedy else "missing" if self.needed else "note"


def doctor(config: DoctorConfig, console: Console | None = None) -> dict[str, Any]:
    """Check the installation, print the table on `console`, and return the findings.

    Raises:
        ConfigError: A needed item is missing or broken.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=160, file=console.file)
    with ThreadPoolExecutor() as pool:
        probes = dict(zip(_PROBES, pool.map(_run_probe, _PROBES.values()), strict=True))
    checks = [_python(), _packages(), _devices(probes["torch"]), _rendering(probes["gl"])]
    checks += [_discovery(probes["lerobot"]), _ros(probes["ros"]), _disk(), _checkpoints()]
    findings: list[Finding] = []
    for check in checks:  # generators: each runs here, so that its exception is caught here
        try:
            findings += check
        except Exception as error:
            found = f"cannot be checked: {_short(f'{type(error).__name__}: {error}')}"
            findings.append(
                Finding(getattr(check, "__name__", "").strip("_"), found, extras.again())
            )
    table = Table("what", "found", "", "what to do", title="ceed-vla doctor", title_justify="left")
    colors = {"ok": "green", "note": "yellow", "missing": "bold red"}
    for one in findings:
        table.add_row(
            Text(one.what), Text(one.found), Text(one.state, colors[one.state]), Text(one.remedy)
        )
    console.print(table)
    if missing := [finding.what for finding in findings if finding.state == "missing"]:
        raise ConfigError(f"Missing or broken: {', '.join(missing)}; the table lists the remedies.")
    return {"findings": [asdict(finding) for finding in findings]}


def _run_probe(script: str) -> dict[str, Any]:
    """Run `script` in a process; return the JSON that it printed, or its "error"."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    with tempfile.TemporaryFile() as file:  # a pipe would also wait for the process's children
        try:
            run = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return {
                "error": f"no answer in {LIMIT_S:.0f} s; slow, not necessarily broken",
                "late": True,
            }
        file.seek(0)
        lines = file.read().decode(errors="replace").strip().splitlines()
    # packages may print other lines before and after it
    answers = [line for line in lines if line.startswith("{")]
    if answers and run.returncode == 0:
        return dict(json.loads(answers[-1]))
    signal = f"died of signal {-run.returncode}: " if run.returncode < 0 else ""
    return {"error": _short(signal + (lines or ["no message"])[-1])}


def _remedy(probe: dict[str, Any], remedy: str) -> str:
    """The remedy for a failed `probe`: `LATE` after a timeout, else `remedy`."""
    return LATE if probe.get("late") else remedy


def _version(package: str) -> str:
    """Version of a package; empty if it is not installed."""
    return next((found.version for found in metadata.distributions(name=package)), "")


def _python() -> Generator[Finding]:
    remedy = (
        ""
        if sys.version_info[:2] in ((3, 12), (3, 13))
        else "3.12 or 3.13 is needed; install one, and then this package again"
    )
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}", remedy)


def _packages() -> Generator[Finding]:
    """Installed packages and extras.

    Packages that affect results are listed if they are installed, others only in an unsupported
    version. Every extra has a line.
    """
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("ceed_vla") or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            "ceed_vla", "runs from a folder and is not installed", extras.again(), needed=False
        )
        return
    unfit: dict[str, list[str]] = {}  # extra -> packages of the wrong version, or that it lacks
    shown = set()
    for requirement in requirements:
        name, marker = requirement.name, requirement.marker
        version = _version(name)
        fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
        always = marker is None or marker.evaluate({"extra": ""})
        named = () if always else EXTRAS
        those = [one for one in named if marker and marker.evaluate({"extra": one})]
        decides = name in ALWAYS_SHOWN and bool(version) and bool(those)
        if name not in shown and (decides or (always and (name in ALWAYS_SHOWN or not fits))):
            shown.add(name)
            advice = f"{name}{requirement.specifier} is needed; {extras.again(*those[:1])}"
            yield Finding(name, version or "not installed", "" if fits else advice)
        for extra in () if fits else those:
            unfit.setdefault(extra, []).append(f"{name} {version}".strip())
    for extra, about in EXTRAS.items():
        if not any(map(extras.installed, about.modules)):
            found, advice = "not installed", f"only for {about.purpose}: {extras.remedy(extra)}"
        elif extra in unfit:
            found = f"lacks {_short(', '.join(unfit[extra]))}"
            advice = f"for {about.purpose}: {extras.again(extra)}"
        else:
            found, advice = about.purpose, ""
        yield Finding(f"extra {extra}", found, advice, needed=False)


def _devices(probe: dict[str, Any]) -> Generator[Finding]:
    if extras.lacks("policy"):
        return
    if "error" in probe:
        advice = _remedy(probe, extras.again("policy"))
        yield Finding("devices", f"torch does not run: {probe['error']}", advice)
        return
    yield Finding("CPU", f"{probe['cores']} cores, torch uses {probe['threads']} threads")
    if probe["cuda"]:
        bfloat16 = "computes" if probe["bfloat16"] else "does not compute"
        yield Finding("CUDA", f"{', '.join(probe['cuda'])}; {bfloat16} in bfloat16")
    else:
        remedy = (
            "nothing without an NVIDIA GPU; with one, its "
            f"driver{'' if probe['built'] else ' and a torch for CUDA'}"
        )
        yield Finding("CUDA", "no device", remedy, needed=False)


def _rendering(probe: dict[str, Any]) -> Generator[Finding]:
    if extras.lacks("sim"):
        return
    how = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}"
    remedy = (
        "`apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1` (MUJOCO_GL=egl) or "
        "libosmesa6 (osmesa)"
    )
    if probe.get("brightest"):
        yield Finding("rendering", f"MuJoCo renders, {how}")
    else:
        yield Finding(
            "rendering",
            f"{how}: {probe.get('error', 'the picture is black')}",
            _remedy(probe, remedy),
        )


def _discovery(probe: dict[str, Any]) -> Generator[Finding]:
    if extras.lacks("policy"):
        return
    version = _version(PLUGIN)
    install = extras.again() if extras.SETUP.is_file() else f"pip install {PLUGIN}"
    advice = f"only for lerobot-train and lerobot-eval: {install}"
    if version and probe.get("known"):
        yield Finding("LeRobot's tools", f"find this policy through {PLUGIN} {version}")
    else:
        found = (
            probe.get("error", "do not find the policy")
            if version
            else f"{PLUGIN} is not installed"
        )
        yield Finding(
            "LeRobot's tools", found, _remedy(probe, advice) if version else advice, needed=False
        )


def _ros(probe: dict[str, Any]) -> Generator[Finding]:
    if "error" in probe:
        advice = (
            "only for robots: `source /opt/ros/<distribution>/setup.bash`, or "
            f"{extras.remedy('ros2')} for wheels"
        )
        yield Finding("ROS 2", probe["error"], _remedy(probe, advice), needed=False)
        return
    wheel = _version("ros-rclpy")
    distribution = os.environ.get("ROS_DISTRO")
    version = f" {wheel} (wheel)" if wheel else f" of {distribution}" if distribution else ""
    yield Finding("ROS 2", f"rclpy{version}, {probe['rmw']}")
    domain = os.environ.get("ROS_DOMAIN_ID") or "0"
    reach = os.environ.get(RANGE) or "SUBNET"
    remedy = ""
    if not (domain.isdigit() and int(domain) <= 232):
        remedy = "ROS_DOMAIN_ID must be a whole number from 0 to 232"
    elif reach != "LOCALHOST":
        remedy = (
            "nodes of other machines in the network are found; for the simulated robot `export "
            f"{RANGE}=LOCALHOST`"
        )
    yield Finding("ROS 2 network", f"domain {domain}, range {reach}", remedy, needed=False)


def _disk() -> Generator[Finding]:
    for what, folder in (
        ("disk here", Path.cwd()),
        ("disk for temporary files", Path(tempfile.gettempdir())),
    ):
        free = shutil.disk_usage(folder).free / 1e9
        remedy = ""
        if free <= WANTED_FREE_GB:
            remedy = f"free disk space: data and checkpoints need about {WANTED_FREE_GB:.0f} GB"
        if not os.access(folder, os.W_OK):
            remedy = "work in a folder that you may write to"
        yield Finding(what, f"{free:.1f} GB free, {folder}", remedy, needed=free < LEAST_FREE_GB)


def _checkpoints() -> Generator[Finding]:
    if extras.lacks("policy"):
        return
    from safetensors import SafetensorError, safe_open

    for name in PRETRAINED:
        file = SHIPPED / name / "model.safetensors"
        try:
            # refuses a file that is too short or too long
            with safe_open(file, "numpy") as content:
                yield Finding(f"checkpoint {name}", f"{len(content.keys())} tensors")
        except (OSError, SafetensorError) as error:
            found = _short(f"{file.name} is not a weights file ({error})")
            yield Finding(
                f"checkpoint {name}", found, "install again from a complete copy of the repository"
            )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:160]} ..."
