"""Learning from the outcomes of episodes: the loss, the space of starts, runs, and resumed runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ceed_vla.checkpoints import load, save
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.starts import SerialGroup, Start
from ceed_vla.training.improve.config import ImproveConfig
from ceed_vla.training.improve.objective import Batch, chances, loss, predicted, stacked
from ceed_vla.training.improve.run import CHECKPOINT, Improvement, described, improve
from ceed_vla.training.improve.space import StartSpace

ROWS = 10


def group(solved: Sequence[bool], seed: int = 0, reached: Sequence[Start] = ()) -> SerialGroup:
    """A group of blocks of 4 tokens, 2 of them executed; the states are 1111, 2222, ..."""
    count = max(len(solved), 1)
    states = torch.arange(count + 1).unsqueeze(1).repeat(1, 4)
    inputs = {"x": torch.full((1, 3), float(seed))}
    return SerialGroup(Start(seed, "t"), inputs, states, 2, list(solved), 7, list(reached))


def test_shorter_groups_are_padded_and_advantages_sum_to_zero() -> None:
    batch = stacked([group([False, True, True]), group([True, True]), group([])], 0.5, "cpu")
    assert batch.inputs["x"].shape == (3, 3)
    assert batch.guess.tolist() == [[0] * 4] * 3
    assert batch.tokens[:, :, 0].tolist() == [[1, 2, 3], [1, 2, 2], [1, 1, 1]]
    assert batch.tokens.shape == (3, 3, 2)
    rewards = np.array([0.0, 0.25, 0.125])
    np.testing.assert_allclose(batch.advantage[0], rewards - rewards.mean(), atol=1e-7)
    np.testing.assert_allclose(batch.advantage[1], [0.125, -0.125, 0], atol=1e-7)
    assert not batch.advantage[2].any()


def planted(logits: Tensor) -> Batch:
    """A group whose second state solves the task, before learning."""
    batch = stacked([group([False, True])], 1.0, "cpu")
    batch.known = chances(logits[0], batch.tokens)
    batch.reference = logits
    return batch


def test_the_loss_moves_probability_to_what_solved_and_stops_at_the_clip() -> None:
    start = torch.zeros(2, 1, 2, 4)
    batch = planted(start)
    logits = start.clone().requires_grad_(True)
    value, strayed = loss(logits, batch, clip=0.2, leash=0.1)
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert strayed.item() == pytest.approx(0, abs=1e-7)
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient[0, ..., 1] > 0).all()  # descent lowers the first state's token
    assert (gradient[0, ..., 2] < 0).all()
    assert gradient[0, ..., [0, 3]].abs().max() < 1e-7
    assert gradient[1].abs().max() < 1e-7  # the leash alone acts behind the last state
    far = start.clone()
    far[..., 2] += 2.0  # beyond the clip, only the leash pulls
    far = far.requires_grad_(True)
    value, strayed = loss(far, batch, clip=0.2, leash=0.0)
    assert strayed > 0.1
    (gradient,) = torch.autograd.grad(value, far)
    assert gradient.abs().max() < 1e-7
    value, _ = loss(far, batch, clip=0.2, leash=0.1)
    (gradient,) = torch.autograd.grad(value, far)
    assert (gradient[..., 2] > 0).all()


def test_a_grown_space_takes_up_states_only_where_outcomes_differ() -> None:
    later = [Start(1, "t", ((0.5,),), (3, 3)), Start(2, "t", ((0.25,),), (3, 3))]
    groups = [
        group([False, True], 1, [later[0]]),
        group([True, True], 2, [later[1]]),
        group([], 3),
    ]
    grown, uniform, first = (StartSpace(mode, 8) for mode in ("grown", "uniform", "first"))
    for space in (grown, uniform, first):
        space.learn(groups, 0.9)
    assert grown.known == pytest.approx({Start(1, "t"): 0.164025, later[0]: 0.164025})
    assert uniform.known == dict.fromkeys(later, 1.0)
    assert first.known == {}
    grown.learn([group([True, True], 1)], 0.9)  # it differs no more
    assert set(grown.known) == {later[0]}
    random = np.random.default_rng(0)
    assert grown.draw(8, random) == [later[0]]
    assert grown.draw(1, random) == first.draw(8, random) == []


def test_states_are_drawn_by_their_score_and_the_least_are_forgotten() -> None:
    starts = [Start(seed, "t") for seed in range(4)]
    space = StartSpace("grown", 4, dict(zip(starts, [0.1, 0.1, 0.1, 0.7], strict=True)))
    random = np.random.default_rng(0)
    drawn = [space.draw(2, random)[0].seed for _ in range(4000)]
    assert drawn.count(3) / len(drawn) == pytest.approx(0.7, abs=0.03)
    many = [group([False, True], seed) for seed in range(10, 13)]
    space.learn(many, 1.0)
    assert {start.seed for start in space.known} == {3, 10, 11, 12}


class Frames:
    """Rollouts by a rule on recorded frames: what the third forward of the first policy found is
    the last state of every group and solves the task; a first state must be equal to it.
    """

    def __init__(self, policy: Path, root: Path) -> None:
        self.root, self.calls, self.settings = root, 0, ["--env.type=frames"]
        self.distances: list[int] = []  # of the state after one forward, of every group
        self.right: dict[int, list[int]] = {}
        for found in self.decoded(
            str(policy), [Start(s, "t") for s in range(37_000, 37_000 + ROWS)]
        ):
            self.right[found.start.seed % ROWS] = found.states[-1].tolist()

    def decoded(self, policy: str, starts: Sequence[Start]) -> list[SerialGroup]:
        loaded, pre, _ = load(policy)
        rows = np.array([start.seed % ROWS for start in starts])
        inputs = pre(open_dataset(self.root).batch(rows * 4, loaded.config.chunk_size))
        with torch.inference_mode():
            result = loaded.decode(inputs, "cap3", record_states=True, read=False)
        states = torch.stack(result.states)
        executed = 2 * loaded.tokenizer.tokens_per_step
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        return [
            SerialGroup(
                start,
                {name: value[row : row + 1].clone() for name, value in tensors.items()},
                states[: 1 + int(result.iterations[row]), row].clone(),
                executed,
                [],
                5,
                [Start(start.seed, "t", ((0.5,) * 7,), (1,) * states.shape[2])],
            )
            for row, start in enumerate(starts)
        ]

    def first(self, seed: int, used: int, count: int) -> list[Start]:
        return [Start(s, "t") for s in range(seed + used, seed + used + count)]

    def __call__(
        self, policy: str, decoding: str, cap: int, starts: Sequence[Start], draw: int
    ) -> Iterator[SerialGroup]:
        assert (decoding, draw) == ("ceed", self.calls)
        self.calls += 1
        for found in self.decoded(policy, starts):
            right = self.right[found.start.seed % ROWS]
            first = found.states[1].clone()
            found.states = torch.stack([found.states[0], first, torch.tensor(right)])
            self.distances.append(int((first - found.states[2]).abs()[: found.executed].sum()))
            found.solved = [self.distances[-1] == 0, True]
            yield found

    def distance(self, policy: Path) -> float:
        """Mean distance [bins] of the state after one forward."""
        self.calls, self.distances = 0, []
        count = len(list(self(str(policy), "ceed", 3, self.frames(), 0)))
        self.calls = 0
        return sum(self.distances) / count

    def frames(self) -> list[Start]:
        return self.first(37_000, 0, ROWS)


def settings(policy: Path, output: Path, **changes: Any) -> ImproveConfig:
    values: dict[str, Any] = {"iterations": 6, "groups": 20, "lr": 2e-3, "batch_size": 10}
    return ImproveConfig(str(policy), str(output), rank=8, epochs=3, **values | changes)


def test_the_first_forward_learns_what_solved_the_task(studio: Any, tmp_path: Path) -> None:
    rollouts = Frames(studio.teacher, studio.demo)
    before = rollouts.distance(studio.teacher)
    run = settings(studio.teacher, tmp_path / "out", starts="first", iterations=12, leash=0.01)
    output = improve(run, rollouts)
    assert rollouts.distance(output) < 0.9 * before
    old, new = load(studio.teacher)[0].state_dict(), load(output)[0].state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert changed <= {f"backbone.{n}" for n in load(output)[0].backbone.distillation_parameters()}
    report = json.loads((tmp_path / "out" / "improve.json").read_text())
    assert [record["groups"] for record in report["iterations"]] == [20] * 12
    assert report["iterations"][0]["outcomes_differ"] > 5


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(studio: Any, tmp_path: Path) -> None:
    rollouts = Frames(studio.teacher, studio.demo)
    whole = improve(settings(studio.teacher, tmp_path / "whole", iterations=3), rollouts)
    part = tmp_path / "part"
    rollouts = Frames(studio.teacher, studio.demo)
    improve(settings(studio.teacher, part, iterations=2), rollouts)
    with pytest.raises(ConfigError, match="not empty"):
        improve(settings(studio.teacher, part), rollouts)
    with pytest.raises(ConfigError, match="other settings"):
        improve(settings(studio.teacher, part, resume=True, decay=0.5), rollouts)
    rollouts.settings = ["--env.type=others"]
    with pytest.raises(ConfigError, match="other settings"):
        improve(settings(studio.teacher, part, resume=True), rollouts)
    rollouts.settings = ["--env.type=frames"]
    with pytest.MonkeyPatch.context() as patch:  # another policy at the same place
        patch.setattr("ceed_vla.training.improve.run.weights_hash", lambda folder: "others")
        with pytest.raises(ConfigError, match="of other weights"):
            improve(settings(studio.teacher, part, resume=True), rollouts)
    state = json.loads((part / "improve.json").read_text())["state"]
    content = (part / f"{state}.safetensors").read_bytes()
    for damage in (b"", content[:-5]):
        (part / f"{state}.safetensors").write_bytes(damage)
        with pytest.raises(CheckpointError, match="cannot be resumed"):
            improve(settings(studio.teacher, part, resume=True), rollouts)
    (part / f"{state}.safetensors").write_bytes(content)
    tensors = load_file(part / f"{state}.safetensors")
    save_file(tensors | {min(tensors): tensors[min(tensors)] * math.nan}, part / "damaged")
    damages = {
        f"{state}.safetensors": (part / "damaged").read_bytes(),
        f"{state}.json": b'{"starts": [[1, "t", [], [], 0]]}',
    }
    (part / "damaged").unlink()
    for name, damage in damages.items():
        whole_file = (part / name).read_bytes()
        (part / name).write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"not finite|outside \(0, 1\]"):
            improve(settings(studio.teacher, part, resume=True), rollouts)
        (part / name).write_bytes(whole_file)
    shutil.rmtree(part / CHECKPOINT)  # as after an interrupt while it was replaced
    improve(settings(studio.teacher, part, iterations=3, resume=True), rollouts)
    reports = [(folder / "improve.json").read_text() for folder in (tmp_path / "whole", part)]
    assert reports[0] == reports[1]
    assert json.loads(reports[0])["iterations"][1]["from_partial_histories"] > 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, part / CHECKPOINT)]
    assert weights[0] == weights[1]


def test_a_run_ends_at_its_control_steps(studio: Any, tmp_path: Path) -> None:
    rollouts = Frames(studio.teacher, studio.demo)
    run = settings(studio.teacher, tmp_path / "out", iterations=50, max_control_steps=150)
    improve(run, rollouts)  # 100 in an iteration
    records = json.loads((tmp_path / "out" / "improve.json").read_text())["iterations"]
    assert [record["control_steps"] for record in records] == [100, 100]


def test_a_run_that_was_interrupted_in_its_first_iteration_resumes(
    studio: Any, tmp_path: Path
) -> None:
    rollouts = Frames(studio.teacher, studio.demo)
    with pytest.raises(CheckpointError, match=r"improve\.json"):
        improve(settings(studio.teacher, tmp_path / "out", resume=True), rollouts)
    Improvement(settings(studio.teacher, tmp_path / "out"), rollouts, tmp_path / "out")
    improve(settings(studio.teacher, tmp_path / "out", resume=True, iterations=1), rollouts)
    assert len(json.loads((tmp_path / "out" / "improve.json").read_text())["iterations"]) == 1


def test_exits_and_decodings_of_the_old_weights_are_left_out(studio: Any, tmp_path: Path) -> None:
    policy, pre, post = load(studio.teacher)
    policy.config.decodings = {"risk0.1": "cap2"}
    old = save(tmp_path / "old", policy, pre, post)
    rollouts = Frames(studio.teacher, studio.demo)
    with pytest.raises(ConfigError, match=r"risk0\.1"):
        improve(settings(old, tmp_path / "out", decoding="risk0.1"), rollouts)
    new = improve(settings(old, tmp_path / "out", iterations=1), rollouts)
    assert load(new)[0].config.decodings == {}


def test_prompts_of_several_lengths_learn_in_batches_of_their_own(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = Frames(studio.teacher, studio.demo)
    run = Improvement(settings(studio.teacher, tmp_path / "out"), rollouts, tmp_path / "out")
    groups = list(rollouts(str(tmp_path / "out" / CHECKPOINT), "ceed", 3, rollouts.frames(), 0))
    for index, found in enumerate(groups):
        found.inputs["words"] = torch.zeros(1, 3 + index % 2, dtype=torch.int64)
    sizes = []
    monkeypatch.setattr(
        "ceed_vla.training.improve.run.predicted",
        lambda policy, batch: sizes.append(batch.inputs["words"].shape) or predicted(policy, batch),
    )
    run._learn(groups, np.random.default_rng(0))
    assert set(sizes) == {(5, 3), (5, 4)}


@pytest.mark.parametrize(
    "change", [{"cap": 1}, {"decay": 0.0}, {"starts": "all"}, {"rank": 0}, {"clip": 0.0}], ids=str
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ImproveConfig(**change)


def test_groups_are_described() -> None:
    groups = [group([False, True]), group([True, False]), group([True, True]), group([])]
    found = described(groups)
    assert {name: found[name] for name in found if name != "control_steps"} == {
        "groups": 4,
        "from_partial_histories": 0,
        "all_states_alike": 1,
        "outcomes_differ": 2,
        "only_last_solves": 1,
        "only_first_solves": 1,
        "solved_from_first": 2,
        "solved_from_last": 2,
    }
