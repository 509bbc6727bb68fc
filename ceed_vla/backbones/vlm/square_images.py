"""The tokens of one square image in Idefics3 and SmolVLM, without the code for padded images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceed_vla.backbones.vlm.kinds import SQUARE_IMAGES
from ceed_vla.errors import ConfigError


def square_tokens(model: Any, image: Tensor) -> Tensor:
    """Tokens (1, T, d) of an image (1, 3, S, S) without padding.

    Raises:
        ConfigError: The model is of another type.
    """
    kind = model.config.model_type
    if kind not in SQUARE_IMAGES:
        raise ConfigError(
            f"The images of {kind} cannot be embedded one by one; only those of "
            f"{' and '.join(SQUARE_IMAGES)} can."
        )
    tower = model.model.vision_model
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(image).flatten(2).transpose(1, 2)  # (1, N, w)
    side = image.shape[-1] // embeddings.patch_size
    places = _places(side, embeddings.num_patches_per_side)
    x = patches + embeddings.position_embedding(places)
    x = tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
    tokens: Tensor = model.model.connector(tower.post_layernorm(x))
    return tokens


def _places(side: int, trained: int) -> Tensor:
    """Rows (1, side ** 2) of a position embedding that was trained on `trained` ** 2 patches."""
    # As the models compute them, in float32.
    shares = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(
        max=1 - 1e-6
    )
    ends = torch.arange(1 / trained, 1.0, 1 / trained)
    along = torch.bucketize(shares, ends, right=True)  # (side,)
    return (along[:, None] * trained + along).flatten()[None]
