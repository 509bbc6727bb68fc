"""``ceed-vla report``: one self-contained page of runs, to open in a browser or to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ceed_vla.errors import ConfigError
from ceed_vla.fields import Checked
from ceed_vla.files import write_text
from ceed_vla.outputs import claim_file
from ceed_vla.report.page import page
from ceed_vla.report.runs import read_run

PAGE = "report.html"


@dataclass
class ReportConfig(Checked, prefix="--"):
    """Options of ``ceed-vla report``.

    Attributes:
        runs: Output folders of eval, bench, demo, merge, calibrate, tune, train, distill or
            ros-demo; several are compared.
        output: The page; a file that ends in .html.
    """

    runs: list[str] = field(default_factory=list)
    output: str = PAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ConfigError("--runs is empty; name output folders of runs.")


def report(config: ReportConfig) -> str:
    """Write the page of runs; return a line that names it.

    Raises:
        ConfigError: A folder holds no run, a file is damaged, or `output` may not be written.
    """
    file = claim_file("output", config.output, ".html")
    write_page([Path(run) for run in config.runs], file)
    return f"Written: {file}"


def write_page(folders: Sequence[Path], file: Path) -> Path:
    """Write the page of the runs in `folders`, and return its path."""
    folders = list(dict.fromkeys(folders))
    names = _names(folders)
    html = page([read_run(folder, name) for folder, name in zip(folders, names, strict=True)])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, html.encode("utf-8", errors="replace").decode("utf-8"))
    return file


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders: their last part, or as many parts as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(map(str, paths))
