"""FAST action tokens from data to checkpoint, with the compact model.

They are fitted, trained, collected, distilled and decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.checkpoints import load
from ceed_vla.data.frames import open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError, DatasetError, MalformedChunkError
from ceed_vla.tokens.fast import FastTokenizer, FastTokensConfig
from ceed_vla.training.distill import TrajectoriesConfig, distill
from ceed_vla.training.distill_data import DistillData
from ceed_vla.training.fit_tokens import FitTokensConfig, all_chunks, fit_action_tokens, fit_tokens
from ceed_vla.training.losses import mixed_labels
from ceed_vla.training.teacher import train
from ceed_vla.training.trajectories import collect, read_trajectories


@pytest.fixture(scope="module")
def teacher(
    studio: Any, tiny_policy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A teacher with FAST tokens, trained until its chunks differ."""
    tokens = FastTokensConfig(most_ids=128, scale=8.0)
    policy = tiny_policy(action_tokens=tokens)
    output = tmp_path_factory.mktemp("fast") / "teacher"
    return train(
        studio.train_config(output, policy=policy, steps=90, roots=f"{studio.demo},{studio.other}")
    )


@pytest.mark.slow
def test_training_fits_the_tokens_and_the_checkpoint_keeps_them(studio: Any, teacher: Path) -> None:
    policy, pre, post = load(teacher)
    tokens = policy.config.action_tokens
    assert isinstance(tokens, FastTokensConfig)
    assert tokens.fitted
    assert policy.config.block_length == tokens.max_tokens <= 4 * 7
    assert policy.config.action_tokens.vocabulary_size == tokens.vocabulary_size <= 129
    store = open_dataset(studio.demo)
    chunks, _ = store.chunks(np.arange(len(store)), 4)
    assert (policy.tokenizer.decode(policy.tokenizer.encode(chunks)) - chunks).abs().max() < 0.2

    batch = pre(store.batch(np.arange(6), 4))
    greedy = policy.decode(batch, "ar")
    assert torch.equal(policy.decode(batch, "jacobi", previous=greedy.tokens).tokens, greedy.tokens)
    assert post(policy.predict_action_chunk(batch)).shape == (6, 4, 7)
    assert policy.select_action(batch).shape == (6, 7)
    loss, parts = policy.eval()(batch)
    assert np.isfinite(loss.item())
    assert parts["token_accuracy"] > 0.3, parts


@pytest.mark.slow
def test_a_teachers_malformed_chunks_are_counted_and_replaced_by_demonstrations(
    studio: Any,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from ceed_vla.training import collector

    policy, pre, _ = load(teacher)
    # chunks are no longer completed
    monkeypatch.setattr(policy.tokenizer, "grammar", None)
    torch.nn.init.normal_(policy.backbone.head.weight)
    batch = pre(open_dataset(studio.demo).batch(np.arange(4), 4))
    with pytest.raises(MalformedChunkError, match="4 of 4 chunks are malformed"):
        policy.decode(batch, "ar")
    tokens = policy.decode(batch, "ar", read=False).tokens

    data = DistillData(str(studio.demo), policy, pre)
    distance = data.distance(
        torch.cat([tokens[:2], policy.tokenizer.encode(batch["action"][2:])]), batch
    )
    assert distance[:2].isinf().all()
    assert distance[2:].isfinite().all()
    _, replaced = mixed_labels(tokens, tokens, distance, float("inf"))
    assert replaced.tolist() == [True, True, False, False]

    monkeypatch.setattr(collector, "load", lambda *_, **__: (policy, pre, None))
    folder = collect(studio.collect_config(tmp_path / "trajectories", policy_path=str(teacher)))
    assert "of the teacher's chunks are malformed" in caplog.text
    assert len(read_trajectories(folder, str(teacher)).fixed_point) == 63


@pytest.mark.slow
def test_trajectories_and_distillation(studio: Any, teacher: Path, tmp_path: Path) -> None:
    folder = collect(studio.collect_config(tmp_path / "trajectories", policy_path=str(teacher)))
    trajectories = read_trajectories(folder, str(teacher))
    policy, pre, _ = load(teacher)
    assert isinstance(policy.tokenizer, FastTokenizer)
    assert policy.tokenizer.readable(
        torch.from_numpy(trajectories.fixed_point.astype(np.int64))
    ).all()
    for states in ("online", "stored"):
        for loss in ("trust_region", "paper"):
            student = distill(
                studio.distill_config(
                    tmp_path / f"{states}_{loss}",
                    teacher_path=str(teacher),
                    trajectories=TrajectoriesConfig(str(folder)),
                    states=states,
                    loss=loss,
                )
            )
            distilled, pre, _ = load(student)
            batch = pre(open_dataset(studio.demo).batch(np.arange(4), 4))
            capped = distilled.decode(batch, "ceed")  # 2 iterations, or on to a whole chunk
            assert capped.actions is not None
            assert torch.isfinite(capped.actions).all()
            exact = distilled.decode(batch, DecodingConfig(guess="mid"))
            assert torch.equal(exact.tokens, distilled.decode(batch, "ar").tokens)


def test_the_command_writes_what_a_trainer_reads(studio: Any, tmp_path: Path) -> None:
    config = FitTokensConfig(
        roots=f"{studio.demo},{studio.other}",
        output=str(tmp_path / "fast.json"),
        chunk_size=4,
        scale=8.0,
    )
    report = fit_tokens(config)
    assert report["tokens_mean"] < report["uniform_tokens"] == 28
    assert report["error_max"] < 0.2
    read = FastTokensConfig(path=config.output)
    assert read.vocabulary_size == report["ids"] + 1
    stores = [open_dataset(root) for root in (studio.demo, studio.other)]
    again = FastTokensConfig(scale=8.0)
    again.fit_chunks(all_chunks(stores, 4))
    assert again.merges == read.merges
    assert read.gripper_dims == [6]  # the dimension of two values
    fit_tokens(config)  # its own file may be written again
    with pytest.raises(DatasetError, match="holds no actions"):
        fit_tokens(
            FitTokensConfig(roots=str(studio.grounding), output=str(tmp_path / "other.json"))
        )
    with pytest.raises(ConfigError, match="set --roots"):
        FitTokensConfig()
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        FitTokensConfig(roots="x", chunk_size=0)


@pytest.mark.parametrize("name", ["notes.txt", "folder", "config.json"])
def test_no_other_file_is_overwritten(studio: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("keep me")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="choose another --output"):
        fit_tokens(
            FitTokensConfig(roots=str(studio.demo), output=str(tmp_path / name), chunk_size=4)
        )
    assert (tmp_path / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    "changes",
    [
        {"output": ""},
        {"chunk_size": 10**9},
        {"scale": float("inf")},
        {"scale": 0.0},
        {"max_tokens": -1},
        {"most_ids": 1},
        {"action_low": [float("nan")]},
        {"gripper_dims": [1.5]},
    ],
    ids=str,
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        FitTokensConfig(**{"roots": "x", **changes})


def test_tokens_that_are_known_are_not_fitted_again(
    studio: Any, tiny_policy: Callable[..., Any]
) -> None:
    store = open_dataset(studio.demo)
    policy = tiny_policy(action_tokens=FastTokensConfig(most_ids=128))
    fit_action_tokens(policy, [store])
    assert isinstance(policy.action_tokens, FastTokensConfig)
    merges = policy.action_tokens.merges
    fit_action_tokens(policy, [open_dataset(studio.other)])
    assert policy.action_tokens.merges == merges
    uniform = tiny_policy()
    fit_action_tokens(uniform, [store])
    assert uniform.action_tokens.type == "uniform"
