"""Exports of language models decode torch's tokens: SmolVLM, and a Llama behind an image stem."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="exports need the extra export")

from damaged_exports import with_settings
from tiny_vlms import make_tiny_vlm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ceed_vla
from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.language.config import LanguageConfig
from ceed_vla.backbones.language.stems import WORDS_KEY
from ceed_vla.backbones.vlm.config import VLMConfig
from ceed_vla.checkpoints import save
from ceed_vla.decoding import DecodingConfig
from ceed_vla.edge import EdgePolicy
from ceed_vla.edge.observation import random_observation
from ceed_vla.edge.settings import read_settings
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError
from ceed_vla.export import cached
from ceed_vla.export.cached import cached_export
from ceed_vla.export.export import ExportConfig, export
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.serving.predictor import BAD_INSTRUCTION, Predictor, PredictorSettings, Request
from tests.helpers.tabletop import tabletop_config
from tests.helpers.tiny_language_models import make_tiny_language_model

EXAMPLES = Path(__file__).parents[3] / "examples"
STATE = "observation.state"
STATS = {STATE: {"mean": torch.randn(14), "std": torch.rand(14) + 0.5}}
DECODERS = ("ar", "jacobi", "jacobi_h", "ceed", "cap1", "gap0.2", "agree4_cap6", "conf0.9_fresh")
INSTRUCTIONS = ["push the red cube to the left", "stack"]


def language_model_config() -> Any:
    """The example's backbone, a Llama with random weights."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("hf_language_model").LanguageModelConfig


def checkpoint(folder: Path, backbone: Any, sizes: tuple[int, int] = (96, 96)) -> Path:
    """A policy with random weights, so large that every token depends on all earlier ones."""
    torch.manual_seed(0)
    config = tabletop_config(
        backbone=backbone,
        chunk_size=2,
        n_action_steps=1,
        decoding=DecodingConfig(max_iterations=2, watch="executed", confidence=0.2),
        auxiliary_scale=[],
    )
    features = config.input_features or {}
    for name in config.cameras:
        features[name].shape = (3, *sizes)
    policy = CeedVLAPolicy(config).eval()
    for parameter in policy.backbone.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[1] ** -0.5)
    processors = make_ceed_vla_pre_post_processors(config, STATS, instructions=INSTRUCTIONS)
    return save(folder, policy, *processors)


def smolvlm(
    folder: Path,
    family: str = "smolvlm",
    sizes: tuple[int, int] = (96, 96),
    split: bool = False,
    **settings: Any,
) -> Path:
    base = make_tiny_vlm(family, folder / "base", scale=3.0)
    if split:
        file = base / "preprocessor_config.json"
        file = file if file.exists() else base / "processor_config.json"
        text = file.read_text()
        assert '"do_image_splitting": false' in text
        file.write_text(text.replace('"do_image_splitting": false', '"do_image_splitting": true'))
    return checkpoint(folder / "policy", VLMConfig(path=str(base), **settings), sizes)


def smolvlm2(folder: Path) -> Path:
    return smolvlm(folder, proprio="text", family="smolvlm2")


def smolvlm1(folder: Path) -> Path:
    return smolvlm(folder, proprio="projected", sizes=(54, 96))


def llama_behind_a_stem(folder: Path) -> Path:
    return checkpoint(folder / "policy", language_model_config()(layers=3, heads=4))


def behind_camera_stems(folder: Path) -> Path:
    """The camera stems read the instruction too, as words."""
    model = make_tiny_language_model(folder / "model", layers=3)
    return checkpoint(folder / "policy", LanguageConfig(path=str(model)))


SOURCES = (smolvlm1, smolvlm2, llama_behind_a_stem, behind_camera_stems)


