"""The notebooks run, at reduced size; the committed ones show a whole run without errors."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
SMALL = {
    "watch_a_chunk_converge": "SEED = 40003\nCHUNKS = 2",
    "distil_and_compare": (
        "DEMONSTRATIONS = 8\nFRAMES = 150\nMINUTES = 0.2\nEPISODES = 2\nFOLDER = '{folder}'"
    ),
}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(notebook: Any) -> Any:
    (cell,) = [one for one in notebook.cells if "parameters" in one.metadata.get("tags", [])]
    return cell


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", list(SMALL))
def test_the_committed_notebook_has_the_outputs_of_a_whole_run(name: str) -> None:
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))  # from top to bottom, once
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert set(re.findall(r"^(\w+) =", parameters(notebook).source, re.MULTILINE)) == set(
        re.findall(r"^(\w+) =", SMALL[name], re.MULTILINE)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = read(name)
    parameters(notebook).source = SMALL[name].format(folder=tmp_path / "run")
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=place).execute()
    if name == "distil_and_compare":
        assert (tmp_path / "run" / "eval" / "report.json").is_file()
