"""Each axis of early exit is a file: without it everything else decodes as before (its trainer is
one more).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AXES = {
    "depth": ("depth1_cap2", "deer2t1", "sure2p0.5"),
    "speculation": ("spec1x2", "del"),
    "ngram": ("ngram4",),
    "programs": ("program0-1_cap2",),
    "context": ("keep8",),
    "learned": ("head1x0x0x0x-1",),
}
PRELOAD = (
    "import json, os, sys, torch, transformers, lerobot.configs.policies, "
    "lerobot.policies.pretrained"
)
WITHOUT = """
import ceed_vla
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.decoding import decode_block, prefill
from ceed_vla.decoding.names import named_config
from ceed_vla.errors import CeedVLAError
from ceed_vla.tokens.uniform import UniformTokensConfig
assert ceed_vla.__file__.startswith(folder)
torch.manual_seed(0)
settings = UniformTokensConfig(action_low=[-1.0] * 7, action_high=[1.0] * 7)
shape = PolicyShape({"observation.images.front": (3, 32, 32)}, 5, 7, 3, settings)
sizes = CompactConfig(
    image_size=32, stem_channels=[8] * 4, width=32, layers=3, heads=2, mlp_width=48
)
backbone = sizes.build(shape).eval()
for parameter in backbone.parameters():
    torch.nn.init.normal_(parameter, std=0.4)
images = {"observation.images.front": torch.rand(1, 3, 32, 32)}
words = torch.randint(1, 256, (1, 12))
batch = {**images, "observation.state": torch.randn(1, 5), "observation.language.tokens": words}

@torch.no_grad()
def decode(name):
    config = named_config(name)
    prefix, tokens = prefill(backbone, batch, config), settings.build(3, 7)
    return decode_block(backbone, prefix, tokens, config, executed_steps=2)

for name in gone:
    try:
        decode(name)
    except CeedVLAError as error:
        assert "nown" in str(error), error
    else:
        raise AssertionError(name + " still decodes")
print(json.dumps([folder, {name: decode(name).tokens.tolist() for name in kept}]), flush=True)
"""
EACH = """
for folder, gone, kept in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        sys.path.insert(0, folder)
        exec(sys.argv[1])
        os._exit(0)
    assert not os.waitpid(child, 0)[1], folder
"""


@pytest.mark.slow
def test_an_axis_can_be_deleted(tmp_path: Path) -> None:
    jobs = []
    for axis, names in {"none": (), **AXES}.items():
        folder = tmp_path / axis
        shutil.copytree(
            ROOT / "ceed_vla", folder / "ceed_vla", ignore=shutil.ignore_patterns("__pycache__")
        )
        if names:
            (folder / "ceed_vla" / "decoding" / f"{axis}.py").unlink()
        kept = [
            name
            for name in ("ar", "jacobi_h", "conf0.2_cap2", "depth1_cap2", "ngram4")
            if name not in names
        ]
        jobs.append((str(folder), names, kept))
    done = subprocess.run(
        [sys.executable, "-c", PRELOAD + EACH, WITHOUT, json.dumps(jobs)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(found) == 1 + len(AXES)
    for folder, _, kept in jobs:
        assert found[folder] == {name: found[str(tmp_path / "none")][name] for name in kept}
