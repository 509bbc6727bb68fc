"""``report.json`` of an evaluation, and the Markdown and plots that are made from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ceed_vla import invocation
from ceed_vla.files import write_text
from ceed_vla.outputs import MADE_BY
from ceed_vla.sim.decoders import Row
from ceed_vla.sim.episode_log import Results
from ceed_vla.sim.evaluation import Evaluation
from ceed_vla.sim.plots import write_plots
from ceed_vla.sim.report import markdown
from ceed_vla.sim.summary import hardware, paired_entries, row_entry, versions
from ceed_vla.sim.timing import summarise

REPORT = "report.json"
MARKDOWN = "report.md"


def build_report(run: Evaluation, *, complete: bool) -> dict[str, Any]:
    """Return the contents of ``report.json`` for the current state of `run`."""
    config = run.config
    policy = run.bundles["policy"][0]
    return {
        "program": MADE_BY,
        "complete": complete,
        "env": config.env.type,
        "task": config.env.task,
        "split": getattr(config.env, "split", None),
        "seeds": {"first": config.seed, "count": config.episodes},
        **({"shard": [config.shard_index, config.num_shards]} if config.num_shards > 1 else {}),
        "executed_steps": config.executed_steps,
        "fps": config.env.fps,
        "max_episode_steps": run.pool.max_episode_steps,
        "chunk_size": policy.config.chunk_size,
        "block_length": policy.config.block_length,
        "policy": run.checkpoints["policy"],
        "teacher": run.checkpoints.get("teacher"),
        "decoders": {row.name: _decoder_entry(run, row) for row in run.rows},
        "timing": run.timing,
        **_clips_entry(run, complete),
        "command": invocation.command(),
        "versions": versions(),
        "hardware": hardware(str(policy.config.device)),
    }


def shown_seed(run: Evaluation) -> int:
    """Seed of the episode in the clips: the first that the first decoder solved, else the first."""
    episodes = sorted(run.results[run.rows[0].name], key=lambda episode: episode.seed)
    return next((episode.seed for episode in episodes if episode.success), episodes[0].seed)


def _clips_entry(run: Evaluation, complete: bool) -> dict[str, Any]:
    """Which episode the clips show, and who solved it."""
    if not (run.config.clips and complete):
        return {}
    seed = shown_seed(run)
    solved = {
        row.name: episode.success
        for row in run.rows
        for episode in run.results[row.name]
        if episode.seed == seed
    }
    return {"clips": {"seed": seed, "solved": solved}}


def _decoder_entry(run: Evaluation, row: Row) -> dict[str, Any]:
    entry = row_entry(run.results[row.name])
    if row.name in run.samples:
        entry |= summarise(
            run.samples[row.name],
            run.samples[row.reference],
            run.bundles[row.model][0].tokenizer,
            run.executed_steps,
        )
    plain = row.name.removesuffix(row.suffix)
    entry |= {"delay_steps": row.delay, "delay_of": plain}
    entry["paired"] = paired_of(row.name, plain, run.results)
    entry["decoding"] = {**asdict(row.decoding), "exits": list(row.decoding.exits)}
    return entry


def paired_of(name: str, delay_of: str, results: Results) -> dict[str, dict[str, Any]]:
    """Compare a row, paired, with the autoregressive rows of its delay and with the teacher's row.

    Args:
        name: The row.
        delay_of: The row without its delay.
        results: Episodes by row.
    """
    suffix = name.removeprefix(delay_of)
    references = (f"ar{suffix}", f"teacher_ar{suffix}", f"teacher_{name}")
    return paired_entries(name, results, references)


def write_json(report: dict[str, Any], folder: Path) -> Path:
    """Write ``report.json``, and return its path."""
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return folder / REPORT


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and the plots, and return their paths in this order."""
    files = [write_json(report, folder), folder / MARKDOWN]
    plots = write_plots(report, folder)
    write_text(folder / MARKDOWN, markdown(report, [plot.name for plot in plots]))
    return files + plots
