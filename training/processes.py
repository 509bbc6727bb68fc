"""Distribute a run over processes: accelerate's settings, and the layers that FSDP wraps."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.optim import computes_bfloat16


def new_accelerator(mixed_precision: str, device: str, output: Path) -> Accelerator:
    """Accelerate's object for a run.

    Args:
        mixed_precision: See `RunConfig`.
        device: "cpu", or an accelerator.
        output: The run's folder.
    """
    if mixed_precision == "auto":
        mixed_precision = "bf16" if computes_bfloat16(device) else "no"
    return Accelerator(
        mixed_precision=mixed_precision,
        log_with="tensorboard",
        project_dir=str(output),
        cpu=device == "cpu",
        kwargs_handlers=[
            # grounding frames use no action head
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # the other processes wait while the main one validates or records
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )


def layer_classes(policy: CeedVLAPolicy) -> list[str]:
    """Class names of the repeated layers of a policy's model."""
    lists = [
        list(m) for m in policy.backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential)
    ]
    return sorted(
        {type(m[0]).__name__ for m in lists if len(m) > 1 and len({type(x) for x in m}) == 1}
    )
