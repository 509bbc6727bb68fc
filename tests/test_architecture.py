"""Rules for the whole repository: imports, no absolute paths, no registries, short files."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450

# Folder -> modules that its files must not import anywhere; `commands.py` has names of modules.
TRAINING, SIM, NODES = "ceed_vla.training", "ceed_vla.sim", "ceed_vla.ros_nodes"
FAMILIES = ("compact", "openvla", "pi0_fast", "transformers", "vlm")
FORBIDDEN: dict[str, set[str]] = {
    "ceed_vla": {TRAINING, SIM, NODES, "benchmarks", "rclpy", "mujoco"},
    "training": {SIM, NODES, "benchmarks", "rclpy", "mujoco"},
    "sim": {TRAINING, NODES, "benchmarks", "rclpy"},
    "ros_nodes/robot": {TRAINING, SIM, f"{NODES}.simulated", f"{NODES}.demo", "benchmarks"},
    "ros_nodes/record": {TRAINING, SIM, f"{NODES}.simulated", f"{NODES}.demo", "benchmarks"},
    "ros_nodes/simulated": {TRAINING, f"{NODES}.demo", "benchmarks"},
    "ros_nodes/demo": {TRAINING, "benchmarks"},
    "benchmarks": {NODES},
    # Inside the policy: the algorithm imports no axis, no family of models and no engine.
    "ceed_vla/decoding": {
        "ceed_vla.axes",
        "ceed_vla.compiled",
        "ceed_vla.configuration_ceed_vla",
        "ceed_vla.modeling_ceed_vla",
        *(f"ceed_vla.backbones.{family}" for family in FAMILIES),
    },
    # Exports run without torch.
    "ceed_vla/edge": {
        "torch",
        "lerobot",
        "transformers",
        "ceed_vla.axes",
        "ceed_vla.backbones",
        "ceed_vla.checkpoints",
        "ceed_vla.export",
        "ceed_vla.tensors",
        "ceed_vla.tokens.base",
    },
    "ceed_vla/axes": {"ceed_vla.configuration_ceed_vla", "ceed_vla.modeling_ceed_vla"},
    "ceed_vla/backbones": {"ceed_vla.axes", "ceed_vla.modeling_ceed_vla"},
    "ceed_vla/compiled": {"ceed_vla.axes", "ceed_vla.modeling_ceed_vla"},
}
FORMER = {"training", "sim", "ros_nodes"}  # former import names
# Message packages that only an extra topic or action of a robot needs.
OPTIONAL_MESSAGES = {"ceed_vla_interfaces", "control_msgs"}

# Spelled so that this file does not match itself.
MACHINE_PATHS = re.compile(r"(?<![\w.~$}])/(?:home|Users|root|work|farm|mnt|scratch)/\w")
REGISTRIES = re.compile(
    r"pypi\.(?:org|python\.org)|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|anaconda\.org"
    r"|-(?:extra-)?index-url|^\s*index-url",
    re.IGNORECASE | re.MULTILINE,
)
UNSAFE_LOADING = re.compile(
    r"\btorch\.load\((?![^()]*\bweights_only=True\))|\bpickle\.loads?\(|trust_remote_code\s*=\s*True"
)


def tracked_files() -> list[Path]:
    """Files under version control, or not ignored; without git, all except environments."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(
            command, cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
        files = [ROOT / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = {".git", ".venv", "outputs", "data", "runs", "build", "dist", "__pycache__"}
        files = [
            path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)
        ]
    return sorted(path for path in files if path.is_file())


