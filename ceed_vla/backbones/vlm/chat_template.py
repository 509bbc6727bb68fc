"""Chat templates of checkpoints: Jinja programs, so they run in a process of their own, with limits of time and memory.

A template is rendered once, around the place of the instruction; acting only fills that place. The environment is the
one of transformers (sandboxed, without its tracking of generated tokens).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

LIMIT_S = 20.0  # of wall time, the interpreter's start included [s]
_CPU_S, _MEMORY = 5, 2**30  # [s], [bytes]
_LONGEST = 10_000_000  # characters of a rendered prompt


def render(template: str, images: int, prompt: str, variables: Mapping[str, Any]) -> str:
    """The text of a user's message with `images` and `prompt`, up to where the model answers."""
    from ceed_vla.errors import CheckpointError  # this file runs without the package, too

    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    job = {"template": template, "messages": [{"role": "user", "content": content}], "variables": dict(variables)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
        problem = str(
            answer.get("error") or (done.stderr.strip().splitlines() or ["it took too much time or memory"])[-1]
        )
    except subprocess.TimeoutExpired:
        answer, problem = {}, f"it took longer than {LIMIT_S:g} s"
    except ValueError:
        answer, problem = {}, "it wrote no text"
    if "text" not in answer:
        raise CheckpointError(f"The chat template cannot be rendered ({problem[:200]}); copy it again.")
    return str(answer["text"])


def _main() -> None:
    """Render the job on standard input; the process that `render` starts."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model is trained to write; here it is text as any other."""

        tags = {"generation"}  # noqa: RUF012  (jinja's name and type)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    job = json.load(sys.stdin)
    with contextlib.suppress(ImportError, OSError, ValueError):  # the limit of wall time holds everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        text = environment.from_string(job["template"]).render(
            messages=job["messages"], tools=None, documents=None, add_generation_prompt=True, **job["variables"]
        )
        answer = {"text": text} if len(text) <= _LONGEST else {"error": "its text has no end"}
    except MemoryError:
        answer = {"error": "it took too much memory"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
