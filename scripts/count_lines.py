"""Lines of Python by part, and of the algorithm: `python scripts/count_lines.py`."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What decoding rests on, without axes, families of published models and engines (design, part 9).
ALGORITHM = (
    "ceed_vla/decoding/",
    "ceed_vla/cache.py",
    "ceed_vla/backbones/base.py",
    "ceed_vla/backbones/capabilities.py",
    "ceed_vla/backbones/compact/",
    "ceed_vla/tokens/base.py",
    "ceed_vla/tokens/uniform.py",
    "ceed_vla/modeling_ceed_vla.py",
    "ceed_vla/configuration_ceed_vla.py",
)
PARTS = (
    "ceed_vla",
    "ceed_vla/decoding",
    "ceed_vla/axes",
    "sim",
    "training",
    "ros_nodes",
    "benchmarks",
    "examples",
    "launch",
    "tests",
)


def count() -> dict[str, int]:
    """Part -> lines of the Python files under version control."""
    command = ["git", "ls-files", "*.py"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listing.split() if (ROOT / name).is_file()]
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in files}
    parts = {
        part: sum(n for name, n in lines.items() if name.startswith(f"{part}/")) for part in PARTS
    }
    algorithm = sum(n for name, n in lines.items() if name.startswith(ALGORITHM))
    total = sum(n for name, n in lines.items() if not name.startswith("tests/"))
    return {"algorithm": algorithm, **parts, "without tests": total}


if __name__ == "__main__":
    for part, lines in count().items():
        print(f"{part:<18} {lines:>7,}")
