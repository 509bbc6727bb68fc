r"""Build a wheel of checkpoints, `ceed_vla_NAME`.

Once it is installed, every command takes ``NAME/student`` as the name of a checkpoint:

    python scripts/weights_wheel.py --name metaworld --folder outputs/mt10 \
        --card recipes/metaworld_mt10.md
    pip install outputs/mt10/ceed_vla_metaworld-*.whl
    ceed-vla eval --env.type=ceed_metaworld --policy.path metaworld/student
"""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import draccus
from setuptools import build_meta

from ceed_vla import __version__
from ceed_vla.checkpoints.manifest import check_files
from ceed_vla.checkpoints.sealing import seal
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.folders import MANIFEST, PRETRAINED, resolve_checkpoint

PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "ceed_vla_{name}"
version = "{version}"
description = "Checkpoints of ceed_vla: {names}"
license = "Apache-2.0"
[tool.setuptools]
packages = ["ceed_vla_{name}"]
[tool.setuptools.package-data]
ceed_vla_{name} = ["**"]
"""


@dataclass
class WheelConfig:
    """Contents of the wheel."""

    name: str  # name of the package without ceed_vla_
    # folder of runs or checkpoints called teacher and student; the wheel is written into it
    folder: Path
    card: Path  # model card of the checkpoints


def build(config: WheelConfig) -> Path:
    """Build the wheel, and return its file.

    Raises:
        ConfigError: The name is invalid, or there is no model card.
        CheckpointError: There is no checkpoint.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", config.name) or not config.card.is_file():
        raise ConfigError(
            f"--name {config.name!r} must be lower-case letters and digits, --card a file "
            f"({config.card})."
        )
    ends = [config.folder / name / "checkpoints/final" for name in PRETRAINED]
    found = {
        end.parents[1].name: end if end.is_dir() else end.parents[1]
        for end in ends
        if end.parents[1].is_dir()
    }
    if not found:
        raise CheckpointError(f"{config.folder} holds neither {' nor '.join(PRETRAINED)}.")
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / f"ceed_vla_{config.name}"
        for name, folder in found.items():
            source = resolve_checkpoint(folder)
            check_files(source)
            shutil.copytree(source, package / name)
            if not (package / name / MANIFEST).exists():
                seal(package / name)
        shutil.copy(config.card, package / "README.md")
        (package / "__init__.py").write_text(f'"""Checkpoints: {", ".join(found)}."""\n')
        text = PROJECT.format(name=config.name, version=__version__, names=", ".join(found))
        (Path(temporary) / "pyproject.toml").write_text(text)
        output = config.folder.resolve()
        with chdir(temporary):
            return output / build_meta.build_wheel(str(output))


if __name__ == "__main__":
    print(f"Written: {build(draccus.parse(WheelConfig))}")
