"""Decoders of several evaluations against one decoder, paired by seed.

    python recipes/pairs.py FOLDER:DECODER FOLDER:DECODER ...

The first is the reference; ``all`` stands for all decoders of a folder. Folders are results of
``ceed-vla eval`` with the same tasks and seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.files import read_json
from ceed_vla.sim.paired import compare_paired


def complete_report(folder: str) -> dict[str, Any]:
    """The report of a finished evaluation."""
    report = read_json(Path(folder) / "report.json")
    if not report["complete"]:
        raise ConfigError(f"The evaluation in {folder} is not complete.")
    return report


def outcomes(report: dict[str, Any], name: str) -> dict[int, bool]:
    """Success of a decoder by seed."""
    if name not in report["decoders"]:
        raise ConfigError(f"There is no decoder {name}; there are {', '.join(report['decoders'])}.")
    failed = set(report["decoders"][name]["failed_seeds"])
    first, count = report["seeds"]["first"], report["seeds"]["count"]
    return {seed: seed not in failed for seed in range(first, first + count)}


def main(reference: str, *others: str) -> None:
    """Print a Markdown table."""
    folder, _, name = reference.rpartition(":")
    base = outcomes(complete_report(folder), name)
    print(
        f"| evaluation | decoder | solved | points against {name} of {Path(folder).name} [95 %] |"
    )
    print("| -- | -- | -- | -- |")
    for other in others:
        folder, _, name = other.rpartition(":")
        report = complete_report(folder)
        for row in report["decoders"] if name == "all" else [name]:
            solved = outcomes(report, row)
            pair = compare_paired(solved, base)
            low, high = pair["ci95_points"]
            found = f"{pair['difference_points']:+.1f} [{low:+.1f}, {high:+.1f}]"
            rate = f"{sum(solved.values())} of {len(solved)}"
            print(f"| {Path(folder).name} | `{row}` | {rate} | {found} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except CeedVLAError as error:
        sys.exit(str(error))
