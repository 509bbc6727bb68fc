"""Latency of an evaluation's rows, measured one chunk at a time on observations of its episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ceed_vla.sim.decoders import Row, resolve_rows
from ceed_vla.sim.engines import engines_of, with_eager
from ceed_vla.sim.environment import Bundle
from ceed_vla.sim.evaluation import Evaluation, planned_episodes
from ceed_vla.sim.timing import (
    PAUSE_S,
    Samples,
    collect_observations,
    make_runner,
    measure,
    percentiles,
)


def measure_latency(run: Evaluation) -> None:
    """Time all rows and their autoregressive references; fill in `run.samples` and `run.timing`.

    All are timed on the same observations, from episodes that one of the rows drives.
    """
    config = run.config
    rows = [row for row in run.rows if not row.delay]
    if not (rows and config.timing_chunks):
        return
    rows_and_references = [*rows, *_missing_references(rows, run.bundles)]
    driver = next((row for row in rows if row.name == "ceed"), rows[-1])
    runner = make_runner(driver, run.bundles, run.executed_steps)
    episodes = collect_observations(
        runner, run.pool, planned_episodes(config), config.timing_chunks
    )
    chunks = sum(len(episode) for episode in episodes)
    engines = run.engines
    able = {row.name: engines_of(engines, row.model, row.decoding) for row in rows_and_references}
    opened = with_eager(engines, run.bundles)
    runners = {
        f"{row.name} {engine}": opened[engine].runner(row, run.executed_steps)
        for row in rows_and_references
        for engine in able[row.name]
    }
    parts = {
        f"{model} {name}": probe
        for name, engine in engines.items()
        for model, probe in engine.parts().items()
    }
    for model, probe in opened["eager"].parts().items():  # of models that no other engine runs
        if not any(name.startswith(f"{model} ") for name in parts):
            parts[f"{model} eager"] = probe
    with tqdm(total=chunks, desc="latency", unit="chunk", dynamic_ncols=True) as bar:
        samples, probed = measure(runners, {**parts, **run.probes}, episodes, bar.update)
    used = {name: _fastest(name, names, samples) for name, names in able.items()}
    for name, engine in used.items():
        run.samples[name] = samples[f"{name} {engine}"]
    run.timing = {
        "chunks": chunks,
        "episodes": len(episodes),
        "driver": driver.name,
        "batch": 1,
        "engines": used,
        "pin": config.pin,
        "pause_ms": [1e3 * seconds for seconds in PAUSE_S],
        "totals": {
            row: {engine: percentiles(samples[f"{row} {engine}"].total) for engine in names}
            for row, names in able.items()
        },
        "loops": {
            row: {engine: percentiles(samples[f"{row} {engine}"].loop) for engine in names}
            for row, names in able.items()
        },
        "parts": {
            name: {part: percentiles(s) for part, s in found.items()}
            for name, found in probed.items()
        },
    }


def _missing_references(rows: Sequence[Row], bundles: dict[str, Bundle]) -> list[Row]:
    """The autoregressive references of `rows` that are not among them."""
    names = sorted({row.reference for row in rows} - {row.name for row in rows})
    return resolve_rows(names, {model: bundle[0].config for model, bundle in bundles.items()})


def _fastest(row: str, engines: Sequence[str], samples: Mapping[str, Samples]) -> str:
    """The engine of `engines` with the smallest median time of a row."""
    return min(engines, key=lambda engine: np.median(samples[f"{row} {engine}"].total))
