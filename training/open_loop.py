"""``ceed-vla open-loop``: compare decoders on held-out data, without a simulator.

In open loop a policy never experiences the results of its own errors. So a small error is necessary
for success but does not prove it. It shows whether the policy has learnt its task, and the
effect of a decoder.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ceed_vla.checkpoints import load
from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import CeedVLAError, ConfigError, DatasetError
from ceed_vla.fields import COUNTS, Checked, ranged
from ceed_vla.files import write_text
from ceed_vla.outputs import MADE_BY, claimed_folder
from ceed_vla.tokens.base import ActionTokens
from ceed_vla.training.held_out import SHARES, held_out_frames
from ceed_vla.training.mixture import check_compatible, check_fits, share_target
from ceed_vla.training.open_loop_report import MEAN_ACTION, draw_actions, print_table
from ceed_vla.training.settings import full_disk, split_list

REPORT = "open_loop.json"
PICTURE = "open_loop.png"
LEARNT = 0.5  # share of the mean action's error; if that of ar is larger, a policy learnt little
_WARM_UP = 3  # chunks that are decoded before time is measured
_DRAWN = 200  # frames


@dataclass
class OpenLoopConfig(Checked):
    """Settings of `ceed-vla open-loop`.

    Attributes:
        policy_path: Checkpoint folder, or teacher or student for the shipped ones.
        roots: Comma-separated LeRobotDataset folders that the policy was not trained on; or those
            that it was trained on, with the held_out of that training.
        held_out: Share of the episodes that training held out, to measure on these only; 0 measures
            on all episodes.
        gate: Largest error of ar that passes, as a share of the mean action's; with a larger error
            the command fails. 0 for no gate.
        output_dir: Folder for open_loop.json and a picture of the first actions; earlier ones of
            this package are replaced.
        decoders: Comma-separated names of decoders, without a teacher's; "ar" is always included.
        chunks: Chunks of every decoder, one after every `executed_steps`, from the first episodes
            of every dataset.
        executed_steps: Steps executed of each chunk; the policy's n_action_steps if None.
        device: Device to run on; the CPU if None.
        threads: CPU threads; torch's default if None.
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
    """Results of one decoder, with one entry per chunk."""

    decoding: DecodingConfig
    tokens: list[Tensor] = field(default_factory=list)  # (n,)
    errors: list[float] = field(default_factory=list)  # NaN for malformed chunks
    forwards: list[int] = field(default_factory=list)
    # layers of the block's forwards, and of the prefix
    layers: list[tuple[Any, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drawn: list[NDArray[np.float32]] = field(default_factory=list)  # (steps, A) executed

    @property
    def errors_malformed(self) -> int:
        """Number of malformed chunks."""
        return int(np.isnan(self.errors).sum())


def open_loop(config: OpenLoopConfig) -> dict[str, Any]:
    """Decode a chunk after every `executed_steps` of an episode, and compare it with the data.

    The decoders take turns on every chunk. Each is warm-started from its own previous chunk, as in
    a closed loop.

    Returns:
        The content of ``open_loop.json``, which is written.

    Raises:
        ConfigError: Policy or data are missing, a decoder is unknown, or `executed_steps` exceeds
            the chunk.
        DatasetError: The data are unreadable, have no actions, or do not match the policy.
        OpenLoopError: The policy does not pass the gate.
    """
    with claimed_folder("output_dir", config.output_dir, (REPORT, PICTURE), (REPORT,)) as folder:
        return _open_loop(config, folder)


def _open_loop(config: OpenLoopConfig, folder: Path) -> dict[str, Any]:
    """As `open_loop`, into the claimed folder `folder`."""
    if not config.policy_path or not split_list(config.roots):
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
            "steps. Lower it."
        )
    rows = {
        name: _Row(policy.config.named(name))
        for name in dict.fromkeys(["ar", *split_list(config.decoders)])
    }
    data = _chosen_data(config, policy, pre, steps)
    constant = _decode_all((policy, pre, post), rows, data, steps)
    report: dict[str, Any] = {
        "program": MADE_BY,
        "policy": config.policy_path,
        "data": [
            {"root": root, "chunks": len(frames)}
            for root, frames in zip(data.roots, data.frames, strict=True)
        ],
        "executed_steps": steps,
        "rows": {
            MEAN_ACTION: {"error": round(float(np.mean(constant)), 5)},
            **{
                name: _entry(row, rows["ar"], policy.tokenizer, steps, data.episodes)
                for name, row in rows.items()
            },
        },
        "threads": torch.get_num_threads(),
    }
    report["ratio"] = _ratio(report, rows["ar"])
    with full_disk(folder, "nothing was written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
        drawn = {
            name: np.concatenate(row.drawn[: len(data.frames[0])]) for name, row in rows.items()
        }
        shown = np.flatnonzero(data.masks[0])[:_DRAWN]
        draw_actions(data.stores[0], shown, drawn, folder / PICTURE)
    print_table(report)
    print(f"Written: {folder / REPORT}, {folder / PICTURE}")
    print(verdict(report["ratio"], config.gate or LEARNT))
    if config.gate and not _passes(report["ratio"], config.gate):
        raise OpenLoopError(
            f"The policy does not pass --gate {config.gate:g}: it has not learnt enough of its "
            "task. Train longer, or on more episodes, before it is distilled."
        )
    return report


# ---- data ----------------------------------------------------------------------------------------


@dataclass
class _Data:
    """The datasets to measure on, and the frames at which chunks are decoded."""

    roots: list[str]
    stores: list[FrameStore]
    masks: list[NDArray[np.bool_]]  # of every store (N,): which frames are measured on
    frames: list[NDArray[np.int64]]  # of every store (C,): frames at which a chunk is decoded

    @property
    def moments(self) -> list[tuple[FrameStore, int]]:
        """Store and frame of every chunk, in order."""
        pairs = zip(self.stores, self.frames, strict=True)
        return [(store, int(frame)) for store, frames in pairs for frame in frames]

    @property
    def episodes(self) -> list[tuple[str, int]]:
        """Root and episode of every chunk, in order."""
        return [(str(store.root), int(store.episode[frame])) for store, frame in self.moments]


def _chosen_data(config: OpenLoopConfig, policy: Any, pre: Any, steps: int) -> _Data:
    """Open the datasets with episodes to measure on, with a chunk after every `steps` frames.

    Raises:
        DatasetError: The data are unreadable, have no actions, or do not match the policy.
    """
    roots = split_list(config.roots)
    stores = [open_dataset(root) for root in roots]
    share_target(stores)
    check_compatible(stores)
    looked_at = [_looked_at(store, config.held_out) for store in stores]
    some = [index for index, mask in enumerate(looked_at) if mask.any()]
    if not some:
        raise DatasetError(
            f"{config.roots}: no episode was held out, because the datasets have fewer than ten "
            "episodes, or none that is demonstrated. Name a dataset that the policy was not "
            "trained on, without --held_out."
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
    most = math.ceil(config.chunks / len(stores))  # of a dataset
    frames = []
    for store, mask in zip(stores, masks, strict=True):
        frames.append(np.flatnonzero((in_run(store, mask) % steps == 0) & mask)[:most])
    return _Data(roots, stores, masks, frames)


def in_run(store: FrameStore, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of each frame (N,) in its run: of an episode's successive frames in `mask` (N,)."""
    number = np.arange(len(store))
    begins = mask & ~np.append(False, mask[:-1])
    begins |= np.diff(store.episode_end, prepend=-1) != 0
    return number - np.maximum.accumulate(np.where(begins, number, 0))


def _looked_at(store: FrameStore, held_out: float) -> NDArray[np.bool_]:
    """Which frames (N,) are measured on: those that training would imitate.

    None if there are too few episodes to hold one out.
    """
    return store.shown & held_out_frames(store, held_out) if held_out else store.shown


# ---- the verdict ---------------------------------------------------------------------------------


def _ratio(report: dict[str, Any], own: _Row) -> float | None:
    """The error of ar as a share of the mean action's.

    None if most chunks are malformed, or the actions never change.
    """
    error = report["rows"]["ar"]["error"]
    mean_error = report["rows"][MEAN_ACTION]["error"]
    mostly_malformed = 2 * own.errors_malformed > len(own.errors)
    known = error is not None and mean_error and not mostly_malformed
    return round(error / mean_error, 4) if known else None


def _passes(ratio: float | None, gate: float) -> bool:
    return ratio is not None and ratio <= gate


def verdict(ratio: float | None, gate: float) -> str:
    """The verdict on the error of ar as a share of the mean action's; see `_ratio`."""
    if ratio is None:
        return "Verdict: none. Most chunks are malformed, or the data's actions never change."
    share = f"the error of ar is {ratio:.2f} of the mean action's"
    if not _passes(ratio, gate):
        return f"Verdict: it has not learnt its task ({share}, above {gate:g}). Do not distil it."
    return (
        f"Verdict: it follows the demonstrations ({share}, at most {gate:g}). Only a closed loop "
        "shows success."
    )


# ---- decoding ------------------------------------------------------------------------------------


def _decode_all(
    bundle: tuple[Any, Any, Any], rows: dict[str, _Row], data: _Data, steps: int
) -> list[float]:
    """Decode every chunk with every row; return the mean action's errors, one per chunk."""
    policy, pre, post = bundle
    actions = np.concatenate([store.action for store in data.stores if store.action is not None])
    mean = actions.mean(0)  # (A,)
    width = np.ptp(actions, axis=0)  # (A,)
    width[width == 0] = 1.0
    episodes, moments = data.episodes, data.moments
    constant: list[float] = []
    for place, (store, frame) in enumerate(
        tqdm(moments, desc="open loop", unit="chunk", dynamic_ncols=True)
    ):
        raw = store.batch(np.array([frame]), steps)
        goes_on = place > 0 and episodes[place] == episodes[place - 1]
        goes_on = goes_on and frame == moments[place - 1][1] + steps
        wanted = raw["action"][0][~raw["action_is_pad"][0]].numpy()  # (steps or fewer, A)
        constant.append(float((np.abs(mean - wanted) / width).mean()))
        for row in rows.values():
            _decode(policy, pre, row, raw, steps, goes_on=goes_on, warm_up=0 if place else _WARM_UP)
            tokens = row.tokens[-1][None]  # (1, n)
            chunk = np.full((len(wanted), len(width)), np.nan, dtype=np.float32)
            if policy.tokenizer.readable(tokens):
                decoded = post(policy.tokenizer.decode(tokens))  # (1, T, A)
                chunk = decoded[0, : len(wanted)].cpu().float().numpy()
            row.errors.append(float((np.abs(chunk - wanted) / width).mean()))
            row.drawn.append(chunk)
    return constant


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
    """Append tokens, forwards and seconds of one chunk, after `warm_up` runs without a record."""
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
        tokens = result.tokens[0].cpu()  # synchronizes with the device
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
    live = (own != stop) | (other != stop)  # slots after the end of both are not compared
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
