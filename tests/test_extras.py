"""What installs with which extra: declared completely, and said where something is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ceed_vla
from ceed_vla import extras
from ceed_vla.cli.commands import COMMANDS
from ceed_vla.cli.entry import main
from ceed_vla.extras import EXTRA_OF, EXTRAS, MissingExtraError, contained
from tests.test_architecture import imports

ROOT = Path(__file__).parents[1]
BESIDE = ("training", "sim", "ros_nodes")
BASE = {"PIL", "draccus", "msgpack", "numpy", "packaging", "rich", "tqdm", "websockets", "yaml"}
COMES_WITH = {"policy": {"gymnasium", "tokenizers"}}  # by lerobot and transformers
OWN_CHECKS = {"all", "test", "docs", "lint"}  # extras that no part of the package needs


def declared() -> dict[str, list[str]]:
    """Extra, or "" for the base -> names of the distributions that setup.py asks for."""
    found: dict[str, list[str]] = {"": []}
    for text in importlib.metadata.requires("ceed_vla") or ():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        name = re.match(r"[\w.-]+", text)
        assert name is not None
        found.setdefault(extra[1] if extra else "", []).append(normal(name[0]))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def file_of(module: str) -> Path | None:
    """The file of a module of this package; None for others."""
    first, *rest = module.split(".")
    if first != "ceed_vla":
        return None
    folder = ROOT if rest[:1] and rest[0] in BESIDE else ROOT / "ceed_vla"
    path = folder.joinpath(*rest)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def outside(module: str) -> dict[str, str]:
    """Packages of others that importing a module imports -> the module that does."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.startswith("ceed_vla."):
            waiting.append(name.rpartition(".")[0])
        file = file_of(name)
        if file is None:
            if not name.startswith("ceed_vla"):
                found.setdefault(name.partition(".")[0], "")
            continue
        for part in imported(file):
            if part.startswith("ceed_vla"):
                waiting.append(part)
            else:
                found.setdefault(part.partition(".")[0], name)
    return {name: by for name, by in found.items() if name not in sys.stdlib_module_names}


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports at import time; a name from a package may be a module too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # for type checkers alone
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for _, name in imports(tree, lazy=False):
        yield name


def test_extras_of_setup_and_of_the_package_are_the_same() -> None:
    assert set(declared()) - {""} == {*EXTRAS, *OWN_CHECKS}
    public = {name for extra in EXTRAS for name in declared()[extra]}
    assert set(declared()["all"]) == public


@pytest.mark.parametrize("extra", list(EXTRAS))
def test_an_extra_installs_its_modules(extra: str) -> None:
    distributions = importlib.metadata.packages_distributions()
    asked = declared()[extra]
    reached = {*asked}
    for name in asked:  # and what these ask for
        if extras.installed(name.replace("-", "_")) or name in map(normal, installed_names()):
            for text in importlib.metadata.requires(name) or ():
                match = re.match(r"[\w.-]+", text)
                assert match is not None
                reached.add(normal(match[0]))
    for module in EXTRAS[extra].modules:
        if module not in distributions:
            pytest.skip(f"{module} is not installed here")
        assert reached & {normal(name) for name in distributions[module]}, module
    for other in EXTRAS[extra].includes:
        assert set(declared()[other]) <= set(asked)


def installed_names() -> list[str]:
    return [found.metadata["Name"] for found in importlib.metadata.distributions()]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_declares_the_extras_that_it_imports(name: str) -> None:
    command = COMMANDS[name]
    there = contained(*command.extras.split())
    modules = {module for extra in there for module in EXTRAS[extra].modules}
    modules |= {module for module, extra in EXTRA_OF.items() if extra in there}
    modules |= {module for extra in there for module in COMES_WITH.get(extra, ())}
    places = [command.where.split()[0], *command.simulator.split()[:1]]
    for place in places:
        for module, by in outside(place).items():
            ros = "ros2" in there and module.endswith(("_msgs", "_interfaces", "_srvs"))
            assert module in BASE | modules or ros, f"{module} of {by}"
    assert outside("ceed_vla.sim.evaluate")["torch"]  # what it looks for can be found


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("ceed_vla", set()),
        ("ceed_vla.serving.client", {"numpy", "msgpack", "websockets", "draccus"}),
        ("ceed_vla.edge.policy", {"numpy", "onnxruntime", "PIL", "draccus"}),
        ("ceed_vla.cli.entry", {"draccus"}),
    ],
)
def test_what_runs_without_torch(module: str, needs: set[str]) -> None:
    assert set(outside(module)) <= needs


def test_a_missing_extra_is_named_in_a_clone_and_beside_a_wheel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert main(["eval", "--policy.path", "student"]) == 1
    text = "eval needs mujoco, which is not installed: run `scripts/setup.sh policy sim`."
    assert text in capsys.readouterr().err
    monkeypatch.setattr(extras, "SETUP", tmp_path / "setup.sh")
    assert main(["eval", "--policy.path", "student"]) == 1
    assert "not installed: pip install 'ceed_vla[policy,sim]'." in capsys.readouterr().err
    assert main(["eval", "--help"]) == 0
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(MissingExtraError, match=r"\[ros2\]', or source a ROS 2 installation"):
        extras.require("this", "ros2")
    assert extras.again() == "pip install --upgrade 'ceed_vla'"