FILES = tracked_files()
SOURCES = [path for path in FILES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str | None:
    """The text of a file; None if it is binary."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """(line, name) of all imports; with `lazy=False` only of those at import time."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level and node.module:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, lazy=lazy)


@pytest.mark.parametrize("folder", ["", *FORBIDDEN])
def test_import_arrows(folder: str) -> None:
    forbidden = FORBIDDEN.get(folder, FORMER)
    wrong = [
        f"{name_of(path)}:{line} imports {imported}"
        for path in SOURCES
        if name_of(path).startswith(f"{folder}/" if folder else "")
        for line, imported in imports(ast.parse(path.read_text()), lazy=True)
        if any(f"{imported}.".startswith(f"{name}.") for name in forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def test_import_arrows_see_what_they_should() -> None:
    source = (
        "import a.b\nclass A:\n  import mujoco\ndef f():\n  from c import data\nif x:\n  import y"
    )
    tree = ast.parse(source)
    assert [name for _, name in imports(tree, lazy=False)] == ["a.b", "mujoco", "y"]
    assert [name for _, name in imports(tree, lazy=True)] == ["a.b", "mujoco", "c.data", "y"]


@pytest.mark.parametrize(
    ("pattern", "what"), [(MACHINE_PATHS, "path of a machine"), (REGISTRIES, "package registry")]
)
def test_nothing_names_a_machine_or_registry(pattern: re.Pattern[str], what: str) -> None:
    wrong = [
        f"{name_of(path)}:{text.count(chr(10), 0, match.start()) + 1}: {what}: {match[0]!r}"
        for path in FILES
        if path != Path(__file__).resolve() and (text := text_of(path)) is not None
        for match in pattern.finditer(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_decoders_require_capabilities_by_name() -> None:
    """Decoders neither probe for attributes of a model nor hide its type."""
    guess = re.compile(r"""getattr\([^)]*,\s*(?:False|None|\{\}|\(\))\)|cast\("Any",""")
    decoders = [
        path
        for path in SOURCES
        if name_of(path).startswith(("ceed_vla/decoding/", "ceed_vla/axes/"))
        and re.search("^@register_decoder|^def decode_", path.read_text(), re.MULTILINE)
    ]
    assert len(decoders) >= 8
    wrong = {name_of(p): found for p in decoders if (found := guess.findall(p.read_text()))}
    assert not wrong


def test_the_algorithm_stays_small() -> None:
    """The limit reveals growth; `python scripts/count_lines.py` prints the parts."""
    counted = runpy.run_path(str(ROOT / "scripts" / "count_lines.py"))["count"]()
    assert 1000 < counted["algorithm, code"] < 3000


def test_weights_are_never_unpickled() -> None:
    wrong = [
        name_of(path)
        for path in SOURCES
        if path != Path(__file__).resolve() and UNSAFE_LOADING.search(path.read_text())
    ]
    assert not wrong, "unpickles, or runs code from elsewhere: " + ", ".join(wrong)


def test_files_are_short() -> None:
    long = {
        name_of(path): lines
        for path in SOURCES
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_large_files_are_few() -> None:
    large = {
        name_of(path): path.stat().st_size for path in FILES if path.stat().st_size > 20_000_000
    }
    assert not large, f"over 20 MB: {large}"


@pytest.mark.parametrize("folder", ["launch", "tests"])
def test_folder_is_no_package(folder: str) -> None:
    found = [
        name_of(path)
        for path in SOURCES
        if path.name == "__init__.py" and name_of(path).startswith(f"{folder}/")
    ]
    assert not found, f"{found} would shadow another module called {folder!r}"


def test_versions_agree() -> None:
    version = re.search(
        r'^__version__ = "(.+)"', (ROOT / "ceed_vla/__init__.py").read_text(), re.MULTILINE
    )
    assert version is not None
    assert f"<version>{version[1]}</version>" in (ROOT / "package.xml").read_text()
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert (
        f'version = "{version[1]}"' in (ROOT / "lerobot_policy_ceed_vla/pyproject.toml").read_text()
    )


def test_ros_reads_the_package_file() -> None:
    from catkin_pkg.package import parse_package

    for file in ("package.xml", "ceed_vla_interfaces/package.xml"):
        warnings: list[str] = []
        package = parse_package(str(ROOT / file), warnings=warnings)
        package.validate(warnings=warnings)
        assert warnings == []
    imported = {name.partition(".")[0] for path in SOURCES for name in _imported(path)}
    ros = {name for name in imported if name.endswith(("_msgs", "_srvs", "_interfaces"))}
    asked = {one.name for one in parse_package(str(ROOT / "package.xml")).exec_depends}
    assert ros | {"rclpy"} <= asked | OPTIONAL_MESSAGES


def _imported(path: Path) -> Iterator[str]:
    if name_of(path).startswith("ros_nodes/"):
        yield from (name for _, name in imports(ast.parse(path.read_text()), lazy=True))


def test_every_file_of_the_packages_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    beside = ("training/", "sim/", "ros_nodes/")
    installed = {
        name: f"ceed_vla/{name}" if name.startswith(beside) else name
        for name in map(name_of, FILES)
        if name.startswith(("ceed_vla/", *beside))
    }
    assert not [name for name, place in installed.items() if not (tmp_path / place).exists()]


def test_constraints_pin_exact_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line)] == []
