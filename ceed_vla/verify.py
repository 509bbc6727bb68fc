"""`ceed-vla verify`: compare a model with the outputs of its reference implementation.

Inputs, action tokens and actions are compared. A folder holds ``images.npz`` (``images`` (cases, H,
W, 3) uint8) and ``expected.json`` (``unnorm_key``, ``chunk``, and for every case prompt, input ids,
sum of the pixel values, action tokens and the first action).
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ceed_vla.backbones.openvla.inputs import IDS_KEY, PIXELS_KEY, OpenVLAInputsStep
from ceed_vla.backbones.openvla.model import OpenVLABackbone
from ceed_vla.backbones.transformers.config import DTYPES
from ceed_vla.checkpoints import load
from ceed_vla.convert.config import ConvertConfig
from ceed_vla.convert.openvla import EXPECTED, published_policy
from ceed_vla.devices import check_device
from ceed_vla.errors import CheckpointError, ConfigError, VerificationError, raised_as
from ceed_vla.fields import check_fields, chosen, fits, short
from ceed_vla.files import read_json

IMAGES = "images.npz"
LARGEST_IMAGES = 2**31  # [bytes]
CASE = {
    "instruction": str,
    "prompt": str,  # may be missing
    "input_ids": list[int],
    "pixel_values_shape": list[int],
    "pixel_values_sum": float,
    "action_tokens": list[int],
    "first_action": list[float],
}
ACTION_TOLERANCE = 1e-6  # [action units]
PIXEL_TOLERANCE = 1e-7  # of the sum, per pixel value: the effect of rounding to float32


@dataclass
class VerifyConfig:
    """Compare a model with the outputs of its reference implementation, one line per case.

    The exit code is 1 if a case differs.

    Attributes:
        folder: Folder of the model, images.npz and expected.json.
        policy_path: Check this converted checkpoint on the folder's cases, instead of the folder
            itself.
        dtype: Type of the weights: "float32" (as in the reference outputs), "auto" (as published),
            "bfloat16" or "float16".
        device: Device to run on.
    """

    folder: str
    policy_path: str = ""
    dtype: str = chosen("float32", ("auto", *DTYPES))
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        check_device(self.device)
        if self.policy_path and self.dtype != "float32":
            raise ConfigError(
                f"dtype is {self.dtype}, but policy_path is a checkpoint, which has its own type; "
                "leave dtype out."
            )


def read_cases(folder: str | Path) -> tuple[NDArray[np.uint8], list[dict[str, Any]], int, str]:
    """Read the images and reference outputs in a folder.

    Returns:
        Images (cases, H, W, 3), the reference outputs of each case, steps of a chunk, and the name
        of the dataset whose statistics un-normalise actions.

    Raises:
        CheckpointError: Files are missing, damaged, or of another format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"No folder at {folder}; give one with a model, {IMAGES} and {EXPECTED}."
        )
    values = read_json(folder / EXPECTED)
    with raised_as(
        CheckpointError,
        f"{folder / IMAGES} has no array 'images' that can be read",
        "copy it again.",
    ):
        with zipfile.ZipFile(folder / IMAGES) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_IMAGES:
            raise ValueError(f"it unpacks to {size / 1e9:.1f} GB")
        with np.load(folder / IMAGES, allow_pickle=False) as arrays:
            images = arrays["images"]
    cases = values.get("cases")
    if not isinstance(cases, list) or not cases or not isinstance(values.get("chunk"), int):
        raise CheckpointError(
            f"{folder / EXPECTED} needs a whole number 'chunk' and a list 'cases'."
        )
    for number, case in enumerate(cases):
        for key, kind in CASE.items():
            value = (
                case.get(key, "" if key == "prompt" else None) if isinstance(case, dict) else None
            )
            if not fits(value, kind):
                raise CheckpointError(
                    f"{folder / EXPECTED}: case {number} lacks {key!r}, or it has another type: "
                    f"{short(value)}."
                )
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
        or len(images) != len(cases)
    ):
        raise CheckpointError(
            f"{folder / IMAGES}: images are {images.shape} {images.dtype}, expected ({len(cases)}, "
            "H, W, 3) uint8: one RGB picture a case."
        )
    return images, cases, int(values["chunk"]), str(values.get("unnorm_key") or "")


