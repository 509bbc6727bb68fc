"""What training asks of the simulator: takeover rounds stay within their seeds and never meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ceed_vla.errors import ConfigError, SimulationError
from sim import hooks, validate
from sim.hooks import ClosedLoopValidation, TakeoverRecorder


def test_rounds_use_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def note(commands: Sequence[Sequence[str]]) -> list[str]:
        for command in commands:
            options = dict(part[2:].split("=", 1) for part in command if part.startswith("--"))
            seeds.extend(range(int(options["seed"]), int(options["seed"]) + int(options["episodes"])))
        return []

    monkeypatch.setattr(hooks, "_run_all", note)
    recorder = TakeoverRecorder(5, seed=31_440, rounds=2)
    for index in range(2):
        recorder(tmp_path / "policy", index, tmp_path / "takeover")
    assert seeds == list(range(31_440, 31_450))


@pytest.mark.parametrize(("seed", "rounds"), [(29_999, 1), (39_999, 1), (30_000, 5001)])
def test_rounds_that_leave_their_seeds_are_refused(seed: int, rounds: int) -> None:
    with pytest.raises(ConfigError, match="30000 to 39999"):
        TakeoverRecorder(2, seed, rounds)
    TakeoverRecorder(2, seed=39_998, rounds=1)


@pytest.mark.parametrize("text", ["", "no result", "[]", "{}", '{"successes": "x", "episodes": 1}'])
def test_a_validation_without_a_result_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_run_all", lambda commands: [text for _ in commands])
    with pytest.raises(SimulationError, match="printed no result"):
        ClosedLoopValidation(4)(Path("policy"))


def test_a_validation_explains_itself_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main([]) == 2
    assert validate.main([str(tmp_path), "x", "1"]) == 2
    assert validate.main([str(tmp_path), "40000", "1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
