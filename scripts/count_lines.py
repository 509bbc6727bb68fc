"""Count lines of Python by part, and of the algorithm: `python scripts/count_lines.py`.

"code" excludes blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Files that decoding needs, without axes, families of published models and engines.
ALGORITHM = (
    "ceed_vla/decoding/",
    "ceed_vla/cache.py",
    "ceed_vla/backbones/base.py",
    "ceed_vla/backbones/capabilities.py",
    "ceed_vla/backbones/compact/",
    "ceed_vla/tokens/base.py",
    "ceed_vla/tokens/uniform.py",
    "ceed_vla/modeling_ceed_vla.py",
    "ceed_vla/configuration_ceed_vla.py",
)
PARTS = (
    "ceed_vla",
    "ceed_vla/decoding",
    "ceed_vla/axes",
    "sim",
    "training",
    "ros_nodes",
    "benchmarks",
    "examples",
    "launch",
    "tests",
)


_NO_CODE = (
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
)


def code_lines(text: str) -> int:
    """Number of lines of a file, without blank lines, comments and docstrings."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def count() -> dict[str, int]:
    """Part -> lines of the Python files under version control."""
    command = ["git", "ls-files", "*.py"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listing.split() if (ROOT / name).is_file()]
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in files}
    parts = {
        part: sum(n for name, n in lines.items() if name.startswith(f"{part}/")) for part in PARTS
    }
    algorithm = sum(n for name, n in lines.items() if name.startswith(ALGORITHM))
    total = sum(n for name, n in lines.items() if not name.startswith("tests/"))
    code = sum(
        code_lines((ROOT / name).read_text()) for name in files if name.startswith(ALGORITHM)
    )
    return {
        "algorithm": algorithm,
        "algorithm, code": code,
        **parts,
        "without tests": total,
    }


if __name__ == "__main__":
    for part, lines in count().items():
        print(f"{part:<18} {lines:>7,}")
