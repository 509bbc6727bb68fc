"""The commands of docs/lerobot.md, as printed, in the order written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.realtime
@pytest.mark.timeout(900)
def test_the_commands_of_the_lerobot_page(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "lerobot.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    script = "set -e\n" + "".join(blocks).replace('export PATH="$PWD/.venv/bin:$PATH"', "export")
    script = script.replace("out=outputs/lerobot", f"out={tmp_path}")
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
    assert (tmp_path / "teacher" / "checkpoints" / "000006" / "pretrained_model" / "model.safetensors").is_file()
    assert list((tmp_path / "adapted").rglob("adapter_model.safetensors"))
    assert json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["pc_success"] >= 50
    # Two rollouts and the client of the server.
    outcomes = re.findall(r"Solved after \d+ control steps|\d+ steps, not solved", output)
    assert len(outcomes) == 3, output[-4000:]
    assert all(outcome.startswith("Solved") for outcome in outcomes), outcomes
