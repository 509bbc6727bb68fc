"""Paired statistics against published values; table and figures of a synthetic report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.sim.clips import HEIGHT, WIDTH, compose_frame, write_clip
from ceed_vla.sim.decoders import parse_decoders
from ceed_vla.sim.paired import compare_paired, paired_interval, sign_test
from ceed_vla.sim.plots import write_plots
from ceed_vla.sim.report import COLUMNS, console_table, markdown, table_rows
from ceed_vla.sim.rollout import EpisodeResult
from ceed_vla.sim.show import AHEAD, SETTLED, UNKNOWN, WRONG, autoregressive_status, jacobi_status
from ceed_vla.sim.success import wilson_interval
from ceed_vla.sim.summary import paired_entries, row_entry


def episode(seed: int, success: bool, forwards: int, task: str = "push_cube") -> EpisodeResult:
    return EpisodeResult(seed, task, "push it", success, 8, [forwards] * 2, ["converged"] * 2)


def synthetic_report(*, timed: bool = True, complete: bool = True) -> dict[str, Any]:
    results = {
        "teacher_ar": [episode(s, s % 5 != 0, 55) for s in range(20)],
        "ceed": [
            episode(s, s % 4 != 0, 1 + s % 3, "stack_cubes" if s % 2 else "push_cube")
            for s in range(20)
        ],
    }
    latency = {
        "total_ms": {"p50": 10.0, "p95": 12.0, "p99": 20.0},
        "decode_ms": {"p50": 6.0, "p95": 8.0, "p99": 9.0},
        "prefill_ms": {"p50": 3.0, "p95": 4.0, "p99": 5.0},
        "control_rate_hz": 400.0,
        "speedup_vs_ar": 3.14,
        "decode_speedup_vs_ar": 4.56,
        "equal_to_ar": 0.9999,
    }
    decoders = {
        name: row_entry(rows) | {"paired": paired_entries(name, results, ("ar", "teacher_ar"))}
        for name, rows in results.items()
    }
    if timed:
        decoders["ceed"] |= latency
    return {
        "complete": complete,
        "env": "tabletop",
        "task": "mixed",
        "split": "train",
        "seeds": {"first": 50_000, "count": 20},
        "executed_steps": 4,
        "chunk_size": 8,
        "policy": {"name": "student", "sha256": "0123456789ab"},
        "teacher": None,
        "hardware": {"cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "threads": 1, "device": "cpu"},
        "versions": {"python": "3.12"},
        "timing": {"chunks": 60, "episodes": 3, "driver": "ceed"} if timed else {},
        "decoders": decoders,
    }


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    for success, episodes, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        assert wilson_interval(success, episodes) == pytest.approx((low, high), abs=1e-4)


def test_paired_interval_against_published_values() -> None:
    # Airway hyper-responsiveness (Bentur 2009), method 10, from Fagerland et al. 2014: -0.286
    # (-0.507, -0.026).
    assert paired_interval(1, 1, 7, 12) == pytest.approx((-0.286, -0.507, -0.026), abs=5e-4)


def test_paired_interval_is_antisymmetric_and_proper() -> None:
    rng = np.random.default_rng(0)
    for counts in rng.integers(0, 30, (50, 4)):
        both, first, second, neither = (int(c) for c in counts)
        difference, low, high = paired_interval(both, first, second, neither)
        assert -1 <= low <= difference <= high <= 1
        mirrored = paired_interval(both, second, first, neither)
        assert mirrored == pytest.approx((-difference, -high, -low))


def test_sign_test_against_the_binomial_distribution() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(34, 18) == pytest.approx(0.036, abs=1e-3)


def test_compare_paired_uses_common_seeds_only() -> None:
    pair = compare_paired(
        {1: True, 2: True, 3: False, 9: True}, {1: True, 2: False, 3: False, 8: False}
    )
    assert (pair["episodes"], pair["only_this"], pair["only_reference"]) == (3, 1, 0)
    assert pair["difference_points"] == pytest.approx(33.33)


def test_row_entry_counts_forwards_by_row_and_success_by_task() -> None:
    entry = row_entry([episode(1, True, 2), episode(2, False, 4, "stack_cubes")])
    assert entry["success"] == 1
    assert entry["success_rate"] == 0.5
    assert entry["forwards_mean"] == 3
    assert entry["forwards_histogram"] == {"2": 2, "4": 2}
    assert entry["per_task"]["stack_cubes"]["success"] == 0
    assert entry["failed_seeds"] == [2]
    assert entry["exit_reasons"] == {"converged": 4}
    assert row_entry([])["success_rate"] is None


def test_markdown_has_one_row_a_decoder_and_the_numbers() -> None:
    report = synthetic_report()
    text = markdown(report, ["success.png"])
    assert (
        "| ceed | 15/20 = 75.0 % [53, 89] | 1.95 / 3 | - | 10.0 / 12.0 / 20.0 | 400 | 3.1x | 4.6x "
        "| 99.9 % |" in text
    )
    assert "| teacher_ar | 16/20 = 80.0 % [58, 92] | 55.00 / 55 | - | - | - | - | - |" in text
    assert "| ceed | teacher_ar | -5.0 [" in text
    assert "![success](success.png)" in text
    assert "Partial" not in text
    assert "seeds 50000 to 50019" in text


def test_partial_report_says_so() -> None:
    report = synthetic_report(timed=False, complete=False)
    assert "**Partial" in markdown(report)
    assert "partial" in str(console_table(report).title)


@pytest.mark.parametrize("width", [60, 90, 160])
def test_console_table_fits_and_has_the_rows_of_the_report(width: int) -> None:
    report = synthetic_report()
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(console_table(report, width))
    text = console.export_text()
    for row in table_rows(report):
        assert row[0] in text
        assert row[1] in text
    assert ("tokens" in text) == (width == 160)
    assert len(COLUMNS) == len(table_rows(report)[0])


def test_plots_are_written_where_there_is_data(tmp_path: Path) -> None:
    written = {path.name for path in write_plots(synthetic_report(), tmp_path)}
    assert written == {"success.png", "latency.png", "forwards.png"}
    assert {path.name for path in write_plots(synthetic_report(timed=False), tmp_path)} == {
        "success.png",
        "forwards.png",
    }


def test_a_clip_that_cannot_be_encoded_leaves_the_old_one(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"the old one")
    with pytest.raises(SimulationError, match="could not be written"):
        write_clip(clip, [np.zeros((HEIGHT, WIDTH, 3), np.uint8)], fps=-1)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert clip.read_bytes() == b"the old one"


def test_clip_is_a_readable_video(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    view = np.full((96, 96, 3), 90, np.uint8)
    frame = compose_frame(
        [view, view[:48]],
        sides=("left", "right"),
        instruction="push it " * 12,
        decoder="ceed",
        forwards=2,
        mean_forwards=1.5,
        unit="block",
        step=4,
    )
    assert frame.shape == (HEIGHT, WIDTH, 3)
    reader = imageio_ffmpeg.read_frames(str(write_clip(tmp_path / "clip.mp4", [frame] * 5)))
    assert next(reader)["size"] == (WIDTH, HEIGHT)
    assert sum(1 for _ in reader) == 5


@pytest.mark.parametrize("name", ["fast", "ar_mid", "cap", "conf_cap2", "cap2_warm", "mid"])
def test_an_unknown_decoder_is_named_with_those_that_exist(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_decoders(f"ar,{name}", has_teacher=False)
    assert f"{name!r}; choose from ceed, ar, jacobi" in str(error.value)
    assert "conf<P>" in str(error.value)


def test_impossible_exit_rules_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="Decoder 'cap0': its cap K is 0"):
        parse_decoders("cap0", has_teacher=False)
    with pytest.raises(ConfigError, match=r"its confidence P is 1\.5"):
        parse_decoders("conf1.5_cap2", has_teacher=False)


def test_teacher_rows_need_a_teacher_and_are_added_with_one() -> None:
    with pytest.raises(ConfigError, match=r"--teacher\.path"):
        parse_decoders("teacher_ar", has_teacher=False)
    with pytest.raises(ConfigError, match="empty"):
        parse_decoders(" , ", has_teacher=False)
    assert parse_decoders("ar,ceed,ar", has_teacher=False) == ["ar", "ceed"]
    assert parse_decoders("ceed,teacher_cap4", has_teacher=True) == [
        "teacher_ar",
        "ceed",
        "teacher_cap4",
    ]


def test_status_of_tokens_on_the_way_to_the_fixed_point() -> None:
    states = np.array([[7, 0, 5, 9], [7, 1, 5, 3], [7, 1, 5, 4]])
    assert jacobi_status(states).tolist() == [
        [SETTLED, WRONG, AHEAD, WRONG],
        [SETTLED, SETTLED, SETTLED, WRONG],
        [SETTLED] * 4,
    ]
    passing = np.array([[1, 2], [1, 3], [1, 2]])  # right by chance, then wrong, then right
    assert jacobi_status(passing)[0].tolist() == [SETTLED, WRONG]
    assert autoregressive_status(3).tolist() == [
        [SETTLED, UNKNOWN, UNKNOWN],
        [SETTLED, SETTLED, UNKNOWN],
        [SETTLED] * 3,
    ]


def test_episodes_of_an_older_file_have_no_motion_to_average() -> None:
    new = [episode(seed, True, 1) for seed in range(2)]
    for one in new:
        one.motion = {"path": 2.0}
    assert row_entry(new)["path_mean_of_successes"] == 2.0
    for mixed in ([*new, episode(2, True, 1)], [episode(2, True, 1), *new]):
        assert "path_mean_of_successes" not in row_entry(mixed)
