"""`ceed-vla doctor`: always a table, and an exit code that shows whether something needed is
missing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ceed_vla import doctor as module
from ceed_vla.cli.entry import main
from ceed_vla.doctor import DoctorConfig, doctor
from ceed_vla.errors import ConfigError

GOOD = {
    "torch": '{"threads": 2, "cores": 2, "cuda": [], "bfloat16": false, "built": null}',
    "gl": '{"brightest": 9}',
    "ros": '{"rmw": "rmw_fastrtps_cpp"}',
    "lerobot": '{"known": true}',
}


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Fast scripts that replace the probes of torch and MuJoCo; tests change them."""
    scripts = {name: f"print({answer!r})" for name, answer in GOOD.items()}
    monkeypatch.setattr(module, "_PROBES", scripts)
    return scripts


def table(*, fails: bool = False) -> str:
    output = StringIO()
    console = Console(file=output, width=200)
    if fails:
        with pytest.raises(ConfigError, match="Missing or broken"):
            doctor(DoctorConfig(), console)
    else:
        doctor(DoctorConfig(), console)
    return output.getvalue()


def test_a_sound_installation(probes: dict[str, str]) -> None:
    text = table()
    for word in (
        "Python",
        "torch",
        "mujoco",
        "rendering",
        "CUDA",
        "ROS 2",
        "disk here",
        "checkpoint student",
    ):
        assert word in text
    assert "missing" not in text


@pytest.mark.parametrize(
    ("name", "script", "fails", "words"),
    [
        (
            "torch",
            "raise ImportError('libfoo.so: cannot open')",
            True,
            "ImportError: libfoo.so: cannot open",
        ),
        ("torch", "import os; os.abort()", True, "died of signal 6"),
        ("torch", "print('{}')", True, "cannot be checked: KeyError"),
        ("gl", "print('remark'); print('{\"brightest\": 0}')", True, "the picture is black"),
        ("gl", "raise RuntimeError('no EGL')", True, "no EGL"),
        ("gl", "import time; time.sleep(60)", True, "no answer in 2 s"),
        ("ros", "import no_such_rclpy", False, "No module named 'no_such_rclpy'"),
        ("ros", "print('nonsense')", False, "nonsense"),
        ("lerobot", "raise SystemExit(3)", False, "no message"),
    ],
)
def test_a_broken_package_is_a_finding(
    probes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    script: str,
    fails: bool,
    words: str,
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 2.0 if "sleep" in script else 60.0)
    probes[name] = script
    if "sleep" in script:
        monkeypatch.setattr(module, "_PROBES", {**dict.fromkeys(GOOD, "print('{}')"), name: script})
    assert words in table(fails=fails)


def test_what_is_only_late_is_not_to_be_installed(
    probes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 2.0)
    version = module._version
    monkeypatch.setattr(module, "_version", lambda package: version(package) or "1.0")
    probes["lerobot"] = "import time; time.sleep(60)"
    lines = [line for line in table().splitlines() if "LeRobot's tools" in line]
    assert "no answer in 2 s; slow" in lines[0]
    assert "run `ceed-vla doctor` again" in lines[0]
    assert "scripts/setup.sh" not in lines[0]


def test_versions_are_compared_with_the_supported_ones(
    probes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["numpy>=1", "surely-not-there>=2", "peft>=99; extra == 'vlm'"]
    wanted += ["torch>=99; extra == 'policy'", "torch>=99; extra == 'train'"]
    monkeypatch.setattr(module.metadata, "requires", lambda name: wanted)
    text = table(fails=True)
    assert text.count("torch>=99 is needed; run `scripts/setup.sh policy`") == 1
    assert "surely-not-there>=2 is needed" in text
    assert "extra vlm" in text


def test_full_disk_and_damaged_checkpoint(
    probes: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1, 1, 1000))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    text = table(fails=True)
    assert "0.0 GB free" in text
    assert "model.safetensors is not a weights file" in text
    assert "checkpoint student" in text.partition("model.safetensors is not a weights file")[2]


@pytest.mark.parametrize(
    ("domain", "reach", "words"),
    [
        ("0", "LOCALHOST", "domain 0, range LOCALHOST"),
        ("", "", "range SUBNET"),
        ("many", "LOCALHOST", "from 0 to 232"),
    ],
)
def test_network_of_ros(
    probes: dict[str, str], monkeypatch: pytest.MonkeyPatch, domain: str, reach: str, words: str
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", domain)
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", reach)
    assert words in table()


def test_the_table_does_not_need_what_it_looks_at() -> None:
    script = (
        "import sys, ceed_vla.cli, ceed_vla.doctor; print([m for m in ('torch', 'lerobot') if m in "
        "sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "[]"


def test_exit_code(probes: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    probes["gl"] = "raise RuntimeError('no EGL')"
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ceed-vla doctor: error: Missing or broken: rendering")
    assert "apt-get install" in captured.out


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_the_real_probes_answer_or_fail_cleanly(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", module._PROBES[name]], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0 or name in ("ros", "lerobot"), run.stderr


def test_without_an_extra_its_checks_are_left_out(
    probes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "mujoco"):
        monkeypatch.setitem(sys.modules, name, None)
    text = table()
    assert "rendering" not in text
    assert "checkpoint student" not in text
