"""Latency of an evaluation's rows, measured one chunk at a time on observations of its episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ceed_vla.sim.decoders import Row, resolve_rows
from ceed_vla.sim.environment import Bundle
from ceed_vla.sim.evaluation import Evaluation, planned_episodes
from ceed_vla.sim.timing import (
    ENGINES,
    Samples,
    bare_parts,
    collect_observations,
    engines_of,
    in_engine,
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
    engines = ENGINES[:2] if config.engine == "fastest" else (config.engine,)
    bundles = {
        engine: {model: in_engine(bundle, engine) for model, bundle in run.bundles.items()}
        for engine in {"eager", *engines}
    }
    runners = {
        f"{row.name} {engine}": make_runner(row, bundles[engine], run.executed_steps)
        for row in rows_and_references
        for engine in engines_of(row.decoding, engines)
    }
    parts = {
        f"{model} {engine}": bare_parts(bundle)
        for engine in engines
        for model, bundle in bundles[engine].items()
    }
    with tqdm(total=chunks, desc="latency", unit="chunk", dynamic_ncols=True) as bar:
        samples, probed = measure(runners, {**parts, **run.probes}, episodes, bar.update)
    used = {row.name: _faster_engine(row, engines, samples) for row in rows_and_references}
    for name, engine in used.items():
        run.samples[name] = samples[f"{name} {engine}"]
    run.timing = {
        "chunks": chunks,
        "episodes": len(episodes),
        "driver": driver.name,
        "batch": 1,
        "engines": used,
        "parts": {
            name: {part: percentiles(s) for part, s in found.items()}
            for name, found in probed.items()
        },
    }


def _missing_references(rows: Sequence[Row], bundles: dict[str, Bundle]) -> list[Row]:
    """The autoregressive references of `rows` that are not among them."""
    names = sorted({row.reference for row in rows} - {row.name for row in rows})
    return resolve_rows(names, {model: bundle[0].config for model, bundle in bundles.items()})


def _faster_engine(row: Row, engines: Sequence[str], samples: Mapping[str, Samples]) -> str:
    """The engine of `engines` with the smallest median time of a row."""
    return min(
        engines_of(row.decoding, engines),
        key=lambda engine: np.median(samples[f"{row.name} {engine}"].total),
    )
