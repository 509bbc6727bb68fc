"""`--help` from stored pages: their content, their use, and that they are up to date."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from ceed_vla.cli import commands, stored_help
from ceed_vla.cli import entry as cli
from ceed_vla.cli import help as cli_help


@dataclass
class ToyConfig:
    """Do something to a folder.

    Attributes:
        root: The folder.
    """

    root: Path
    unexplained: int = 0


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module for the command `toy`."""
    module = types.ModuleType("toy_of_test_cli_help")
    module.ToyConfig = ToyConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(
        cli.COMMANDS, "toy", cli.Command("a toy", f"{module.__name__} ToyConfig run")
    )
    return module


def test_help_imports_nothing_heavy() -> None:
    """An import would take seconds; the time is not asserted, because machines differ."""
    script = (
        "import sys; from ceed_vla.cli import entry as cli\nfor name in cli.COMMANDS: assert "
        "cli.main([name, '--help']) == cli.main([name, '--help=all']) == 0\nheavy = ('torch', "
        "'lerobot', 'transformers', 'mujoco', 'numpy')\nprint('HEAVY', [name for name in heavy if "
        "name in sys.modules])"
    )
    root = Path(cli.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("HEAVY []\n")


@pytest.mark.slow  # it imports every command's module
def test_help_is_up_to_date() -> None:
    """The stored pages match the configurations; the output names the command that writes them."""
    root = Path(cli.__file__).parents[2]
    command = [sys.executable, "-m", "ceed_vla.cli.stored_help", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_command_has_a_stored_page() -> None:
    assert {file.stem for file in cli_help.PAGES.iterdir()} == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        page = cli_help.Page.stored(name)
        assert page is not None
        names = [flag[0] for flag in page.flags]
        assert len(names) == len(set(names))
        assert page.text() == (cli_help.PAGES / f"{name}.json").read_text(encoding="utf-8")


def test_pages_are_written_and_compared(
    toy: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for module in (cli, commands):
        monkeypatch.setattr(module, "COMMANDS", {"toy": commands.COMMANDS["toy"]})
    monkeypatch.setattr(cli_help, "PAGES", tmp_path / "help")
    assert cli.main(["toy", "--help=all"]) == 0
    live = capsys.readouterr().out
    assert stored_help.main(["--check"]) == 1
    assert stored_help.REGENERATE in capsys.readouterr().out
    assert stored_help.main([]) == stored_help.main(["--check"]) == 0
    (tmp_path / "help" / "gone.json").touch()
    assert stored_help.main(["--check"]) == 1
    assert "gone" in capsys.readouterr().out
    assert stored_help.main([]) == 0
    assert [file.name for file in (tmp_path / "help").iterdir()] == ["toy.json"]
    capsys.readouterr()
    monkeypatch.delattr(toy, "ToyConfig")  # keys that are not needed
    assert cli.main(["toy", "--help=all"]) == 0
    assert capsys.readouterr().out == live


def test_help_is_live_beside_packages_of_the_user(
    toy: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "live_of_test_cli.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli_help.Page, "stored", lambda name: pytest.fail("reads the stored page"))
    assert cli.main(["toy", "--discover_packages_path=live_of_test_cli", "--help"]) == 0
    assert "--root PATH" in capsys.readouterr().out


def test_help_names_installed_environments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "installed_environments", lambda: ["lerobot_env_mine"])
    assert cli.main(["eval", "--help"]) == cli.main(["fit-tokens", "--help"]) == 0
    assert capsys.readouterr().out.count("lerobot_env_mine") == 1  # only where there is --env.type


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_short_and_its_groups_are_flags(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(cli, "installed_environments", list)
    command = cli.COMMANDS[name]
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 55
    assert cli.main([name, "--help=all"]) == 0
    full = capsys.readouterr().out
    for flag in f"{command.must} {command.may}".split():
        assert f"\n  --{flag} " in text
    assert "the rest (" not in full


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_show_one_spelling(name: str) -> None:
    page = cli_help.Page.stored(name)
    assert page is not None
    flags = {flag[0] for flag in page.flags}
    assert not flags & {"policy_path", "teacher_path"}
    assert ("root" in flags) == (name in ("record", "bag-to-dataset"))  # they write one data set
