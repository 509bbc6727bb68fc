"""Entries of ``report.json``: success, forwards, paired comparisons, versions and hardware."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ceed_vla
from ceed_vla.sim.paired import compare_paired
from ceed_vla.sim.rollout import EpisodeResult
from ceed_vla.sim.success import success_entry


def row_entry(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Entry of one decoder: success overall and per task, forwards, layers and exit reasons."""
    episodes = sorted(episodes, key=lambda episode: episode.seed)  # means to the last digit
    forwards = np.array([count for episode in episodes for count in episode.forwards])
    families = sorted({episode.task for episode in episodes})
    entry = success_entry(episode.success for episode in episodes)
    if len(forwards):
        entry |= {
            "chunks": len(forwards),
            "forwards_mean": round(float(forwards.mean()), 4),
            "forwards_p95": float(np.percentile(forwards, 95)),
            "forwards_histogram": {
                str(k): v for k, v in sorted(Counter(forwards.tolist()).items())
            },
        }
    for name in ("block_layers", "prefix_layers"):
        layers = [count for episode in episodes for count in getattr(episode, name)]
        if len(layers) == len(forwards) > 0:  # missing in episodes of older files
            entry[f"{name}_mean"] = round(float(np.mean(layers)), 4)
    solved = [episode for episode in episodes if episode.success]
    entry["steps_mean_of_successes"] = (
        round(float(np.mean([e.steps for e in solved])), 2) if solved else None
    )
    # motion is missing in older files
    for name in solved[0].motion if solved and all(e.motion for e in solved) else ():
        entry[f"{name}_mean_of_successes"] = float(
            np.mean([episode.motion[name] for episode in solved])
        )
    entry["exit_reasons"] = dict(
        sorted(Counter(r for episode in episodes for r in episode.exit_reasons).items())
    )
    entry["per_task"] = {
        family: success_entry(e.success for e in episodes if e.task == family)
        for family in families
    }
    entry["failed_seeds"] = sorted(episode.seed for episode in episodes if not episode.success)
    return entry


def paired_entries(
    name: str, results: Mapping[str, Sequence[EpisodeResult]], references: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Compare decoder `name`, paired, with each of `references` that has common seeds."""
    outcomes = {
        row: {episode.seed: episode.success for episode in episodes}
        for row, episodes in results.items()
    }
    return {
        reference: compare_paired(outcomes[name], outcomes[reference])
        for reference in references
        if reference != name and outcomes.get(reference, {}).keys() & outcomes[name].keys()
    }


def versions() -> dict[str, str]:
    """Versions of the software that affects the numbers."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        **found,
        **{name: version(name) for name in ("mujoco", "lerobot")},
        "ceed_vla": ceed_vla.__version__,
    }


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, memory [GB], threads and device of this run."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
