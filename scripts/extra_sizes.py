"""Installed size and time of every extra, as a table for docs/how-to/install.md.

python scripts/extra_sizes.py WHEEL [extra ...]

Each row is an environment of its own with the wheel and one extra (or several: policy,sim), and an
empty cache, so that the time contains the downloads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ceed_vla.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("", *EXTRAS, "policy,sim", "edge,ros2,sim", "all")


def measure(wheel: Path, extras: str) -> tuple[float, float, int]:
    """Install the wheel with extras; return size [MB], time [s] and number of packages."""
    uv = str(Path(sys.executable).with_name("uv"))
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"UV_CACHE_DIR": f"{folder}/cache"}
        venv = Path(folder) / "venv"
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(venv)], check=True)
        command = [uv, "pip", "install", "--quiet", "--python", str(venv / "bin" / "python")]
        command += ["--constraints", str(ROOT / "constraints.txt")]
        command += ["--overrides", str(ROOT / "overrides.txt")]
        command.append(f"{wheel}[{extras}]" if extras else str(wheel))
        began = time.monotonic()
        subprocess.run(command, check=True, env=environment)
        took = time.monotonic() - began
        site = next(venv.glob("lib/python*/site-packages"))
        size = sum(file.lstat().st_size for file in site.rglob("*") if file.is_file())
        return size / 1e6, took, len(list(site.glob("*.dist-info")))


def main(arguments: list[str]) -> None:
    """Print a row per extra."""
    wheel, *chosen = arguments
    print("| extra | packages | installed [MB] | time [s] |\n| -- | -- | -- | -- |")
    for extras in chosen or ROWS:
        size, took, packages = measure(Path(wheel).resolve(), extras)
        print(f"| {extras or 'none'} | {packages} | {size:,.0f} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