def verify(config: VerifyConfig) -> str:
    """Decode all cases with AR and strict Jacobi; print a line for each, and return a summary.

    Raises:
        VerificationError: A case differs.
        CheckpointError: The folder cannot be read.
    """
    images, cases, chunk, unnorm_key = read_cases(config.folder)
    if config.policy_path:
        policy, pre, _ = load(config.policy_path, config.device)
    else:
        source = ConvertConfig(
            config.folder,
            weights="reference",
            dtype=config.dtype,
            unnorm_key=unnorm_key,
            chunk_size=chunk,
            device=config.device,
        )
        policy, pre, _ = published_policy(source)
    if not isinstance(policy.backbone, OpenVLABackbone):
        kind = policy.config.backbone.type
        raise CheckpointError(
            f"{config.policy_path} runs a {kind} model; the cases must be of OpenVLA."
        )
    if policy.config.chunk_size != chunk:
        raise CheckpointError(
            f"{config.policy_path} decodes chunks of {policy.config.chunk_size}, the cases hold "
            f"{chunk} actions; convert it with that --chunk_size."
        )
    wrong = 0
    for number, case in enumerate(cases):
        problems, facts = _check(policy, pre, images[number], case)
        wrong += bool(problems)
        print(
            f"case {number:>2}  {'DIFFERS' if problems else 'equal'}  {facts}  "
            f"{case['instruction']!r}"
        )
        for problem in problems:
            print(f"         {problem}")
    if wrong:
        raise VerificationError(f"{wrong} of {len(cases)} cases differ from the reference.")
    return f"all {len(cases)} cases equal the reference"


def _check(
    policy: Any, pre: Any, image: NDArray[np.uint8], case: dict[str, Any]
) -> tuple[list[str], str]:
    """The differences in a case, and a line of numbers about it."""
    step = next(step for step in pre.steps if isinstance(step, OpenVLAInputsStep))
    picture = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W)
    batch = pre({step.camera: picture.float() / 255, "task": case["instruction"]})
    problems = []
    prompt = step.text(case["instruction"])
    if prompt.lower() != str(case.get("prompt", prompt)).lower():
        problems.append(f"prompt: {prompt!r}, expected {case['prompt']!r}")
    elif "prompt" in case:  # use the reference's upper and lower case
        batch[IDS_KEY] = torch.tensor(
            [step.encode_text(case["prompt"])], device=batch[IDS_KEY].device
        )
    problems += _differences("input ids", batch[IDS_KEY][0].tolist(), case["input_ids"])
    pixels = batch[PIXELS_KEY]
    problems += _differences("pixel shape", list(pixels.shape), list(case["pixel_values_shape"]))
    off = abs(pixels.double().sum().item() - case["pixel_values_sum"])
    if not off <= PIXEL_TOLERANCE * pixels.numel():
        problems.append(
            f"pixel sum: {pixels.double().sum().item()!r}, expected {case['pixel_values_sum']!r}"
        )
    autoregressive = policy.decode(batch, "ar")
    jacobi = policy.decode(batch, "jacobi")
    for name, result in (("AR tokens", autoregressive), ("Jacobi tokens", jacobi)):
        ids = [policy.backbone.words - 1 - token for token in result.tokens[0].tolist()]
        problems += _differences(name, ids, case["action_tokens"])
    action = policy.tokenizer.values(autoregressive.tokens)[0, 0].cpu().numpy()  # (A,) float64
    expected = np.array(case["first_action"], dtype=np.float64)
    error = (
        float(np.abs(action - expected).max()) if action.shape == expected.shape else float("inf")
    )
    if not error <= ACTION_TOLERANCE:
        problems.append(f"first action: {action.tolist()}, expected {expected.tolist()}")
    n = autoregressive.tokens.shape[1]
    return (
        problems,
        (
            f"{len(case['input_ids'])} ids, pixel sum off by {off:.1e}, {n} tokens: AR "
            f"{autoregressive.forwards + 1} forwards, Jacobi {jacobi.forwards + 1}, action off by "
            f"{error:.1e}"
        ),
    )


def _differences(name: str, found: list[int], expected: list[int]) -> list[str]:
    if found == expected:
        return []
    if len(found) != len(expected):
        return [f"{name}: {len(found)} instead of {len(expected)}: {json.dumps(found)}"]
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    first = f"{wrong[0]}: {found[wrong[0]]} instead of {expected[wrong[0]]}"
    return [f"{name}: {len(wrong)} of {len(found)} differ, the first at {first}"]
