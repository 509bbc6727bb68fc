"""Spellings of flags: one of each is shown, and the older ones work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ceed_vla.cli.flags import parse_flags
from ceed_vla.cli.help import format_help
from ceed_vla.cli.values import UsageError


@dataclass
class Inner:
    """A group with a path."""

    path: str = ""


@dataclass
class Wide:
    """A group without a path."""

    width: int = 8


@dataclass
class PathsConfig:
    """Fields as commands have them whose flags are spelled otherwise.

    Attributes:
        policy_path: The policy.
        teacher_path: The teacher.
        policy: Settings of the policy.
    """

    policy_path: Path | None = None
    teacher_path: str = ""
    root: str = ""
    policy: Wide = field(default_factory=lambda: Wide(4))


@dataclass
class WrittenConfig:
    """A command that writes a dataset."""

    root: str


@dataclass
class GroupConfig:
    """A command whose policy is a group, as in `ceed-vla eval`."""

    policy: Inner
    teacher: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--policy.path=a"], ("a", "", "", 4)),
        (["--policy_path", "a"], ("a", "", "", 4)),
        (["--policy", "a"], ("a", "", "", 4)),
        (["--policy.path=a", "--policy.width=5"], ("a", "", "", 5)),
        (["--teacher.path=b"], ("None", "b", "", 4)),
        (["--teacher_path=b"], ("None", "b", "", 4)),
        (["--roots=c"], ("None", "", "c", 4)),
        (["--root=c"], ("None", "", "c", 4)),
        (["c"], ("None", "", "c", 4)),
    ],
)
def test_spellings(flags: list[str], expected: tuple[str, str, str, int]) -> None:
    config = parse_flags(PathsConfig, flags, "roots", "root=roots")
    assert (
        str(config.policy_path),
        config.teacher_path,
        config.root,
        config.policy.width,
    ) == expected


@pytest.mark.parametrize("flag", ["--policy.path", "--policy_path", "--policy"])
def test_spellings_where_the_policy_is_a_group(flag: str) -> None:
    config = parse_flags(GroupConfig, [flag, "a", f"{flag.replace('policy', 'teacher')}=b"])
    assert config == GroupConfig(Inner("a"), Inner("b"))


@pytest.mark.parametrize(
    "text",
    [
        "policy_path: a\nteacher_path: b\nroot: c",
        "policy:\n  path: a\n  width: 5\nteacher:\n  path: b\nroots: c",
        "policy: {path: a}\nteacher: {path: b}\nroots: c",
    ],
)
def test_spellings_in_a_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    config = parse_flags(PathsConfig, [f"--config_path={file}"], "", "root=roots")
    assert (config.policy_path, config.teacher_path, config.root) == (Path("a"), "b", "c")
    assert config.policy.width == (5 if "width" in text else 4)
    if "root:" in text:
        file.write_text("policy_path: a\nteacher_path: b")
        assert parse_flags(GroupConfig, [f"--config_path={file}"]) == GroupConfig(
            Inner("a"), Inner("b")
        )


@pytest.mark.parametrize("kind", [PathsConfig, GroupConfig])
def test_two_spellings_are_one_flag(kind: type[Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--policy\.path is set twice"):
        parse_flags(kind, ["--policy.path=a", "--policy_path=b"])
    file = tmp_path / "run.yaml"
    file.write_text("policy_path: a\npolicy: {path: b}")
    with pytest.raises(
        UsageError, match=r"--policy\.path is set twice: policy_path is its older spelling"
    ):
        parse_flags(kind, [f"--config_path={file}"])
    file.write_text("policy_path: a\npolicy: 5")
    with pytest.raises(UsageError, match="--policy is 5"):
        parse_flags(kind, [f"--config_path={file}"])


def test_a_data_set_that_is_written_is_no_alias() -> None:
    with pytest.raises(UsageError, match=r"unknown flag '--roots=x'; did you mean --root\?"):
        parse_flags(WrittenConfig, ["--roots=x"])


def test_messages_have_the_new_spelling() -> None:
    @dataclass
    class Needs:
        """A command that needs a policy."""

        policy_path: str

    with pytest.raises(UsageError, match=r"missing --policy\.path$"):
        parse_flags(Needs, [])
    with pytest.raises(UsageError, match=r"did you mean --policy\.path"):
        parse_flags(Needs, ["--policy.pth=x"])
    assert "\n  --policy.path STR" in format_help("ceed-vla needs", Needs)


def test_a_local_path_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path` turns "./student" into "student", which would be the shipped checkpoint."""
    monkeypatch.chdir(tmp_path)
    for given, path in (
        ("./student", tmp_path / "student"),
        ("student", "student"),
        ("./other", "other"),
    ):
        assert parse_flags(PathsConfig, [f"--policy.path={given}"]).policy_path == Path(path)
        (tmp_path / "flags.yaml").write_text(f"policy: {{path: {given}}}\n")
        from_file = parse_flags(PathsConfig, ["--config_path=flags.yaml"])
        assert from_file.policy_path == Path(path)
