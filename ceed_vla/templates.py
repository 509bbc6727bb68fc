"""Prompts with a place for the instruction, filled without any attribute access, whatever the template says."""

from __future__ import annotations

from ceed_vla.errors import ConfigError

PLACE = "{instruction}"
LONGEST_PROMPT = 100_000


def check_template(template: object, name: str) -> None:
    """Raise `ConfigError` unless `template` is a text with exactly one ``{instruction}`` and no other field."""
    fits = isinstance(template, str) and len(template) <= LONGEST_PROMPT
    if not fits or str(template).count(PLACE) != 1 or set("{}") & set(str(template).replace(PLACE, "")):
        raise ConfigError(f"{name} is {str(template)[:200]!r}; it must hold {PLACE} once, and no other field.")


def fill_template(template: str, instruction: str) -> str:
    """The template with the instruction in its place."""
    return template.replace(PLACE, instruction)
