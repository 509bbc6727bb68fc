"""The command-line entry: exit codes, messages and help; `test_cli_flags` tests the flags."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ceed_vla
from ceed_vla.cli import entry as cli
from ceed_vla.errors import DatasetError
from tests.helpers.toy_config import ToyConfig


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module for the command `toy`; a test sets its function `run`."""
    module = types.ModuleType("toy_command")
    module.ToyConfig = ToyConfig  # type: ignore[attr-defined]
    module.run = lambda config: f"ran {config.root} {config.steps}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_command", module)
    command = cli.Command("a toy", "toy_command ToyConfig run", kept="units are in {root}")
    monkeypatch.setitem(cli.COMMANDS, "toy", command)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    return module


def run_in_new_process(*words: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; from ceed_vla.cli import entry as cli; code = cli.main(sys.argv[1:]); "
        "print('HEAVY', [m for m in ('torch', 'lerobot', 'mujoco', 'numpy') if m in sys.modules]); "
        "sys.exit(code)"
    )
    root = Path(cli.__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"]])
def test_top_level_imports_nothing_heavy(words: list[str]) -> None:
    assert "HEAVY []" in run_in_new_process(*words).stdout


def test_overview_has_one_line_per_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [
            [name, command.summary]
        ]


def test_no_command_prints_the_overview_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"ceed-vla {ceed_vla.__version__}")
    assert ("(commit " in printed) == (Path(__file__).parents[3] / ".git").exists()


def test_unknown_command_lists_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    message = capsys.readouterr().err
    assert "'trian'" in message
    assert "did you mean train?" in message
    assert ", ".join(cli.COMMANDS) in message


def test_every_command_exists() -> None:
    import importlib

    for command in cli.COMMANDS.values():
        place, config, function = command.where.split()
        module = importlib.import_module(place)
        assert callable(getattr(module, function))
        config_class = getattr(module, config)
        names = {item.name for item in config_class.__dataclass_fields__.values()}
        # the message of an interrupt must not fail
        command.kept.format_map(dict.fromkeys(names, ""))


