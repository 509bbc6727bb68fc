"""The pages docs/how-to/add-*.md as a reader follows them.

Each kind of component is one file outside the package, and is found by its name.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ceed_vla
from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.check import check_untrained
from ceed_vla.checkpoints import save
from ceed_vla.cli.entry import main
from ceed_vla.decoding import (
    DecodingConfig,
    ExitRule,
    decode_block,
    named_config,
    register_decoder,
    register_exit,
)
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.serving.predictor import Predictor, PredictorSettings, Request
from ceed_vla.tokens.uniform import ActionTokenizer
from tests.helpers.edits import unsealed
from tests.helpers.tabletop import tabletop_config
from tests.helpers.tiny_pi0_fast import write_text_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("add-an-action-vocabulary", "add-a-decoder", "add-a-loss")
BLOCKS = {
    re.search(r"# (my_\w+)\.py", block).group(1): block
    for page in PAGES
    for block in re.findall(
        r"```python\n(.*?)```", (ROOT / f"docs/how-to/{page}.md").read_text(), re.DOTALL
    )
}
SIZES = {"width": 16, "layers": 1, "heads": 2}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, on the path of this process and its children."""
    for name, text in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(text)
    own = (ROOT / "examples/own_backbone.py").read_text().partition("# ---- used as any other")[0]
    # another test may have imported it
    mine = own.replace('register_subclass("own")', 'register_subclass("mine")')
    (tmp_path / "my_backbone.py").write_text(mine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path


def test_the_pages_have_every_kind() -> None:
    assert set(BLOCKS) == {"my_tokens", "my_decoding", "my_loss"}


@pytest.mark.parametrize("frozen_steps", [0, 1])
def test_a_decoder_and_an_exit_rule(plugins: Path, frozen_steps: int) -> None:
    importlib.import_module("my_decoding")
    policy, pre, _ = ceed_vla.load("student")
    observation = {name: torch.rand(2, 3, 96, 96) for name in policy.config.cameras}
    batch = pre(
        {**observation, "observation.state": torch.rand(2, 14), "task": ["push the red cube"] * 2}
    )
    behind = {"previous": torch.full((2, 56), 127), "frozen_steps": frozen_steps}
    greedy = policy.decode(batch, "ar", **behind)
    for name in ("verify", "verify_mid", "verify_random"):
        assert torch.equal(policy.decode(batch, name, **behind).tokens, greedy.tokens), name
    sure = policy.decode(batch, "margin0.000001_random", **behind)
    assert sure.exit_reason == ["margin"] * 2
    assert (
        policy.decode(batch, "margin1_cap1_random", **behind).exit_reason == ["max_iterations"] * 2
    )
    assert named_config("margin0.5_mid", DecodingConfig()).exits == ("margin0.5",)
    policy.config.decode_with = "verify"
    policy.config.save_pretrained(plugins / "saved")
    assert json.loads((plugins / "saved/config.json").read_text())["packages"] == ["my_decoding"]
    with pytest.raises(ConfigError, match=r"choose from .*\bverify\b"):
        named_config("nothing", DecodingConfig())


def test_exit_rules_read_what_decode_block_gives(plugins: Path) -> None:
    importlib.import_module("my_decoding")
    policy, pre, _ = ceed_vla.load("student")
    observation = {name: torch.rand(1, 3, 96, 96) for name in policy.config.cameras}
    batch = pre(
        {**observation, "observation.state": torch.rand(1, 14), "task": "push the red cube"}
    )
    prefix = policy.backbone.prefill(batch)
    assert isinstance(policy.tokenizer, ActionTokenizer)
    result = decode_block(
        policy.backbone, prefix, policy.tokenizer, "margin1_conf1", executed_steps=2
    )
    assert result.exit_reason == ["stable"] or result.exit_reason == ["converged"]


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
def test_tokens_backbone_and_loss_from_data_to_evaluation(
    plugins: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packages = "--discover_packages_path=my_tokens,my_backbone,my_loss,my_decoding"
    assert (
        main(["record", "--root=demos", "--episodes=2", "--mode=clean", "--env.task=push_cube"])
        == 0
    )
    sizes = [f"--policy.backbone.{name}={value}" for name, value in SIZES.items()]
    train = [
        "train",
        "--roots=demos",
        "--output_dir=teacher",
        "--steps=2",
        "--batch_size=4",
        "--rounds=0",
        "--validate_episodes=0",
        "--policy.backbone.type=mine",
        "--policy.action_tokens.type=signed_levels",
        "--policy.chunk_size=4",
        "--policy.n_action_steps=2",
        *sizes,
        packages,
    ]
    assert main(train) == 0
    teacher = plugins / "teacher/checkpoints/final/pretrained_model"
    config = json.loads((teacher / "config.json").read_text())
    assert config["packages"] == ["my_backbone", "my_tokens"]
    distil = [
        "distill",
        f"--teacher_path={teacher}",
        "--roots=demos",
        "--output_dir=student",
        "--steps=2",
        "--loss=hard",
        "--batch_size=4",
        "--eval_frames=4",
        "--eval_every=0",
        "--trajectories.online=true",
        "--validate_episodes=0",
        packages,
    ]
    assert main(distil) == 0
    student = plugins / "student/checkpoints/final/pretrained_model"
    assert json.loads((student / "config.json").read_text())["decoding"]["watch"] == "executed"
    run = [
        "eval",
        f"--policy.path={student}",
        "--episodes=1",
        "--env.episode_length=4",
        "--timing_chunks=0",
        "--clips=false",
        "--executed_steps=2",
        "--decoders=ar,verify,margin0.9_cap3",
        packages,
    ]
    assert main(run) == 0
    assert set(json.loads(Path("outputs/eval/report.json").read_text())["decoders"]) == {
        "ar",
        "verify",
        "margin0.9_cap3",
    }
    capfd.readouterr()
    # In a process that has not imported the packages.
    command = [sys.executable, "-m", "ceed_vla.cli", *run[:-2], "--decoders=ar"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "'my_backbone, my_tokens'" in found.stderr
    assert "--discover_packages_path=my_backbone,my_tokens " in found.stderr
    assert "Traceback" not in found.stderr


def test_tokens_take_their_ranges_from_the_data(plugins: Path) -> None:
    tokens = importlib.import_module("my_tokens").SignedLevelsConfig()
    with pytest.raises(ConfigError, match="needs the statistics of the data"):
        tokens.fit(2, None)
    tokens.fit(2, {"min": np.array([-3.0, 0.0]), "max": np.array([2.0, 0.5])})
    assert tokens.largest == [3.0, 0.5]
    built = tokens.build(4, 2)
    actions = torch.tensor([3.0, -0.5]).expand(1, 4, 2)
    torch.testing.assert_close(built.decode(built.encode(actions)), actions)
    # of another dataset: what is known stays
    tokens.fit(2, {"min": np.zeros(2), "max": np.ones(2)})
    assert tokens.largest == [3.0, 0.5]
    assert built.clipped == 0
    assert built.encode(4 * actions).shape == (1, 16)
    assert built.clipped == 8


@pytest.fixture
def language_model(plugins: Path) -> Any:
    """The example as a module of another name, as another test may have registered its family."""
    for name, mine in (("hf_language_model", "my_lm"), ("own_environment", "my_environment")):
        text = (ROOT / f"examples/{name}.py").read_text()
        text = (
            text.replace('"hf_lm"', '"my_lm"')
            .replace('"point_reach"', '"my_point"')
            .replace("own_env/", "my_env/")
        )
        (plugins / f"{mine}.py").write_text(text)
    return importlib.import_module("my_lm")


def test_a_language_model_decodes_exactly(plugins: Path, language_model: Any) -> None:
    backbone = language_model.LanguageModelConfig(width=32, heads=2)
    sizes = {"chunk_size": 2, "n_action_steps": 1, "auxiliary_scale": []}
    config = tabletop_config(backbone=backbone, **sizes)
    built = CeedVLAPolicy(config).backbone
    assert check_untrained(built, config, instruction_tokens=16, rows=2) == 2 * 14 * 7


def test_a_published_language_model(plugins: Path, language_model: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    write_text_tokenizer(plugins / "published")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    published = Qwen2ForCausalLM(Qwen2Config(vocab_size=700, num_hidden_layers=1, **sizes))
    published.save_pretrained(plugins / "published")
    backbone = language_model.LanguageModelConfig(path=str(plugins / "published"))
    config = tabletop_config(backbone=backbone, chunk_size=2, n_action_steps=1, auxiliary_scale=[])
    policy = CeedVLAPolicy(config).eval()
    rows = policy.backbone.pretrained.get_input_embeddings().weight
    assert torch.equal(rows[:700], published.get_input_embeddings().weight)
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    save(
        plugins / "saved",
        policy,
        *make_ceed_vla_pre_post_processors(config, stats, instructions=["put the cube"]),
    )
    (plugins / "published").rename(plugins / "gone")  # the checkpoint needs no other files
    again, pre, _ = ceed_vla.load(plugins / "saved")
    observation = {name: torch.rand(2, 3, 96, 96) for name in config.cameras}
    batch = pre(
        {
            **observation,
            "observation.state": torch.rand(2, 14),
            "task": ["put the cube in", "put cube"],
        }
    )
    assert torch.equal(again.decode(batch, "jacobi").tokens, policy.decode(batch, "ar").tokens)
    config.backbone = language_model.LanguageModelConfig(path="nowhere")
    with pytest.raises(CheckpointError, match=r"backbone\.path is 'nowhere'"):
        CeedVLAPolicy(config)


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
def test_a_language_model_learns_from_a_recording(plugins: Path, language_model: Any) -> None:
    own = ["--env.type=my_point", "--discover_packages_path=my_environment,my_lm"]
    assert main(["record", "--root=demos", "--episodes=2", "--mode=clean", *own]) == 0
    train = [
        "train",
        "--roots=demos",
        "--output_dir=teacher",
        "--steps=2",
        "--grounding_steps=0",
        "--batch_size=4",
        "--rounds=0",
        "--validate_episodes=0",
        "--policy.backbone.type=my_lm",
        "--policy.chunk_size=4",
        "--policy.n_action_steps=2",
        "--policy.backbone.width=32",
        "--policy.backbone.heads=2",
        *own,
    ]
    assert main(train) == 0
    teacher = "teacher/checkpoints/final/pretrained_model"
    assert json.loads(Path(teacher, "config.json").read_text())["packages"] == ["my_lm"]
    policy, pre, _ = ceed_vla.load(teacher)
    seen = {"observation.images.top": torch.rand(3, 32, 32), "observation.state": torch.zeros(2)}
    batch = pre({**seen, "task": "go to the red"})
    assert torch.equal(policy.decode(batch, "jacobi").tokens, policy.decode(batch, "ar").tokens)


@pytest.mark.parametrize("delta_dims", [[], [0, 2]])
def test_two_tokens_a_dimension_on_a_robot(plugins: Path, delta_dims: list[int]) -> None:
    tokens = importlib.import_module("my_tokens").SignedLevelsConfig(largest=[1.0] * 7)
    config = tabletop_config(
        **SIZES, mlp_width=16, stem_channels=[8] * 4, action_tokens=tokens, delta_dims=delta_dims
    )
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    pre, post = make_ceed_vla_pre_post_processors(config, stats, instructions=["push the red cube"])
    save(plugins / "signed", CeedVLAPolicy(config).eval(), pre, post)
    predictor = Predictor(PredictorSettings(str(plugins / "signed"), decoding="ar", replan_steps=4))
    random = np.random.default_rng(0)
    seen: dict[str, Any] = {
        c: random.integers(0, 255, (96, 96, 3), dtype=np.uint8) for c in config.cameras
    }
    request = Request(
        1, {**seen, "observation.state": np.zeros(14, np.float32)}, "push the red cube", stream=True
    )
    early: list[Any] = []
    whole = predictor.predict(request, early=early.append)
    assert [len(one.actions) for one in early] == list(range(1, 8))
    for one in early:
        np.testing.assert_array_equal(one.actions, whole.actions[: len(one.actions)])
    behind = predictor.predict(
        replace(request, previous=whole.tokens, shift_steps=3, frozen_steps=2)
    )
    assert behind.error is None
    assert behind.tokens is not None
    assert whole.tokens is not None
    np.testing.assert_array_equal(behind.tokens[:28], whole.tokens[42:70])
    np.testing.assert_array_equal(behind.actions[:2], whole.actions[3:5])
    if delta_dims:  # for increments, later steps compensate the smaller motion of these
        free = predictor.predict(request)
        np.testing.assert_array_equal(
            behind.actions[2:, [1, 3, 4, 5, 6]], free.actions[2:, [1, 3, 4, 5, 6]]
        )


def test_a_checkpoint_of_a_missing_package_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    policy, pre, post = ceed_vla.load("student")
    unsealed(save(folder, policy, pre, post))
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert values["packages"] == []
    for packages in (["nobodys_package"], "nobodys_package", [3]):
        (folder / "config.json").write_text(json.dumps({**values, "packages": packages}))
        with pytest.raises(CheckpointError, match=r"needs a package .*--discover_packages_path"):
            ceed_vla.load(folder)


def test_mistakes_in_a_rule_or_a_decoder_are_named() -> None:
    class Wrong(ExitRule):
        reason = "wrong"

        def ends(self, seen: Any, measured: Any) -> Any:
            return torch.ones(1)

    register_exit("wrong", "wrong", "never right")(Wrong)
    register_decoder("nothing", "nothing", "no result")(
        lambda backbone, prefix, request: request.guess
    )
    policy, pre, _ = ceed_vla.load("student")
    observation = {name: torch.rand(1, 3, 96, 96) for name in policy.config.cameras}
    batch = pre(
        {**observation, "observation.state": torch.rand(1, 14), "task": "push the red cube"}
    )
    with pytest.raises(
        ConfigError, match=r"exit rule Wrong does not work: ends \(TypeError: it returned Tensor"
    ):
        policy.decode(batch, "wrong_random")
    Wrong.ends = lambda self, seen, measured: measured.values  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"Wrong does not work: ends \(AttributeError"):
        policy.decode(batch, "wrong_random")
    Wrong.measure = lambda self, logits, tokens: logits  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError, match=r"Wrong does not work: measure \(TypeError: it returned Tensor"
    ):
        policy.decode(batch, "wrong_random")
    with pytest.raises(ConfigError, match="'nothing' returned a Tensor, not a DecodeResult"):
        policy.decode(batch, "nothing")
    for name in ("a_b", "mid", "cap<N>"):
        with pytest.raises(ConfigError, match="The name"):
            register_exit("x", name, "taken")(Wrong)
    with pytest.raises(ConfigError, match="has no `reason`"):
        register_exit("x", "x", "no reason")(type("Bare", (ExitRule,), {}))
    with pytest.raises(ConfigError, match="ladder of 'y<K>' has 'y'"):
        register_exit(r"y\d", "y<K>", "another's names", ("y1", "y"))
