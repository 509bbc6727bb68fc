"""``ceed-vla open-loop``: decoders on the frames of held-out data, where there is no simulator.

A policy that follows demonstrations step by step never meets its own mistakes, so a small error
here is needed for success and does not prove it. What it does show: whether the policy learnt
anything, and what a decoder changes.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from ceed_vla.checkpoints import load
from ceed_vla.data.frames import ACTION, FrameStore, open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import CeedVLAError, ConfigError, DatasetError
from ceed_vla.fields import COUNTS, Checked, ranged
from ceed_vla.files import replacing, write_text
from ceed_vla.outputs import MADE_BY, claimed_folder, default_console
from ceed_vla.tokens.base import ActionTokens
from ceed_vla.training.held_out import SHARES, held_out_frames
from ceed_vla.training.mixture import check_compatible, check_fits
from ceed_vla.training.settings import full_disk, split_list

REPORT, PICTURE = "open_loop.json", "open_loop.png"
MEAN_ACTION = "mean action"
LEARNT = 0.5  # share of the mean action's error: where ar makes more, a policy has learnt little
_WARM_UP = 3  # chunks that are decoded before the clock runs
_DRAWN = 200  # frames


@dataclass
class OpenLoopConfig(Checked):
    """Settings of `ceed-vla open-loop`.

    Attributes:
        policy_path: Checkpoint folder, or teacher or student for the shipped ones.
        roots: Comma-separated LeRobotDataset folders that the policy was not trained on; or those
            that it was trained on, with the held_out of that training.
        held_out: Share of the episodes that training left out, to look at these alone; 0: at all.
        gate: Largest error of ar, as a share of the mean action's, that passes: with a larger one
            the command fails. 0: only say which it is.
        output_dir: Folder for open_loop.json and a picture of the first actions; earlier ones of
            ours are replaced.
        decoders: Comma-separated names of decoders, without a teacher's; "ar" is always among them.
        chunks: Chunks of every decoder, one after every `executed_steps`, from the first episodes
            of every data set.
        executed_steps: Steps executed of each chunk; the policy's n_action_steps if None.
        device: Overrides the checkpoint's device.
        threads: Threads of torch; None leaves torch's choice.
    """

    policy_path: str = ""
    roots: str = ""
    output_dir: str = ""
    decoders: str = "ar,jacobi,ceed"
    held_out: float = ranged(0.0, SHARES)
    gate: float = ranged(0.0, "[0, 1]")
    chunks: int = ranged(400, COUNTS)
    executed_steps: int | None = ranged(None, "[1, 4096]")
    device: str | None = None
    threads: int | None = ranged(None, "[1, 256]")


class OpenLoopError(CeedVLAError):
    """A policy does not pass the gate."""


@dataclass
class _Row:
    """What one decoder wrote: an entry a chunk."""

    decoding: DecodingConfig
    tokens: list[Tensor] = field(default_factory=list)  # (n,)
    errors: list[float] = field(default_factory=list)  # NaN where the tokens stand for no chunk
    forwards: list[int] = field(default_factory=list)
    # of the block's forwards, and of the prefix
    layers: list[tuple[Any, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drawn: list[NDArray[np.float32]] = field(default_factory=list)  # (steps, A) executed

    @property
    def errors_malformed(self) -> int:
        """Chunks whose tokens stand for no chunk."""
        return int(np.isnan(self.errors).sum())


def open_loop(config: OpenLoopConfig) -> dict[str, Any]:
    """Decode a chunk after every `executed_steps` of an episode, and compare it with what was
    demonstrated.

    One chunk at a time, the decoders in turns, each warm-started from its own chunk before, as in a
    closed loop. Writes and returns ``open_loop.json``. `ConfigError` for no policy or data, an
    unknown decoder, or more steps than a chunk has; `DatasetError` for data that are unreadable,
    without actions, or do not fit the policy.
    """
    with claimed_folder("output_dir", config.output_dir, (REPORT, PICTURE), (REPORT,)) as folder:
        return _open_loop(config, folder)


def _open_loop(config: OpenLoopConfig, folder: Path) -> dict[str, Any]:
    """As `open_loop`, into a folder of its own."""
    roots = split_list(config.roots)
    if not config.policy_path or not roots:
        raise ConfigError(
            "Set --policy.path to a checkpoint, and --roots to data that it was not trained on."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, pre, post = load(config.policy_path, device=config.device)
    steps = config.executed_steps or policy.config.n_action_steps
    if steps > policy.config.chunk_size:
        raise ConfigError(
            f"--executed_steps is {steps}; the policy's chunks have {policy.config.chunk_size} "
            "steps."
        )
    rows = {
        name: _Row(policy.config.named(name))
        for name in dict.fromkeys(["ar", *split_list(config.decoders)])
    }
    stores = [open_dataset(root) for root in roots]
    check_compatible(stores)
    looked_at = [_looked_at(store, config.held_out) for store in stores]
    some = [index for index, mask in enumerate(looked_at) if mask.any()]
    if not some:
        raise DatasetError(
            f"{config.roots}: no episode was held out: data sets of fewer than ten spare none. "
            "Name a data set that the policy was not trained on, without --held_out."
        )
    roots = [roots[index] for index in some]
    stores = [stores[index] for index in some]
    masks = [looked_at[index] for index in some]
    for store in stores:
        check_fits(store, policy.config, pre)
        if store.action is None:
            raise DatasetError(
                f"{store.root} holds no actions to compare with; it has {', '.join(store.shapes)}."
            )
    actions = np.concatenate([store.action for store in stores if store.action is not None])
    # (A,)
    width = np.ptp(actions, axis=0)
    mean = actions.mean(0)
    width[width == 0] = 1.0
    most = math.ceil(config.chunks / len(stores))  # of a data set
    places = [
        np.arange(len(store)) - np.searchsorted(store.episode, store.episode) for store in stores
    ]
    plans = [
        np.flatnonzero((p % steps == 0) & mask)[:most]
        for p, mask in zip(places, masks, strict=True)
    ]
    moments = [
        (store, int(frame)) for store, plan in zip(stores, plans, strict=True) for frame in plan
    ]
    episodes = [(str(store.root), int(store.episode[frame])) for store, frame in moments]
    constant: list[float] = []
    for place, (store, frame) in enumerate(
        tqdm(moments, desc="open loop", unit="chunk", dynamic_ncols=True)
    ):
        raw = store.batch(np.array([frame]), steps)
        goes_on = place and episodes[place] == episodes[place - 1]
        wanted = raw["action"][0][~raw["action_is_pad"][0]].numpy()  # (steps or fewer, A)
        constant.append(float((np.abs(mean - wanted) / width).mean()))
        for row in rows.values():
            _decode(
                policy,
                pre,
                row,
                raw,
                steps,
                goes_on=bool(goes_on),
                warm_up=0 if place else _WARM_UP,
            )
            readable = policy.tokenizer.readable(row.tokens[-1][None])
            chunk = np.full((len(wanted), len(width)), np.nan, dtype=np.float32)
            if readable:
                chunk = (
                    post(policy.tokenizer.decode(row.tokens[-1][None]))[0, : len(wanted)]
                    .cpu()
                    .float()
                    .numpy()
                )
            row.errors.append(float((np.abs(chunk - wanted) / width).mean()))
            row.drawn.append(chunk)
    report: dict[str, Any] = {
        "program": MADE_BY,
        "policy": config.policy_path,
        "data": [
            {"root": root, "chunks": len(plan)} for root, plan in zip(roots, plans, strict=True)
        ],
        "executed_steps": steps,
        "rows": {
            MEAN_ACTION: {"error": round(float(np.mean(constant)), 5)},
            **{
                name: _entry(row, rows["ar"], policy.tokenizer, steps, episodes)
                for name, row in rows.items()
            },
        },
        "threads": torch.get_num_threads(),
    }
    own, mean_error = (report["rows"][name]["error"] for name in ("ar", MEAN_ACTION))
    mostly_malformed = 2 * rows["ar"].errors_malformed > len(rows["ar"].errors)
    known = own is not None and mean_error and not mostly_malformed
    report["ratio"] = round(own / mean_error, 4) if known else None
    with full_disk(folder, "nothing was written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
        drawn = {name: np.concatenate(row.drawn[: len(plans[0])]) for name, row in rows.items()}
        _draw(stores[0], np.flatnonzero(masks[0])[:_DRAWN], drawn, folder / PICTURE)
    _print(report)
    print(f"Written: {folder / REPORT}, {folder / PICTURE}")
    print(verdict(report["ratio"], config.gate or LEARNT))
    if config.gate and not _passes(report["ratio"], config.gate):
        raise OpenLoopError(
            f"The policy does not pass --gate {config.gate:g}: it has not learnt enough of its "
            "task. Train longer, or on more episodes, before it is distilled."
        )
    return report


def _looked_at(store: FrameStore, held_out: float) -> NDArray[np.bool_]:
    """Which frames (N,) are looked at; none where there are too few episodes to hold one out."""
    return held_out_frames(store, held_out) if held_out else np.ones(len(store), dtype=bool)


def _passes(ratio: float | None, gate: float) -> bool:
    return ratio is not None and ratio <= gate


def verdict(ratio: float | None, gate: float) -> str:
    """What the error of ar, as a share of the mean action's, says; None where there is none."""
    if ratio is None:
        return "Verdict: none. Every chunk was malformed, or the data's actions never change."
    share = f"the error of ar is {ratio:.2f} of the mean action's"
    if not _passes(ratio, gate):
        return f"Verdict: it has not learnt its task ({share}, above {gate:g}). Do not distil it."
    return (
        f"Verdict: it follows the demonstrations ({share}, at most {gate:g}). Success shows in a "
        "closed loop only."
    )


