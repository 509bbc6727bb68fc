"""How flags become a configuration: from the command line, from a file, from defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from ceed_vla.cli.flags import UsageError, parse_flags
from ceed_vla.cli.values import _typed
from ceed_vla.report.command import ReportConfig
from tests.helpers.toy_config import Inner, ToyConfig


def test_setting_one_nested_flag_keeps_the_other_defaults() -> None:
    config = parse_flags(ToyConfig, ["--root=x", "--inner.path=p"])
    assert config.inner == Inner("p", 16, [1, 2])


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("root: from_file\nsteps: 4\ninner:\n  path: p\n  width: 2\n")
    config = parse_flags(ToyConfig, ["--config_path", str(file), "--inner.width=5"])
    assert config == ToyConfig(Path("from_file"), steps=4, inner=Inner("p", 5, [1, 2]))


def test_no_path_is_none() -> None:
    assert _typed("none", str | None, "policy_path") is None
    assert _typed("nobody", str | None, "policy_path") == "nobody"


@pytest.mark.parametrize("value", ["007", "null", "a: b", "true", "-x"])
def test_text_stays_text(value: str) -> None:
    config = parse_flags(ToyConfig, ["--root", value, f"--inner.path={value}"])
    assert (config.root, config.inner.path) == (Path(value), value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2024.10", ["2024.10"]),
        ("run #2,010", ["run #2", "010"]),
        ("[2024.10, b]", ["2024.10", "b"]),
    ],
)
def test_texts_in_a_list_stay_texts(text: str, names: list[str]) -> None:
    assert parse_flags(ReportConfig, ["--runs", text]).runs == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("\xff", "cannot be read"),
        ("\0", "cannot be read"),
        ("- " * 5000 + "a", "nested too deep"),
        ("{" * 3000, "nested too deep"),
        ("inner: &a {path: p}\nroot: *a", "alias"),
        ("steps: 1\nsteps: 2", "duplicate key 'steps'"),
        ("1: 2", "keys must be strings"),
        ("? [1]\n: 2", "keys must be strings"),
        ("root: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("stesp: 2", "unknown flag '--stesp'; did you mean --steps?"),
        ("inner: {widht: 2}", "unknown flag '--inner.widht'; did you mean --inner.width?"),
        ("inner: 5", "--inner is 5; it must be"),
        ("inner: {width: {a: 1}}", "--inner.width is {'a': 1}; it must be a whole number"),
        ("mode: [good]", "--mode is ['good']; it must be a string"),
        ("root:", "--root is None; it must be a path"),
        ("rate: .inf", "--rate is '.inf'; it must be a finite number"),
        ("mode: " + "x" * 2**20, "more than 1048 kB"),
        ("sizes: [" + "[]," * 100_000 + "]", "more than 20000 lines and values"),
        ("mode: |\n" + "\n" * 100_000, "more than 20000 lines and values"),
        ("discover_packages_path: our_package\n", "on the command line"),
    ],
)
def test_unusable_file(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as error:
        parse_flags(ToyConfig, ["--root=x", f"--config_path={file}"])
    assert "run.yaml" in str(error.value)
    assert words in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_folder_and_a_device_are_no_files_of_flags(tmp_path: Path) -> None:
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(UsageError, match="is not a file"):
            parse_flags(ToyConfig, ["--root=x", f"--config_path={path}"])


def test_numbers_are_those_of_yaml_1_2() -> None:
    config = parse_flags(
        ToyConfig, ["--root=x", "--steps=010", "--rate=1e-3", "--inner.sizes=[010, 1]"]
    )
    assert (config.steps, config.rate, config.inner.sizes) == (10, 0.001, [10, 1])


@pytest.mark.parametrize(
    ("flags", "resume"),
    [
        (["--resume"], True),
        (["--resume", "--steps=2"], True),
        (["--resume", "false"], False),
        (["--resume=true"], True),
    ],
)
def test_switches(flags: list[str], resume: bool) -> None:
    assert parse_flags(ToyConfig, ["--root=x", *flags]).resume is resume


@pytest.mark.parametrize("value", ["007", "1.10", "1e3", "null_", "12345678901234567890"])
def test_text_in_a_file_stays_text(tmp_path: Path, value: str) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(f"root: {value}\ninner:\n  path: {value}\n")
    config = parse_flags(ToyConfig, [f"--config_path={file}"])
    assert (config.root, config.inner.path) == (Path(value), value)
