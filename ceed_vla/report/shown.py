"""What is shown of a run: a verdict and sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ceed_vla.report.html import Markup, element, joined
from ceed_vla.report.plots import Plot


@dataclass
class Section:
    """A part of the page with a title; its parts are elements and figures."""

    title: str
    parts: Sequence[Markup | Plot]


@dataclass
class Shown:
    """What is shown of a run.

    Attributes:
        verdict: The result, in one or two sentences.
        sections: What it rests on.
    """

    verdict: str
    sections: list[Section]


def settings(shown: Mapping[str, object], values: Mapping[str, Any]) -> Markup:
    """A list of settings, and what a report says of machine, versions and command.

    Args:
        shown: Settings by name.
        values: Contents of the report.
    """
    listed = dict(shown)
    if machine := values.get("hardware"):
        listed["machine"] = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, device "
            f"{machine['device']}, torch threads {machine['threads']}"
        )
    if versions := values.get("versions"):
        listed["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    elif program := values.get("program"):
        listed["program"] = program
    terms = [
        part
        for name, value in listed.items()
        if value
        for part in (element("dt", name), element("dd", value))
    ]
    command = values.get("command")
    parts = [element("dl", *terms)]
    if command:
        parts += [element("p", "The command that repeats it:"), element("pre", command)]
    return joined(parts)
