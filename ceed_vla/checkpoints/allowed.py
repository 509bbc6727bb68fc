"""Which of LeRobot's other policies are loaded, and what the texts in their config.json may be.

LeRobot builds some policies from names in config.json: it takes a tokenizer or a vision encoder
from a hub or from a folder, lets it run code that lies there (``trust_remote_code``), or asks on
standard input whether it may. So a type is on this list only if its construction does no more with
a text than choose among a few things that LeRobot has; and a text must be one of these. This is
checked before LeRobot reads config.json, or imports the policy.
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
# Type -> field -> the texts that it may hold. All other fields hold numbers, or lists of numbers.
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
# Training wrote these, and nothing that acts reads them: they are dropped. Pretrained weights of
# the backbone are in the checkpoint by now, and would be downloaded.
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
    """config.json of another LeRobot policy, its type included, checked, and for `device`.

    The type may also be one of a package that the user named (`ceed_vla.discovery`); then nothing
    is checked or dropped.

    Raises:
        CheckpointError: A type that is not listed, or a field with what it may not hold.
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
    kept = {name: value for name, value in values.items() if name not in _DROPPED}
    for name, value in kept.items():
        _check_field(folder, name, value, texts)
    if "pretrained_backbone_weights" in values:
        kept["pretrained_backbone_weights"] = None
    return {**kept, "device": device}


def is_of_named_package(kind: object) -> bool:
    """Whether a policy's type was registered by a package that the user named."""
    from lerobot.configs import PreTrainedConfig

    if not isinstance(kind, str) or kind not in PreTrainedConfig.get_known_choices():
        return False
    module = str(PreTrainedConfig.get_choice_class(kind).__module__)
    # LeRobot's own stay what they are, whoever names LeRobot.
    return named_by_user(module) and module.partition(".")[0] != "lerobot"


def _refusal(folder: Path, kind: object, values: dict[str, Any]) -> str:
    """Why a type is not loaded, with the fields whose texts LeRobot would follow."""
    names = [name for name, value in values.items() if isinstance(value, str)]
    names = [name for name in names if name not in ("type", "device", *_DROPPED)]
    names.sort(key=lambda name: not name.endswith(("_name", "_path")))
    fields = ", ".join(f"{short(name)[1:-1]}: {short(values[name])}" for name in names[:_SHOWN])
    with_fields = f" with {fields}" if fields else ""
    return (
        f"{folder} holds a policy of type {short(kind)}{with_fields}. Such a type is not loaded, "
        "because LeRobot may fetch what its texts name, or run code that lies there. Loaded are "
        f"ceed_vla, {', '.join(POLICIES)}, and types of packages that you name with "
        "--discover_packages_path (policy_node: discover_packages). "
        "`ceed-vla convert` makes a ceed_vla checkpoint from a pi0_fast policy."
    )


def _check_field(folder: Path, name: str, value: Any, texts: dict[str, tuple[str, ...]]) -> None:
    """Raise `CheckpointError` for a field that holds what it may not."""
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
        expected = "a number or a list of numbers; no text is expected in it"
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
