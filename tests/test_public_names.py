"""The public names of the package: those that the pages and examples import.

A name that leaves this table, or moves, is a change that CONTRIBUTING.md (names and versions) has a
rule for.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ceed_vla

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
PUBLIC: dict[str, set[str]] = {
    "ceed_vla": {
        "ActionTokenizer",
        "CeedVLAConfig",
        "CeedVLAError",
        "CeedVLAPolicy",
        "DecodeResult",
        "DecodingConfig",
        "__version__",
        "load",
        "pretrained_path",
    },
    "ceed_vla.backbones.base": {"Prefix", "TrainableBackbone"},
    "ceed_vla.backbones.check": {"check_untrained"},
    "ceed_vla.backbones.compact.words": {
        "InstructionWordsStep",
        "build_vocabulary",
        "make_instruction_step",
    },
    "ceed_vla.backbones.config": {"BackboneConfig", "PolicyShape"},
    "ceed_vla.backbones.features": {"check_features"},
    "ceed_vla.backbones.pi0_fast.inputs": {"PromptTokensStep"},
    "ceed_vla.backbones.transformers.backbone": {"TransformersBackbone"},
    "ceed_vla.backbones.transformers.config": {
        "least_sizes",
        "published_folder",
        "read_architecture",
    },
    "ceed_vla.backbones.transformers.prefix": {"PrefixEmbeddings"},
    "ceed_vla.backbones.transformers.step_files": {"LOCAL"},
    "ceed_vla.cache": {"KVCache"},
    "ceed_vla.checkpoints": {"resolve_checkpoint"},
    "ceed_vla.configuration_ceed_vla": {"CeedVLAConfig"},
    "ceed_vla.decoding": {"DecodeResult", "ExitRule", "register_decoder", "register_exit"},
    "ceed_vla.edge": {"EdgePolicy"},
    "ceed_vla.errors": {"ConfigError"},
    "ceed_vla.fields": {"Checked", "ranged"},
    "ceed_vla.ros_nodes.robot.interfaces.base": {"ActionInterface", "register_interface"},
    "ceed_vla.serving.client": {"PolicyClient"},
    "ceed_vla.serving.predictor_types": {"Request"},
    "ceed_vla.sim.environment": {
        "Environment",
        "Privileged",
        "VALIDATION_SEED",
        "observation_batch",
    },
    "ceed_vla.sim.tabletop.lerobot_env": {"CeedTabletopEnv"},
    "ceed_vla.tensors": {"check_actions", "check_tokens", "numbers"},
    "ceed_vla.tokens.base": {"ActionTokens", "ActionTokensConfig"},
    "ceed_vla.training.losses": {"DistillationTerms", "register_loss"},
    "ceed_vla.word_ids": {"PAD_ID"},
}


def imported(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of this package in a program."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ceed_vla"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def shown() -> set[tuple[str, str]]:
    """What pages and examples import."""
    found: set[tuple[str, str]] = set()
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            found |= set(imported(block))
    for example in EXAMPLES:
        found |= set(imported(example.read_text()))
    return found


@pytest.mark.parametrize("module", list(PUBLIC))
def test_a_public_name_is_there(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in sorted(PUBLIC[module]) if not hasattr(found, name)] == []


def test_pages_and_examples_use_public_names_only() -> None:
    listed = {(module, name) for module, names in PUBLIC.items() for name in names}
    own = {(module, name) for module, name in listed if module == "ceed_vla"}
    assert shown() <= listed
    assert listed <= shown() | own
    assert PUBLIC["ceed_vla"] == set(ceed_vla.__all__)
