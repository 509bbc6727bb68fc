"""The page of runs: what it says, what it refuses, and how it behaves in a browser."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, installed, opened_browser

from ceed_vla.errors import ConfigError
from ceed_vla.outputs import is_own
from ceed_vla.report.command import ReportConfig, report, write_page

REPO = Path(__file__).parents[3]
MOST = 8e6  # bytes of a page without clips
needs_browser = pytest.mark.skipif(not installed(), reason="chromium is not installed")
HOSTILE = '</script><script>window.injected = 1</script><img src=x onerror="window.injected = 1">'


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    """A real report of two decoders and ten tasks."""
    values: dict[str, Any] = json.loads(
        (REPO / "docs/reports/libero/own-official.json").read_text()
    )
    return values


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as tab:
        yield tab


def written(folder: Path, values: dict[str, Any], name: str = "report.json") -> Path:
    folder.mkdir()
    (folder / name).write_text(json.dumps(values))
    return folder


def test_the_verdict_comes_first_and_the_page_is_small(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    folder = written(tmp_path / "run", {**evaluation, "command": "ceed-vla eval --seed 50000"})
    said = report(ReportConfig([str(folder)], str(tmp_path / "page.html")))
    assert said == f"Written: {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text()
    verdict = (
        "ceed solves 475 of 500 = 95.0 % [93, 97] at 1.08 forwards a chunk. teacher_ar solves 482 "
        "of 500 = 96.4 % [94, 98] at 55.00 forwards a chunk; on the same episodes the difference "
        "is -1.4 points [-3.6, +0.7]."
    )
    assert page.index(verdict) < page.index("<table>")
    for text in ("AMD EPYC, 2 cores", "mujoco 3.8.1", "ceed-vla eval --seed 50000"):
        assert text in page
    assert "p50 [ms]" not in page  # nothing was timed
    assert len(page.encode()) < MOST
    assert is_own(tmp_path / "page.html")


def test_several_runs_are_compared_under_names_that_tell_them_apart(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "eval", evaluation)
    log = tmp_path / "training"
    log.mkdir()
    lines = [{"step": 0, "loss": 2.5}, {"step": 10, "loss": 1.25, "validation_success": 0.5}]
    (log / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 20, "lo')
    folders = [tmp_path / "one/eval", tmp_path / "two/eval", log]
    page = write_page(folders, tmp_path / "page.html").read_text()
    assert "<h1>3 runs</h1>" in page
    for name in ("one/eval", "two/eval", f"{tmp_path.name}/training"):
        assert f"<td>{name}</td>" in page
    assert "10 steps; at the end validation success 0.5, loss 1.25." in page


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5}\n')
    page = write_page([tmp_path / "run"], tmp_path / "page.html").read_text()
    plots = re.search(r'<script type="application/json" id="plots">(.*?)</script>', page)
    assert plots is not None
    assert json.loads(plots[1], parse_constant=pytest.fail)[0]["traces"][0]["y"] == [None, 1.5]


def test_clips_are_those_of_the_report_with_failures_first(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    solved = {"teacher_ar": True, "ceed": False, "linked": True, "../up": True}
    clips = {"clips": {"seed": 50_000, "solved": solved}}
    folder = written(tmp_path / "run", {**evaluation, **clips})
    for name in ("teacher_ar", "ceed", "earlier"):
        (folder / f"clip_{name}.mp4").write_bytes(f"clip of {name}".encode())
    (tmp_path / "secret").write_text("secret")
    (folder / "clip_linked.mp4").symlink_to(tmp_path / "secret")
    page = write_page([folder], tmp_path / "page.html").read_text()
    captions = re.findall(r"<figcaption>([^<]*solved)</figcaption>", page)
    assert captions == ["ceed: not solved", "teacher_ar: solved"]
    sources = re.findall(r"data:video/mp4;base64,([\w=+/]+)", page)
    assert [base64.b64decode(one) for one in sources] == [b"clip of ceed", b"clip of teacher_ar"]


def test_of_several_reports_in_a_folder_the_last_one_counts(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    folder = written(tmp_path / "run", evaluation, "bench.json")
    os.utime(folder / "bench.json", (1, 1))
    (folder / "report.json").write_text(json.dumps({**evaluation, "complete": False}))
    page = write_page([folder], tmp_path / "page.html").read_text()
    assert "<h1>eval: run</h1>" in page
    assert "Partial, the run was interrupted" in page


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("other.json", "{}", "has none of bench.json, report.json"),
        ("report.json", "{", r"report\.json"),
        ("report.json", "{}", "lacks what a page of eval shows .*run the command again"),
        ("log.jsonl", '{"step": 1}\n{\n{"step": 2}', "line 2 is damaged"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        report(ReportConfig([str(tmp_path / "run")], str(tmp_path / "page.html")))
    assert not (tmp_path / "page.html").exists()


def test_a_file_of_a_user_is_not_replaced(evaluation: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path / "run", evaluation)
    (tmp_path / "page.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="did not make"):
        report(ReportConfig([str(folder)], str(tmp_path / "page.html")))
    with pytest.raises(ConfigError, match="--runs is empty"):
        ReportConfig()


def poisoned(values: Any, text: str) -> Any:
    """The values, with every text and every name of a decoder or task followed by `text`."""
    if isinstance(values, dict):
        return {
            (key + text if key in ("ceed", "confidence") or "/" in key else key): poisoned(
                one, text
            )
            for key, one in values.items()
        }
    if isinstance(values, list):
        return [poisoned(one, text) for one in values]
    return values + text if isinstance(values, str) else values


@needs_browser
def test_text_of_a_run_is_only_text(
    evaluation: dict[str, Any], browser: Browser, tmp_path: Path
) -> None:
    folder = written(tmp_path / "run<b>", poisoned(copy.deepcopy(evaluation), HOSTILE))
    page = write_page([folder], tmp_path / "page.html")
    browser.open(page, 1200, 900)
    assert browser.value("window.injected") is None
    assert browser.value("document.querySelectorAll('script').length") == 3
    assert browser.value("document.querySelectorAll('img, b').length") == 0
    assert HOSTILE in browser.value("document.querySelector('td').closest('table').textContent")
    assert browser.errors == []
    assert browser.requests == []


@needs_browser
def test_tables_sort_by_keyboard_and_nothing_is_wider_than_a_phone(
    evaluation: dict[str, Any], browser: Browser, tmp_path: Path
) -> None:
    page = write_page([written(tmp_path / "run", evaluation)], tmp_path / "page.html")
    browser.open(page, 1200, 900)
    first = "document.querySelector('tbody tr td').textContent"
    focused = "document.activeElement.textContent"
    assert browser.value(first) == "teacher_ar"
    while browser.value(focused) != "forwards":
        browser.press("Tab", 9)
    for expected in ("teacher_ar", "ceed"):  # descending, then ascending
        browser.press("Enter", 13)
        assert browser.value(first) == expected
    assert browser.value("document.activeElement.parentElement.ariaSort") == "ascending"
    drawn = "document.querySelectorAll('.plot svg.main-svg').length > 0"
    for width, dark in ((1200, False), (390, True)):
        browser.open(page, width, 844, dark=dark)
        assert browser.value(drawn)
        assert browser.value("document.documentElement.scrollWidth") <= width
    colours = "getComputedStyle(document.body).backgroundColor"
    assert re.findall(r"\d+", browser.value(colours)) == ["22", "24", "28"]
    assert browser.errors == []
    assert browser.requests == []
