"""Render a chat template, which is a Jinja program, in a limited child.

The environment is that of transformers: sandboxed, but without its tracking of generated tokens.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

_LONGEST = 10_000_000  # characters of a rendered prompt


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Render the job's messages up to the start of the model's answer; or return an "error"."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accepts ``{% generation %}``, which marks training targets, as plain text."""

        tags = {"generation"}  # noqa: RUF012  (jinja's name and type)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False, **options}
    )
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    text = environment.from_string(job["template"]).render(
        messages=job["messages"],
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **job["variables"],
    )
    if len(text) > _LONGEST:
        return {"error": f"its text is longer than {_LONGEST} characters"}
    return {"text": text}
