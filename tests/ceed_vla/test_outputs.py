"""Output paths: other people's files, links and inputs are refused before any work is done."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ceed_vla.errors import ConfigError
from ceed_vla.outputs import MADE_BY, WRITTEN, claim_folder, hashes

REPORT, PART = "report.json", "checkpoint"


def claim(folder: Path, *inputs: Path, part: str = PART) -> Path:
    return claim_folder("output_dir", str(folder), (REPORT,), (REPORT,), part, inputs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder of an earlier run, with a report that lists its checkpoint."""
    made = tmp_path / "out"
    (made / PART).mkdir(parents=True)
    (made / PART / "config.json").write_text("{}")
    (made / PART / "model.safetensors").write_bytes(b"weights")
    (made / REPORT).write_text(json.dumps({"program": MADE_BY, WRITTEN: hashes(made, PART)}))
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_folder_and_our_own_may_be_written(folder: Path, tmp_path: Path) -> None:
    assert claim(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    assert claim(folder) == folder
    (tmp_path / "link").symlink_to(folder)
    assert claim(tmp_path / "link") == tmp_path / "link"
    assert WRITTEN in (folder / REPORT).read_text()
    assert len(hashes(folder, PART)) == 2


def test_a_report_of_an_earlier_version_vouches_for_the_weights_that_it_names(folder: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    (folder / REPORT).write_text(json.dumps({"program": MADE_BY, "policy": {"sha256": digest}}))
    assert claim(folder) == folder
    for named in ({"sha256": "0" * 12}, {"sha256": ""}, {"sha256": None}, {}, None, digest):
        (folder / REPORT).write_text(json.dumps({"program": MADE_BY, "policy": named}))
        with pytest.raises(
            ConfigError, match=r"checkpoint/config\.json' that ceed-vla did not make"
        ):
            claim(folder)


CASES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "own weights": (
        lambda out, _: (out / PART / "model.safetensors").write_bytes(b"mine"),
        "'checkpoint/model.safetensors' that ceed-vla did not make",
    ),
    "own exits": (
        lambda out, _: (out / PART / "exits.safetensors").write_bytes(b"mine"),
        "'checkpoint/exits.safetensors' that ceed-vla did not make",
    ),
    "own notes below": (
        lambda out, _: [(out / PART / "a").mkdir(), (out / PART / "a" / "notes").touch()],
        "'checkpoint/a/notes' that ceed-vla did not make",
    ),
    "no report": (
        lambda out, _: (out / REPORT).unlink(),
        "'checkpoint' that ceed-vla did not make",
    ),
    "a report without its list": (
        lambda out, _: (out / REPORT).write_text(json.dumps({"program": MADE_BY})),
        "'checkpoint/config.json' that ceed-vla did not make",
    ),
    "a damaged report": (
        lambda out, _: (out / REPORT).write_text(MADE_BY),
        "'checkpoint/config.json' that ceed-vla did not make",
    ),
    "a file instead of the part": (
        lambda out, _: [(out / PART).rename(out.parent / "moved"), (out / PART).touch()],
        "'checkpoint' that ceed-vla did not make",
    ),
    "the part is a link to the user's folder": (
        lambda out, user: [
            (out / PART).rename(out.parent / "moved"),
            (out / PART).symlink_to(user),
        ],
        "holds checkpoint, a link to",
    ),
    "a file of the part is a link": (
        lambda out, user: (out / PART / "extra").symlink_to(user / "model.safetensors"),
        "holds checkpoint/extra, a link to",
    ),
    "a link that leads nowhere": (
        lambda out, user: (out / PART / "extra").symlink_to(user / "not there"),
        "holds checkpoint/extra, a link to",
    ),
    "the report is a link": (
        lambda out, user: [
            (out / REPORT).rename(user / REPORT),
            (out / REPORT).symlink_to(user / REPORT),
        ],
        "holds report.json, a link to",
    ),
    "a pipe": (lambda out, _: os.mkfifo(out / PART / "pipe"), "holds checkpoint/pipe, a pipe"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_ours_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    change, message = CASES[case]
    user = tmp_path / "user"
    user.mkdir()
    (user / "model.safetensors").write_bytes(b"mine")
    change(folder, user)
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        claim(folder)
    assert str(error.value).startswith(f"--output_dir is {str(folder)!r}, ")
    assert names(tmp_path) == before
    assert (user / "model.safetensors").read_bytes() == b"mine"


def test_an_input_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder / PART)
    for source in (folder / PART, tmp_path / "link", folder / PART / "inner"):
        with pytest.raises(ConfigError, match=r"where checkpoint would replace .*, an input"):
            claim(folder, source)
    # a report next to a policy replaces nothing
    assert claim(folder, folder / PART, part="") == folder
    assert claim(folder, tmp_path / "elsewhere") == folder
