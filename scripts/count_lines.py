"""Lines of Python by part, as the design counts them: `python scripts/count_lines.py`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The library core: what decoding rests on, without the families of real VLAs, FAST, conversion,
# data sets, the kinematics that simulated and real arms share, and the command line.
NOT_CORE = re.compile(
    r"ceed_vla/(backbones/(openvla|vlm|pi0_fast|transformers)/|convert/|data/|tokens/(fast|openvla)|verify|cli|doctor"
    r"|kinematics)"
)
PARTS = ("ceed_vla", "sim", "training", "ros_nodes", "benchmarks", "examples", "launch", "tests")


def count() -> dict[str, int]:
    """Part -> lines of the Python files under version control."""
    listing = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in listing.stdout.split()}
    parts = {
        part: sum(n for name, n in lines.items() if name.startswith(f"{part}/")) for part in PARTS
    }
    core = [
        n for name, n in lines.items() if name.startswith("ceed_vla/") and not NOT_CORE.match(name)
    ]
    total = sum(n for name, n in lines.items() if not name.startswith("tests/"))
    return {"core": sum(core), **parts, "without tests": total}


if __name__ == "__main__":
    for part, lines in count().items():
        print(f"{part:<14} {lines:>7,}")
