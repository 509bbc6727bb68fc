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


def run_page(page: str, folder: Path) -> str:
    """What the commands of a page print, with `folder` in the place of its ``out``."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    script = "set -e\n" + "".join(blocks).replace('export PATH="$PWD/.venv/bin:$PATH"', "export")
    script = re.sub(r"out=outputs/\S+", f"out={folder}", script, count=1)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.run(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
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
    assert (tmp_path / "teacher" / "checkpoints" / "000006" / "pretrained_model" / "model.safetensors").is_file()
    assert list((tmp_path / "adapted").rglob("adapter_model.safetensors"))
    assert json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["pc_success"] >= 50
    # Two rollouts and the client of the server.
    outcomes = re.findall(r"Solved after \d+ control steps|\d+ steps, not solved", output)
    assert len(outcomes) == 3, output[-4000:]
    assert all(outcome.startswith("Solved") for outcome in outcomes), outcomes


@pytest.mark.slow
@pytest.mark.realtime  # it trains for a time, not for a number of steps
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_for_own_data(tmp_path: Path) -> None:
    """PushT: another robot, one camera, two dimensions of absolute positions, no gripper, no simulator in training."""
    output = run_page("own-data.md", tmp_path)
    assert "two-valued dimensions []; increments []" in output
    assert re.search(r"action ranges \[\d+(\.\d+)?, \d+(\.\d+)?\], \[\d+", output)  # positive, as the data are
    before, after = (
        json.loads((tmp_path / f"{model}-open-loop" / "open_loop.json").read_text())["rows"]
        for model in ("teacher", "student")
    )
    for rows in (before, after):
        assert rows["ar"]["error"] < 0.7 * rows["mean action"]["error"]  # it has learnt something
        assert rows["jacobi"]["tokens_equal_ar"] == 1
    assert after["jacobi"]["forwards_mean"] < before["jacobi"]["forwards_mean"]
    assert after["ceed"]["forwards_mean"] < after["jacobi"]["forwards_mean"]
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["complete"]
    assert report["decoders"]["ceed"]["episodes"] == 4
