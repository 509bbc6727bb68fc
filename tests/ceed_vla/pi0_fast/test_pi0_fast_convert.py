"""Conversion of a LeRobot checkpoint: the same tokens and actions, offline, and without running the
checkpoint's code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi0_fast.processor_pi0_fast import make_pi0_fast_pre_post_processors
from lerobot.processor import tokenizer_processor
from safetensors.torch import load_file, save_file
from torch import Tensor

from ceed_vla.backbones.pi0_fast.tokens import Pi0FastTokenizer
from ceed_vla.checkpoints import load, save
from ceed_vla.cli.entry import main
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError, MalformedChunkError
from tests.helpers.edits import unsealed

IDS = "observation.language.tokens"


@pytest.fixture
def published(lab: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A LeRobot checkpoint folder that was trained on two chunks, its policy and processors, and
    raw observations.
    """
    random = torch.Generator().manual_seed(7)
    policy = lab.build(5)
    monkeypatch.setattr(tokenizer_processor, "AutoProcessor", modeling_pi0_fast.AutoProcessor)
    stats = {
        "observation.state": {"mean": torch.full((4,), 0.5), "std": torch.full((4,), 2.0)},
        "action": {"mean": torch.tensor([1.0, -2.0, 0.3]), "std": torch.tensor([0.5, 3.0, 1.0])},
    }
    pre, post = make_pi0_fast_pre_post_processors(policy.config, stats)
    raw: dict[str, Any] = {key: torch.rand(2, 3, 40, 32, generator=random) for key in lab.CAMERAS}
    raw |= {
        "observation.state": torch.rand(2, 4, generator=random),
        "task": ["w31 w32", "w33 w34_w35"],
    }
    _, tokenizer = lab.wrap(policy)
    chunks = 0.4 * torch.randn(2, lab.STEPS, lab.DIM, generator=random).cumsum(1)
    lab.overfit(policy, pre(raw), tokenizer.encode(chunks))
    folder = lab.folder / "lerobot"
    policy.save_pretrained(folder)
    pre.save_pretrained(folder)
    post.save_pretrained(folder)
    with torch.no_grad():
        actions = post(policy.predict_action_chunk(pre(raw)))
    expected = lab.lerobot_tokens(policy, pre(raw), lab.STOP)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("code of a checkpoint was about to run")

    for module in (modeling_pi0_fast, tokenizer_processor):
        monkeypatch.setattr(module, "AutoProcessor", SimpleNamespace(from_pretrained=refuse))
    return SimpleNamespace(
        folder=folder, raw=raw, tokens=expected, actions=actions, policy=policy, ids=pre(raw)[IDS]
    )


def convert_pi0_fast(source: Path, output: Path, **settings: Any) -> Path:
    convert(ConvertConfig(str(source), str(output), from_="pi0_fast", **settings))
    return output


def act(bundle: tuple[Any, Any, Any], raw: dict[str, Any], decoding: str) -> tuple[Tensor, Tensor]:
    policy, pre, post = bundle
    result = policy.decode(pre(raw), decoding)
    return result.tokens, post(result.actions)


@pytest.mark.parametrize("weights", ["copied", "reference"])
def test_a_converted_checkpoint_acts_as_lerobots(lab: Any, published: Any, weights: str) -> None:
    output = convert_pi0_fast(published.folder, lab.folder / "ours", weights=weights)
    names = load_file(output / "model.safetensors")
    assert bool(names) == (weights == "copied")
    for name in ("text", "fast", *(() if weights == "reference" else ("lerobot",))):
        shutil.rmtree(lab.folder / name)  # the checkpoint needs no other files
    bundle = load(output)
    # without the marker of LeRobot's action tokenizer
    assert torch.equal(bundle[1](published.raw)[IDS], published.ids)
    for decoding in ("ar", "jacobi", "ceed"):
        tokens, actions = act(bundle, published.raw, decoding)
        assert torch.equal(tokens, published.tokens)
        assert torch.allclose(actions, published.actions, atol=1e-6)
    chunk = bundle[2](bundle[0].predict_action_chunk(bundle[1](published.raw)))
    assert torch.allclose(chunk, published.actions)
    assert bundle[0].tokenizer.malformed == 0


