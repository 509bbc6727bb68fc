"""`ceed-vla fit-tokens`: fit FAST action tokens on datasets, for trainers that do not fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.fields import check_fields, ranged
from ceed_vla.files import replacing
from ceed_vla.tokens.fast import FastTokensConfig
from ceed_vla.training.clipping import MOST_CLIPPED, check_actions
from ceed_vla.training.settings import SHARES, full_disk, split_list


@dataclass
class FitTokensConfig:
    """Settings of `ceed-vla fit-tokens`.

    Attributes:
        roots: Comma-separated LeRobotDataset folders with demonstrations.
        output: File to write; ``--policy.action_tokens.path`` of a trainer reads it.
        chunk_size: Steps of a chunk, equal to the policy's ``chunk_size``.
        most_ids: Most FAST ids; the data may need fewer.
        scale: Quantisation: a DCT coefficient is rounded to ``1 / scale`` of half a range.
        max_tokens: Slots of a block; a quarter more than the longest chunk if 0.
        action_low: Lower end of every action dimension; from the data if empty.
        action_high: Upper end of every action dimension; from the data if empty.
        gripper_dims: Two-valued action dimensions.
        max_clipped: Largest share of a dimension's actions far outside the range.
    """

    moved: ClassVar[dict[str, str]] = {"vocabulary_size": "most_ids"}

    roots: str = ""
    output: str = "fast_tokens.json"
    chunk_size: int = ranged(8, "[1, 4096]")
    most_ids: int = ranged(1024, "[2, 65536]")
    scale: float = ranged(10.0, "(0, 1e6]")
    max_tokens: int = ranged(0, "[0, 65536]")
    action_low: list[float] = ranged([], "[-1e9, 1e9]")
    action_high: list[float] = ranged([], "[-1e9, 1e9]")
    gripper_dims: list[int] = ranged([-1], "[-1000, 1000]")
    max_clipped: float = ranged(MOST_CLIPPED, SHARES)

    def __post_init__(self) -> None:
        check_fields(self)
        if not split_list(self.roots):
            raise ConfigError("No data: set --roots to one or more recorded folders.")
        if not self.output.strip():
            raise ConfigError("No --output; name the file for the tokens.")


def fit_tokens(config: FitTokensConfig) -> dict[str, Any]:
    """Fit, write and measure FAST tokens, and print a report.

    Returns:
        The report: ids, slots, tokens per chunk, and the error of a decoded action [action units].

    Raises:
        DatasetError: A dataset is unreadable or has no actions.
        ConfigError: The settings do not match the data.
    """
    output = Path(config.output)
    if output.exists():
        try:
            FastTokensConfig(path=str(output))
        except CeedVLAError as error:
            raise ConfigError(
                f"{output} exists and is not a file of fitted tokens; choose another --output."
            ) from error
    settings = ("most_ids", "scale", "max_tokens", "action_low", "action_high", "gripper_dims")
    tokens = FastTokensConfig(**{name: getattr(config, name) for name in settings})
    stores = [open_dataset(root, decode=False) for root in split_list(config.roots)]
    parts = [all_chunks([store], config.chunk_size) for store in stores]
    if len({part.shape[2] for part in parts}) > 1:
        raise ConfigError(
            f"The datasets have actions of {[part.shape[2] for part in parts]} dimensions; they "
            "must be of one robot."
        )
    chunks = torch.cat(parts)
    if config.gripper_dims == [-1]:  # find dimensions of two values (grippers)
        tokens.gripper_dims = [
            d for d in range(chunks.shape[2]) if len(chunks[:, 0, d].unique()) == 2
        ]
    tokens.fit_chunks(chunks)
    check_actions(tokens.build(*chunks.shape[1:]), chunks[:, 0].numpy(), config.max_clipped)
    with full_disk(output.parent, "nothing was written"), replacing(output) as temporary:
        tokens.write(temporary)
    report = measure_tokens(tokens, chunks)
    print(f"{config.output}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items()))
    return report


def fit_action_tokens(policy: CeedVLAConfig, stores: Sequence[FrameStore]) -> None:
    """Fit a new policy's action tokens on its datasets, if they are of a kind that is fitted."""
    tokens = policy.action_tokens
    if isinstance(tokens, FastTokensConfig) and not tokens.fitted:
        tokens.fit_chunks(all_chunks(stores, policy.chunk_size))


def all_chunks(stores: Sequence[FrameStore], chunk_size: int) -> Tensor:
    """The chunk (N, m, A) that starts at every frame."""
    return torch.cat([store.chunks(np.arange(len(store)), chunk_size)[0] for store in stores])


def measure_tokens(tokens: FastTokensConfig, chunks: Tensor) -> dict[str, float]:
    """Length and error of fitted tokens on chunks (N, m, A)."""
    tokenizer: Any = tokens.build(chunks.shape[1], chunks.shape[2])
    encoded = tokenizer.encode(chunks)
    lengths = (encoded != tokenizer.stop).sum(1).float()
    error = (tokenizer.decode(encoded) - chunks).abs()
    return {
        "ids": float(tokenizer.vocabulary_size - 1),
        "slots": float(tokenizer.block_length),
        "tokens_mean": lengths.mean().item(),
        "tokens_max": lengths.max().item(),
        "uniform_tokens": float(chunks.shape[1] * chunks.shape[2]),
        "error_mean": error.mean().item(),
        "error_max": error.max().item(),
    }
