"""`ceed-vla open-loop`: its counts, compared with a computation frame by frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.checkpoints import load
from ceed_vla.data.frames import open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.training.open_loop import OpenLoopConfig, open_loop


@pytest.fixture(scope="module")
def report(studio: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("report")
    roots = f"{studio.demo},{studio.other}"
    config = OpenLoopConfig(
        str(studio.teacher), roots, str(output), "jacobi,cap1_random,jacobi_random"
    )
    found = open_loop(config)
    assert json.loads((output / "open_loop.json").read_text()) == found
    assert (output / "open_loop.png").read_bytes().startswith(b"\x89PNG")
    return found


def one_by_one(studio: Any, decoder: str) -> tuple[list[float], list[int]]:
    """Errors and forwards of the chunks, every two steps, one frame at a time."""
    policy, pre, post = load(studio.teacher)
    stores = [open_dataset(root) for root in (studio.demo, studio.other)]
    width = np.ptp(np.concatenate([store.action for store in stores]), axis=0)
    errors, forwards = [], []
    for store in stores:
        for first, end in sorted(
            {
                (int(np.searchsorted(store.episode, e)), int(store.episode_end[i]))
                for i, e in enumerate(store.episode)
            }
        ):
            previous = None
            for frame in range(first, end, 2):
                batch = pre(store.batch(np.array([frame]), 4))
                result = policy.decode(
                    batch, decoder, previous=previous, shift_steps=2, executed_steps=2
                )
                previous, count = result.tokens, min(2, end - frame)
                chunk = post(policy.tokenizer.decode(result.tokens))[0, :count].numpy()
                errors.append(
                    float((np.abs(chunk - store.action[frame : frame + count]) / width).mean())
                )
                forwards.append(int(result.iterations[0]))
    return errors, forwards


def test_rows_are_what_single_frames_give(studio: Any, report: Any) -> None:
    assert report["executed_steps"] == 2
    assert [data["chunks"] for data in report["data"]] == [7 + 8 + 5 + 6, 5 + 2]
    for decoder in ("ar", "jacobi"):
        errors, forwards = one_by_one(studio, decoder)
        assert report["rows"][decoder]["error"] == pytest.approx(np.mean(errors), abs=1e-4)
        assert report["rows"][decoder]["forwards_mean"] == pytest.approx(
            np.mean(forwards), abs=1e-3
        )


def test_strict_rows_are_greedy_and_a_cap_is_not(report: Any) -> None:
    rows = report["rows"]
    assert (
        rows["ar"]["tokens_equal_ar"]
        == rows["jacobi"]["tokens_equal_ar"]
        == rows["jacobi_random"]["tokens_equal_ar"]
        == 1
    )
    assert rows["cap1_random"]["forwards_p95"] == 1
    assert rows["cap1_random"]["tokens_equal_ar"] < 1
    per_forward = rows["cap1_random"]["block_layers_mean"]
    assert per_forward == rows["ar"]["prefix_layers_mean"] > 0
    assert rows["ar"]["block_layers_mean"] == pytest.approx(
        per_forward * rows["ar"]["forwards_mean"]
    )
    assert rows["ar"]["error"] < rows["mean action"]["error"]  # the policy has learnt these frames
    assert all(
        row["total_ms"]["p95"] >= row["total_ms"]["p50"] > 0
        for name, row in rows.items()
        if name != "mean action"
    )


def test_the_mean_action_is_the_data_s_own(studio: Any, report: Any) -> None:
    actions = np.concatenate([open_dataset(root).action for root in (studio.demo, studio.other)])
    distance = np.abs(actions - actions.mean(0)) / np.ptp(actions, axis=0)
    # Every frame belongs to one chunk of two steps; the last one of an odd episode is alone in its
    # chunk and counts double.
    assert report["rows"]["mean action"]["error"] == pytest.approx(distance.mean(), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"roots": ""}, ConfigError, "--roots to data"),
        ({"policy_path": ""}, ConfigError, "--policy.path"),
        ({"output_dir": " "}, ConfigError, "--output_dir"),
        ({"decoders": "fast"}, ConfigError, "Unknown decoder 'fast'"),
        ({"executed_steps": 5}, ConfigError, "chunks have 4 steps"),
        ({"chunks": 0}, ConfigError, "chunks is 0"),
        ({"roots": "grounding"}, DatasetError, "no actions to compare with"),
        ({"policy_path": "student"}, DatasetError, None),
    ],
)
def test_what_cannot_work_is_said(
    studio: Any,
    write_dataset: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str | None,
) -> None:
    settings: dict[str, Any] = {
        "policy_path": str(studio.teacher),
        "roots": str(studio.demo),
        "output_dir": str(tmp_path / "out"),
    }
    if changes.get("roots") == "grounding":
        changes = {"roots": str(studio.grounding)}
    if message is None:  # of another robot
        changes, message = (
            {"roots": str(write_dataset(tmp_path / "three", (5,), action_dim=3))},
            "does not fit the policy",
        )
    with pytest.raises(error, match=message):
        open_loop(OpenLoopConfig(**{**settings, **changes}))
    assert not (tmp_path / "out").exists()


def test_only_a_report_of_ours_is_replaced(studio: Any, tmp_path: Path) -> None:
    (tmp_path / "open_loop.json").write_text("{}")
    config = OpenLoopConfig(str(studio.teacher), str(studio.demo), str(tmp_path), "ar", chunks=1)
    with pytest.raises(ConfigError, match=r"open_loop\.json"):
        open_loop(config)
    (tmp_path / "open_loop.json").unlink()
    assert open_loop(config)["rows"]["ar"]["error_pm95"] is None  # of one episode
    assert open_loop(config)["data"] == [{"root": str(studio.demo), "chunks": 1}]


def test_the_picture_shows_the_first_data_set_alone(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "ceed_vla.training.open_loop.draw_actions",
        lambda store, frames, actions, path: drawn.update(actions),
    )
    roots = f"{studio.other},{studio.demo}"
    open_loop(OpenLoopConfig(str(studio.teacher), roots, str(tmp_path), "jacobi", chunks=6))
    assert drawn["ar"].shape == (6, 7)  # three chunks of two steps
    np.testing.assert_array_equal(drawn["ar"], drawn["jacobi"])


def test_tokens_of_variable_length(studio: Any, tmp_path: Path, tiny_policy: Any) -> None:
    """FAST: blocks differ in length, and equal slots after the end of both are no agreement."""
    from ceed_vla.tokens.fast import FastTokensConfig
    from ceed_vla.training.open_loop import _entry, _Row
    from ceed_vla.training.teacher import train

    policy = tiny_policy(action_tokens=FastTokensConfig(most_ids=64, gripper_dims=[-1]))
    config = studio.train_config(
        tmp_path / "run", policy=policy, grounding_steps=0, grounding_roots="", steps=20
    )
    checkpoint = train(config)
    rows = open_loop(
        OpenLoopConfig(str(checkpoint), str(studio.demo), str(tmp_path / "out"), "jacobi")
    )["rows"]
    assert rows["jacobi"]["tokens_equal_ar"] == 1
    assert rows["jacobi"]["forwards_mean"] < rows["ar"]["forwards_mean"]
    tokens: Any = load(checkpoint)[0].tokenizer
    own, other = (
        _Row(
            DecodingConfig(),
            [torch.tensor([1, second, tokens.stop, tokens.stop])],
            [0.5],
            [1],
            [(4, 4)],
            [0.1],
        )
        for second in (2, 3)
    )
    entry = _entry(own, other, tokens, 2, [("set", 0)])
    assert entry["tokens_equal_ar"] == 0.5
    malformed = _entry(
        _Row(DecodingConfig(), own.tokens, [np.nan], [1], [(4, 4)], [0.1]),
        other,
        tokens,
        2,
        [("set", 0)],
    )
    assert (malformed["error"], malformed["malformed"]) == (None, 1)
