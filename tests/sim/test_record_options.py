"""Invalid options of a recording, and its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ceed_vla.cli.entry import main
from ceed_vla.errors import ConfigError
from ceed_vla.sim.record import record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 50_000}, "never recorded"),
        ({"seed": 49_999, "episodes": 2}, "never recorded"),
        ({"seed": 40_000, "mode": "takeover"}, "never recorded"),
        ({"seed": 29_999, "episodes": 2}, "range of mode 'clean'"),
        ({"seed": 0, "mode": "takeover"}, "range of mode 'takeover'"),
        ({"seed": -1}, "seed is -1"),
        ({"mode": "dirty"}, "clean, perturb, grounding, takeover"),
        ({"episodes": 0}, r"episodes is 0.*\[1, 1e6\]"),
        ({"commit_frames": 0}, "commit_frames is 0"),
        ({"excursion_fraction": float("nan")}, "excursion_fraction is nan"),
        ({"executed_steps": -1}, "executed_steps is -1"),
        ({"decoding": "fast"}, "Unknown decoder 'fast'"),
        (
            {"decoding": "deadline8", "mode": "takeover", "seed": 30_000},
            "a deadline applies to a chunk alone",
        ),
        ({"decoding": "ar,ceed"}, "Unknown decoder 'ar,ceed'"),
        ({"decoding": "teacher_ar"}, "Unknown decoder 'teacher_ar'"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str, config: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "set", **options)


def test_existing_root_is_refused(tmp_path: Path, config: Any) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="choose a new --root"):
            record(config(tmp_path, resume=resume))
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_resume_with_other_options_is_refused(tmp_path: Path, config: Any) -> None:
    record(config(tmp_path / "set", episodes=1))
    with pytest.raises(ConfigError, match=r"other options \(env\)"):
        record(config(tmp_path / "set", episodes=1, env={"episode_length": 50}, resume=True))
    with pytest.raises(ConfigError, match="--resume"):
        record(config(tmp_path / "set", episodes=1))


def test_no_root(tmp_path: Path, config: Any) -> None:
    for root in ("", "."):
        with pytest.raises(ConfigError, match="root is"):
            config(Path(root))


def test_more_steps_than_a_chunk_has(tmp_path: Path, config: Any) -> None:
    options = {"mode": "takeover", "policy_path": Path("student"), "executed_steps": 99}
    with pytest.raises(ConfigError, match="executed_steps is 99; the policy's chunks have"):
        record(config(tmp_path / "set", **options))
    assert config(tmp_path / "set", mode="takeover").executed_steps is None  # the policy's own


def test_takeover_needs_a_policy(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match=r"--policy\.path"):
        record(config(tmp_path / "set", mode="takeover"))
    assert not (tmp_path / "set").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "record",
        f"--root={tmp_path / 'set'}",
        "--env.task=push_cube",
        "--episodes=1",
        "--progress=false",
    ]
    assert main(words) == 0
    assert "push_cube/recorded 1" in capsys.readouterr().out
    assert main(words) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["record", "--tasks=all"], "--tasks is now --env.task"),
        (["record", "--image_size", "64"], "--image_size is now --env.image_size"),
        (["record", "--max_steps=9"], "--max_steps is now --env.episode_length"),
        (["eval", "--env", "tabletop"], "--env is now --env.type"),
        (["eval", "--task=push_cube"], "--task is now --env.task"),
        (["show", "--split=heldout"], "--split is now --env.split"),
        (["eval", "--max_episode_steps=9"], "--max_episode_steps is now --env.episode_length"),
        (["grounding", "--split=heldout"], "--split is now --env.split"),
        (["fit-tokens", "--vocabulary_size=9"], "--vocabulary_size is now --most_ids"),
        (["train", "--policy.backbone.vocabulary_size=9"], "is now --policy.backbone.words"),
        (
            ["train", "--policy.decoding.executed_steps=2"],
            "is now --policy.decoding.watch=executed",
        ),
        (["train", "--policy.decoding.tolerance_bins=1"], "is now --policy.decoding.confidence"),
        (["eval", "--env.type=kitchen"], "--env.type is 'kitchen'; choose one of"),
        (["eval", "--env.type=pusht", "--env.split=train"], "unknown flag '--env.split'"),
    ],
)
def test_flags_that_moved_say_where(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_without_an_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", f"--root={tmp_path / 'set'}", "--env.type=pusht"]) == 1
    assert (
        "--env.type=pusht has no expert, which mode clean needs: its configuration PushtEnv lacks "
        "act(env)" in (capsys.readouterr().err)
    )
