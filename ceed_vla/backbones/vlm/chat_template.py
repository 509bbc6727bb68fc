"""Chat templates of checkpoints. They are Jinja programs, so they run in a limited child process
(`ceed_vla.limited`).

A template is rendered once, with a placeholder for the instruction, which is replaced in every
observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.errors import CheckpointError
from ceed_vla.limited.process import LimitError, run_limited


def render(template: str, images: int, prompt: str, variables: Mapping[str, Any]) -> str:
    """Render a user message with `images` and `prompt`, up to the start of the model's answer."""
    pictures = [{"type": "image"} for _ in range(images)]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
    job = {"template": template, "messages": messages, "variables": dict(variables)}
    try:
        return str(run_limited("template", job)["text"])
    except LimitError as error:
        raise CheckpointError(
            f"The chat template cannot be rendered ({error}); copy the checkpoint again."
        ) from error