@torch.inference_mode()
def _decode(
    policy: Any,
    pre: Any,
    row: _Row,
    raw: dict[str, Any],
    steps: int,
    *,
    goes_on: bool,
    warm_up: int,
) -> None:
    """Append tokens, forwards and seconds of one chunk, after `warm_up` that do not count."""
    previous = row.tokens[-1][None].to(policy.config.device) if goes_on else None
    generator = torch.Generator().manual_seed(row.decoding.seed + len(row.tokens))
    for _ in range(warm_up + 1):
        started = time.perf_counter()
        result = policy.decode(
            pre(dict(raw)),
            row.decoding,
            previous=previous,
            generator=generator,
            shift_steps=steps,
            executed_steps=steps,
            read=False,
        )
        tokens = result.tokens[0].cpu()  # which waits for the device
        seconds = time.perf_counter() - started
    row.tokens.append(tokens)
    row.forwards.append(int(result.iterations[0]))
    row.layers.append((result.layer_forwards, result.prefix_layers))
    row.seconds.append(seconds)


def _entry(
    row: _Row, reference: _Row, tokens: ActionTokens, steps: int, episodes: list[tuple[str, int]]
) -> dict[str, Any]:
    errors = np.array(row.errors)
    forwards = np.array(row.forwards)
    sound = ~np.isnan(errors)
    by_episode: dict[tuple[str, int], list[float]] = {}
    for episode, error in zip(episodes, errors, strict=True):
        by_episode.setdefault(episode, []).append(error)
    means = np.array(
        [np.nanmean(found) for found in by_episode.values() if not np.isnan(found).all()]
    )
    executed = steps * tokens.tokens_per_step if tokens.tokens_per_step else None
    own, other = (torch.stack(r.tokens)[:, :executed] for r in (row, reference))
    stop = -1 if tokens.stop is None else tokens.stop
    live = (own != stop) | (other != stop)  # behind the stop of both is nothing
    block, prefix = np.array([[int(count) for count in counts] for counts in row.layers]).mean(0)
    p50, p95, p99 = (
        round(1e3 * float(value), 2) for value in np.percentile(row.seconds, (50, 95, 99))
    )
    return {
        "error": round(float(errors[sound].mean()), 5) if sound.any() else None,
        "error_pm95": (
            round(1.96 * float(means.std(ddof=1)) / math.sqrt(len(means)), 5)
            if len(means) > 1
            else None
        ),
        "malformed": int((~sound).sum()),
        "forwards_mean": round(float(forwards.mean()), 3),
        "forwards_p95": float(np.percentile(forwards, 95)),
        "block_layers_mean": round(float(block), 3),
        "prefix_layers_mean": round(float(prefix), 3),
        "tokens_equal_ar": round(float((own == other)[live].double().mean()), 5),
        "total_ms": {"p50": p50, "p95": p95, "p99": p99},
    }


