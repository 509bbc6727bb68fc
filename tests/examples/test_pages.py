"""Shell commands and Python examples of the pages, as printed, in the order of the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import (
    FIRST_POLICY,
    FIRST_ROBOT,
    IN_CI,
    LEROBOT,
    OUTSIDE_CI,
    PIPELINE,
    REPOSITORY,
    run_page,
    sizes_in,
)


@pytest.mark.slow
@pytest.mark.realtime(alone=False)  # ten steps a second leave a core to others
@pytest.mark.timeout(900)
def test_the_commands_of_the_lerobot_page(tmp_path: Path) -> None:
    output = run_page(LEROBOT, tmp_path)
    assert (
        tmp_path / "teacher" / "checkpoints" / "000006" / "pretrained_model" / "model.safetensors"
    ).is_file()
    assert list((tmp_path / "adapted").rglob("adapter_model.safetensors"))
    assert (
        json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["pc_success"]
        >= 50
    )
    # Two rollouts, and the client of the server.
    outcomes = re.findall(r"Solved after \d+ control steps|\d+ steps, not solved", output)
    assert len(outcomes) == 3, output[-4000:]
    assert all(outcome.startswith("Solved") for outcome in outcomes), outcomes


REDUCED = "seed=0 attempts=30 scenes=40 teacher_minutes=0.6 student_minutes=0.3 gate=0 episodes=2"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_the_first_policy(tmp_path: Path) -> None:
    """gymnasium-robotics' FetchPickAndPlace in tiny sizes.

    It shows that every command runs, not that the task is learnt.
    """
    output = run_page(FIRST_POLICY, tmp_path, sizes=REDUCED, timeout=1100)
    assert "two-valued dimensions [3]; increments [0, 1, 2]" in output
    assert "Verdict: ready" in output  # inspect
    assert "0.6 minutes on this machine:" in output
    # open-loop, which without a gate only prints the verdict
    assert re.search("Verdict: it (has not learnt|follows)", output)
    assert output.count("held-out episode") >= 2  # the summaries of teacher and student
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["complete"]
    assert set(report["decoders"]) == {"teacher_cap4", "teacher_ar", "ar", "jacobi", "ceed", "cap1"}
    assert report["decoders"]["ceed"]["episodes"] == 2
    rows = report["decoders"]
    assert (
        rows["ceed"]["forwards_mean"]
        <= rows["jacobi"]["forwards_mean"]
        < rows["ar"]["forwards_mean"]
    )


# half an hour of two quiet cores for each seed; the log is docs/reports/own-data.md
@pytest.mark.external
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_policy_solves_its_task(tmp_path: Path, seed: int) -> None:
    text = (REPOSITORY / "docs" / FIRST_POLICY).read_text(encoding="utf-8")
    (sizes,) = sizes_in(text, "seed")
    run_page(
        FIRST_POLICY,
        tmp_path,
        sizes=sizes.replace("seed=0", f"seed={seed}"),
        threads=2,
        timeout=3600,
    )
    rows = json.loads((tmp_path / "eval" / "report.json").read_text())["decoders"]
    assert rows["teacher_ar"]["success"] >= 80
    assert rows["ceed"]["success"] >= rows["teacher_ar"]["success"] - 3


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        *(pytest.param(page, marks=pytest.mark.slow) for page in IN_CI),
        *(pytest.param(page, marks=pytest.mark.external) for page in OUTSIDE_CI),
    ],
)
def test_the_commands_of_a_how_to(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.external  # minutes, most of them imports of its commands
@pytest.mark.timeout(900)
def test_the_commands_of_the_pipeline(tmp_path: Path) -> None:
    run_page(
        PIPELINE,
        tmp_path,
        sizes="demos=6 scenes=16 grounding=2 steps=4 takeovers=2 distil=2 episodes=2",
    )
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["decoders"]["ceed"]["episodes"] == 2


@pytest.mark.external  # it runs in real time for five minutes
@pytest.mark.realtime
@pytest.mark.timeout(1800)
def test_the_commands_of_the_first_robot(tmp_path: Path) -> None:
    run_page(FIRST_ROBOT, tmp_path, timeout=1500)


@pytest.mark.slow
def test_the_examples_of_the_first_decode() -> None:
    text = (REPOSITORY / "docs" / "tutorials" / "first-decode.md").read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=280, check=False
    )
    assert not done.returncode, done.stderr
    assert done.stdout.count("same tokens as ar: True") == 2
    assert "frozen steps equal: True" in done.stdout
    assert "solved: True" in done.stdout
