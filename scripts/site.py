"""Builds the site of the documentation: ``python scripts/site.py [OUTPUT]`` (``make site``).

OUTPUT (site) gets a folder per version, versions.json for the selector of versions, and an
index.html that leads to the newest. Pages of earlier versions in it stay. Every broken link is an
error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

from ceed_vla import __version__

ROOT = Path(__file__).resolve().parents[1]


def build(output: Path) -> Path:
    """Build the present version into a folder of `output`; return that folder."""
    folder = output.resolve() / __version__
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--clean"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    versions = sorted(
        (
            path.name
            for path in output.iterdir()
            if (path / "index.html").is_file() and _version(path.name)
        ),
        key=Version,
        reverse=True,
    )
    listed = [
        {"version": one, "title": one, "aliases": ["latest"] if one == versions[0] else []}
        for one in versions
    ]
    (output / "versions.json").write_text(json.dumps(listed), encoding="utf-8")
    newest = f'<meta http-equiv="refresh" content="0; url={versions[0]}/index.html">'
    page = f'<!doctype html><html lang="en"><head>{newest}<title>ceed_vla</title></head></html>\n'
    (output / "index.html").write_text(page, encoding="utf-8")
    return folder


def _version(name: str) -> Version | None:
    """The version that a folder is named after; None for other folders, such as ``latest``."""
    try:
        return Version(name)
    except InvalidVersion:
        return None


if __name__ == "__main__":
    made = build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
    print(f"Written: {made / 'index.html'}")
