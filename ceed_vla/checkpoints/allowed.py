"""Which other policies of LeRobot are loaded, and which strings their config.json may contain.

LeRobot builds some policies from names in config.json: it loads a tokenizer or a vision encoder
from a hub or a folder, may run code from there (``trust_remote_code``), or prompts for permission
on standard input. Therefore a type is on this list only if its construction uses strings to choose
among a few parts of LeRobot and for nothing else, and each string must be one of these choices. The
check precedes LeRobot's reading of config.json and its import of the policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.devices import check_device_name
from ceed_vla.discovery import named_by_user
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import short
from ceed_vla.files import plain_name, read_json
from ceed_vla.folders import CONFIG

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# Type -> field -> the allowed strings. All other fields are numbers or lists of numbers.
POLICIES: dict[str, dict[str, tuple[str, ...]]] = {
    "act": {
        "vision_backbone": _RESNETS,
        "feedforward_activation": ("relu", "gelu", "glu"),
    },
    "diffusion": {
        "vision_backbone": _RESNETS,
        "noise_scheduler_type": ("DDPM", "DDIM"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        "prediction_type": ("epsilon", "sample"),
        "compile_mode": (
            "default",
            "reduce-overhead",
            "max-autotune",
            "max-autotune-no-cudagraphs",
        ),
        "scheduler_name": (
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "piecewise_constant",
        ),
    },
    "tdmpc": {},
    "vqbet": {"vision_backbone": _RESNETS},
}
# Fields that only training uses are dropped. LeRobot would download the pretrained weights of the
# backbone, although the checkpoint contains its weights.
_DROPPED = (
    "pretrained_backbone_weights",
    "pretrained_path",
    "pretrained_revision",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
    "license",
)
_MODES = ("MIN_MAX", "MEAN_STD", "IDENTITY", "QUANTILES", "QUANTILE10")
_KINDS = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")
_PEFT = "adapter_config.json"
_SHOWN = 4  # fields of a refused type in the message


def read_allowed(folder: Path, device: str) -> dict[str, Any]:
    """Read and check config.json of another LeRobot policy; set its device to `device`.

    The values include the type. If a package that the user named (`ceed_vla.discovery`) registers
    the type, no value is checked or dropped.

    Raises:
        CheckpointError: The type is not listed, or a field has a value that is not allowed.
    """
    values = read_json(folder / CONFIG)
    kind = values.get("type")
    if is_of_named_package(kind):
        return {**values, "device": device}
    texts = POLICIES.get(kind) if isinstance(kind, str) else None
    if texts is None:
        raise CheckpointError(_refusal(folder, kind, values))
    if values.get("use_peft") or (folder / _PEFT).exists(follow_symlinks=False):
        what = f"{folder} has adapters (use_peft, {_PEFT}), which are not loaded"
        raise CheckpointError(f"{what}; merge them into the weights first.")
    used = {name: value for name, value in values.items() if name not in _DROPPED}
    for name, value in used.items():
        _check_field(folder, name, value, texts)
    if "pretrained_backbone_weights" in values:
        used["pretrained_backbone_weights"] = None
    return {**used, "device": device}


def is_of_named_package(kind: object) -> bool:
    """Whether a policy's type was registered by a package that the user named."""
    from lerobot.configs import PreTrainedConfig

    if not isinstance(kind, str) or kind not in PreTrainedConfig.get_known_choices():
        return False
    module = str(PreTrainedConfig.get_choice_class(kind).__module__)
    # LeRobot's own types are always checked, even if the user names the package lerobot.
    return named_by_user(module) and module.partition(".")[0] != "lerobot"


def _refusal(folder: Path, kind: object, values: dict[str, Any]) -> str:
    """Why a type is not loaded, with the fields whose strings LeRobot would use as names."""
    names = [name for name, value in values.items() if isinstance(value, str)]
    names = [name for name in names if name not in ("type", "device", *_DROPPED)]
    names.sort(key=lambda name: not name.endswith(("_name", "_path")))
    fields = ", ".join(f"{short(name)[1:-1]}: {short(values[name])}" for name in names[:_SHOWN])
    with_fields = f" with {fields}" if fields else ""
    return (
        f"{folder} holds a policy of type {short(kind)}{with_fields}. This type is not loaded, "
        "because LeRobot may download files that its fields name, or run code in them. Loaded are "
        f"ceed_vla, {', '.join(POLICIES)}, and types of packages that you name with "
        "--discover_packages_path (policy_node: discover_packages). "
        "`ceed-vla convert` makes a ceed_vla checkpoint from a pi0_fast policy."
    )


def _check_field(folder: Path, name: str, value: Any, texts: dict[str, tuple[str, ...]]) -> None:
    """Raise `CheckpointError` if the value of a field is not allowed."""
    plain_name(name, f"{folder / CONFIG}: a field")
    if name == "type":
        return
    if name == "device":
        allowed = value is None or _is_device(value)
        expected = "a device"
    elif name in ("input_features", "output_features"):
        allowed = _are_features(value)
        expected = f"features, each with a type ({', '.join(_KINDS)}) and a shape"
    elif name == "normalization_mapping":
        allowed = _are_modes(value)
        expected = f"a mode ({', '.join(_MODES)}) for each of {', '.join(_KINDS)}"
    elif name in texts:
        allowed = isinstance(value, str) and value in texts[name]
        expected = f"one of {', '.join(texts[name])}"
    else:
        allowed = _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))
        expected = "a number or a list of numbers"
    if not allowed:
        problem = f"{name} is {short(value)}; it must be {expected}"
        raise CheckpointError(f"{folder / CONFIG}: {problem}. Copy the checkpoint again.")


def _is_device(value: object) -> bool:
    try:
        check_device_name(value)
    except ConfigError:
        return False
    return True


def _are_modes(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(kind in _KINDS and mode in _MODES for kind, mode in value.items())


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _are_features(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    for name, feature in value.items():
        plain_name(name, "The name of a feature")
        shape = feature.get("shape") if isinstance(feature, dict) else None
        if not isinstance(shape, list) or not all(type(side) is int for side in shape):
            return False
        if feature.get("type") not in _KINDS or feature.keys() - {"type", "shape"}:
            return False
    return True
