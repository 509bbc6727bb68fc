"""``ceed-vla export``: write a checkpoint as graphs that run without torch (`ceed_vla.edge`)."""

from __future__ import annotations

import hashlib
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lerobot.processor import NormalizerProcessorStep
from torch import Tensor, nn

from ceed_vla import __version__
from ceed_vla.backbones.compact.words import InstructionWordsStep
from ceed_vla.checkpoints import load, resolve_checkpoint
from ceed_vla.checkpoints.manifest import own_files
from ceed_vla.edge.observation import random_observation
from ceed_vla.edge.settings import (
    EXPORTED_WEIGHTS,
    CacheSettings,
    CheckSettings,
    ExportSettings,
    StateSettings,
    TokenSettings,
    check_decoding,
    graph_names,
)
from ceed_vla.errors import CheckpointError, ConfigError, VerificationError, raised_as
from ceed_vla.export.cached import check_family
from ceed_vla.export.graphs import CACHE, SLOT, CompactBlock, CompactStem, CompactTrunk
from ceed_vla.fields import Checked, chosen
from ceed_vla.files import settle
from ceed_vla.folders import MANIFEST, MODULES, TEMPLATE, WEIGHTS

OPSET = 20
STEPS = (  # of processors
    "to_batch_processor",
    "ceed_vla_instruction_words",
    "device_processor",
    "normalizer_processor",
    "unnormalizer_processor",
)
CHECKED = 3  # observations on which torch and the export are compared


@dataclass
class ExportConfig(Checked):
    """Settings of ``ceed-vla export``.

    Attributes:
        policy_path: Checkpoint folder, or "student" or "teacher".
        output_dir: Folder of the export; it must be new or empty.
        weights: Number type of the matrices behind the camera stems. float32 gives torch's tokens;
            int8 makes smaller graphs and changes some tokens; measure speed and success.
    """

    policy_path: str
    output_dir: str
    weights: str = chosen("float32", EXPORTED_WEIGHTS)


