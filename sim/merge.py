"""``ceed-vla merge``: one evaluation from the output folders of its shards.

A job array runs ``ceed-vla eval --shard_index I --num_shards N`` once per I. The merged report is
that of a run in one go; only times are those of the first shard that measured them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ceed_vla import invocation
from ceed_vla.errors import ConfigError, raised_as
from ceed_vla.fields import Checked
from ceed_vla.files import read_json
from ceed_vla.outputs import claimed_folder, default_console
from ceed_vla.report.command import PAGE, write_page
from ceed_vla.sim.env_tasks import MIXED
from ceed_vla.sim.episode_log import EPISODES, EpisodeLog, Results, read_identity
from ceed_vla.sim.evaluation_report import (
    MARKDOWN,
    REPORT,
    paired_of,
    write_report,
)
from ceed_vla.sim.plots import PLOTS
from ceed_vla.sim.report import console_table
from ceed_vla.sim.summary import row_entry
from ceed_vla.wording import numbered

MOST_SHARDS = MOST_EPISODES = 100_000  # as `EvalConfig` allows
SHARD = "shard"  # key of [index, number of shards] in an identity and in a report
# Keys of a report that may differ between shards.
_OWN = (SHARD, "complete", "decoders", "timing", "hardware", "clips", "command")


@dataclass
class MergeConfig(Checked, prefix="--"):
    """Options of ``ceed-vla merge``.

    Attributes:
        folders: Output folders of `ceed-vla eval`, one of each shard, in any order.
        output_dir: Folder for the merged episodes, report and plots.
    """

    folders: list[str] = field(default_factory=list)
    output_dir: str = "outputs/merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folders:
            raise ConfigError("--folders is empty; name the output folders of the shards.")


@dataclass
class Part:
    """The evaluation of one shard.

    Attributes:
        folder: Its folder.
        index: Its index.
        count: Number of shards.
        identity: What its episodes depend on, without the shard.
        report: Its report.
        results: Its episodes by row.
    """

    folder: Path
    index: int
    count: int
    identity: dict[str, Any]
    report: dict[str, Any]
    results: Results


def merge(config: MergeConfig) -> dict[str, Any]:
    """Merge shards; write episodes, report and plots, and return the contents of ``report.json``.

    Raises:
        ConfigError: A folder is not that of a shard, shards are missing, incomplete or given twice,
            or they differ in checkpoints, versions or settings.
    """
    parts = sorted(map(_read_checked, map(Path, config.folders)), key=lambda part: part.index)
    _check_equal(parts)
    _check_complete(parts)
    inputs = [part.folder for part in parts]
    if Path(config.output_dir).resolve() in [folder.resolve() for folder in inputs]:
        raise ConfigError(
            f"--output_dir is {config.output_dir}, which is a shard; name another folder."
        )
    own = (EPISODES, REPORT, MARKDOWN, PAGE, *PLOTS)
    known_by = (REPORT, EPISODES)
    with claimed_folder("output_dir", config.output_dir, own, known_by, inputs=inputs) as out:
        out.mkdir(parents=True, exist_ok=True)
        results = _joined(parts)
        limit = parts[0].report["max_episode_steps"]
        EpisodeLog(out, parts[0].identity, {}, limit, parts[0].report["versions"]).start(results)
        report = _report(parts, results)
        files = [*write_report(report, out), write_page([out], out / PAGE)]
    console = default_console()
    console.print(console_table(report, console.width))
    console.print("Written: " + ", ".join(map(str, files)), soft_wrap=True, highlight=False)
    return report


def _read_checked(folder: Path) -> Part:
    """As `_read`; a damaged report is one error."""
    with raised_as(ConfigError, f"{folder} holds a damaged report", "run this shard again"):
        return _read(folder)


def _read(folder: Path) -> Part:
    """Read the evaluation of a shard."""
    identity = read_identity(folder)
    shard = identity.pop(SHARD, None)
    if not (isinstance(shard, list) and len(shard) == 2 and all(type(n) is int for n in shard)):
        raise ConfigError(
            f"{folder} is an evaluation without shards; name folders that were written with "
            "--shard_index and --num_shards."
        )
    report = read_json(folder / REPORT, ConfigError)
    if report.get("complete") is not True:
        raise ConfigError(
            f"{folder}, shard {shard[0]} of {shard[1]}, is not complete; continue it with --resume."
        )
    seeds = report["seeds"]
    if not (0 <= shard[0] < shard[1] <= MOST_SHARDS and 0 < seeds["count"] <= MOST_EPISODES):
        raise ConfigError(f"{folder} has shard {shard} of {seeds}; restore its files.")
    if set(report["decoders"]) != set(identity["decoders"]) or "timing" not in report:
        raise ConfigError(f"{folder} has a report of other decoders; run this shard again.")
    known = dict.fromkeys(range(seeds["first"], seeds["first"] + seeds["count"]), MIXED)
    log = EpisodeLog(folder, {**identity, SHARD: shard}, known, report["max_episode_steps"], None)
    return Part(folder, shard[0], shard[1], identity, report, log.read())


def _check_equal(parts: Sequence[Part]) -> None:
    """Raise `ConfigError` unless all parts are of the same evaluation."""
    first = parts[0]
    for part in parts[1:]:
        for ours, theirs in (
            ({SHARD: first.count, **first.identity}, {SHARD: part.count, **part.identity}),
            (_shared(first.report), _shared(part.report)),
        ):
            for name in {**ours, **theirs}:
                if ours.get(name) != theirs.get(name):
                    what = "number of shards" if name == SHARD else name
                    raise ConfigError(
                        f"{first.folder} and {part.folder} are shards of different evaluations: "
                        f"their {what} is {str(ours.get(name))[:200]} and "
                        f"{str(theirs.get(name))[:200]}. Run one of them again."
                    )


def _shared(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report has in common with those of the other shards."""
    return {name: value for name, value in report.items() if name not in _OWN}


