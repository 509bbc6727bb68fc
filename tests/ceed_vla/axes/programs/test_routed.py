"""`route` and `skip`: which layers run, which rows end, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ceed_vla
from ceed_vla.axes.programs.router import ROUTER, ProgramRouter
from ceed_vla.checkpoints import save
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.folders import MANIFEST

PROGRAMS = [(0, 1, 2, 3), (0, 1, 3), (0, 3)]


@pytest.fixture
def student() -> tuple[Any, Any, Any]:
    return ceed_vla.load("student")


def routed(policy: Any, choice: int | None = None) -> ProgramRouter:
    """Attach a router: one that always chooses the same program, or a random one."""
    torch.manual_seed(0)
    router = ProgramRouter(192, PROGRAMS).eval().requires_grad_(False)
    if choice is None:
        torch.nn.init.normal_(router.score.weight)
    else:
        router.score.bias[choice] = 1.0
    policy.backbone.router = (router,)
    return router


def previous(rows: int = 3) -> torch.Tensor:
    return torch.randint(255, (rows, 56), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_a_route_is_the_program_that_it_chooses(
    choice: int, student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy = student[0]
    routed(policy, choice)
    skipped = sorted({0, 1, 2, 3} - set(PROGRAMS[choice]))
    for confidence in ("0.2", "0.9", "1"):
        found = policy.decode(batch, f"route{confidence}_cap3", previous=previous())
        if skipped:
            name = f"skip{'-'.join(map(str, skipped))}p{confidence}_cap3"
            same = policy.decode(batch, name, previous=previous())
            assert torch.equal(found.tokens, same.tokens)
            assert torch.equal(found.layer_forwards, same.layer_forwards)
            assert found.exit_reason == same.exit_reason
        sure = torch.tensor([reason == "program_sure" for reason in found.exit_reason])
        size = len(PROGRAMS[choice])
        assert torch.equal(found.layer_forwards == size, sure)
        rest = found.layer_forwards - size
        assert (rest[~sure] == 4 * (found.iterations[~sure] - 1)).all()
        assert (found.iterations <= 3).all()
        assert confidence != "1" or not sure.any()


def test_rows_have_their_own_programs(student: tuple[Any, Any, Any], batch: dict[str, Any]) -> None:
    policy, pre, _ = student
    random = torch.Generator().manual_seed(5)
    images = {name: torch.rand(8, 3, 96, 96, generator=random) for name in policy.config.cameras}
    state = 2 * torch.randn(8, 14, generator=random)
    batch = pre({**images, "observation.state": state, "task": ["push the red cube"] * 8})
    along = torch.randn(192, generator=random)
    middle = (policy.backbone.prefill(batch).state @ along).sort().values[3:5].mean()

    class Router:
        programs = PROGRAMS

        def __call__(self, state: torch.Tensor) -> torch.Tensor:
            score = state @ along - middle
            return torch.stack([score - 1e9, score, torch.zeros_like(score)], dim=1)

    policy.backbone.router = (Router(),)
    together = policy.decode(batch, "route0_cap2", previous=previous(8))
    assert len({size % 4 for size in together.layer_forwards.tolist()}) == 2
    for row in range(8):
        one = {k: v[row : row + 1] for k, v in batch.items() if torch.is_tensor(v)}
        alone = policy.decode(one, "route0_cap2", previous=previous(8)[row : row + 1])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.layer_forwards[0] == together.layer_forwards[row]


def test_what_cannot_run_is_refused(student: tuple[Any, Any, Any], batch: dict[str, Any]) -> None:
    policy = student[0]
    for name, message in {
        "route0.2_cap2": "no router of programs; train one with `ceed-vla route`",
        "skip4p0.2_cap2": "each must be one of 0 to 3",
        "skip1-1p0.2_cap2": "occur once",
        "skip0-1-2-3p0.2_cap2": "must list 1 to 8 layers",
        "skip1p0.2_cap1": "must exceed 1",
    }.items():
        with pytest.raises(ConfigError, match=message):
            policy.decode(batch, name)


def test_a_checkpoint_keeps_it(
    student: tuple[Any, Any, Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    policy, *processors = student
    routed(policy)
    folder = save(tmp_path / "routed", policy, *processors)
    again, _, _ = ceed_vla.load(folder)
    assert again.backbone.router[0].programs == PROGRAMS
    for name in ("route0.2_cap2", "ar"):
        assert torch.equal(again.decode(batch, name).tokens, policy.decode(batch, name).tokens)
    again.backbone.router = ()
    save(folder, again, *processors)
    assert not (folder / ROUTER).exists()


@pytest.mark.parametrize("programs", ["0-1,0-9,0", "", "a", "0,1", ",".join(["0"] * 65)])
def test_a_router_of_another_model_is_refused(
    programs: str, student: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    policy, *processors = student
    routed(policy)
    folder = save(tmp_path / "routed", policy, *processors)
    (folder / MANIFEST).unlink()
    config = (folder / "config.json").read_text().replace('"sealed": true', '"sealed": false')
    (folder / "config.json").write_text(config)
    save_file(load_file(folder / ROUTER), folder / ROUTER, metadata={"programs": programs})
    with pytest.raises(CheckpointError, match=ROUTER):
        ceed_vla.load(folder)
