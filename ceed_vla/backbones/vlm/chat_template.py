"""Chat templates of checkpoints: Jinja programs, so they run in a limited child
(`ceed_vla.limited`).

A template is rendered once, around the place of the instruction; acting only fills that place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.errors import CheckpointError
from ceed_vla.limited.process import LimitError, run_limited


def render(template: str, images: int, prompt: str, variables: Mapping[str, Any]) -> str:
    """The text of a user's message with `images` and `prompt`, up to where the model answers."""
    pictures = [{"type": "image"} for _ in range(images)]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
    job = {"template": template, "messages": messages, "variables": dict(variables)}
    try:
        return str(run_limited("template", job)["text"])
    except LimitError as error:
        raise CheckpointError(
            f"The chat template cannot be rendered ({error}); copy it again."
        ) from error
