r"""Build a wheel of checkpoints, `ceed_vla_NAME`.

Once it is installed, every command takes ``NAME/student`` and ``NAME/teacher`` as names of
checkpoints. For a folder of `weights`, the command needs only its name, and ``NAME`` alone is the
student:

    python scripts/weights_wheel.py --name libero_object
    pip install dist/ceed_vla_libero_object-*.whl
    ceed-vla eval --env.type=ceed_libero --policy.path libero_object

The model that checkpoints with adapters refer to becomes part of the wheel, as its folder ``base``.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import tempfile
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import draccus
from setuptools import build_meta

from ceed_vla import __version__
from ceed_vla.checkpoint_files import base_path
from ceed_vla.checkpoints.manifest import check_files, read_config
from ceed_vla.checkpoints.sealing import seal
from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError
from ceed_vla.folders import CONFIG, MANIFEST, PRETRAINED, base_folder, resolve_checkpoint

BASE = "base"  # folder of the model that checkpoints refer to
PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "ceed_vla_{name}"
version = "{version}"
description = "Checkpoints of ceed_vla: {names}"
license = "Apache-2.0"
[tool.setuptools]
packages = [{packages}]
[tool.setuptools.package-data]
"*" = ["*"]
"""


@dataclass
class WheelConfig:
    """Contents of the wheel."""

    name: str  # name of the package without ceed_vla_
    # folder of runs or checkpoints called teacher and student; by default weights/NAME
    folder: Path | None = None
    card: Path | None = None  # model card; by default README.md of the folder
    output: Path = Path("dist")  # folder of the wheel


def build(config: WheelConfig) -> Path:
    """Build the wheel, and return its file.

    Raises:
        ConfigError: The name is invalid, or there is no model card.
        CheckpointError: There is no checkpoint.
    """
    weights = config.folder or Path("weights") / config.name
    card = config.card or weights / "README.md"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", config.name):
        raise ConfigError(
            f"--name is {config.name!r}; it must be lower-case letters, digits and underscores."
        )
    if not card.is_file():
        raise ConfigError(
            f"There is no model card {card}. Set --folder to the runs of a recipe, such as "
            "outputs/libero, and --card to its page, such as recipes/README.md."
        )
    ends = [weights / name / "checkpoints/final" for name in PRETRAINED]
    found = {
        end.parents[1].name: end if end.is_dir() else end.parents[1]
        for end in ends
        if end.parents[1].is_dir()
    }
    if not found:
        raise CheckpointError(f"{weights} holds neither {' nor '.join(PRETRAINED)}.")
    sources = {name: resolve_checkpoint(folder) for name, folder in found.items()}
    base = _base(list(sources.values()), card)
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / f"ceed_vla_{config.name}"
        if base:
            shutil.copytree(base, package / BASE)
        for name, source in sources.items():
            check_files(source)
            shutil.copytree(source, package / name)
            if base:
                _refer_to_base(package / name)
            if not (package / name / MANIFEST).exists():
                seal(package / name)
        shutil.copy(card, package / "README.md")
        (package / "__init__.py").write_text(f'"""Checkpoints: {", ".join(found)}."""\n')
        parts = [p.name for p in sorted(package.iterdir()) if p.is_dir()]
        packages = [package.name, *(f"{package.name}.{part}" for part in parts)]
        text = PROJECT.format(
            name=config.name,
            version=__version__,
            names=", ".join(found),
            packages=", ".join(f'"{name}"' for name in packages),
        )
        (Path(temporary) / "pyproject.toml").write_text(text)
        output = config.output.resolve()
        output.mkdir(parents=True, exist_ok=True)
        logging.disable(logging.WARNING)  # setuptools reports every file
        try:
            with chdir(temporary):
                return output / build_meta.build_wheel(str(output))
        finally:
            logging.disable(logging.NOTSET)


def _base(checkpoints: list[Path], card: Path) -> Path | None:
    """The folder of the model that the checkpoints refer to, if they do.

    Raises:
        CheckpointError: It is missing, or they refer to several.
    """
    found = set()
    for checkpoint in checkpoints:
        if path := base_path(read_config(checkpoint)):
            found.add(base_folder(checkpoint.absolute(), path).resolve())
    if len(found) > 1:
        raise CheckpointError(
            f"The checkpoints refer to different models: {', '.join(map(str, sorted(found)))}; "
            "build a wheel for each."
        )
    if missing := [base for base in found if not base.is_dir()]:
        raise CheckpointError(
            f"{checkpoints[0].parent} refers to the model in {missing[0]}, which is missing; make "
            f"it or download it again ({card} may say how)."
        )
    return next(iter(found), None)


def _refer_to_base(packed: Path) -> None:
    """Let a checkpoint in the package refer to the model beside it; it must be sealed again."""
    file = packed / CONFIG
    values = json.loads(file.read_text())
    if values["backbone"].get("weights") != "reference":
        return
    values["backbone"]["path"] = f"../{BASE}"
    file.write_text(json.dumps(values, indent=4))
    (packed / MANIFEST).unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        print(f"Written: {build(draccus.parse(WheelConfig))}")
    except CeedVLAError as error:
        sys.exit(str(error))
