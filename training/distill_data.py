"""Batches for distillation: observations with the teacher's fixed points, stored or online."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.processor import (
    NormalizerProcessorStep,
    RelativeActionsProcessorStep,
    to_relative_actions,
)
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.fields import check_fields
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.collector import distinct_states
from ceed_vla.training.corruption import PREVIOUS, StateDraw, guess_states
from ceed_vla.training.held_out import SHARE, held_out_frames
from ceed_vla.training.losses import chunk_distance, mixed_labels
from ceed_vla.training.mixture import (
    check_compatible,
    check_fits,
    join_batches,
    share_target,
)
from ceed_vla.training.settings import split_list
from ceed_vla.training.spans import row_spans
from ceed_vla.training.trajectories import (
    are_those,
    check_storable,
    describe,
    layout_of,
    read_trajectories,
)

logger = logging.getLogger(__name__)

# The teacher: (observation, guesses (B, n) or None) -> the fixed points (B, n) and, from guesses,
# all states (k, B, n).
Decode = Callable[[dict[str, Any], Tensor | None], tuple[Tensor, Tensor | None]]

DECODED = 16  # frames of the sample for `delta_quantile` that are decoded together


@dataclass
class TrajectoriesConfig:
    """Source of the teacher's trajectories.

    Attributes:
        path: Folder made by `ceed-vla collect` with this teacher.
        online: The teacher decodes each batch during training; nothing is stored.
    """

    path: str = ""
    online: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "trajectories.")
        if self.path and self.online:
            raise ConfigError(
                f"trajectories.path is {self.path!r}, but trajectories.online is set; leave one of "
                "them out."
            )


class DistillData:
    """Frames of datasets, and the targets of distillation on each.

    Args:
        roots: Comma-separated datasets with actions.
        policy: The student.
        pre: Its preprocessor.
        eval_frames: Held-out frames to measure on; single frames if the datasets have too few
            episodes.
        held_out: Share of the episodes that are held out.
        delta_quantile: Share of the other frames whose distance between teacher and demonstration
            is accepted.
        intervention_weight: Share of a batch from frames in which a person intervened; 0: as their
            number.
        corrections_only: Whether of a dataset with interventions only these are used: in the
            states that the policy needed help to leave, its teacher may not know the way either.
        streaming: Which datasets are streamed.
        seed: Seed of the order in which streamed data are read.

    Raises:
        DatasetError: The `policy` cannot read a dataset, or a dataset has no actions.
    """

    def __init__(
        self,
        roots: str,
        policy: CeedVLAPolicy,
        pre: Any,
        *,
        eval_frames: int = 0,
        held_out: float = SHARE,
        delta_quantile: float = 1.0,
        intervention_weight: float = 0.0,
        corrections_only: bool = False,
        streaming: StreamingConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.policy, self.pre = policy, pre
        self.eval_frames = eval_frames
        self.delta_quantile = delta_quantile
        self.seed = seed
        self.held_out_share = held_out
        self.intervention_weight = intervention_weight
        self.corrections_only = corrections_only
        self.stores = [open_dataset(root, streaming=streaming) for root in split_list(roots)]
        if not self.stores:
            raise ConfigError("No data: set --roots to one or more recorded folders.")
        for store in self.stores:
            check_fits(store, policy.config, pre)
            if store.action is None:
                raise DatasetError(f"{store.root} holds no actions; distil on demonstrations.")
        share_target(self.stores)
        check_compatible(self.stores)
        # dataset and frame of every row (N,)
        self.root = np.concatenate(
            [np.full(len(store), index) for index, store in enumerate(self.stores)]
        )
        self.frame = np.concatenate([np.arange(len(store)) for store in self.stores])
        # whether the action may be the label (N,); if not, the label is the teacher's
        self.shown = np.concatenate([store.shown for store in self.stores])
        # distance beyond which the demonstration replaces the teacher's block
        self.delta_max = float("inf")

    def split(self) -> None:
        """Split the frames into `rows` to train on and `held_out` to measure on.

        Raises:
            DatasetError: There are too few frames.
        """
        order = np.random.default_rng(0).permutation(len(self.frame))
        if self.corrections_only:
            order = order[~self._policy_driven()[order]]
        if len(order) < len(self.frame):
            logger.info(
                "%d of %d frames are used: of a dataset with interventions only these.",
                len(order),
                len(self.frame),
            )
        most = self.eval_frames
        spared = self._in_held_out_episodes()[order]
        self.whole_episodes = most > 0 and bool(spared.any())
        if self.whole_episodes:
            held_out = order[spared][:most]
            self.rows = order[~spared]
        else:
            held_out = order[:most]
            self.rows = order[most:]
        self.held_out = self._by_store(held_out)
        if not len(self.rows):
            raise DatasetError(
                f"--eval_frames is {most}, but there are only {len(order)} frames to use; record "
                "more, or lower it."
            )
        self.spans = row_spans(self.stores, self.root, self.frame, self.rows, self.seed)
        self.odds = self._odds()

    def _policy_driven(self) -> NDArray[np.bool_]:
        """Which rows (N,) are frames between the interventions of a dataset."""
        corrected = np.array([store.corrected for store in self.stores])[self.root]
        return corrected & ~self.demonstrated(np.arange(len(self.root))).numpy()

    def _odds(self) -> NDArray[np.float64] | None:
        """Probability of each of `rows`; None if all are equal."""
        corrected = np.array([store.corrected for store in self.stores])[self.root]
        chosen = (corrected & self.shown[self._place(np.arange(len(self.root)))])[self.rows]
        share = self.intervention_weight
        if not share or not chosen.any() or chosen.all():
            return None
        if self.spans:
            raise ConfigError(
                f"intervention_weight is {share}, and the images are streamed, whose order is "
                "fixed; set it to 0, or streaming.above_gb higher."
            )
        return np.where(chosen, share / chosen.sum(), (1 - share) / (~chosen).sum())

    def _place(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of rows among the frames of all datasets."""
        begins = np.cumsum([0, *(len(store) for store in self.stores)])[:-1]
        found: NDArray[np.int64] = begins[self.root[rows]] + self.frame[rows]
        return found

    def _in_held_out_episodes(self) -> NDArray[np.bool_]:
        """Which rows (N,) are frames of held-out episodes."""
        masks = [held_out_frames(store, self.held_out_share) for store in self.stores]
        found: NDArray[np.bool_] = np.concatenate(masks)[self._place(np.arange(len(self.root)))]
        return found

    def draw(self, size: int, random: np.random.Generator, step: int) -> NDArray[np.int64]:
        """Draw the rows of a step's batch, grouped by dataset."""
        spans = self.spans
        rows = (
            spans.draw(random, size, step * size)
            if spans
            else random.choice(self.rows, size=size, p=self.odds)
        )
        return self._by_store(rows)

    def _by_store(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows[np.argsort(self.root[rows], kind="stable")]

    def observations(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Preprocessed observations and actions of rows that are grouped by dataset."""
        of_stores = (
            (store, rows[self.root[rows] == index]) for index, store in enumerate(self.stores)
        )
        size = self.policy.config.chunk_size
        parts = [store.batch(self.frame[own], size) for store, own in of_stores if len(own)]
        return self.pre(join_batches(parts))  # type: ignore[no-any-return]

    def fixed_points(
        self, rows: NDArray[np.int64], observation: dict[str, Any], draw: StateDraw | None
    ) -> dict[str, Tensor]:
        """The teacher's tokens for `rows`.

        Returns:
            ``fixed_point`` (B, n), ``previous`` (B, n), -1 in rows without a previous chunk, and
            ``teacher_states`` (B, n) if distillation uses these.
        """
        raise NotImplementedError

    def batch(self, rows: NDArray[np.int64], draw: StateDraw | None = None) -> dict[str, Any]:
        """The batch of a part of a step, on the policy's device.

        Args:
            rows: Rows that are grouped by dataset.
            draw: The random part of the states; without it every row gets its previous chunk.

        Returns:
            The outputs of the preprocessor and of `fixed_points`, ``labels``, ``label_weight``,
            ``live`` (B, n) and ``replaced`` (B,).
        """
        batch = self.observations(rows)
        found = self.fixed_points(rows, batch, draw)
        fixed = found["fixed_point"]
        demonstration = self.policy.tokenizer.encode(batch["action"])
        distance = self.distance(fixed, batch)
        shown = self.demonstrated(rows).to(distance.device)
        unlabelled = ~shown & distance.isinf()  # neither a whole chunk nor a demonstration
        distance = torch.where(shown, distance, 0.0)  # keep the teacher's label
        labels, replaced = mixed_labels(fixed, demonstration, distance, self.delta_max)
        valid = self.policy.tokenizer.weight(labels, batch["action_is_pad"]).bool()  # (B, n)
        live = self.policy.tokenizer.weight(fixed)
        weight = torch.where(replaced[:, None], valid, live.bool()).float()
        weight = weight.masked_fill(unlabelled[:, None], 0.0)
        return {
            **batch,
            **found,
            "labels": labels,
            "replaced": replaced,
            "label_weight": weight,
            "live": live,
        }

    def demonstrated(self, rows: NDArray[np.int64]) -> Tensor:
        """Whether the action of each row (B,) is a demonstration."""
        return torch.from_numpy(self.shown[self._place(rows)])

    def distance(self, fixed: Tensor, batch: dict[str, Any]) -> Tensor:
        """Distance (B,) between the teacher's chunk and the demonstration, in normalised units."""
        tokenizer = self.policy.tokenizer
        actions = batch["action"]
        # (A,)
        low = tokenizer.low.float().to(actions.device)
        high = tokenizer.high.float().to(actions.device)
        valid = (~batch["action_is_pad"]).float()
        distance = torch.full((len(fixed),), torch.inf, device=actions.device)
        read = tokenizer.readable(fixed)  # a malformed chunk is infinitely far away
        chunks = tokenizer.decode(fixed[read])
        half = (high - low).clamp(min=1e-6) / 2
        distance[read] = chunk_distance(chunks, actions[read].clamp(low, high), valid[read], half)
        return distance


class StoredData(DistillData):
    """Trajectories of `ceed-vla collect`.

    Args:
        path: Folder of the trajectories.
        roots: The datasets that they were collected on, in the same order.
        teacher: Checkpoint that they were collected with.
        policy: See `DistillData`.
        pre: See `DistillData`.
        states: Whether the states between guess and fixed point are read.
        settings: See `DistillData`.

    Raises:
        DatasetError: There are too few frames, no states, or trajectories and data do not match.
        CheckpointError: The trajectories are of another teacher.
    """

    def __init__(
        self,
        path: str,
        roots: str,
        teacher: str,
        policy: CeedVLAPolicy,
        pre: Any,
        states: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(roots, policy, pre, **settings)
        if not path:
            raise ConfigError(
                "No trajectories: set --trajectories.path to their folder, or "
                "--trajectories.online=true."
            )
        self.trajectories = read_trajectories(path, teacher, states)
        if states and not self.trajectories.states:
            raise DatasetError(f"{path} has no states; collect them with --states=true.")
        meta, own = self.trajectories.meta, layout_of(policy)
        if values := {key: meta[key] for key, value in own.items() if meta[key] != value}:
            raise DatasetError(
                f"{path}: meta.json has {values}, but the policy has {own}; collect the "
                "trajectories again."
            )
        if not are_those(self.stores, meta["datasets"]):
            raise DatasetError(
                f"The trajectories were collected on {meta['datasets']}, but --roots is "
                f"{describe(self.stores)}; name the same folders, unchanged, in the same order."
            )
        self.root, self.frame = self.trajectories.root, self.trajectories.frame
        self.split()
        shown = self.rows[self.shown[self._place(self.rows)]]
        if len(shown):
            self.delta_max = float(np.quantile(self.distances(shown), self.delta_quantile))

    def distances(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`distance` (N,) of many rows, from their actions alone."""
        found = np.empty(len(rows), np.float32)
        for index, store in enumerate(self.stores):
            own = np.flatnonzero(self.root[rows] == index)
            for part in np.split(own, range(4096, len(own), 4096)):
                fixed = as_tokens(self.trajectories.fixed_point[rows[part]])
                action, pad = store.chunks(self.frame[rows[part]], self.policy.config.chunk_size)
                for step in self.pre.steps:
                    if isinstance(step, RelativeActionsProcessorStep) and step.enabled:
                        state = store.state[self.frame[rows[part]]]
                        mask = step._build_mask(action.shape[-1])
                        action = to_relative_actions(action, torch.from_numpy(state), mask)
                    if isinstance(step, NormalizerProcessorStep):
                        action = step._normalize_action(action, inverse=False)
                found[part] = self.distance(fixed, {"action": action, "action_is_pad": pad}).numpy()
        return found

    def fixed_points(
        self, rows: NDArray[np.int64], observation: dict[str, Any], draw: StateDraw | None
    ) -> dict[str, Tensor]:
        found = {
            "fixed_point": self.trajectories.fixed_point[rows],
            "previous": self.trajectories.previous[rows],
        }
        if draw is not None and self.trajectories.states:
            picked = zip(rows.tolist(), draw.pick, strict=True)
            found["teacher_states"] = np.stack(
                [_pick(self.trajectories.states[r], u) for r, u in picked]
            )
        device = observation["action"].device
        return {name: as_tokens(tokens).to(device) for name, tokens in found.items()}


class OnlineData(DistillData):
    """The teacher decodes each batch, and the previous chunks that guesses start from.

    Args:
        roots: See `DistillData`.
        policy: See `DistillData`.
        pre: See `DistillData`.
        decode: The teacher.
        teacher_states: Whether batches have states of its trajectories (Jacobi decoding).
        labels: Whether labels are read; otherwise they are all the teacher's.
        settings: See `DistillData`; `delta_quantile` is of a sample of 4 `eval_frames`.
    """

    def __init__(
        self,
        roots: str,
        policy: CeedVLAPolicy,
        pre: Any,
        decode: Decode,
        *,
        teacher_states: bool,
        labels: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(roots, policy, pre, **settings)
        self.decode, self.teacher_states = decode, teacher_states
        if teacher_states:
            check_storable(policy)
        self.episode = np.concatenate([s.episode for s in self.stores])
        self.split()
        distances = []
        shown = self.rows[self.shown[self._place(self.rows)]]
        sample = self._by_store(shown[: 4 * self.eval_frames * labels])
        for part in np.split(sample, range(DECODED, len(sample), DECODED)) if len(sample) else ():
            observation = self.observations(part)
            distances.append(self.distance(decode(observation, None)[0], observation).cpu())
        if len(sample):
            self.delta_max = float(torch.cat(distances).quantile(self.delta_quantile))

    def fixed_points(
        self, rows: NDArray[np.int64], observation: dict[str, Any], draw: StateDraw | None
    ) -> dict[str, Tensor]:
        previous = self._previous(rows, draw).to(observation["action"].device)
        if draw is None or not self.teacher_states:
            fixed, _ = self.decode(observation, None)
            return {"fixed_point": fixed, "previous": previous}
        fixed, states = self.decode(observation, guess_states(self.policy, previous, draw))
        assert states is not None
        found = states.cpu().numpy().astype(np.int16)  # (k, B, n)
        picked = [_pick(distinct_states(found[:, i]), u) for i, u in enumerate(draw.pick)]
        chosen = as_tokens(np.stack(picked)).to(fixed.device)
        return {"fixed_point": fixed, "previous": previous, "teacher_states": chosen}

    def _previous(self, rows: NDArray[np.int64], draw: StateDraw | None) -> Tensor:
        """Fixed points (B, n) of the frames `n_action_steps` earlier; -1 if missing or unused."""
        before = rows - self.policy.config.n_action_steps
        there = before >= 0
        there[there] = (self.episode[before] == self.episode[rows])[there]
        there[there] = (self.root[before] == self.root[rows])[there]
        if draw is not None:
            there &= draw.kind == PREVIOUS
        previous = torch.full((len(rows), self.policy.config.block_length), -1)
        if there.any():
            fixed, _ = self.decode(self.observations(before[there]), None)
            previous[torch.from_numpy(there)] = fixed.cpu()
        return previous


def _pick(states: NDArray[np.int16], share: float) -> NDArray[np.int16]:
    """One state (n,) of a trajectory (k + 1, n), except the last one, the fixed point."""
    return states[int(share * (len(states) - 1))]


def as_tokens(tokens: NDArray[np.int16]) -> Tensor:
    """Stored tokens as int64."""
    return torch.from_numpy(tokens.astype(np.int64))