def test_the_command_converts(lab: Any, published: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = lab.folder / "ours"
    flags = [
        "--from=pi0_fast",
        f"--output_dir={output}",
        "--vocabulary=actions",
        "--weights=reference",
    ]
    assert main(["convert", str(published.folder), *flags]) == 0
    assert "pi0-FAST, weights reference, vocabulary actions" in capsys.readouterr().out
    policy, pre, post = load(output)
    result = policy.decode(pre(published.raw), "jacobi")
    assert torch.allclose(post(result.actions), published.actions, atol=1e-6)
    assert result.exit_reason == ["stop", "stop"]
    assert isinstance(policy.tokenizer, Pi0FastTokenizer)
    assert torch.equal(policy.tokenizer.action_ids[result.tokens], published.tokens)


def test_steps_that_would_run_code_are_refused(lab: Any, published: Any) -> None:
    file = published.folder / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    assert any(step["registry_name"] == "action_tokenizer_processor" for step in pipeline["steps"])
    output = convert_pi0_fast(published.folder, lab.folder / "ours", weights="reference")
    copied = json.loads((output / file.name).read_text())
    assert not any(
        step["registry_name"] == "action_tokenizer_processor" for step in copied["steps"]
    )

    unsealed(output)
    ran = lab.folder / "ran"
    bad = {"class": "subprocess.Popen", "config": {"args": ["touch", str(ran)]}}
    for folder, read in (
        (published.folder, lambda f: convert_pi0_fast(f, lab.folder / "bad")),
        (output, load),
    ):
        values = json.loads((folder / file.name).read_text())
        (folder / file.name).write_text(json.dumps({**values, "steps": [*values["steps"], bad]}))
        with pytest.raises(
            CheckpointError, match=r"a step 'subprocess\.Popen', which could run code"
        ):
            read(folder)
    values["steps"].append({"registry_name": "action_tokenizer_processor", "config": {}})
    (output / file.name).write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match="a step 'action_tokenizer_processor', which could run code"
    ):
        load(output)
    assert not ran.exists()


def test_a_temperature_is_said_to_be_left_out(lab: Any, published: Any, caplog: Any) -> None:
    values = json.loads((published.folder / "config.json").read_text())
    (published.folder / "config.json").write_text(json.dumps({**values, "temperature": 0.5}))
    convert_pi0_fast(published.folder, lab.folder / "ours", weights="reference")
    assert "temperature 0.5; here it decodes greedily" in caplog.text


def test_a_distilled_layer_is_saved_and_the_rest_stays_a_reference(
    lab: Any, published: Any
) -> None:
    output = convert_pi0_fast(
        published.folder, lab.folder / "ours", weights="reference", vocabulary="actions"
    )
    policy, pre, post = load(output)
    learning = policy.backbone.distillation_parameters()
    assert learning
    assert all(".language_model." in name and "embed_tokens" not in name for name in learning)
    for name, parameter in policy.backbone.named_parameters():
        parameter.requires_grad_(name in learning)
    with torch.no_grad():
        dict(policy.backbone.named_parameters())[learning[0]].add_(0.001)
    save(lab.folder / "student", policy, pre, post)
    assert set(load_file(lab.folder / "student" / "model.safetensors")) == {
        f"backbone.{n}" for n in learning
    }
    again, pre, post = load(lab.folder / "student")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in policy.state_dict().items()
    )
    _, actions = act((again, pre, post), published.raw, "jacobi")
    assert torch.allclose(actions, published.actions, atol=1e-6)


def test_a_malformed_chunk_is_an_error_of_the_policy(lab: Any, published: Any) -> None:
    policy, pre, _ = load(convert_pi0_fast(published.folder, lab.folder / "ours"))
    batch = pre(published.raw)
    batch["observation.language.tokens"] = batch["observation.language.tokens"].flip(1)
    with pytest.raises(MalformedChunkError, match="chunks are malformed"):
        policy.decode(batch, DecodingConfig(guess="mid"))
    assert isinstance(policy.tokenizer, Pi0FastTokenizer)
    assert policy.tokenizer.malformed > 0


def test_bad_folders(lab: Any, published: Any) -> None:
    folder, broken = published.folder, lab.folder / "broken"

    def change(name: str, text: str | None) -> Path:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        (broken / name).unlink()
        if text is not None:
            (broken / name).write_text(text)
        return broken

    config = json.loads((folder / "config.json").read_text())
    output = lab.folder / "ours"
    with pytest.raises(CheckpointError, match="has a policy of type 'act'"):
        convert_pi0_fast(change("config.json", json.dumps({**config, "type": "act"})), output)
    with pytest.raises(CheckpointError, match="is not JSON"):
        convert_pi0_fast(change("config.json", "{"), output)
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        convert_pi0_fast(change("model.safetensors", None), output)
    state = next(folder.glob("*normalizer*.safetensors")).name
    with pytest.raises(CheckpointError, match=f"names the state '{state}'"):
        convert_pi0_fast(change(state, None), lab.folder / "less")
    with pytest.raises(CheckpointError, match="do not load"):
        convert_pi0_fast(change("model.safetensors", "x"), output)
    with pytest.raises(CheckpointError, match=r"lacks policy_preprocessor\.json"):
        convert_pi0_fast(change("policy_preprocessor.json", None), lab.folder / "half")
    with pytest.raises(CheckpointError, match=r"fast_tokenizer 'some/where' is neither a folder"):
        convert_pi0_fast(folder, output, fast_tokenizer="some/where")
    with pytest.raises(CheckpointError, match="no text tokenizer that loads"):
        convert_pi0_fast(folder, output, text_tokenizer=str(lab.folder / "fast" / ".."))
    with pytest.raises(ConfigError, match="vocabulary is 'some'"):
        convert_pi0_fast(folder, output, vocabulary="some")
    with pytest.raises(ConfigError, match="name a new or empty folder"):
        convert_pi0_fast(folder, folder)
    weights = load_file(folder / "model.safetensors")
    change("model.safetensors", "")
    weights.pop(next(name for name in weights if "layers.1.mlp.up" in name))
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 weights \(.*layers\.1\.mlp\.up"):
        convert_pi0_fast(broken, output)
