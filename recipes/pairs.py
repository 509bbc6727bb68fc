"""Decoders of several evaluations against one decoder, paired by seed, and a picture of them.

    python recipes/pairs.py FOLDER:DECODER FOLDER ... --picture latency.png

The first is the reference. All decoders of the folders are compared with it. Folders are results of
``ceed-vla eval`` with the same tasks and seeds. The picture has the decoders with milliseconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.files import read_json
from ceed_vla.sim.bench import floor, pareto
from ceed_vla.sim.paired import compare_paired
from ceed_vla.sim.plots import save_figure


def opened(folder: str) -> dict[str, Any]:
    """The report of an evaluation.

    Raises:
        ConfigError: It is not complete, or one shard of several.
    """
    report = read_json(Path(folder) / "report.json")
    if not report["complete"]:
        raise ConfigError(f"The evaluation in {folder} is not complete.")
    if any(row["episodes"] != report["seeds"]["count"] for row in report["decoders"].values()):
        raise ConfigError(f"{folder} lacks episodes: it is one shard of several; merge them first.")
    return report


def outcomes(report: dict[str, Any], decoder: str) -> dict[int, bool]:
    """Success of a decoder by seed.

    Raises:
        ConfigError: The evaluation lacks this decoder.
    """
    if decoder not in report["decoders"]:
        there = ", ".join(report["decoders"])
        raise ConfigError(f"There is no decoder {decoder}; there are {there}.")
    failed = set(report["decoders"][decoder]["failed_seeds"])
    first, count = report["seeds"]["first"], report["seeds"]["count"]
    return {seed: seed not in failed for seed in range(first, first + count)}


def main(reference: str, folders: list[str], picture: str) -> None:
    """Print a Markdown table, and draw the picture."""
    folder, _, decoder = reference.rpartition(":")
    if not folder:
        raise ConfigError(f"The reference is {reference!r}; write FOLDER:DECODER.")
    report = opened(folder)
    base = outcomes(report, decoder)
    least = floor(report, "policy") if report["timing"] else None
    against = f"points against {decoder} of {Path(folder).name} [95 %]"
    print(f"| evaluation | decoder | solved | {against} | p50 [ms] |")
    print("| -- | -- | -- | -- | -- |")
    timed = {}
    for folder in folders:
        name, report = Path(folder).name, opened(folder)
        for row in report["decoders"]:
            solved = outcomes(report, row)
            pair = compare_paired(solved, base)
            low, high = pair["ci95_points"]
            found = f"{pair['difference_points']:+.1f} [{low:+.1f}, {high:+.1f}]"
            entry = report["decoders"][row]
            p50 = f"{entry['total_ms']['p50']:.1f}" if "total_ms" in entry else ""
            rate = f"{sum(solved.values())} of {len(solved)}"
            print(f"| {name} | `{row}` | {rate} | {found} | {p50} |")
            timed[f"{row}, {name}"] = entry
    if picture:
        if least is None:
            raise ConfigError("The evaluation of the reference has no milliseconds to draw.")
        save_figure(pareto({"decoders": timed, "floor_ms": least}), Path(picture))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("reference", metavar="FOLDER:DECODER")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--picture", default="", metavar="FILE")
    options = parser.parse_args()
    try:
        main(options.reference, options.folders, options.picture)
    except CeedVLAError as error:
        sys.exit(str(error))
