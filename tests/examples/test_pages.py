"""The commands of docs/lerobot.md and docs/own-data.md, as printed, in the order written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run_page(
    page: str, folder: Path, *, sizes: str = "", threads: int = 1, timeout: float = 880
) -> str:
    """What the commands of a page print, with `folder` in the place of its ``out``, and `sizes` of
    its sizes.
    """
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    script = "set -e\n" + "".join(blocks).replace('export PATH="$PWD/.venv/bin:$PATH"', "export")
    script = re.sub(r"out=outputs/\S+", f"out={folder}", script, count=1)
    if sizes:
        assert len(SIZES.findall(script)) == 1
        script = SIZES.sub(sizes, script)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": tools,
        "OMP_NUM_THREADS": str(threads),
        "TQDM_DISABLE": "1",
    }
    process = subprocess.run(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.slow
@pytest.mark.realtime
@pytest.mark.timeout(900)
def test_the_commands_of_the_lerobot_page(tmp_path: Path) -> None:
    output = run_page("lerobot.md", tmp_path)
    assert (
        tmp_path / "teacher" / "checkpoints" / "000006" / "pretrained_model" / "model.safetensors"
    ).is_file()
    assert list((tmp_path / "adapted").rglob("adapter_model.safetensors"))
    assert (
        json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["pc_success"]
        >= 50
    )
    # Two rollouts and the client of the server.
    outcomes = re.findall(r"Solved after \d+ control steps|\d+ steps, not solved", output)
    assert len(outcomes) == 3, output[-4000:]
    assert all(outcome.startswith("Solved") for outcome in outcomes), outcomes


SIZES = re.compile(r"^seed=0 .*$", re.MULTILINE)  # of docs/own-data.md
REDUCED = "seed=0 attempts=30 scenes=40 teacher_minutes=0.6 student_minutes=0.3 gate=0 episodes=2"


@pytest.mark.slow
@pytest.mark.realtime  # it trains for a time, not for a number of steps
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_for_own_data(tmp_path: Path) -> None:
    """gymnasium-robotics' FetchPickAndPlace in sizes that show that every command runs, not that
    the task is learnt.
    """
    output = run_page("own-data.md", tmp_path, sizes=REDUCED)
    assert "two-valued dimensions [3]; increments [0, 1, 2]" in output
    assert "Verdict: ready" in output  # inspect
    assert "0.6 minutes on this machine:" in output
    # open-loop, which only says it without a gate
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
def test_the_page_for_own_data_solves_its_task(tmp_path: Path, seed: int) -> None:
    text = (REPOSITORY / "docs" / "own-data.md").read_text(encoding="utf-8")
    (sizes,) = SIZES.findall(text)
    run_page(
        "own-data.md",
        tmp_path,
        sizes=sizes.replace("seed=0", f"seed={seed}"),
        threads=2,
        timeout=3600,
    )
    rows = json.loads((tmp_path / "eval" / "report.json").read_text())["decoders"]
    assert rows["teacher_ar"]["success"] >= 80
    assert rows["ceed"]["success"] >= rows["teacher_ar"]["success"] - 3
