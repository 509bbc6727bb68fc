"""``ceed-vla open-loop``: decoders on the frames of held-out data, where there is no simulator.

A policy that follows demonstrations step by step never meets its own mistakes, so a small error here is needed for
success and does not prove it. What it does show: whether the policy learnt anything, and what a decoder changes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from ceed_vla.checkpoints import load
from ceed_vla.data.frames import ACTION, FrameStore, open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.fields import COUNTS, check_fields, ranged
from ceed_vla.files import replacing, write_text
from training.mixture import check_compatible, check_fits
from training.settings import full_disk, output_folder, split_list

REPORT, PICTURE = "open_loop.json", "open_loop.png"
MEAN_ACTION = "mean action"
_WARM_UP = 3  # chunks that are decoded before the clock runs
_DRAWN = 200  # frames


@dataclass
class OpenLoopConfig:
    """Settings of `ceed-vla open-loop`.

    Attributes:
        policy_path: Checkpoint folder, or teacher or student for the shipped ones.
        roots: Comma-separated LeRobotDataset folders that the policy was not trained on.
        output_dir: Folder for open_loop.json and a picture of one episode's actions.
        decoders: Comma-separated names, as `ceed-vla eval` has them; "ar" is always among them.
        chunks: Chunks of every decoder, one after every `executed_steps`, from the first episodes of every data set.
        executed_steps: Steps executed of each chunk; the policy's n_action_steps if None.
        batch_size: Chunks that are decoded together.
        timing_chunks: Chunks that are decoded once more, one at a time, for the latency; 0 skips it.
        device: Overrides the checkpoint's device.
        threads: Threads of torch; None leaves torch's choice.
    """

    policy_path: str = ""
    roots: str = ""
    output_dir: str = ""
    decoders: str = "ar,jacobi,ceed"
    chunks: int = ranged(1000, COUNTS)
    executed_steps: int | None = ranged(None, "[1, 4096]")
    batch_size: int = ranged(16, "[1, 1000]")
    timing_chunks: int = ranged(50, "[0, 100000]")
    device: str | None = None
    threads: int | None = ranged(None, "[1, 256]")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class _Row:
    """What one decoder wrote, over the chunks of all data sets."""

    decoding: DecodingConfig
    tokens: list[Tensor] = field(default_factory=list)  # (n,)
    errors: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def open_loop(config: OpenLoopConfig) -> dict[str, Any]:
    """Decode a chunk after every `executed_steps` of every episode, and compare it with what was demonstrated.

    The warm start is the decoder's own chunk before, as in a closed loop. Writes and returns ``open_loop.json``.

    Raises:
        ConfigError: No policy or data, an unknown decoder, or more steps than a chunk has.
        DatasetError: Unreadable data, without actions, or data that do not fit the policy.
    """
    folder = output_folder(config.output_dir, "the report")
    if not config.policy_path or not split_list(config.roots):
        raise ConfigError("Set --policy_path to a checkpoint, and --roots to data that it was not trained on.")
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, pre, post = load(config.policy_path, device=config.device)
    steps = config.executed_steps or policy.config.n_action_steps
    if steps > policy.config.chunk_size:
        raise ConfigError(f"--executed_steps is {steps}; the policy's chunks have {policy.config.chunk_size} steps.")
    names = list(dict.fromkeys(["ar", *split_list(config.decoders)]))
    rows = {name: _Row(policy.config.named(name)) for name in names}
    stores = [open_dataset(root) for root in split_list(config.roots)]
    check_compatible(stores)
    for store in stores:
        check_fits(store, policy.config)
        if store.action is None:
            raise DatasetError(f"{store.root} holds no actions to compare with; it has {', '.join(store.shapes)}.")
    actions = np.concatenate([store.action for store in stores if store.action is not None])
    width = np.ptp(actions, axis=0)  # (A,)
    run = _Run(policy, pre, post, steps, np.where(width > 0, width, 1.0))
    plans = [_replans(store, steps, math.ceil(config.chunks / len(stores))) for store in stores]
    total = len(rows) * sum(len(plan) for plan in plans)
    drawn: dict[str, NDArray[np.float32]] = {}
    with tqdm(total=total, desc="open loop", unit="chunk", dynamic_ncols=True) as bar:
        for store, plan in zip(stores, plans, strict=True):
            for name, row in rows.items():
                chunks = run.decode(store, plan, row, config.batch_size, bar)
                drawn.setdefault(name, _executed(store, plan, chunks, steps))
    run.time(stores[0], plans[0][: config.timing_chunks], rows)
    episodes = np.concatenate(
        [store.episode[plan] + 1e9 * index for index, (store, plan) in enumerate(zip(stores, plans, strict=True))]
    )
    mean = _mean_action(stores, plans, actions.mean(0), run)
    report = {
        "policy": config.policy_path,
        "data": [{"root": store.root.name, "chunks": len(plan)} for store, plan in zip(stores, plans, strict=True)],
        "executed_steps": steps,
        "rows": {
            MEAN_ACTION: {"error": mean},
            **{name: _entry(row, rows["ar"], run, episodes) for name, row in rows.items()},
        },
        "threads": torch.get_num_threads(),
    }
    with full_disk(folder, "nothing was written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
        _draw(stores[0], drawn, folder / PICTURE)
    _print(report)
    print(f"Written: {folder / REPORT}, {folder / PICTURE}")
    return report


@dataclass
class _Run:
    policy: Any
    pre: Any
    post: Any
    steps: int
    width: NDArray[np.float32]  # (A,) of the data's actions

    @torch.inference_mode()
    def decode(self, store: FrameStore, plan: NDArray[np.int64], row: _Row, size: int, bar: Any) -> NDArray[np.float32]:
        """The chunks (N, m, A) at the frames `plan` (N,), appended to `row` as well."""
        policy, n = self.policy, self.policy.config.block_length
        device = policy.config.device
        before = {int(frame): place for place, frame in enumerate(plan)}
        tokens = torch.full((len(plan), n), -1, dtype=torch.int64, device=device)
        chunks = np.full((len(plan), policy.config.chunk_size, len(self.width)), np.nan, dtype=np.float32)
        forwards = np.zeros(len(plan), dtype=np.int64)
        generator = torch.Generator().manual_seed(row.decoding.seed)
        for group in _in_turn(store, plan, self.steps, size):
            last = [before.get(int(frame) - self.steps, -1) for frame in plan[group]]
            same = [
                i >= 0 and store.episode[plan[i]] == store.episode[f] for i, f in zip(last, plan[group], strict=True)
            ]
            previous = tokens[last]
            previous[~torch.tensor(same)] = -1
            result = policy.decode(
                self.pre(store.batch(plan[group], policy.config.chunk_size)),
                row.decoding,
                previous=previous if any(same) else None,
                generator=generator,
                shift_steps=self.steps,
                executed_steps=self.steps,
                read=False,
            )
            tokens[group], forwards[group] = result.tokens, result.iterations.cpu().numpy()
            readable = policy.tokenizer.readable(result.tokens)
            found = self.post(policy.tokenizer.decode(result.tokens[readable]))
            chunks[group[readable.cpu().numpy()]] = found.cpu().float().numpy()
            bar.update(len(group))
        row.tokens += list(tokens.cpu())
        row.forwards += forwards.tolist()
        row.errors += self.errors(store, plan, chunks).tolist()
        return chunks

    def errors(self, store: FrameStore, plan: NDArray[np.int64], chunks: NDArray[Any]) -> NDArray[np.float64]:
        """(N,) mean distance of the executed steps from the demonstrated ones, over the width of the data's actions;
        NaN where the tokens stand for no chunk.
        """
        wanted, padded = (part.numpy() for part in store.chunks(plan, self.steps))
        distance = (np.abs(chunks[:, : self.steps] - wanted) / self.width).mean(-1)
        return np.where(padded, 0.0, distance).sum(1) / (~padded).sum(1)

    @torch.inference_mode()
    def time(self, store: FrameStore, plan: NDArray[np.int64], rows: dict[str, _Row]) -> None:
        """Decode one chunk at a time, the decoders in turns, from a warm start where there is one."""
        last: dict[str, Tensor | None] = dict.fromkeys(rows)
        warm_up = [(frame, False) for frame in plan[:1].repeat(_WARM_UP)]
        for frame, counted in (*warm_up, *((frame, True) for frame in plan)):
            if counted and (frame == plan[0] or store.episode[frame] != store.episode[frame - self.steps]):
                last = dict.fromkeys(rows)
            raw = store.batch(np.array([frame]), 1)
            for name, row in rows.items():
                started = time.perf_counter()
                result = self.policy.decode(
                    self.pre(dict(raw)), row.decoding, previous=last[name], shift_steps=self.steps,
                    executed_steps=self.steps, read=False,
                )  # fmt: skip
                last[name] = result.tokens.cpu()  # which waits for the device
                if counted:
                    row.seconds.append(time.perf_counter() - started)


def _replans(store: FrameStore, steps: int, most: int) -> NDArray[np.int64]:
    """The first `most` frames (N,) at which a chunk begins, one after every `steps` of an episode."""
    position = np.arange(len(store)) - np.searchsorted(store.episode, store.episode)
    return np.flatnonzero(position % steps == 0)[:most]


def _in_turn(store: FrameStore, plan: NDArray[np.int64], steps: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Places in `plan` in groups (B,) of at most `size`, every chunk after the one before it in its episode."""
    turn = (plan - np.searchsorted(store.episode, store.episode[plan])) // steps
    for index in range(int(turn.max()) + 1):
        group = np.flatnonzero(turn == index)
        yield from np.split(group, range(size, len(group), size))