def _print(report: dict[str, Any]) -> None:
    chunks = sum(data["chunks"] for data in report["data"])
    table = Table(
        "decoder",
        "error [% of range]",
        "forwards mean / p95",
        "layers",
        "tokens = AR",
        "latency [ms] p50 / p95",
        "malformed",
        title=f"{chunks} chunks, {report['executed_steps']} steps of each; held-out data, no "
        "closed loop",
    )
    for name, entry in report["rows"].items():
        error = "-" if entry["error"] is None else f"{100 * entry['error']:.2f}"
        error += (
            f" ± {100 * entry['error_pm95']:.2f}" if entry.get("error_pm95") is not None else ""
        )
        if name == MEAN_ACTION:
            table.add_row(name, error)
            continue
        latency = entry["total_ms"]
        table.add_row(
            name,
            error,
            f"{entry['forwards_mean']:.2f} / {entry['forwards_p95']:g}",
            f"{entry['block_layers_mean']:.1f} + {entry['prefix_layers_mean']:.1f}",
            f"{100 * entry['tokens_equal_ar']:.1f} %",
            f"{latency['p50']:.1f} / {latency['p95']:.1f}",
            str(entry["malformed"]),
        )
    default_console().print(table)


def _draw(
    store: FrameStore,
    frames: NDArray[np.int64],
    actions: dict[str, NDArray[np.float32]],
    path: Path,
) -> None:
    """Demonstrated and decoded actions of `frames` (F,), a panel for every dimension."""
    assert store.action is not None
    names = store.labels.get(ACTION, [])
    names = (
        names
        if len(names) == store.action.shape[1]
        else [f"action {i}" for i in range(store.action.shape[1])]
    )
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 1.3 * len(names) + 0.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
        for dim, (panel, label) in enumerate(zip(panels, names, strict=True)):
            panel.plot(
                store.action[frames, dim],
                color="black",
                linewidth=2.0,
                alpha=0.3,
                label="demonstrated",
            )
            for name, found in actions.items():
                panel.plot(found[: len(frames), dim], linewidth=0.8, label=name)
            panel.set_ylabel(str(label))
        panels[0].legend(
            ncols=len(actions) + 1, loc="lower left", bbox_to_anchor=(0, 1), frameon=False
        )
        panels[-1].set_xlabel("frame")
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": MADE_BY})