@pytest.fixture(scope="module", params=SOURCES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export, which must not be changed."""
    folder = tmp_path_factory.mktemp("llama")
    source = request.param(folder)
    if request.param in (smolvlm2, behind_camera_stems):
        return source, cached_export(source)
    export(ExportConfig(str(source), str(folder / "export")))
    return source, folder / "export"


def as_batch(raw: dict[str, np.ndarray], instruction: str) -> dict[str, Any]:
    images = {
        name: torch.from_numpy(value).permute(2, 0, 1)[None].float() / 255
        for name, value in raw.items()
        if value.ndim == 3
    }
    return {**images, STATE: torch.from_numpy(raw[STATE])[None], "task": [instruction]}


def test_tokens_are_torchs(pair: tuple[Path, Path]) -> None:
    source, exported = pair
    policy, preprocess, postprocess = ceed_vla.load(source)
    edge = EdgePolicy(exported, threads=1)
    previous = None
    for seed, instruction in enumerate(INSTRUCTIONS):
        raw, _ = random_observation(edge.settings, 100 + seed)
        batch = preprocess(as_batch(raw, instruction))
        last = None if previous is None else torch.from_numpy(previous)
        for decoding in DECODERS:
            for frozen in (0, 1) if previous is not None else (0,):
                wanted = policy.decode(batch, decoding, previous=last, frozen_steps=frozen)
                found = edge.decode(
                    raw, instruction, decoding, previous=previous, frozen_steps=frozen
                )
                np.testing.assert_array_equal(found.tokens, wanted.tokens, decoding)
                actions = postprocess(wanted.actions)
                np.testing.assert_array_equal(found.actions, actions, decoding)
                assert (found.forwards, found.exit_reason) == (wanted.forwards, wanted.exit_reason)
                for name in ("iterations", "exact_tokens", "layer_forwards", "prefix_layers"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        previous = np.asarray(edge.decode(raw, instruction, "ar").tokens)


def test_inputs_are_torchs(pair: tuple[Path, Path]) -> None:
    source, exported = pair
    _, preprocess, _ = ceed_vla.load(source)
    edge = EdgePolicy(exported, threads=1)
    raw, _ = random_observation(edge.settings, 7)
    for instruction in INSTRUCTIONS:
        found = edge.prepare(raw, instruction)
        batch = preprocess(as_batch(raw, instruction))
        ids = batch.get("observation.vlm.input_ids")
        if ids is None:
            words = batch["observation.language.tokens"]
            ids = words[words != 0][None]
            pixels = [batch[camera] for camera in edge.settings.images.cameras]
        else:
            pixels = batch["observation.vlm.pixel_values"][0].split(1)
        np.testing.assert_array_equal(found.words, ids)
        np.testing.assert_equal(found.stem_words, batch.get(WORDS_KEY))
        np.testing.assert_array_equal(found.state, batch[STATE])
        for camera, wanted in zip(edge.settings.images.cameras, pixels, strict=True):
            np.testing.assert_array_equal(found.images[camera], wanted)


def test_equal_cameras_share_a_stem(pair: tuple[Path, Path]) -> None:
    _, exported = pair
    files = {file.name for file in exported.glob("*.onnx")}
    edge = EdgePolicy(exported, threads=2)  # the stem runs twice at the same time
    own = {"stem_1.onnx"} if edge.settings.text.stem_vocabulary else set()
    assert files == {"embed.onnx", "layers.onnx", "prefix.onnx", "stem_0.onnx"} | own
    raw, instruction = random_observation(edge.settings, 3)
    first = edge.decode(raw, instruction, "ar")
    cameras = edge.settings.images.cameras
    features = [edge.run_stem(camera, raw[camera], instruction) for camera in cameras]
    again = edge.decode({STATE: raw[STATE]}, instruction, "ar", features=features)
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_it_runs_without_torch(pair: tuple[Path, Path]) -> None:
    _, exported = pair
    script = f"""
import sys
from ceed_vla.edge import EdgePolicy
from ceed_vla.edge.observation import random_observation
policy = EdgePolicy({str(exported)!r}, threads=1)
assert policy.decode(*random_observation(policy.settings, 0)).actions.shape == (1, 2, 7)
print([name for name in ("torch", "lerobot", "transformers") if name in sys.modules])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_observations_that_do_not_fit(pair: tuple[Path, Path]) -> None:
    _, exported = pair
    edge = EdgePolicy(exported, threads=1)
    raw, instruction = random_observation(edge.settings, 3)
    front = edge.settings.images.cameras[0]
    if edge.settings.images.kind != "square":
        with pytest.raises(ObservationError, match="the size that the policy was trained with"):
            edge.decode({**raw, front: raw[front][1:]}, instruction)
    with pytest.raises(ObservationError, match=r"values from .* to 2; images must be in"):
        edge.decode({**raw, front: np.full(raw[front].shape, 2.0)}, instruction)
    with pytest.raises(ObservationError, match=r"must be one text"):
        edge.decode(raw, " ")
    if edge.settings.text.stem_vocabulary:
        with pytest.raises(ObservationError, match="no word of the policy's vocabulary"):
            edge.decode(raw, "lift")
    elif edge.settings.text.kind == "prompt":
        with pytest.raises(ObservationError, match="contains <image>, which stands for an image"):
            edge.decode(raw, "lift <image>")
        with pytest.raises(ObservationError, match=r"The prompt has \d+ tokens, more than"):
            edge.decode(raw, "lift it " * 500)
        with pytest.raises(ObservationError, match=r"The tokenizer cannot read the instruction"):
            edge.decode(raw, "lift \ud800")


def test_a_served_export_knows_the_words_of_its_stems(pair: tuple[Path, Path]) -> None:
    _, exported = pair
    predictor = Predictor(PredictorSettings(str(exported), engine="edge", decoding="ar", warmup=1))
    raw, instruction = random_observation(read_settings(exported), 3)
    text = read_settings(exported).text
    known = text.vocabulary or text.stem_vocabulary or ["move"]
    assert predictor.spec.example_instruction == min(known)
    assert predictor.predict(Request(1, raw, instruction)).error is None
    strange = predictor.predict(Request(2, raw, f"{min(known)} fluffy dragons eat my breakfast"))
    if known == ["move"]:
        assert strange.error is None  # a language model reads any word
    else:
        assert (strange.code, predictor.failures) == (BAD_INSTRUCTION, 0)
        assert "at least half must be" in str(strange.error)


def test_long_instructions_are_cut_as_by_torch(tmp_path: Path) -> None:
    """A backbone that reads at most 6 tokens of a prompt."""
    base = make_tiny_vlm("smolvlm", tmp_path / "base", scale=3.0)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    language = LlamaForCausalLM(
        LlamaConfig(  # type: ignore[call-arg]
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    backbone = language_model_config()(path=str(tmp_path / "language"), max_words=6)
    source = checkpoint(tmp_path / "policy", backbone)
    export(ExportConfig(str(source), str(tmp_path / "export")))
    edge = EdgePolicy(tmp_path / "export", threads=1)
    assert edge.settings.text.cut == "right"
    policy, preprocess, _ = ceed_vla.load(source)
    for instruction in ("lift", "push the red cube to the left, then stack it"):
        raw, _ = random_observation(edge.settings, 5)
        wanted = policy.decode(preprocess(as_batch(raw, instruction)), "ar").tokens
        np.testing.assert_array_equal(edge.decode(raw, instruction, "ar").tokens, wanted)
    assert edge.reader.words("push the red cube to the left").shape == (1, 6)


def test_int8(tmp_path: Path) -> None:
    source = llama_behind_a_stem(tmp_path)
    said = export(ExportConfig(str(source), str(tmp_path / "export"), weights="int8"))
    assert "% of the tokens equal to torch's" in said
    assert EdgePolicy(tmp_path / "export").settings.weights == "int8"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "other family": (partial(smolvlm, family="qwen2_5_vl"), "not a LlamaModel"),
    "other images": (partial(smolvlm, family="llava"), "LlavaProcessor with separate cameras"),
    "stacked": (partial(smolvlm, cameras="stacked"), "with stacked cameras"),
    "split images": (partial(smolvlm, split=True), "do_image_splitting must be False"),
    "bfloat16": (partial(smolvlm, dtype="bfloat16"), "its weights are not float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ConfigError("It cannot be exported. Run it with torch.")

    make, message = REFUSED[case]
    source = make(tmp_path)
    with pytest.raises(ConfigError, match=message):
        export(ExportConfig(str(source), str(tmp_path / "export")))
    assert not (tmp_path / "export").exists()
    started = []
    monkeypatch.setattr(cached, "_export_once", lambda *args: started.append(args) or refuse())
    for _ in range(2):
        with pytest.raises(ConfigError, match="Run it with torch"):
            cached_export(source)
    assert len(started) == (case in ("stacked", "split images"))  # the others are not tried


@pytest.mark.parametrize("pair", [smolvlm2], indirect=True)
def test_a_tokenizer_that_is_damaged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, exported = pair
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / "text.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"text.json differs from the hash"):
        EdgePolicy(folder)
    digest = hashlib.sha256(b"{}").hexdigest()
    with_settings(folder, lambda s: s["files"].update({"text.json": digest}))
    with pytest.raises(CheckpointError, match=r"text.json cannot be read"):
        EdgePolicy(folder)


@pytest.mark.parametrize("pair", [smolvlm2], indirect=True)
def test_the_library_of_prompts_is_named_if_it_is_missing(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exported = pair
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs tokenizers, which is not installed"):
        EdgePolicy(exported)
