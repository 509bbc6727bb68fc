"""A check for authors of backbones: the contract that exact decoding depends on."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ceed_vla.backbones.base import Prefix, TrainableBackbone
from ceed_vla.backbones.capabilities import ReadsDepths, offers, require
from ceed_vla.decoding import BlockRequest, DecodingConfig, decode_autoregressive, decode_jacobi
from ceed_vla.errors import ConfigError

GREEDY = BlockRequest(DecodingConfig(method="ar"))


@torch.no_grad()
def check_backbone(
    backbone: TrainableBackbone,
    observation: dict[str, Any],
    *,
    action_dim: int = 1,
    guesses: int = 4,
) -> int:
    """Decode one block by all routes and compare every token.

    Greedy decoding with the cache must equal strict Jacobi decoding from random guesses, teacher
    forcing as in training, decoding behind a prefix that was used before, and decoding of every row
    alone. If the backbone reads depths, the logits of its first layer must differ from those of all
    layers. Use float32, as lower precision may flip near-ties.

    Args:
        backbone: The model, in evaluation mode. Without training, its weights must be large enough
            that tokens depend on one another; otherwise the check has little power.
        observation: A preprocessed batch.
        action_dim: Action dimensions ``A``.
        guesses: Number of random guesses.

    Returns:
        Number of tokens that were compared.

    Raises:
        ConfigError: Two routes differ; the message names them and the usual causes.
    """
    rows = backbone.check_observation(observation)
    n = backbone.block_length
    prefix = backbone.prefill(observation)
    greedy = decode_autoregressive(backbone, prefix, GREEDY).tokens  # (B, n)
    _, (forced,) = backbone.packed_logits(backbone.embed_prefix(observation), [greedy])
    compared = _compare(
        forced.argmax(-1), greedy, "packed_logits", "the cache, a mask, or positions"
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(guesses):
        guess = torch.randint(backbone.vocabulary_size, (rows, n), generator=generator)
        strict = decode_jacobi(
            backbone, prefix, BlockRequest(guess=guess, tokens_per_step=action_dim)
        )
        compared += _compare(
            strict.tokens,
            greedy,
            "strict Jacobi decoding",
            "a block that is not causal, or a cache",
        )
    prefix.cache.roll_back()
    if backbone.num_layers > 1 and offers(backbone, ReadsDepths):
        _check_depths(backbone, prefix, greedy)
    again = decode_autoregressive(backbone, prefix, GREEDY).tokens
    compared += _compare(
        again, greedy, "a prefix that was used before", "a cache that is not rolled back"
    )
    by_rows = {
        k: v for k, v in observation.items() if isinstance(v, Tensor) and v.ndim and len(v) == rows
    }
    for row in range(rows):
        one = {key: value[row : row + 1] for key, value in by_rows.items()}
        alone = decode_autoregressive(backbone, backbone.prefill(one), GREEDY).tokens
        compared += _compare(
            alone, greedy[row : row + 1], f"row {row} alone", "padding that is attended to"
        )
    return compared


def check_untrained(
    backbone: TrainableBackbone, config: Any, *, instruction_tokens: int, rows: int = 4
) -> int:
    """Run `check_backbone` with random observations and random weights.

    Args:
        backbone: The model. Its weights are overwritten with values that are large enough to make
            every token depend on those before it.
        config: The policy's configuration, with its features.
        instruction_tokens: Length of an instruction [tokens].
        rows: Number of observations.
    """
    backbone.eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    cameras = {
        camera: torch.rand(rows, *config.image_features[camera].shape) for camera in config.cameras
    }
    observation = {
        **cameras,
        OBS_STATE: torch.randn(rows, *config.robot_state_feature.shape),
        OBS_LANGUAGE_TOKENS: torch.randint(1, 256, (rows, instruction_tokens)),
    }
    return check_backbone(backbone, observation, action_dim=config.action_dim)


def _check_depths(backbone: TrainableBackbone, prefix: Prefix, greedy: Tensor) -> None:
    """Raise `ConfigError` if the first layer gives the same logits as all layers."""
    tokens = greedy[:, : backbone.block_length - 1]
    shallow = require(backbone, ReadsDepths, "The check").shallow_logits(prefix, tokens, 1)
    prefix.cache.roll_back()
    if torch.equal(shallow, backbone.block_logits(prefix, tokens)):
        raise ConfigError(
            f"shallow_logits returns the same logits at depth 1 as at depth {backbone.num_layers}; "
            "it ignores depth. It must stop after `depth` layers."
        )


def _compare(tokens: Tensor, greedy: Tensor, route: str, suspects: str) -> int:
    wrong = tokens.cpu() != greedy.cpu()
    if wrong.any():
        row, slot = wrong.nonzero()[0].tolist()
        raise ConfigError(
            f"{int(wrong.sum())} of {wrong.numel()} tokens of {route} differ from greedy decoding "
            f"with the cache, the first in row {row}, slot {slot}: {int(tokens[row, slot])} "
            f"instead of {int(greedy[row, slot])}. Check {suspects}."
        )
    return wrong.numel()
