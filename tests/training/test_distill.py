"""Distillation: fewer iterations on a small set, resumable, frozen parts unchanged; its data."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ceed_vla
from ceed_vla.checkpoints import save
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import CheckpointError, ConfigError, DatasetError
from ceed_vla.tokens.uniform import ActionTokenizer
from ceed_vla.training.adapters import LoRAConfig
from ceed_vla.training.corruption import draw_states, guess_states, online_states, with_first
from ceed_vla.training.distill import DistillConfig, DistillRun, distill
from ceed_vla.training.distill_data import StoredData, TrajectoriesConfig
from ceed_vla.training.trajectories import collect

SHARES = np.array([0.7, 0.2, 0.1])
FINAL = Path("checkpoints/final/pretrained_model")
TRUNK = tuple(
    f"backbone.{name}" for name in ("action_tokens", "slots", "layers", "final_norm", "head")
)


@pytest.fixture(scope="module")
def teacher(studio: Any) -> tuple[Any, Any, Any]:
    return ceed_vla.load(studio.teacher)


@pytest.fixture(scope="module")
def data(studio: Any, teacher: tuple[Any, Any, Any]) -> StoredData:
    return StoredData(
        str(studio.trajectories),
        f"{studio.demo},{studio.other}",
        str(studio.teacher),
        *teacher[:2],
        eval_frames=8,
        delta_quantile=0.8,
    )


# ---- the purpose of distillation ----------------------------------------------------------------


@pytest.mark.parametrize("loss", ["trust_region", pytest.param("paper", marks=pytest.mark.slow)])
def test_iterations_fall(
    studio: Any, tmp_path: Path, loss: str, read_log: Callable[..., dict[int, float]]
) -> None:
    config = studio.distill_config(
        tmp_path / "run",
        loss=loss,
        steps=150,
        batch_size=16,
        eval_frames=32,
        lr=1e-2,
        muon_lr=3e-2,
        warmup=5,
    )
    run = DistillRun(config, None)
    # over-fit: measured on the training frames
    run.data.rows = np.concatenate([run.data.rows, run.data.held_out])
    before = run._measure()
    run.run()
    after = read_log(tmp_path / "run", "iterations_mean")[150]
    assert after < 0.75 * before["iterations_mean"]
    assert (
        read_log(tmp_path / "run", "one_forward_agreement")[150] > before["one_forward_agreement"]
    )
    assert before["teacher_agreement"] == 1.0  # the student starts as the teacher
    assert read_log(tmp_path / "run", "teacher_agreement")[150] > 0.5


@pytest.mark.parametrize("loss", ["trust_region", "paper"])
@pytest.mark.parametrize("states", ["online", "stored"])
def test_every_combination_trains_only_the_trunk(
    studio: Any,
    teacher: tuple[Any, Any, Any],
    tmp_path: Path,
    loss: str,
    states: str,
    read_log: Callable[..., dict[int, float]],
) -> None:
    distill(
        studio.distill_config(
            tmp_path / "run", loss=loss, states=states, max_iterations=3, confidence=0.4, lr=1e-2
        )
    )
    student, _, _ = ceed_vla.load(tmp_path / "run" / FINAL)
    before, after = teacher[0].state_dict(), student.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) != name.startswith(TRUNK), name
    assert student.config.decoding.max_iterations == 3
    assert student.config.decoding.confidence == 0.4
    assert all(np.isfinite(list(read_log(tmp_path / "run", "consistency_loss").values())))
    assert bool(read_log(tmp_path / "run", "replacement_rate")) == (loss == "paper")


def test_the_first_loss_of_the_trust_region_is_only_consistency(
    studio: Any, tmp_path: Path, read_log: Callable[..., dict[int, float]]
) -> None:
    distill(studio.distill_config(tmp_path / "run", steps=1))
    assert read_log(tmp_path / "run", "anchor_loss")[1] == pytest.approx(0, abs=1e-6)
    assert read_log(tmp_path / "run", "consistency_loss")[1] > 1e-4


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_run_resumes_to_the_same_losses(
    studio: Any,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    step: int,
    read_log: Callable[..., dict[int, float]],
) -> None:
    settings = {"loss": "paper", "states": "online", "eval_every": 2}
    distill(studio.distill_config(tmp_path / "whole", **settings))
    interrupt_at(step)
    with pytest.raises(KeyboardInterrupt):
        distill(studio.distill_config(tmp_path / "run", **settings))
    interrupt_at(-1)
    time.sleep(1)  # TensorBoard reads files of one second in an order of its own
    distill(studio.distill_config(tmp_path / "run", **settings, resume=True))
    for key in ("loss", "state_accuracy", "iterations_mean"):
        assert read_log(tmp_path / "run", key) == read_log(tmp_path / "whole", key)
    run, whole = ((tmp_path / name / "log.jsonl").read_text() for name in ("run", "whole"))
    assert run.count("\n") == whole.count("\n")  # nothing is logged twice
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.*")}
    values = EventAccumulator(str(folder)).Reload()
    steps = [event.step for event in values.Scalars("loss")]
    assert steps == list(read_log(tmp_path / "run", "loss"))


# ---- labels --------------------------------------------------------------------------------------


def test_the_replaced_share_is_one_minus_the_quantile(data: StoredData) -> None:
    replaced = (data.distances(data.rows) > data.delta_max).mean()
    assert replaced == pytest.approx(0.2, abs=1 / len(data.rows))


def test_distances_and_labels_equal_a_loop(
    studio: Any, teacher: tuple[Any, Any, Any], data: StoredData
) -> None:
    policy = teacher[0]
    stores = [open_dataset(studio.demo), open_dataset(studio.other)]
    low, high = policy.tokenizer.low.numpy(), policy.tokenizer.high.numpy()
    rows = np.array([0, 12, 30, 49, 52, 62])
    batch, distances = data.batch(rows), data.distances(rows)
    np.testing.assert_allclose(
        data.distance(batch["fixed_point"], batch).numpy(), distances, rtol=1e-5
    )
    for i, row in enumerate(rows):
        store, frame = stores[data.trajectories.root[row]], data.trajectories.frame[row]
        fixed = policy.tokenizer.decode(
            torch.from_numpy(data.trajectories.fixed_point[[row]].astype(np.int64))
        )[0]
        steps = min(4, store.episode_end[frame] - frame)
        assert store.action is not None
        differences = [
            np.abs(fixed[k].numpy() - store.action[frame + k].clip(low, high)) / ((high - low) / 2)
            for k in range(steps)
        ]
        assert distances[i] == pytest.approx(np.mean(differences), rel=1e-4)
        replaced = distances[i] > data.delta_max
        own = data.trajectories.fixed_point[row]
        recorded = policy.tokenizer.encode(batch["action"][i : i + 1])[0].numpy()
        np.testing.assert_array_equal(batch["labels"][i].numpy(), recorded if replaced else own)
        assert batch["label_weight"][i].tolist() == [
            1.0 if k // 7 < steps or not replaced else 0.0 for k in range(28)
        ]


def test_distances_in_ranges_that_are_not_symmetric(data: StoredData) -> None:
    low, high = [-0.1] * 7, [0.3] * 7
    config = SimpleNamespace(action_low=low, action_high=high, chunk_size=4, action_dim=7)
    other = copy(data)
    other.policy = SimpleNamespace(
        config=config, tokenizer=ActionTokenizer(low, high, 4, num_bins=63)
    )  # type: ignore[assignment]
    rows = np.flatnonzero(data.trajectories.frame < 9)[:3]
    actions, _ = data.stores[0].chunks(data.trajectories.frame[rows], 4)
    fixed = other.policy.tokenizer.decode(
        torch.from_numpy(data.trajectories.fixed_point[rows].astype(np.int64))
    )
    expected = np.abs(fixed.numpy() - actions.numpy().clip(-0.1, 0.3)).mean((1, 2)) / 0.2
    np.testing.assert_allclose(other.distances(rows), expected, rtol=1e-4)


def test_actions_are_compared_as_the_policy_writes_them(data: StoredData) -> None:
    """A vocabulary of normalised actions reads chunks that are normalised."""
    other, step = (
        copy(data),
        deepcopy(next(s for s in data.pre.steps if isinstance(s, NormalizerProcessorStep))),
    )
    step.norm_map = {**step.norm_map, FeatureType.ACTION: NormalizationMode.MEAN_STD}
    step._tensor_stats = {
        **step._tensor_stats,
        "action": {"mean": torch.full((7,), 2.0), "std": torch.full((7,), 4.0)},
    }
    other.pre = SimpleNamespace(steps=[step])
    rows = np.arange(3)
    actions, pad = data.stores[0].chunks(data.trajectories.frame[rows], 4)
    fixed = torch.from_numpy(data.trajectories.fixed_point[rows].astype(np.int64))
    expected = data.distance(fixed, {"action": (actions - 2) / 4, "action_is_pad": pad})
    np.testing.assert_allclose(other.distances(rows), expected.numpy(), rtol=1e-4)
    assert not np.allclose(data.distances(rows), expected.numpy(), rtol=0.01)
    other.pre = SimpleNamespace(steps=[RelativeActionsProcessorStep(enabled=True), step])
    # (B, 1, A)
    state = torch.from_numpy(data.stores[0].state[data.trajectories.frame[rows]])[:, None, :7]
    expected = data.distance(fixed, {"action": (actions - state - 2) / 4, "action_is_pad": pad})
    np.testing.assert_allclose(other.distances(rows), expected.numpy(), rtol=1e-4)


# ---- states --------------------------------------------------------------------------------------


def test_stored_states_are_never_the_fixed_point(data: StoredData) -> None:
    random = np.random.default_rng(0)
    rows, policy = np.arange(len(data.trajectories.frame)), data.policy
    observation = data.observations(rows)
    fixed = data.trajectories.fixed_point.astype(np.int64)
    moving = [len(s) > 2 or (s[0] != s[-1]).any() for s in data.trajectories.states]
    seen = [set() for _ in rows]
    for _ in range(20):
        draw = draw_states(policy, len(rows), SHARES, 2, random)
        drawn = data.fixed_points(rows, observation, draw)["teacher_states"].numpy()
        assert (drawn != fixed).any(axis=1)[moving].all()
        for i, state in enumerate(drawn):
            seen[i].add(state.tobytes())
    assert max(len(s) for s in seen) > 3  # not always the guess


def test_guesses_of_inference(data: StoredData, teacher: tuple[Any, Any, Any]) -> None:
    batch = data.batch(np.arange(12))
    previous, random = batch["previous"], np.random.default_rng(0)

    def guesses(*shares: float) -> torch.Tensor:
        return guess_states(
            teacher[0], previous, draw_states(teacher[0], 12, np.array(shares), 0, random)
        )

    has = previous[:, 0] >= 0
    assert has.any()
    assert not has.all()
    states = guesses(1.0, 0.0, 0.0)
    shifted = torch.cat([previous[:, 14:], previous[:, -7:], previous[:, -7:]], dim=1)
    assert torch.equal(states[has], shifted[has])
    assert states[~has].min() >= 0
    assert states[~has].max() < 63
    mid = guesses(0.0, 1.0, 0.0)
    assert torch.equal(mid, teacher[0].tokenizer.zero.expand(12, -1))


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_online_states_are_jacobi_updates_of_a_guess(
    data: StoredData, teacher: tuple[Any, Any, Any], updates: int
) -> None:
    policy, batch, shares = teacher[0], data.batch(np.arange(20)), np.array([0.5, 0.2, 0.3])
    draw = draw_states(policy, 20, shares, updates, np.random.default_rng(4))
    with torch.no_grad():
        embeddings = policy.backbone.embed_prefix(batch)
    fixed = batch["fixed_point"]
    states = online_states(policy, embeddings, batch["previous"], fixed, draw, updates)
    chain = [with_first(guess_states(policy, batch["previous"], draw), fixed)]
    with torch.no_grad():
        for _ in range(updates):
            chain.append(policy.backbone.packed_logits(embeddings, [chain[-1]])[1][0].argmax(-1))
    found = torch.stack([(states == link).all(1) for link in chain])  # (updates + 1, B)
    assert found.any(0).float().mean() > 0.9  # up to ties in floating point
    assert found.any(1).all()  # every number of updates occurs
    shown = policy.decode(batch, policy.decoding_config("cap1_mid"), record_states=True).states[0]
    assert (states[:, 0] == shown[:, 0]).all()  # as decoding starts


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "l2"}, "trust_region, paper"),
        ({"states": "none"}, "online, stored"),
        ({"curriculum": "hard"}, "uniform, spread"),
        ({"curriculum": "spread", "states": "stored"}, "use --states online"),
        ({"omega": -1.0}, r"omega is -1.0.*\[0, 1e6\]"),
        ({"omega": float("nan")}, "omega is nan"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"eval_frames": 0}, "eval_frames is 0"),
        ({"guesses": "nan,1,1"}, "guesses"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"delta_quantile": 0.0}, "delta_quantile"),
        ({"max_updates": -1}, "max_updates"),
        ({"steps": 0}, "steps"),
        ({"guesses": "1"}, "shares"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"roots": "OTHER,DEMO"}, DatasetError, "same order"),
        ({"roots": "DEMO"}, DatasetError, "same order"),
        ({"trajectories": "MISSING"}, DatasetError, "No trajectories"),
        ({"teacher_path": "MISSING"}, CheckpointError, "No checkpoint"),
        ({"eval_frames": 63}, DatasetError, "--eval_frames is 63, but there are only 63"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"trajectories": ""}, ConfigError, "No trajectories"),
        (
            {"lora": LoRAConfig(rank=2, targets="all")},
            ConfigError,
            "adapters of the language model only",
        ),
        ({"output_dir": " "}, ConfigError, "output_dir"),
        ({"resume": True}, CheckpointError, "no run to resume"),
    ],
)
def test_settings_that_cannot_work(
    studio: Any, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    places = {
        "DEMO": str(studio.demo),
        "OTHER": str(studio.other),
        "MISSING": str(tmp_path / "missing"),
    }
    for name, place in places.items():
        changes = {
            k: v.replace(name, place) if isinstance(v, str) else v for k, v in changes.items()
        }
    if "trajectories" in changes:
        changes["trajectories"] = TrajectoriesConfig(changes["trajectories"])
    with pytest.raises(error, match=message):
        distill(studio.distill_config(tmp_path / "run", **changes))


@pytest.mark.parametrize(
    "change", [{"num_bins": 65}, {"shift_steps": 4}, {"chunk_size": 7, "action_dim": 4}], ids=str
)
def test_trajectories_of_another_layout_are_refused(
    studio: Any, teacher: tuple[Any, Any, Any], tmp_path: Path, change: dict[str, int]
) -> None:
    copy = shutil.copytree(studio.trajectories, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(DatasetError, match=next(iter(change))):
        StoredData(
            str(copy),
            f"{studio.demo},{studio.other}",
            str(studio.teacher),
            *teacher[:2],
            eval_frames=8,
            delta_quantile=0.8,
        )


@pytest.mark.parametrize("digest", ["0" * 16, None], ids=["other actions", "none stored"])
def test_trajectories_of_other_actions_are_refused(
    studio: Any, teacher: tuple[Any, Any, Any], tmp_path: Path, digest: str | None
) -> None:
    copy = shutil.copytree(studio.trajectories, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    del meta["datasets"][1]["digest"]
    if digest:
        meta["datasets"][1]["digest"] = digest
    (copy / "meta.json").write_text(json.dumps(meta))
    places = (str(copy), f"{studio.demo},{studio.other}", str(studio.teacher))
    with pytest.raises(DatasetError, match="unchanged") if digest else nullcontext():
        StoredData(*places, *teacher[:2], eval_frames=8, delta_quantile=0.8)


def test_stored_states_must_have_been_kept(studio: Any, tmp_path: Path) -> None:
    collect(studio.collect_config(tmp_path / "ar", states=False))
    settings = {"trajectories": TrajectoriesConfig(str(tmp_path / "ar")), "steps": 1}
    with pytest.raises(DatasetError, match="--states=true"):
        distill(studio.distill_config(tmp_path / "run", states="stored", **settings))
    distill(studio.distill_config(tmp_path / "run", states="online", **settings))


def test_without_a_held_out_demonstration_there_is_no_accuracy(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(data: StoredData, rows: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(rows), dtype=torch.bool)

    monkeypatch.setattr(StoredData, "demonstrated", nobody)
    distill(
        studio.distill_config(
            tmp_path / "run", steps=1, trajectories=TrajectoriesConfig(str(studio.trajectories))
        )
    )
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "teacher_agreement" in log
    assert "token_accuracy" not in log


def test_exit_rules_of_the_teacher_are_not_the_students(studio: Any, tmp_path: Path) -> None:
    policy, pre, post = ceed_vla.load(studio.teacher)
    policy.config.decoding = replace(policy.config.decoding, exits=("changed4",), deadline_s=0.02)
    policy.config.decode_with = "ar"
    save(tmp_path / "own", policy, pre, post)
    folder = distill(studio.distill_config(tmp_path / "run", teacher_path=str(tmp_path / "own")))
    config = ceed_vla.load(folder)[0].config
    found = config.decoding
    assert (found.exits, found.deadline_s, found.max_iterations) == ((), None, 2)
    assert config.decode_with == "ceed"