def test_result_is_printed(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--root", "here", "--steps=5"]) == 0
    assert capsys.readouterr().out == "ran here 5\n"


def test_report_is_not_printed(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy.run = lambda config: {"success": 1}
    assert cli.main(["toy", "--root=here"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--root", "x", "--stesp=1"], "unknown flag '--stesp=1'; did you mean --steps?"),
        (["--root", "x", "--steps", "many"], "--steps is 'many'; it must be a whole number"),
        (["--root", "x", "--steps=1.5"], "--steps is 1.5; it must be a whole number"),
        (["--root", "x", "--steps=true"], "--steps is True; it must be a whole number"),
        (["--root", "x", "--steps=[1]"], "--steps is [1]; it must be a whole number"),
        (["--root", "x", "--steps=1_000"], "--steps is '1_000'; it must be a whole number"),
        (["--root", "x", f"--steps={'9' * 5000}"], "--steps cannot be read"),
        (["--root", "x", "--steps="], "--steps needs a value"),
        (["--root", "x", "--steps=null"], "--steps is None; it must be a whole number"),
        (["--root", "x", "--rate=nan"], "--rate is 'nan'; it must be a finite number"),
        (["--root", "x", "--rate=1e999"], "--rate is inf; it must be a finite number"),
        (["--root", "x", "--steps=1", "--steps=2"], "--steps is set twice"),
        (["--root", "x", "--resume=maybe"], "--resume is 'maybe'; it must be true or false"),
        (
            ["--root=x", "--inner.sizes=[1, many]"],
            "--inner.sizes.1 is 'many'; it must be a whole number",
        ),
        (
            ["--root=x", f"--inner.sizes={'[' * 5000}"],
            "--inner.sizes cannot be read: it is nested too deep",
        ),
        (["--root=x", "="], "unknown flag '='"),
        (["--root=x", "--=1"], "unknown flag '--=1'"),
        (["--root=x", "--" + "q" * 100_000], "unknown flag '--qqq"),
        (["--root=x", "--inner=5", "--inner.path=6"], "--inner.path is set twice"),
        (["--root"], "--root needs a value"),
        (["--root", "--steps=1"], "--root needs a value"),
        (["x"], "unknown flag 'x'"),
        (["--root=x", "--inner.sizes=[1,"], "--inner.sizes cannot be read"),
        ([], "missing --root"),
        (["--root", "x", "--config_path", "no-such.yaml"], "no-such.yaml cannot be read"),
        (["--root", "x", "--config_path"], "--config_path needs a value"),
    ],
)
def test_wrong_usage(
    toy: Any, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["toy", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ceed-vla toy: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 2000
    assert captured.out == ""


def test_refused_value_is_an_error_of_the_configuration(
    toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["toy", "--root=x", "--mode=bad"]) == 1
    assert (
        capsys.readouterr().err == "ceed-vla toy: error: unknown mode 'bad'; choose good or fine\n"
    )


class SafetensorError(Exception):
    """An exception with the name of safetensors' error."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DatasetError("no frames\nin x"), "no frames in x"),
        (DatasetError("a\x1b[2Jb\udcff"), "a?[2Jb?"),
        (DatasetError("x" * 10_000), "xxx ..."),
        (PermissionError(13, "denied", "x"), "x: denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            "a.png: No space left on device; free space",
        ),
        (OSError("no network"), "no network"),
        (
            SafetensorError("header too large"),
            "weights cannot be read or written (header too large)",
        ),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB"), "not enough memory"),
        (RecursionError("maximum"), "nested too deep"),
        (
            ModuleNotFoundError("No module named 'rclpy'"),
            "No module named 'rclpy'; `ceed-vla doctor`",
        ),
        (
            KeyError("steps"),
            "unexpected KeyError: 'steps' (this is a defect or damaged input; CEED_VLA_TRACEBACK=1",
        ),
        (AssertionError(), "unexpected AssertionError"),
    ],
)
def test_error_is_one_line(
    toy: Any, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def fail(config: ToyConfig) -> None:
        raise error

    toy.run = fail
    assert cli.main(["toy", "--root=x"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("ceed-vla toy: error: ")
    assert words in message
    assert message.count("\n") == 1
    assert len(message) < 2000
    assert "Traceback" not in message


def test_what_others_log_has_no_traceback(
    toy: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = logging.LogRecord("lerobot", logging.ERROR, __file__, 1, "failed", (), None)
    try:
        raise DatasetError("no frames")
    except DatasetError:
        record.exc_info = sys.exc_info()
    assert cli._is_for_the_user(record)
    assert record.exc_info is None


def test_traceback_on_request(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: ToyConfig) -> None:
        raise DatasetError("no frames")

    toy.run = fail
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(DatasetError):
        cli.main(["toy", "--root=x"])


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF", "", "2", "maybe"])
def test_other_values_ask_for_no_traceback(
    toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    def fail(config: ToyConfig) -> None:
        raise DatasetError("no frames")

    toy.run = fail
    monkeypatch.setenv(cli.TRACEBACK, value)
    assert cli.main(["toy", "--root=x"]) == 1
    said = capsys.readouterr().err
    assert ("CEED_VLA_TRACEBACK is" in said) == (value in ("2", "maybe"))
    assert said.endswith("ceed-vla toy: error: no frames\n")


@pytest.mark.parametrize("how", ["sys.exit(0)", "sys.exit('bye')", "raise SystemExit", "quit()"])
def test_a_package_that_ends_the_process_is_an_error(
    toy: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    how: str,
) -> None:
    (tmp_path / "leaves_of_test_cli.py").write_text(f"import sys\n{how}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["toy", "--root=x", "--discover_packages_path=leaves_of_test_cli"]) == 1
    said = capsys.readouterr()
    assert "'leaves_of_test_cli' cannot be imported (SystemExit" in said.err
    assert said.out == ""


def test_an_interrupt_of_an_import_is_none_of_the_package(
    toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stopped_of_test_cli.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["toy", "--root=x", "--discover_packages_path=stopped_of_test_cli"]) == 130


def test_interrupt_says_what_is_kept(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: ToyConfig) -> None:
        raise KeyboardInterrupt

    toy.run = interrupt
    assert cli.main(["toy", "--root=there"]) == 130
    assert capsys.readouterr().err.strip() == "ceed-vla toy: interrupted; units are in there"


def test_simulator_arguments_reach_the_function(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Simulation:
        episodes: int = 3

        def arguments(self) -> dict[str, Any]:
            return {"closed_loop": self.episodes}

    seen = {}
    toy.run = lambda config, closed_loop: seen.update(root=config.root, closed_loop=closed_loop)
    toy.Simulation = Simulation
    command = cli.Command("", "toy_command ToyConfig run", simulator="toy_command Simulation")
    monkeypatch.setitem(cli.COMMANDS, "toy", command)
    assert cli.main(["toy", "--root=x", "--episodes=7"]) == 0
    assert seen == {"root": Path("x"), "closed_loop": 7}


def test_help_describes_every_flag(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ceed-vla toy ")
    assert "Do something to a folder." in text
    assert "--root PATH                     The folder. (required)" in text
    assert "--inner.width INT               Its width. [16]" in text
    assert "--rate FLOAT                    How fast; in (0, 1]. [0.5]" in text
    assert text.index("you must set:") < text.index("--root") < text.index("you may want:")
    assert text.endswith("the rest (--help=all explains them):\n  --unexplained\n")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("words", [["--help=all"], ["--help", "all"]])
def test_help_in_full(toy: Any, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(["toy", *words]) == 0
    text = capsys.readouterr().out
    assert "the rest:\n  --unexplained INT" in text


def test_range_in_help_is_the_one_in_the_error(
    toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["toy", "--root=x", "--rate=7"]) == 1
    assert (
        capsys.readouterr().err
        == "ceed-vla toy: error: rate is 7.0; it must be a finite number in (0, 1].\n"
    )


def test_packages_of_the_user_are_imported_first(
    toy: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours_of_test_cli.py").write_text("print('registered')")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["toy", "--root=x", "--discover_packages_path", "ours_of_test_cli"]) == 0
    assert capsys.readouterr().out == "registered\nran x 3\n"
    assert cli.main(["toy", "--root=x", "--discover_packages_path=no.such.package"]) == 1
    assert "'no.such.package' cannot be imported" in capsys.readouterr().err
    assert cli.main(["toy", "--root=x", "--discover_packages_path"]) == 2
    assert "--discover_packages_path needs a value" in capsys.readouterr().err