def _executed(
    store: FrameStore, plan: NDArray[np.int64], chunks: NDArray[np.float32], steps: int
) -> NDArray[np.float32]:
    """What the chunks do at the first frames of a data set (F, A); NaN where there is none."""
    found = np.full((min(len(store), _DRAWN), chunks.shape[2]), np.nan, dtype=np.float32)
    for frame, chunk in zip(plan[plan < len(found)], chunks, strict=False):
        end = min(frame + steps, store.episode_end[frame], len(found))
        found[frame:end] = chunk[: end - frame]
    return found


def _mean_action(stores: list[FrameStore], plans: list[NDArray[np.int64]], mean: NDArray[Any], run: _Run) -> float:
    """The error of always writing the data's mean action."""
    errors = [
        run.errors(store, plan, np.broadcast_to(mean, (len(plan), run.steps, len(mean))))
        for store, plan in zip(stores, plans, strict=True)
    ]
    return round(float(np.concatenate(errors).mean()), 5)


def _entry(row: _Row, reference: _Row, run: _Run, episodes: NDArray[Any]) -> dict[str, Any]:
    errors, forwards = np.array(row.errors), np.array(row.forwards)
    sound = ~np.isnan(errors)
    each = [errors[sound & (episodes == one)].mean() for one in np.unique(episodes[sound])]
    own, other = (torch.stack(r.tokens) for r in (row, reference))
    executed = run.steps * (run.policy.tokenizer.tokens_per_step or own.shape[1])
    entry: dict[str, Any] = {
        "error": round(float(np.nanmean(errors)), 5) if each else None,
        "error_pm95": round(1.96 * float(np.std(each, ddof=1)) / math.sqrt(len(each)), 5) if len(each) > 1 else None,
        "malformed": int((~sound).sum()),
        "forwards_mean": round(float(forwards.mean()), 3),
        "forwards_p95": float(np.percentile(forwards, 95)),
        "tokens_equal_ar": round(float((own == other)[:, :executed].double().mean()), 5),
    }
    if row.seconds:
        p50, p95, p99 = 1e3 * np.percentile(row.seconds, (50, 95, 99))
        entry["latency_ms"] = {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2)}
    return entry


