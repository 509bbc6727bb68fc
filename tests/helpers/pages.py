"""The pages whose shell commands tests run as printed, and how they are run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import warm_commands

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST_POLICY = "tutorials/first-policy.md"
FIRST_ROBOT = "tutorials/first-robot.md"
LEROBOT = "how-to/use-lerobot-tools.md"
PIPELINE = "how-to/run-the-pipeline.md"
# Pages with commands that are small as printed. Those outside CI take minutes, because each command
# imports torch and LeRobot; tests of the modules call the same commands in one process.
IN_CI = (
    "how-to/add-an-environment.md",
    "how-to/connect-an-arm.md",
    "how-to/share-a-ros-network.md",
    "how-to/tune-a-plan.md",
)
OUTSIDE_CI = (
    "how-to/add-a-backbone.md",
    "how-to/calibrate-exits.md",
    "how-to/choose-a-decoder.md",
    "how-to/learn-when-to-exit.md",
    "how-to/run-fewer-prefix-tokens.md",
    "how-to/run-on-several-machines.md",
    "how-to/show-results.md",
    "how-to/train-early-exit-layers.md",
)
RUN = (FIRST_POLICY, FIRST_ROBOT, LEROBOT, PIPELINE, *IN_CI, *OUTSIDE_CI)
# A block with a marker, and the empty line that the formatter puts between the two.
NOT_RUN = re.compile(r"<!-- not run: [^\n]*-->\n+```bash\n.*?```", re.DOTALL)


def run_page(
    page: str, folder: Path, *, sizes: str = "", threads: int = 1, timeout: float = 880
) -> str:
    """Run the commands of a page in one shell and return what they print.

    Args:
        page: Its path below docs.
        folder: Stands in the place of the page's ``outputs/NAME``.
        sizes: Replaces the line of the page that assigns its sizes, which begins with the same
            name.
        threads: Threads of each process.
        timeout: Longest time [s].
    """
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", NOT_RUN.sub("", text), re.DOTALL)
    script = "set -e\n" + "".join(blocks).replace('export PATH="$PWD/.venv/bin:$PATH"', "export")
    script = re.sub(r"out=outputs/\S+", f"out={folder}", script, count=1)
    script = script.replace("outputs/", f"{folder}/")
    if sizes:
        (line,) = sizes_in(script, sizes.partition("=")[0])
        script = script.replace(line, sizes)
    process = subprocess.run(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PATH": warm_commands.path(),
            "OMP_NUM_THREADS": str(threads),
            "TQDM_DISABLE": "1",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-4000:]
    return output


def sizes_in(text: str, first: str) -> list[str]:
    """The lines of `text` that assign sizes, `first` the first of them."""
    return re.findall(rf"^{first}=\S+ \w+=.*$", text, re.MULTILINE)
