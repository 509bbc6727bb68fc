"""The site of the documentation: it builds without a broken link, and works in a browser."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, installed, opened_browser

import ceed_vla

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, with an earlier version in it, and a folder that is no version."""
    output = tmp_path_factory.mktemp("site")
    for name in ("0.0.9", "latest"):
        (output / name).mkdir()
        (output / name / "index.html").write_text("<!doctype html><title>old</title>")
    done = subprocess.run(
        [sys.executable, "scripts/site.py", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address of a server of the site."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            """Print nothing."""

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser() -> Iterator[Browser]:
    if installed() is None:
        pytest.skip("chromium is not installed")
    with opened_browser() as one:
        yield one


def test_every_page_is_in_the_site_and_old_versions_stay(site: Path) -> None:
    folder = site / ceed_vla.__version__
    for page in (ROOT / "docs").rglob("*.md"):
        inside = page.relative_to(ROOT / "docs").with_suffix("")
        assert (folder / inside / "index.html").is_file(), page
    for project in ("CONTRIBUTING", "CHANGELOG", "recipes/MODEL_CARD"):
        assert (folder / project / "index.html").is_file()
    versions = json.loads((site / "versions.json").read_text())
    assert [one["version"] for one in versions] == [ceed_vla.__version__, "0.0.9"]
    assert f"url={ceed_vla.__version__}/" in (site / "index.html").read_text()
    api = (folder / "reference" / "api" / "index.html").read_text()
    for name in ("ceed_vla.serving.client.PolicyClient", "register_decoder", "EdgePolicy"):
        assert name in api


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_pages_work_in_a_browser_and_load_nothing_from_elsewhere(
    address: str, browser: Browser, width: int, dark: bool
) -> None:
    for page in ("", "how-to/install/", "reference/api/", "reports/libero/"):
        browser.open(f"{address}/{ceed_vla.__version__}/{page}", width, 900, dark=dark)
        assert browser.value("document.querySelector('h1') !== null")
        wide = browser.value("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{page} scrolls sideways by {wide} px"
        scheme = browser.value("document.body.getAttribute('data-md-color-scheme')")
        assert scheme == ("slate" if dark else "default")
    assert browser.errors == []
    assert {one for one in browser.requests if not one.startswith(address)} == set()


def test_search_finds_a_page(address: str, browser: Browser) -> None:
    browser.open(f"{address}/{ceed_vla.__version__}/?q=early+exit", 1280, 900)
    browser.wait("document.querySelectorAll('.md-search-result__item').length > 3")
