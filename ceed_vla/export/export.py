"""``ceed-vla export``: write a checkpoint as graphs that run without torch (`ceed_vla.edge`)."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ceed_vla import __version__
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.checkpoints import load, resolve_checkpoint
from ceed_vla.checkpoints.manifest import own_files
from ceed_vla.edge.feature_settings import TOKENIZER
from ceed_vla.edge.observation import random_observation
from ceed_vla.edge.settings import (
    EXPORTED_WEIGHTS,
    CacheSettings,
    CheckSettings,
    ExportSettings,
    TokenSettings,
    check_decoding,
)
from ceed_vla.errors import ConfigError, VerificationError
from ceed_vla.export.cached import check_tokens
from ceed_vla.export.compact import write_compact
from ceed_vla.export.inputs import INPUT_STEPS, Inputs, read_inputs
from ceed_vla.export.llama import check_llama, write_llama
from ceed_vla.export.onnx_files import quantise
from ceed_vla.extras import require
from ceed_vla.fields import Checked, chosen
from ceed_vla.files import settle
from ceed_vla.folders import MANIFEST, MODULES, TEMPLATE, WEIGHTS

STEPS = (  # of processors
    "to_batch_processor",
    *INPUT_STEPS,
    "device_processor",
    "normalizer_processor",
    "unnormalizer_processor",
)
QUANTISED = {"compact": ("trunk", "block"), "llama": ("layers",)}  # graphs
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
    require("an export", "export")
    folder = Path(config.output_dir)
    is_a_place = folder.is_symlink() or folder.is_mount()  # which cannot be replaced
    if is_a_place or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(
            f"output_dir {folder} is a link, a mount or not empty; name a new folder."
        )
    policy, preprocess, postprocess = load(config.policy_path)
    family = _family(config.policy_path, policy)
    _check_steps(config.policy_path, [*preprocess.steps, *postprocess.steps])
    inputs = read_inputs(config.policy_path, family, policy, preprocess)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        written = Path(temporary) / folder.name
        written.mkdir()
        cache, inputs = _write_graphs(written, policy, family, inputs)
        if inputs.tokenizer is not None:
            (written / TOKENIZER).write_text(inputs.tokenizer, encoding="utf-8")
        settings = _settings(policy, family, inputs, cache, _hashes(written))
        settings.write(written)
        equal = _verify(written, policy, preprocess, postprocess)
        if config.weights == "int8":
            for name in QUANTISED[family]:
                quantise(written / f"{name}.onnx")
            replace(settings, files=_hashes(written), weights="int8").write(written)
            equal = _verify(written, policy, preprocess, postprocess)
        _copy_settings(resolve_checkpoint(config.policy_path), written)
        graphs = list(written.glob("*.onnx"))
        total = sum(graph.stat().st_size for graph in graphs)
        settle(*written.iterdir())
        if folder.exists():
            folder.rmdir()  # it is empty
        written.rename(folder)
    share = "tokens" if equal == 1 else f"{equal:.1%} of the tokens"
    return (
        f"Exported {config.policy_path} to {folder}: {len(graphs)} graphs, {total / 1e6:.1f} MB; "
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


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the graphs and the tokenizer in a folder."""
    files = [*folder.glob("*.onnx"), *folder.glob(TOKENIZER)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def _copy_settings(checkpoint: Path, folder: Path) -> None:
    """Copy the small files of a checkpoint, from which a robot's file is checked."""
    large = {WEIGHTS, MANIFEST, *MODULES}
    for name in sorted((own_files(checkpoint) | {TEMPLATE}) - large):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _family(name: str, policy: Any) -> str:
    """The family of a policy; raises `ConfigError` for a policy that cannot be exported."""
    config = policy.config
    model = policy.backbone
    check_tokens(name, config.action_tokens.type)
    if isinstance(model, TransformersBackbone):
        check_llama(name, model)
        family = "llama"
    elif config.backbone.type == "compact":
        family = "compact"
    else:
        raise ConfigError(
            f"{name} has the backbone {config.backbone.type}; exports support compact, and those "
            "built on TransformersBackbone whose language model is a Llama. Run it with torch."
        )
    if policy.tokenizer.block_length < 3:
        raise ConfigError(
            f"{name} has blocks of {policy.tokenizer.block_length} tokens; exports need at least 3."
        )
    try:
        check_decoding(config.decoding)
    except ConfigError as error:
        raise ConfigError(f"The decoding of {name} cannot be exported. {error}") from error
    return family


def _write_graphs(
    folder: Path, policy: Any, family: str, inputs: Inputs
) -> tuple[CacheSettings, Inputs]:
    """Write the graphs; returns the sizes of their cache, and what the graphs read."""
    ordered = policy.tokenizer.ordered
    if family == "compact":
        return write_compact(folder, policy.backbone, ordered), inputs
    written = write_llama(
        folder, policy.backbone, ordered, inputs.images, inputs.text, inputs.state.size
    )
    images = replace(inputs.images, stems=written.stems)
    text = inputs.text
    if written.longest < text.longest:  # the model has fewer positions, so nothing may be cut
        text = replace(text, longest=written.longest, cut="")
    return written.cache, replace(inputs, images=images, text=text)


def _settings(
    policy: Any, family: str, inputs: Inputs, cache: CacheSettings, files: dict[str, str]
) -> ExportSettings:
    """What the graphs do not hold."""
    config = policy.config
    tokens = policy.tokenizer
    return ExportSettings(
        version=__version__,
        images=inputs.images,
        state=inputs.state,
        text=inputs.text,
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
        family=family,
        n_action_steps=config.n_action_steps,
        delta_dims=config.delta_dims,
        action_names=list(config.action_names),
        control_rate=config.control_rate,
        decodings=dict(config.decodings),
    )


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
            for name in settings.images.cameras
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
