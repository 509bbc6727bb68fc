"""Backbones and action tokens by name: flags, files, help, and unknown names."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from torch import Tensor

from ceed_vla import CeedVLAConfig, CeedVLAPolicy
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.backbones.features import check_features
from ceed_vla.backbones.openvla.config import OpenVLAConfig
from ceed_vla.backbones.transformers.step_files import FilesStep, read_files
from ceed_vla.cli.flags import UsageError, format_help, parse_flags
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError
from ceed_vla.tokens.base import ActionTokensConfig
from ceed_vla.tokens.openvla import OpenVLATokensConfig
from ceed_vla.tokens.uniform import UniformTokensConfig
from tests.helpers.tabletop import tabletop_config


@dataclass
class ToolConfig:
    """A command with a policy.

    Attributes:
        path: A folder.
        policy: The policy.
        class_: A word that Python reserves.
    """

    path: str = ""
    policy: CeedVLAConfig = field(
        default_factory=lambda: tabletop_config(decoding=DecodingConfig(guess="mid"))
    )
    class_: str = "a"


# Checkpoints contain these names, so they never change.
STEPS = {
    "compact": ("ceed_vla_instruction_words",),
    "language": ("ceed_vla_pi0_fast_prompt", "ceed_vla_stem_words"),
    "openvla": ("ceed_vla_openvla_inputs",),
    "vlm": ("ceed_vla_vlm_inputs",),
    "pi0_fast": ("pi0_fast_prepare_state_tokenizer_processor_step", "ceed_vla_pi0_fast_prompt"),
}


@pytest.mark.slow
def test_names_in_checkpoints_are_frozen() -> None:
    """Importing the configuration registers the steps, in a process without other imports."""
    script = (
        "import ceed_vla.configuration_ceed_vla, json\nfrom ceed_vla.backbones.config import "
        "BackboneConfig as B\nfrom lerobot.processor import ProcessorStepRegistry as "
        "R\nprint(json.dumps([{n: B.get_choice_class(n).steps for n in B.get_known_choices()}, "
        "R.list()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    families, steps = json.loads(done.stdout.splitlines()[-1])
    assert families == {name: list(kinds) for name, kinds in STEPS.items()}
    ours = {step for kinds in STEPS.values() for step in kinds if step.startswith("ceed_vla_")}
    assert {step for step in steps if step.startswith("ceed_vla_")} == ours


def test_the_families_are_registered() -> None:
    assert {"uniform", "openvla", "fast"} <= set(ActionTokensConfig.get_known_choices())
    assert CeedVLAConfig(device="cpu").backbone == CompactConfig()
    assert OpenVLAConfig().type == "openvla"
    assert UniformTokensConfig().type == "uniform"


def test_flags_of_the_usual_kind_keep_the_other_defaults() -> None:
    policy = parse_flags(
        ToolConfig, ["--policy.backbone.width=96", "--policy.action_tokens.num_bins=63"]
    ).policy
    assert policy.backbone == CompactConfig(width=96)
    assert policy.action_tokens == UniformTokensConfig(
        num_bins=63,
        action_range="fixed",
        action_low=[-1.0, -1.0, -1.0, -0.25, -0.25, -1.0, -1.0],
        action_high=[1.0, 1.0, 1.0, 0.25, 0.25, 1.0, 1.0],
    )
    same = parse_flags(
        ToolConfig, ["--policy.backbone.type=compact", "--policy.backbone.heads=4"]
    ).policy
    assert same.backbone == CompactConfig(heads=4)


def test_a_decoding_flag_keeps_the_policys_other_decoding_settings() -> None:
    usual = ToolConfig().policy.decoding
    assert usual.guess == "mid"  # not the default of `DecodingConfig`
    changed = parse_flags(ToolConfig, ["--policy.decoding.max_iterations=3"]).policy.decoding
    assert changed == replace(usual, max_iterations=3)


def test_another_kind_starts_from_its_own_defaults(tmp_path: Path) -> None:
    flags = [
        "--policy.backbone.type=openvla",
        "--policy.backbone.path=there",
        "--policy.action_tokens.type=openvla",
    ]
    policy = parse_flags(ToolConfig, flags).policy
    assert policy.backbone == OpenVLAConfig(path="there")
    assert policy.action_tokens == OpenVLATokensConfig()
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"policy": {"backbone": {"type": "openvla", "dtype": "bfloat16"}}}))
    given = ["--config_path", str(file), "--policy.backbone.camera=wrist"]
    assert parse_flags(ToolConfig, given).policy.backbone == OpenVLAConfig(
        dtype="bfloat16", camera="wrist"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy.backbone.type=opnvla"], "backbone.type is 'opnvla'; choose one of .*compact"),
        (["--policy.action_tokens.type=x"], "action_tokens.type is 'x'; choose one of .*uniform"),
        (
            ["--policy.backbone.type=openvla", "--policy.backbone.width=3"],
            "unknown flag .--policy.backbone.width",
        ),
        (["--policy.backbone.depth=3"], "unknown flag '--policy.backbone.depth=3'"),
        (["--policy.backbone.dtype=int4"], "dtype"),
    ],
)
def test_flags_that_fit_no_kind(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_flags(ToolConfig, flags)


def test_help_names_the_kinds_and_says_whose_a_flag_is() -> None:
    words = " ".join(format_help("ceed-vla tool", ToolConfig, "path").split())
    assert "usage: ceed-vla tool PATH [--flag" in words
    assert "--policy.backbone.type compact|" in words
    assert "--policy.backbone.width INT Model width" in words
    assert "--policy.action_tokens.n_action_bins INT openvla: Number of bin edges" in words
    assert words.count("--policy.backbone.path STR") == 1


def test_a_word_without_dashes_is_the_positional_flag() -> None:
    assert parse_flags(ToolConfig, ["there", "--class=b"], "path") == parse_flags(
        ToolConfig, ["--path=there", "--class", "b"]
    )
    assert parse_flags(ToolConfig, ["--class", "b", "there"], "path").class_ == "b"
    with pytest.raises(UsageError, match="unknown flag 'here'"):
        parse_flags(ToolConfig, ["there", "here"], "path")
    with pytest.raises(UsageError, match="unknown flag 'there'"):
        parse_flags(ToolConfig, ["there"])


def test_lerobots_files_and_flags_reach_the_kinds(tmp_path: Path) -> None:
    config = tabletop_config(width=96, num_bins=63)
    config._save_pretrained(tmp_path)
    read = PreTrainedConfig.from_pretrained(
        tmp_path, cli_overrides=["--backbone.layers=2", "--action_tokens.gripper_dims=[6]"]
    )
    assert isinstance(read, CeedVLAConfig)
    assert read.backbone == CompactConfig(width=96, layers=2)
    assert read.action_tokens.gripper_dims == [6]
    other = draccus.parse(
        CeedVLAConfig, args=["--backbone.type=openvla", "--backbone.path=x", "--device=cpu"]
    )
    assert other.backbone == OpenVLAConfig(path="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": OpenVLAConfig()},
            "OpenVLA reads one camera, the policy has 2; set backbone.camera to one of",
        ),
        (
            {"backbone": OpenVLAConfig(camera="left")},
            "backbone.camera is 'left'; choose one of observation",
        ),
        (
            {"action_tokens": OpenVLATokensConfig(q01=[0.0], q99=[1.0])},
            "q01 has 1 values, the action has 7",
        ),
        (
            {"num_bins": 2, "action_low": [0.0], "action_high": [1.0]},
            "has 1 values, the action has 7",
        ),
    ],
)
def test_kinds_that_do_not_fit_the_features(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CeedVLAPolicy(tabletop_config(**changes))


def test_uniform_bins_and_openvla_ids_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVLAConfig, "_architecture", lambda _: {"n_action_bins": 256})
    shape = PolicyShape({"observation.images.front": (3, 8, 8)}, 0, 7, 1, UniformTokensConfig())
    with pytest.raises(ConfigError, match="255 values, but the model has 256 action ids"):
        OpenVLAConfig(architecture="{}").build(shape)


def test_the_compact_model_writes_openvlas_tokens() -> None:
    tokens = OpenVLATokensConfig(q01=[-1.0] * 7, q99=[1.0] * 7)
    sizes = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 16, "stem_channels": [4] * 4}
    config = tabletop_config(**sizes, action_tokens=tokens, auxiliary_scale=[], augment_shift=0)
    policy = CeedVLAPolicy(config)
    batch = {
        **{camera: torch.rand(2, 3, 96, 96) for camera in config.cameras},
        "observation.state": torch.zeros(2, 14),
        "observation.language.tokens": torch.ones(2, 12, dtype=torch.int64),
        "action": torch.zeros(2, 8, 7),
    }
    assert torch.isfinite(policy(batch)[0])
    policy.eval()
    result = policy.decode(batch, "jacobi")
    assert result.tokens.max() < 256
    assert torch.equal(result.tokens, policy.decode(batch, "ar").tokens)
    assert torch.equal(policy.tokenizer.encode(result.actions), result.tokens.clamp(max=254))


def test_what_learns_in_distillation_by_name() -> None:
    sizes = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 16, "stem_channels": [4] * 4}
    backbone = CeedVLAPolicy(tabletop_config(**sizes)).backbone
    parts = {name.partition(".")[0] for name in backbone.distillation_parameters()}
    assert parts == {"action_tokens", "slots", "layers", "final_norm", "head"}
    assert backbone.referenced == []


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"b": torch.zeros(2)}, "lacks 'a'; it has none"),
        ({"a": torch.zeros(2, 4), "b": torch.zeros(2)}, r"a has shape \(2, 4\), expected \(B, 3\)"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "with the rows B of a"),
        ({"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}, r"b has shape \(\)"),
        ({"a": torch.full((2, 3), torch.inf), "b": torch.zeros(2)}, "a is not finite"),
    ],
)
def test_features_that_do_not_fit(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        check_features(batch, {"a": (3,), "b": ()}, finite=["a"])


def test_features_that_fit_give_their_rows() -> None:
    assert check_features({"a": torch.zeros(5, 2, 9)}, {"a": (2, None)}) == 5


def test_files_travel_as_tensors(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\x00\xffz")
    (tmp_path / "empty").touch()
    files = read_files(tmp_path, ["a.json", "empty", "none"])
    assert set(files) == {"a.json", "empty"}

    class Step(FilesStep):
        def _open(self, folder: Path) -> None:
            self.found = {path.name: path.read_bytes() for path in folder.iterdir()}
            if "bad" in self.found:
                raise CheckpointError(f"{folder}/bad is wrong.")

    step = Step()
    step.load_state_dict(files)
    assert step.found == {"a.json": b"\x00\xffz", "empty": b""}
    for name in ("../a", "/a", "", ".."):
        with pytest.raises(CheckpointError, match="plain name"):
            step.use({name: files["a.json"]}, "it")
    with pytest.raises(CheckpointError, match="must be uint8 bytes"):
        step.use({"a": files["a.json"].float()}, "it")
    with pytest.raises(CheckpointError, match=r"^it/bad is wrong"):
        step.use({"bad": files["empty"]}, "it")


def test_features_without_a_state_serve_a_model_that_reads_none() -> None:
    features = {"observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}
    config = tabletop_config(input_features=features, backbone=OpenVLAConfig())
    config.validate_features()
    with pytest.raises(
        ConfigError, match=r"no observation\.state; the compact backbone needs a state"
    ):
        tabletop_config(input_features=features).validate_features()
