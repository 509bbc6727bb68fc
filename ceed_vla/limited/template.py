"""Render a chat template, in a limited child: a Jinja program, in the environment of transformers.

That is sandboxed; its tracking of generated tokens is left out.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

_LONGEST = 10_000_000  # characters of a rendered prompt


def work(job: dict[str, Any]) -> dict[str, Any]:
    """The text of the job's messages up to where the model answers, or what is wrong with the
    template.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model is trained to write; here it is text as any
        other.
        """

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
    return {"text": text} if len(text) <= _LONGEST else {"error": "its text has no end"}
