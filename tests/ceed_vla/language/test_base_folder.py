"""A checkpoint that refers to a language model beside it, in every way to read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lerobot.configs.policies import PreTrainedConfig

import ceed_vla
import lerobot_policy_ceed_vla  # noqa: F401  (its reader of configurations)
from ceed_vla import folders
from ceed_vla.checkpoint_files import fingerprint, weights_hash
from ceed_vla.checkpoints import load, save
from ceed_vla.checkpoints.sealing import seal
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import CheckpointError
from ceed_vla.export import cached
from ceed_vla.export.cached import cached_export
from ceed_vla.workers import shipped
from tests.helpers.policies_by_reference import refer_relatively, save_student_beside_base
from tests.helpers.tiny_language_models import make_tiny_language_model


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A checkpoint that names its base by a path relative to itself."""
    folder, _ = save_student_beside_base(tmp_path)
    before = weights_hash(folder), fingerprint(folder)
    refer_relatively(folder)
    seal(folder)
    assert (weights_hash(folder), fingerprint(folder)) == before  # moving both leaves its identity
    return folder


def test_lerobots_readers_find_the_base(student: Path) -> None:
    base = str(student.parent / "base")
    for reader in (PreTrainedConfig, CeedVLAConfig):
        for flags in ([], ["--decode_with=cap1"]):
            config = reader.from_pretrained(student, cli_overrides=flags)
            assert config.backbone.path == base  # type: ignore[attr-defined]
        config = reader.from_pretrained(student, cli_overrides=["--backbone.path=/other"])
        assert config.backbone.path == "/other"  # type: ignore[attr-defined]


def test_a_copy_in_another_folder_refers_to_the_same_base(student: Path, tmp_path: Path) -> None:
    loaded, weights = load(student), (student / folders.WEIGHTS).read_bytes()
    shutil.rmtree(student)  # what was loaded is saved, whatever the folder has by then
    copy = save(tmp_path / "deep" / "copy", *loaded, unchanged=True)
    assert (copy / folders.WEIGHTS).read_bytes() == weights
    assert load(copy)[0].config.backbone.path == str(student.parent / "base")  # type: ignore[attr-defined]


def test_another_model_in_the_place_of_the_base_is_refused(student: Path) -> None:
    make_tiny_language_model(student.parent / "base", layers=2, scale=2.0)
    with pytest.raises(CheckpointError, match="has other weights than those that this checkpoint"):
        ceed_vla.load(student)
    file = student / folders.CONFIG
    values = json.loads(file.read_text())
    assert len(values["backbone"]["weights_sample"]) == 16
    values["backbone"]["weights_sample"] = ""
    file.write_text(json.dumps(values))
    seal(student)
    assert ceed_vla.load(student)[0].backbone.num_layers == 2


def test_workers_of_a_cluster_find_the_base(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_relocated", {})
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(shipped.tempfile, "tempdir", str(tmp_path / "node"))
    shipped.unpack(shipped.read_checkpoint(str(student)), "job")
    copy = folders.resolve_checkpoint(str(student))
    assert copy != student
    folders._relocated.clear()  # as in a process that the worker starts
    assert ceed_vla.load(copy)[0].backbone.num_layers == 2


def test_an_export_is_of_the_base_as_it_is(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CEED_VLA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "exports").mkdir(parents=True)
    exported = []
    monkeypatch.setattr(cached, "_export_once", lambda _, folder, __: exported.append(folder))
    cached_export(student)
    make_tiny_language_model(tmp_path / "base", layers=2, scale=2.0)
    cached_export(student)
    assert len(set(exported)) == 2


def test_layers_that_are_not_used_do_not_count_in_the_size_of_an_export(student: Path) -> None:
    file = student.parent / "base" / folders.WEIGHTS
    first, both = cached._numbers(file, 1), cached._numbers(file, 0)
    assert 0 < first < both == cached._numbers(file, 2)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"do not load .*; copy them again"):
        cached._numbers(file, 0)
