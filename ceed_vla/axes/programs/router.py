"""A router that chooses the program of a chunk from the prefix (CoLa, arXiv 2507.07996).

`ceed-vla route` trains it on a frozen policy. It is not part of the policy's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ceed_vla.axes.programs.decoder import check_program
from ceed_vla.backbones.capabilities import HasExits, RunsPrograms, require
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import regular
from ceed_vla.folders import ROUTER as ROUTER
from ceed_vla.weights import copy_weights, opened

HIDDEN = 64
MOST_PROGRAMS = 64
LONGEST = 2**16  # text of all programs [characters]
_ADVICE = "copy the checkpoint again."

type Program = tuple[int, ...]


class ProgramRouter(nn.Module):
    """Scores programs from the hidden vector behind the prefix.

    Args:
        width: Width ``d`` of the model.
        programs: The programs, each the layers of a forward in the order in which they run.
    """

    def __init__(self, width: int, programs: Sequence[Program]) -> None:
        super().__init__()
        self.programs = [tuple(program) for program in programs]
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, HIDDEN)
        self.score = nn.Linear(HIDDEN, len(programs))
        nn.init.zeros_(self.score.weight)

    def forward(self, state: Tensor) -> Tensor:
        """Map hidden vectors (B, d) to scores (B, K), one for each program."""
        state = self.norm(state.to(self.norm.weight.dtype))
        scores: Tensor = self.score(F.silu(self.hidden(state)))
        return scores


def save_router(backbone: Any, folder: Path) -> None:
    """Write the router of a backbone into a folder; without one, remove an earlier policy's."""
    (folder / ROUTER).unlink(missing_ok=True)
    for router in getattr(backbone, "router", ()):
        metadata = {"programs": written_programs(router.programs)}
        save_file(router.state_dict(), folder / ROUTER, metadata=metadata)


def written_programs(programs: Sequence[Program]) -> str:
    """Programs as text, for example ``0-1-2-3,0-1-3``."""
    return ",".join("-".join(map(str, program)) for program in programs)


def read_programs(text: str, num_layers: int, source: str) -> list[Program]:
    """The programs in the result of `written_programs`, for a model of `num_layers` layers.

    Raises:
        CheckpointError: The text, which was read from `source`, is damaged, or is of another model.
    """
    with raised_as(CheckpointError, f"The programs in {source} are damaged", _ADVICE):
        if len(text) > LONGEST:
            raise ValueError(f"they have {len(text)} characters, at most {LONGEST} are read")
        programs = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        if len(programs) > MOST_PROGRAMS:
            raise ValueError(f"there are {len(programs)}, at most {MOST_PROGRAMS} are read")
    what = f"The programs in {source} do not belong to this model"
    with raised_as(CheckpointError, what, _ADVICE, passing=()):
        for program in programs:
            check_program(program, num_layers)
    return programs


def load_router(backbone: Any, folder: Path) -> None:
    """Attach the router of a checkpoint folder to a backbone, if there is one.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model.
    """
    file = folder / ROUTER
    if not file.exists(follow_symlinks=False):
        return
    with opened(regular(file)) as tensors:
        text = (tensors.metadata() or {}).get("programs", "")
    what = f"{file} does not belong to this model"
    with raised_as(CheckpointError, what, _ADVICE, passing=()):
        require(backbone, RunsPrograms, ROUTER)
        width = require(backbone, HasExits, ROUTER).exit_parts()[2]
    programs = read_programs(text, backbone.num_layers, str(file))
    router = ProgramRouter(width, programs)
    missing, unknown = copy_weights(router, [file])
    if wrong := [*missing, *unknown]:
        raise CheckpointError(f"{file} does not belong to this model: {', '.join(wrong)}.")
    backbone.router = (router.eval().requires_grad_(False),)
