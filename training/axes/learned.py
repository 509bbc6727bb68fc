"""``ceed-vla reinforce``: learn when to exit from the outcomes of episodes (S-GRPO, arXiv
2505.07686).

The states of one decode path, one per forward, form a serial group. From each state, the episode is
rolled out to its end, from the same state of the simulator. The reward of a state is success times
``decay ** forwards``; its advantage is the difference to the group's mean. These give the values of
leaving and of staying in every state, from which a head learns to choose. The policy's weights do
not change.

In most groups all states have the same outcome. Therefore half of the groups are drawn from seeds
where the outcomes of one forward and of many differ. Weights correct for this share, so that the
expectation stays the same and its variance is smaller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ceed_vla.axes.learned.rule import FEATURES, Group, head_name
from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoints import load, save
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.fields import COUNTS, SEEDS, Checked, ranged, short
from ceed_vla.files import parse_json, read_text, write_text
from ceed_vla.outputs import claimed_folder

REPORT = "reinforce.json"
GROUPS = "groups.jsonl"
LEARNED = "learned"
# conf0.2: leave if the log-odds of the least certain slot exceed those of 0.2
START = np.array([1.0, 0.0, 0.0, 0.0, 1.386])
SWEEPS = 4  # fits, because the value of staying depends on the head
LARGEST = 99.0  # largest weight in the name of a decoder
DIFFER, ALIKE = "differ", "alike"
MOST_GROUPS = 2**26  # [bytes] of a file of groups
MOST_STATES = 64  # in a group; the largest --cap
Rollouts = Any  # ceed_vla.sim.axes.learned.SerialGroups: training never imports the simulation


@dataclass
class ReinforceConfig(Checked):
    """Settings of `ceed-vla reinforce`.

    Attributes:
        policy_path: Checkpoint of the policy, whose weights do not change.
        output_dir: New folder for a copy of the checkpoint with the decoder "learned", and
            reinforce.json.
        cap: Most forwards of a chunk, and states of a group.
        decay: Factor of the reward for each forward. With 0.99, leaving one forward earlier in
            every chunk is worth one episode in a hundred.
        rounds: Rounds of rollouts with the head of the round before; each fit uses all groups.
        groups: Groups per round.
        scouts: Episodes that are run to find the seeds where outcomes differ.
        groups_from: Folder of another run, whose groups are used instead of new rollouts, to try
            other settings below.
        leash: Weight of the deviation (cross-entropy of each choice) from the head at the start,
            `conf0.2`.
        seed: First seed; those of takeovers, 30000 to 39999, are for training.
        steps: Most optimiser steps of each fit.
    """

    policy_path: str = ""
    output_dir: str = ""
    cap: int = ranged(3, "[2, 64]")
    decay: float = ranged(0.995, "(0, 1]")
    rounds: int = ranged(2, "[1, 1000]")
    groups: int = ranged(2000, COUNTS)
    scouts: int = ranged(800, COUNTS)
    groups_from: str = ""
    leash: float = ranged(0.001, "[0, 1e6]")
    seed: int = ranged(36_000, SEEDS)
    steps: int = ranged(100, COUNTS)


@dataclass
class Strata:
    """Seeds by whether the outcomes of one forward and of many differ."""

    # (seed, task, chunks) of the episodes in every stratum
    episodes: dict[str, list[tuple[int, str, int]]] = field(
        default_factory=lambda: {DIFFER: [], ALIKE: []}
    )
    of: dict[int, str] = field(default_factory=dict)  # the stratum of every seed
    # share of the episodes that many forwards solve, by stratum
    solved: dict[str, float] = field(default_factory=dict)

    def weight(self, stratum: str, drawn: int, total: int) -> float:
        """Weight of a group: its stratum's share of the chunks over its share of the groups.

        `drawn` of `total` groups are of this stratum.
        """
        chunks = {
            name: sum(count for _, _, count in episodes) for name, episodes in self.episodes.items()
        }
        return (chunks[stratum] / sum(chunks.values())) / (drawn / total)


def reinforce(config: ReinforceConfig, rollouts: Rollouts) -> Path:
    """Learn a head, write a copy of the policy with it, and return the folder.

    Raises:
        ConfigError: The settings are invalid, or the folder is not empty.
        CheckpointError: The checkpoint cannot be loaded.
        DatasetError: There are no groups in `groups_from`.
        SimulationError: The environment cannot restore an earlier state.
    """
    with claimed_folder("output_dir", config.output_dir, (), ()) as output:
        return _reinforce(config, rollouts, output)


def _reinforce(config: ReinforceConfig, rollouts: Rollouts, output: Path) -> Path:
    """As `reinforce`, into the claimed folder `output`."""
    old = config.groups_from
    # read before the policy, so that errors come at once
    found = read_groups(Path(old) / GROUPS) if old else None
    policy, pre, post = load(config.policy_path)
    policy.requires_grad_(False)  # so that no weight is saved as trained
    check_whole_prefix(policy, "reinforce")
    if policy.tokenizer.tokens_per_step is None:
        raise ConfigError(
            "The policy's tokens have variable length and belong to no step; an exit is learnt for "
            "fixed-length blocks only."
        )

    def named(head: NDArray[np.float64]) -> str:
        return f"{head_name(head)}_cap{config.cap}"

    strata, groups = found or (scout(config, rollouts), list[Group]())
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / GROUPS, "".join(line_of(item) + "\n" for item in (strata, *groups)))
    head, rounds = START, []
    for number in range(1 if old else config.rounds):
        decisions = (
            [] if old else drawn(config, strata, np.random.default_rng([config.seed, number]))
        )
        with (
            (output / GROUPS).open("a") as file,
            tqdm(
                total=len(decisions), desc=f"groups {number + 1}", unit="group", dynamic_ncols=True
            ) as bar,
        ):
            for group in (
                rollouts.groups(config.policy_path, named(head), config.cap, decisions)
                if decisions
                else ()
            ):
                groups.append(group)
                file.write(line_of(group) + "\n")
                bar.update()
        if not groups:
            raise ConfigError(
                f"--groups is {config.groups}, but no group reached its decision; increase it."
            )
        table = tabulated(config, groups, strata)
        head = learn(config, table)
        rounds.append({"head": head_name(head), **described(groups, table, head)})
        print(f"round {number + 1}: {json.dumps(rounds[-1])}")
    policy.config.decodings = {**policy.config.decodings, LEARNED: named(head)}
    save(output, policy, pre, post, unchanged=True)
    counts = {
        name: {"seeds": len(strata.episodes[name]), "solved": strata.solved[name]}
        for name in strata.episodes
    }
    write_text(
        output / REPORT,
        json.dumps({"features": FEATURES, "strata": counts, "rounds": rounds}, indent=2),
    )
    print(f"Written: {output}, whose decoding {LEARNED} is {policy.config.decodings[LEARNED]}")
    return output


def line_of(item: Any) -> str:
    """Strata or a group as JSON."""
    return json.dumps(asdict(item), default=np.ndarray.tolist)


def read_groups(file: Path) -> tuple[Strata, list[Group]]:
    """Read the groups of another run, also of one that was killed while it wrote a line.

    Raises:
        DatasetError: The file is missing or damaged, or has no groups.
    """
    if not file.exists():
        raise DatasetError(
            f"There is no {file}; --groups_from must be the folder of another run of `ceed-vla "
            "reinforce`."
        )
    lines = read_text(file, DatasetError, most=MOST_GROUPS).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        strata = _strata_of(parse_json(whole[0]) if whole else None)
        groups = [_group_of(parse_json(line), strata) for line in whole[1:]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DatasetError(
            f"{file} cannot be read as groups ({short(error)}); run without it."
        ) from error
    if not groups:
        raise DatasetError(f"{file} holds no groups that a head can learn from; run without it.")
    return strata, groups


def _strata_of(values: Any) -> Strata:
    """Parse the first line of a file of groups; wrong types raise `ValueError` or other errors."""
    of = {int(seed): name for seed, name in values["of"].items()}
    episodes = {name: list(map(tuple, found)) for name, found in values["episodes"].items()}
    strata = Strata(episodes, of, values["solved"])
    every = [episode for found in episodes.values() for episode in found]
    fits = (
        episodes.keys() == {DIFFER, ALIKE}
        and strata.solved.keys() >= set(of.values())
        and all(type(share) in (int, float) and 0 <= share <= 1 for share in strata.solved.values())
        and all(type(seed) is int and type(task) is str for seed, task, _ in every)
        and all(type(chunks) is int and 0 < chunks < 10**6 for _, _, chunks in every)
        and set(of.items())
        == {(seed, name) for name, found in episodes.items() for seed, _, _ in found}
    )
    if not fits:
        raise ValueError("its first line must list which episodes differ")
    return strata


def _group_of(values: Any, strata: Strata) -> Group:
    """Parse a line of a file of groups; wrong types raise `ValueError` or other errors."""
    group = Group(values["seed"], np.array(values["features"], dtype=float), values["solved"])
    fits = (
        type(group.seed) is int
        and group.seed in strata.of
        and isinstance(group.solved, list)
        and 0 < len(group.solved) <= MOST_STATES
        and all(solved is None or type(solved) is bool for solved in group.solved)
        and group.features.shape == (len(group.solved), len(FEATURES))
        and bool(np.isfinite(group.features).all())
    )
    if not fits:
        raise ValueError("a line is not a group of its episodes")
    return group


def scout(config: ReinforceConfig, rollouts: Rollouts) -> Strata:
    """Run episodes to find the seeds where the outcomes of one forward and of many differ.

    Seeds where both fail count as different, too.
    """
    one = "cap1"
    many = f"cap{config.cap}"
    seeds = range(config.seed, config.seed + config.scouts)
    strata = Strata()
    found: dict[int, dict[str, tuple[str, bool, int]]] = {seed: {} for seed in seeds}
    with tqdm(total=2 * config.scouts, desc="scouts", unit="episode", dynamic_ncols=True) as bar:
        for decoder, seed, task, solved, chunks in rollouts.outcomes(
            config.policy_path, [one, many], seeds
        ):
            found[seed][decoder] = (task, solved, chunks)
            bar.update()
    for seed, by_decoder in found.items():
        (task, first, _), (_, second, chunks) = by_decoder[one], by_decoder[many]
        strata.of[seed] = ALIKE if first and second else DIFFER
        strata.episodes[strata.of[seed]].append((seed, task, chunks))
    for name, episodes in strata.episodes.items():
        strata.solved[name] = sum(found[seed][many][1] for seed, _, _ in episodes) / max(
            len(episodes), 1
        )
    return strata


def drawn(
    config: ReinforceConfig, strata: Strata, random: np.random.Generator
) -> list[tuple[int, str, int]]:
    """Draw decisions (seed, task, chunks before), half of them from each stratum.

    Episodes are drawn in proportion to their chunks. If a stratum is empty, all decisions are from
    the other.
    """
    there = [episodes for episodes in strata.episodes.values() if episodes]
    found = []
    for episodes in there:
        lengths = np.array([chunks for _, _, chunks in episodes], dtype=float)
        for index in random.choice(
            len(episodes), config.groups // len(there), p=lengths / lengths.sum()
        ):
            seed, task, chunks = episodes[index]
            found.append((seed, task, int(random.integers(chunks))))
    return [found[i] for i in random.permutation(len(found))]


@dataclass
class Table:
    """All groups as tensors, padded to the longest: G groups of K states."""

    seen: Tensor  # features and a one for the bias, (G, K, F + 1)
    advantage: Tensor  # (G, K)
    last: Tensor  # (G,) index of the last state
    weight: Tensor  # (G,) of the groups

    def chances(self, head: Tensor) -> Tensor:
        """Probabilities (G, K) that a head (F + 1,) leaves in each state; it must in the last."""
        leave = torch.sigmoid(self.seen @ head)
        leave = torch.where(torch.arange(leave.shape[1]) >= self.last[:, None], 1.0, leave)
        stay = torch.cat([torch.ones_like(leave[:, :1]), (1 - leave[:, :-1]).cumprod(1)], dim=1)
        return leave * stay

    def staying(self, head: Tensor) -> Tensor:
        """Value of staying in each state (G, K): the expected advantage if `head` then decides."""
        leave = torch.sigmoid(self.seen @ head)
        worth = self.advantage[:, -1]
        found = [torch.zeros_like(self.advantage[:, -1])]
        for k in range(self.advantage.shape[1] - 2, -1, -1):
            found.insert(0, worth)
            ahead = leave[:, k] * self.advantage[:, k] + (1 - leave[:, k]) * worth
            worth = torch.where(k >= self.last, self.advantage[:, k], ahead)
        return torch.stack(found, dim=1)

    def expected(self, chances: Tensor, values: Tensor) -> Tensor:
        """Weighted mean of `values` (G, K) or (K,) in the states where the groups are left."""
        return (self.weight * (chances * values).sum(1)).mean()


def tabulated(config: ReinforceConfig, groups: Sequence[Group], strata: Strata) -> Table:
    """Tabulate features and advantages.

    Groups whose states all act alike are not rolled out; their reward is the success rate of their
    stratum.
    """
    count = len(groups)
    longest = max(len(g.solved) for g in groups)
    of = [strata.of[g.seed] for g in groups]
    weights = {name: strata.weight(name, of.count(name), count) for name in set(of)}
    seen = torch.zeros(count, longest, len(FEATURES) + 1, dtype=torch.float64)
    advantage = torch.zeros(count, longest, dtype=torch.float64)
    for row, (group, stratum) in enumerate(zip(groups, of, strict=True)):
        k = len(group.solved)
        solved = [strata.solved[stratum] if s is None else float(s) for s in group.solved]
        reward = torch.tensor(
            [s * config.decay**forwards for forwards, s in enumerate(solved, start=1)],
            dtype=torch.float64,
        )
        seen[row, :k] = torch.from_numpy(np.column_stack([group.features, np.ones(k)]))
        advantage[row, :k] = reward - reward.mean()
    last = torch.tensor([len(group.solved) - 1 for group in groups])
    return Table(
        seen, advantage, last, torch.tensor([weights[name] for name in of], dtype=torch.float64)
    )


def learn(config: ReinforceConfig, table: Table) -> NDArray[np.float64]:
    """Fit a head (F + 1,) that leaves if leaving is worth more than staying, regularised.

    Direct gradient ascent fails, because probabilities saturate, and the gradient vanishes for a
    head that never leaves. Therefore each sweep solves a classification for the present head: to
    leave or to stay in each state, weighted by the difference in value. The logistic loss is
    convex, and has the same optimum if the features suffice.
    """
    start = torch.from_numpy(START)
    head = start.clone()
    usual = torch.sigmoid(table.seen @ start)
    # in the last state there is no choice
    inner = torch.arange(usual.shape[1]) < table.last[:, None]
    for _ in range(SWEEPS):
        stake = table.weight[:, None] * (table.advantage - table.staying(head)) * inner  # (G, K)
        head = head.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([head], max_iter=config.steps, line_search_fn="strong_wolfe")

        def loss(head: Tensor = head, optimizer: Any = optimizer, stake: Tensor = stake) -> Tensor:
            optimizer.zero_grad()
            scores = table.seen @ head
            wrong = stake.abs() * F.softplus(-stake.sign() * scores)
            strayed = F.binary_cross_entropy_with_logits(scores, usual, reduction="none") * inner
            total = (wrong + config.leash * strayed).sum(1).mean()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        head = head.detach()
    head *= min(1.0, LARGEST / float(head.abs().max()))  # the rule uses only the sign
    return head.numpy().round(2)


def described(groups: Sequence[Group], table: Table, head: NDArray[np.float64]) -> dict[str, Any]:
    """Entry of the report: the groups, and expectations of the heads at start and end."""
    ran = [group for group in groups if group.solved[0] is not None]
    forwards = torch.arange(1.0, table.seen.shape[1] + 1, dtype=torch.float64)
    heads = [table.chances(torch.from_numpy(weights)) for weights in (START, head)]
    return {
        "groups": len(groups),
        "all_states_alike": len(groups) - len(ran),
        "without_spread_of_outcome": round(
            sum(len(set(group.solved)) == 1 for group in groups) / len(groups), 4
        ),
        "only_last_solves": sum(bool(g.solved[-1]) and not g.solved[0] for g in ran),
        "only_first_solves": sum(bool(g.solved[0]) and not g.solved[-1] for g in ran),
        "forwards": [round(float(table.expected(chances, forwards)), 4) for chances in heads],
        "advantage": [
            round(float(table.expected(chances, table.advantage)), 6) for chances in heads
        ],
    }