def export(config: ExportConfig) -> str:
    """Export a checkpoint, and compare its tokens with torch's; returns a summary.

    With weights of int8, tokens may differ, and the summary says how many.

    The folder appears when everything is written and compared.

    Raises:
        ConfigError: The checkpoint or its decoding cannot be exported, a package is missing, or the
            folder is not empty.
        CheckpointError: The checkpoint is damaged, or torch cannot export its graphs.
        VerificationError: The export in float32 gives other tokens than torch.
    """
    missing = [name for name in ("onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{missing[0]} is not installed, which exports need; run `scripts/setup.sh export`, or "
            "install the extra export."
        )
    folder = Path(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output_dir {folder} is not an empty folder; name a new one.")
    policy, preprocess, postprocess = load(config.policy_path)
    _check(config.policy_path, policy)
    _check_steps(config.policy_path, [*preprocess.steps, *postprocess.steps])
    state = _state(policy, preprocess)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        written = Path(temporary) / folder.name
        written.mkdir()
        cache = _write_graphs(written, policy.backbone, policy.tokenizer.ordered)
        names = graph_names(len(policy.config.cameras))
        settings = _settings(policy, preprocess, state, cache, _hashes(written, names))
        settings.write(written)
        equal = _verify(written, policy, preprocess, postprocess)
        if config.weights == "int8":
            _quantise(written)
            replace(settings, files=_hashes(written, names), weights="int8").write(written)
            equal = _verify(written, policy, preprocess, postprocess)
        _copy_settings(resolve_checkpoint(config.policy_path), written)
        total = sum((written / name).stat().st_size for name in names)
        settle(*written.iterdir())
        if folder.exists():
            folder.rmdir()  # it is empty
        written.rename(folder)
    share = "tokens" if equal == 1 else f"{equal:.1%} of the tokens"
    return (
        f"Exported {config.policy_path} to {folder}: {len(names)} graphs, {total / 1e6:.1f} MB; "
        f"{share} equal to torch's on {CHECKED} random observations (ar, jacobi, ceed)."
    )


def _check_steps(name: str, steps: Sequence[Any]) -> None:
    """Raise `ConfigError` for processor steps that an export does not have."""
    for step in steps:
        kind = getattr(type(step), "_registry_name", type(step).__name__)
        idle = getattr(step, "enabled", True) is False or getattr(step, "rename_map", None) == {}
        if kind not in STEPS and not idle:
            raise ConfigError(
                f"{name} has the processor step {kind}, which exports do not have; they support "
                f"{', '.join(STEPS)}. Run it with torch."
            )


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def _copy_settings(checkpoint: Path, folder: Path) -> None:
    """Copy the small files of a checkpoint, from which a robot's file is checked."""
    large = {WEIGHTS, MANIFEST, *MODULES}
    for name in sorted((own_files(checkpoint) | {TEMPLATE}) - large):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _check(name: str, policy: Any) -> None:
    """Raise `ConfigError` for a policy that cannot be exported."""
    config = policy.config
    check_family(name, config.backbone.type, config.action_tokens.type)
    if policy.tokenizer.block_length < 3:
        raise ConfigError(
            f"{name} has blocks of {policy.tokenizer.block_length} tokens; exports need at least 3."
        )
    try:
        check_decoding(config.decoding)
    except ConfigError as error:
        raise ConfigError(f"The decoding of {name} cannot be exported. {error}") from error


@torch.no_grad()
def _write_graphs(folder: Path, model: Any, ordered: bool) -> CacheSettings:
    """Export the graphs of a compact backbone; returns the sizes of their cache."""
    side = model.image_size
    image = torch.rand(1, 3, side, side)
    words = torch.ones(1, model.max_words, dtype=torch.int64)
    state = torch.zeros(1, model.state_dim)
    cameras = []
    for index in range(len(model.cameras)):
        stem = CompactStem(model, index)
        cameras.append(stem(image, words))
        _write(folder / f"stem_{index}.onnx", stem, (image, words), ("image", "words"), ("out",))
    trunk = CompactTrunk(model, ordered)
    inputs = ("words", "state", *(f"camera_{index}" for index in range(len(cameras))))
    *_, keys, _ = trunk(words, state, *cameras)  # (layers, heads, P, width)
    outputs = (*SLOT, *CACHE)
    _write(folder / "trunk.onnx", trunk, (words, state, *cameras), inputs, outputs)
    layers, heads, length, width = keys.shape
    cache = torch.zeros(layers, heads, length, width)
    tokens = torch.zeros(1, model.block_length - 1, dtype=torch.int64)
    positions = torch.export.Dim("P", min=1, max=length + model.block_length)
    _write(
        folder / "block.onnx",
        CompactBlock(model, ordered),
        (cache, cache.clone(), torch.tensor([0]), tokens),
        ("keys", "values", "committed", "read"),
        (*SLOT, "new_keys", "new_values"),
        {
            0: {2: positions},
            1: {2: positions},
            3: {1: torch.export.Dim("k", min=1, max=model.block_length)},
        },
    )
    return CacheSettings(layers, heads, width, length)


def _write(
    file: Path,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    dynamic: dict[int, dict[int, Any]] | None = None,
) -> None:
    """Export one module; the inputs at the positions in `dynamic` have dynamic axes."""
    shapes = None if dynamic is None else tuple(dynamic.get(i) for i in range(len(inputs)))
    with (
        raised_as(CheckpointError, f"{file.name} cannot be exported", "report the checkpoint."),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            inputs,
            input_names=list(names),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(str(file))


def _state(policy: Any, preprocess: Any) -> StateSettings:
    """The state and its normalization.

    Raises:
        ConfigError: The mode of the normalization is not supported.
    """
    config = policy.config
    (name,) = (key for key, f in config.input_features.items() if f.type.value == "STATE")
    size = config.shape.state_dim
    mode = config.normalization_mapping.get("STATE", "IDENTITY")
    mode = getattr(mode, "value", mode)
    if mode not in ("MEAN_STD", "IDENTITY"):
        raise ConfigError(
            f"The state's normalization is {mode}; exports support MEAN_STD and IDENTITY. Run the "
            "policy with torch."
        )
    normalizer = next((s for s in preprocess.steps if isinstance(s, NormalizerProcessorStep)), None)
    values = {} if normalizer is None else normalizer._tensor_stats.get(name, {})
    if mode == "IDENTITY" or normalizer is None or not values:
        return StateSettings(name, size)
    mean, std = values["mean"].tolist(), values["std"].tolist()
    return StateSettings(name, size, mean, std, float(normalizer.eps))


def _settings(
    policy: Any,
    preprocess: Any,
    state: StateSettings,
    cache: CacheSettings,
    files: dict[str, str],
) -> ExportSettings:
    """What the graphs do not hold."""
    config = policy.config
    words = next(step for step in preprocess.steps if isinstance(step, InstructionWordsStep))
    tokens = policy.tokenizer
    return ExportSettings(
        version=__version__,
        cameras=list(policy.backbone.cameras),
        state=state,
        vocabulary=list(words.vocabulary),
        tokens=TokenSettings(
            tokens.low.tolist(),
            tokens.high.tolist(),
            tokens.chunk_steps,
            tokens.vocabulary_size,
            tokens.ordered,
        ),
        cache=cache,
        decoding=config.decoding,
        files=files,
        image_size=policy.backbone.image_size,
        max_words=words.max_words,
        n_action_steps=config.n_action_steps,
        camera_sizes=[list(config.input_features[name].shape[1:]) for name in config.cameras],
        delta_dims=config.delta_dims,
        decodings=dict(config.decodings),
    )


def _quantise(folder: Path) -> None:
    """Quantise the matrices of trunk and block to int8, in their files.

    Activations are quantised when the graphs run, each with its own range.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in ("trunk.onnx", "block.onnx"):
        whole = folder / f"float32-{name}"
        (folder / name).rename(whole)
        root = logging.getLogger()
        before = root.level
        root.setLevel(logging.ERROR)  # it advises a preparation that these graphs do not need
        try:
            with raised_as(CheckpointError, f"{name} cannot be quantised", "use float32."):
                quantize_dynamic(
                    str(whole),
                    str(folder / name),
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    # Without VNNI, products of 8 bits are summed in 16 bits, and would saturate.
                    reduce_range=True,
                    op_types_to_quantize=["MatMul"],
                )
        finally:
            root.setLevel(before)
        whole.unlink()


def _verify(folder: Path, policy: Any, preprocess: Any, postprocess: Any) -> float:
    """Compare the export with torch on random observations, and store its tokens as its checks.

    Returns:
        Share of equal tokens; 1 for weights of float32.

    Raises:
        VerificationError: Tokens or actions differ with weights of float32.
    """
    from ceed_vla.edge import EdgePolicy

    edge = EdgePolicy(folder, threads=1)
    settings = edge.settings
    exact = settings.weights == "float32"
    checks = []
    shares = []
    for seed in range(CHECKED):
        observation, instruction = random_observation(settings, seed)
        batch: dict[str, Any] = {
            name: torch.from_numpy(observation[name]).permute(2, 0, 1)[None] / 255
            for name in settings.cameras
        }
        batch[settings.state.name] = torch.from_numpy(observation[settings.state.name])[None]
        batch = preprocess({**batch, "task": [instruction]})
        for name in ("ar", "jacobi", "ceed"):
            # Without the checkpoint's deadline, on which tokens would depend.
            decoding = replace(edge.decoding_config(name), deadline_s=None)
            wanted = policy.decode(batch, decoding)
            found = edge.decode(observation, instruction, decoding)
            shares.append(float(np.mean(np.asarray(found.tokens) == wanted.tokens.numpy())))
            if exact and shares[-1] < 1:
                raise VerificationError(
                    f"The export in {folder} gives other tokens than torch with {name}; do not use "
                    "it. Report the checkpoint."
                )
            actions: Any = found.actions
            if exact and not np.array_equal(actions, postprocess(wanted.actions).numpy()):
                raise VerificationError(
                    f"The export in {folder} gives other actions than torch and the checkpoint's "
                    "postprocessor; do not use it. Report the checkpoint."
                )
            if name != "jacobi":
                checks.append(CheckSettings(seed, name, found.tokens[0].tolist()))
    replace(settings, checks=checks).write(folder)
    return sum(shares) / len(shares)