def _print(report: dict[str, Any]) -> None:
    chunks = sum(data["chunks"] for data in report["data"])
    table = Table(
        "decoder", "error [% of range]", "forwards mean / p95", "tokens = AR", "latency [ms] p50 / p95", "malformed",
        title=f"{chunks} chunks, {report['executed_steps']} steps of each; held-out data, no closed loop",
    )  # fmt: skip
    for name, entry in report["rows"].items():
        error = "-" if entry["error"] is None else f"{100 * entry['error']:.2f}"
        error += f" ± {100 * entry['error_pm95']:.2f}" if entry.get("error_pm95") is not None else ""
        if name == MEAN_ACTION:
            table.add_row(name, error)
            continue
        latency = entry.get("latency_ms")
        table.add_row(
            name, error, f"{entry['forwards_mean']:.2f} / {entry['forwards_p95']:g}",
            f"{100 * entry['tokens_equal_ar']:.1f} %",
            f"{latency['p50']:.1f} / {latency['p95']:.1f}" if latency else "-", str(entry["malformed"]),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 120).print(table)


def _draw(store: FrameStore, actions: dict[str, NDArray[np.float32]], path: Path) -> None:
    """Demonstrated and decoded actions of the first frames, a panel for every dimension."""
    assert store.action is not None
    frames = min(_DRAWN, len(store))
    names = store.labels.get(ACTION) or [f"action {i}" for i in range(store.action.shape[1])]
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 1.3 * len(names) + 0.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
        for dim, (panel, label) in enumerate(zip(panels, names, strict=True)):
            panel.plot(store.action[:frames, dim], color="black", linewidth=2.0, alpha=0.3, label="demonstrated")
            for name, found in actions.items():
                panel.plot(found[:frames, dim], linewidth=0.8, label=name)
            panel.set_ylabel(str(label))
        panels[0].legend(ncols=len(actions) + 1, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        panels[-1].set_xlabel("frame")
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120)