def _check_complete(parts: Sequence[Part]) -> None:
    """Raise `ConfigError` unless every shard is there once, with all its episodes."""
    indices = [part.index for part in parts]
    count = parts[0].count
    if missing := [index for index in range(count) if index not in indices]:
        raise ConfigError(
            f"Of {count} shards, {numbered('shard', missing)} are missing; run `ceed-vla eval` "
            "with these values of --shard_index, and name their folders, too."
        )
    for part, following in pairwise(parts):
        if part.index == following.index:
            raise ConfigError(
                f"{part.folder} and {following.folder} are the same shard, {part.index}; name each "
                "shard once."
            )


def _joined(parts: Sequence[Part]) -> Results:
    """The episodes of all parts by row, sorted by seed.

    Raises:
        ConfigError: Episodes are missing, or two parts have the same ones.
    """
    seeds = parts[0].report["seeds"]
    planned = list(range(seeds["first"], seeds["first"] + seeds["count"]))
    joined: Results = {}
    for name in parts[0].identity["decoders"]:
        episodes = [episode for part in parts for episode in part.results[name]]
        joined[name] = sorted(episodes, key=lambda episode: episode.seed)
        if [episode.seed for episode in joined[name]] != planned:
            raise ConfigError(
                f"The shards have {len(episodes)} episodes of {name}, and they must be the "
                f"{len(planned)} of seeds {planned[0]} to {planned[-1]}, each once. Run the shards "
                "again."
            )
    return joined


def _report(parts: Sequence[Part], results: Results) -> dict[str, Any]:
    """The contents of ``report.json``."""
    timed = next((part for part in parts if part.report["timing"]), parts[0]).report
    decoders = {
        name: {
            **entry,  # its times, and what does not depend on episodes
            **row_entry(results[name]),
            "paired": paired_of(name, entry["delay_of"], results),
        }
        for name, entry in timed["decoders"].items()
    }
    rest = {name: value for name, value in timed.items() if name not in (SHARD, "clips")}
    return rest | {"decoders": decoders, "command": invocation.command()}