def test_a_name_of_the_package_whose_extra_is_missing_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'lerobot'", name="lerobot")

    monkeypatch.setattr("ceed_vla.importlib.import_module", absent)
    with pytest.raises(ImportError, match=r"ceed_vla\.load needs lerobot, .*setup\.sh policy"):
        _ = ceed_vla.load


# ---- installed from a wheel ----------------------------------------------------------------------

BASE_WORKS = """
import sys
import ceed_vla, ceed_vla.cli.entry, ceed_vla.serving.client, ceed_vla.serving.server
heavy = {"torch", "lerobot", "transformers", "mujoco", "onnxruntime"} & set(sys.modules)
print(ceed_vla.__file__, heavy)
for name in ("ceed_vla.edge.EdgePolicy", "ceed_vla.load"):
    module, _, what = name.rpartition(".")
    try:
        getattr(__import__(module, fromlist=[what]), what)
    except ImportError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main wheel, built from the source distribution, whose metadata an index accepts."""
    out = tmp_path_factory.mktemp("dist")
    build = ["-m", "build", "--quiet", "--installer", "uv", "--outdir", str(out), str(ROOT)]
    run([sys.executable, *build], out)
    (made,) = out.glob("*.whl")
    (source,) = out.glob("*.tar.gz")
    checked = run([sys.executable, "-m", "twine", "check", "--strict", str(made), str(source)], out)
    assert checked.count("PASSED") == 2
    return made


def uv() -> str:
    return str(Path(sys.executable).with_name("uv"))


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder; return its output."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def environment(wheel: Path, folder: Path, chosen: str = "") -> Path:
    """Make an environment with the wheel, and a hostile package where commands run; return bin."""
    run([uv(), "venv", "--quiet", "--python", sys.executable, "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    run(
        [uv(), "pip", "install", "--quiet", "--python", str(python), f"{wheel}{chosen}"]
        + ["--constraints", str(ROOT / "constraints.txt")],
        folder,
    )
    (folder / "sim").mkdir()
    (folder / "sim" / "__init__.py").write_text("raise SystemExit('not the package of ceed_vla')\n")
    return python.parent


@pytest.mark.slow
def test_the_base_installation_has_clients_and_says_what_the_rest_needs(
    wheel: Path, tmp_path: Path
) -> None:
    programs = environment(wheel, tmp_path)
    text = run([str(programs / "python"), "-c", BASE_WORKS], tmp_path)
    assert f"{tmp_path}/venv/" in text
    assert "set()" in text
    assert (
        "ceed_vla.edge needs onnxruntime, which is not installed: pip install 'ceed_vla[edge]'."
        in text
    )
    assert (
        "ceed_vla.load needs lerobot, which is not installed: pip install 'ceed_vla[policy]'."
        in text
    )
    assert "Missing" not in run([str(programs / "ceed-vla"), "doctor"], tmp_path)
    version = run([str(programs / "ceed-vla"), "--version"], tmp_path)
    known = (ROOT / ".git").exists()
    assert re.fullmatch(rf"ceed-vla [\d.]+{r' \(commit [\w-]+\)' if known else ''}\n", version)
    refused = subprocess.run(
        [str(programs / "ceed-vla"), "demo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert (
        "demo needs torch, which is not installed: pip install 'ceed_vla[policy,sim]'"
        in refused.stderr
    )


# runs in every process of an environment; writes what leaves this machine
WATCH = """
import sys

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.bind"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "localhost"
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "localhost", "::1") and not str(host).startswith("127."):
        with open(LOG, "a") as log:
            log.write(f"{event} {host}\\n")

sys.addaudithook(watch)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_from_the_wheel_with_its_two_extras_and_stays_on_this_machine(
    wheel: Path, tmp_path: Path
) -> None:
    programs = environment(wheel, tmp_path, "[policy,sim]")
    log = tmp_path / "sockets.txt"
    site = next((programs.parent / "lib").glob("python3*/site-packages"))
    (site / "watch.py").write_text(f"LOG = {str(log)!r}\n{WATCH}")
    (site / "watch.pth").write_text("import watch\n")
    datagrams = "import socket; socket.socket(type=socket.SOCK_DGRAM)"  # connecting sends nothing
    connect = f"{datagrams}.connect(('203.0.113.1', 9))"
    subprocess.run([str(programs / "python"), "-c", connect], capture_output=True)
    assert "203.0.113.1" in log.read_text()  # the watch sees what it should
    log.unlink()
    demo = ["demo", "--episodes", "1", "--timing_chunks", "2"]
    text = run([str(programs / "ceed-vla"), *demo], tmp_path)
    assert "1/1" in text
    assert (tmp_path / "outputs" / "demo" / "report.html").is_file()
    assert not log.exists(), log.read_text()
