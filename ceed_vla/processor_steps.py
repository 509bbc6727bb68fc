"""Validation of a checkpoint's processors: only listed steps with valid settings are built.

LeRobot imports and calls any class that a processor's file names, and some of its registered steps
download models and run their code. So only these steps are allowed: the steps that this package
writes; for other policies, LeRobot's own steps without a model, path or hub name in their settings;
and in both cases steps of packages that the user has named (`ceed_vla.discovery`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ceed_vla.devices import check_device, check_device_name
from ceed_vla.discovery import named_by_user
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.fields import Interval, describe, fits, short
from ceed_vla.files import plain_name, read_json
from ceed_vla.folders import POSTPROCESSOR, PREPROCESSOR, PROCESSOR_FILES
from ceed_vla.weights import opened

if TYPE_CHECKING:
    from lerobot.configs import PreTrainedConfig

NORMALIZER = "normalizer_processor"
UNNORMALIZER = "unnormalizer_processor"
DEVICE = "device_processor"
MOST_STEPS = 64
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e9  # of a state dimension that moves, in its own units

# Normalisation mode -> the statistics that it uses.
_STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}

Maker = Callable[..., Any]


def _takes(**kinds: Any) -> Maker:
    """Make a function that validates the settings of a step, in place of the step's class.

    Args:
        kinds: Setting -> its type, or a pair of its type and the allowed values; all other settings
            are an error.
    """

    def check(**settings: Any) -> None:
        for name, value in settings.items():
            hint, allowed = kinds[name] if isinstance(kinds[name], tuple) else (kinds[name], None)
            if not fits(value, hint, allowed):
                raise ConfigError(
                    f"{name} is {short(value)}; it must be {describe(hint, allowed)}."
                )
        if "device" in settings:
            check_device_name(settings["device"])

    return check


_AFTER = (UNNORMALIZER, "absolute_actions_processor")  # allowed only in the postprocessor
_NORMALISE = _takes(
    features=dict[str, Any],
    norm_map=dict[str, str],
    eps=(float, Interval("(0, 1e-3]")),
    normalize_observation_keys=list[str] | None,
)
_PLAIN: dict[str, Maker] = {
    "rename_observations_processor": _takes(rename_map=dict[str, str]),
    "to_batch_processor": _takes(),
    DEVICE: _takes(
        device=str, float_dtype=(str | None, ("float32", "float16", "bfloat16", "float64"))
    ),
    NORMALIZER: _NORMALISE,
    UNNORMALIZER: _NORMALISE,
    "relative_actions_processor": _takes(
        enabled=bool, exclude_joints=list[str] | None, action_names=list[str] | None
    ),
    "absolute_actions_processor": _takes(enabled=bool),
    "pi0_fast_prepare_state_tokenizer_processor_step": _takes(),
}
_OTHERS = ("pi0_new_line_processor", "smolvla_new_line_processor", "observation_processor")
_OF_OTHERS: dict[str, Maker] = {**_PLAIN, **dict.fromkeys(_OTHERS, _takes())}
_TOKENIZER = _takes(
    max_length=(int, Interval("[1, 65536]")),
    task_key=str,
    padding_side=(str, ("left", "right")),
    padding=(str, ("max_length", "longest", "do_not_pad")),
    truncation=bool,
    tokenizer_name=str | None,
)

# Steps of LeRobot's checkpoints that conversion reads but does not run. It copies the tokenizer and
# omits the steps in `REMOTE_CODE`.
REMOTE_CODE = ("action_tokenizer_processor",)
CONVERTED: dict[str, Maker] = {
    **_PLAIN,
    "tokenizer_processor": _TOKENIZER,
    **dict.fromkeys(REMOTE_CODE, dict),
}


@dataclass(frozen=True)
class Step:
    """One entry of a processor's file; `state` is the file of its tensors."""

    file: Path
    name: str
    settings: dict[str, Any]
    state: Path | None

    def __str__(self) -> str:
        return f"{self.file}: the step {self.name!r}"

    def error(self, problem: str) -> CheckpointError:
        """Make an error about this step, for the caller to raise."""
        return CheckpointError(f"{self} {problem}")

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of its state, or None if there is none."""
        if self.state is None:
            return None
        with opened(self.state) as tensors:
            if name not in tensors.keys():  # noqa: SIM118  (not a mapping)
                return None
            if math.prod(tensors.get_slice(name).get_shape()) > 1e6:
                raise self.error(
                    f"has over a million values in {name!r} of {self.state.name}; copy it again."
                )
            return tensors.get_tensor(name)


def read_steps(folder: Path, name: str, allowed: dict[str, Maker]) -> list[Step]:
    """Read and validate the steps of a processor's file.

    Args:
        folder: The checkpoint.
        name: One of `PROCESSOR_FILES`.
        allowed: Registered name -> a callable that accepts valid settings and raises an error
            otherwise.

    Raises:
        CheckpointError: A step is not allowed, or has other settings or files.
    """
    file = folder / name
    entries = read_json(file).get("steps")
    if (
        not isinstance(entries, list)
        or len(entries) > MOST_STEPS
        or not all(isinstance(e, dict) for e in entries)
    ):
        raise CheckpointError(
            f"{file} is not a processor's file: it must have 'steps', a list of at most "
            f"{MOST_STEPS} objects. Copy it again."
        )
    steps = [_read_step(file, entry, allowed) for entry in entries]
    names = [step.name for step in steps]
    if twice := {n for n in names if names.count(n) > 1}:
        raise CheckpointError(f"{file} has the step {min(twice)!r} twice; copy it again.")
    return steps


def _read_step(file: Path, entry: dict[str, Any], allowed: dict[str, Maker]) -> Step:
    name = entry.get("registry_name")
    if (
        not isinstance(name, str)
        or "class" in entry
        or not (name in allowed or _of_named_package(name))
    ):
        shown = str(name if isinstance(name, str) and "class" not in entry else entry.get("class"))[
            :200
        ]
        raise CheckpointError(
            f"{file} has a step {shown!r}, which could run code that the checkpoint names. Allowed "
            f"are {', '.join(sorted(allowed))}; for steps of another package, pass it with "
            "--discover_packages_path."
        )
    settings = entry.get("config", {})
    state = entry.get("state_file")
    if unknown := entry.keys() - {"registry_name", "config", "state_file"}:
        raise CheckpointError(
            f"{file}: the step {name!r} has the entry {min(unknown)!r}; copy it again."
        )
    if not isinstance(settings, dict) or ("state_file" in entry and state is None):
        raise CheckpointError(f"{file}: the step {name!r} has no settings, or an empty state_file.")
    path = None
    if state is not None:
        path = file.parent / plain_name(state, f"{file}: the state_file of the step {name!r}")
        if path.suffix != ".safetensors" or not path.is_file():
            raise CheckpointError(
                f"{file} names the state {state!r}, but there is no such *.safetensors file; copy "
                "it too."
            )
        with opened(path) as tensors:
            if wrong := [key for key in tensors.keys() if "." not in key]:  # noqa: SIM118  (not a mapping)
                raise CheckpointError(
                    f"{path} has the tensor {wrong[0][:100]!r}; names must be "
                    "<feature>.<statistic>. Copy it again."
                )
    step = Step(file, name, settings, path)
    if name in allowed:
        with raised_as(
            CheckpointError,
            f"{step} has settings that are not allowed",
            "copy it again.",
            CheckpointError,
        ):
            allowed[name](**settings)
    return step


def _of_named_package(name: str) -> bool:
    """Whether a package that the user has named, or the user's own script, registered a step."""
    from lerobot.processor import ProcessorStepRegistry

    if name not in ProcessorStepRegistry.list():
        return False
    module = str(ProcessorStepRegistry.get(name).__module__)
    return module == "__main__" or named_by_user(module)


def check_processors(folder: Path, config: Any) -> None:
    """Validate both processors of a checkpoint of this package: steps, settings and normalisation.

    Args:
        folder: The checkpoint.
        config: The policy's configuration.

    Raises:
        CheckpointError: A step is missing, not allowed, or does not fit.
    """
    own = _own_steps(config)
    pre = read_steps(folder, PREPROCESSOR, {n: kind for n, kind in own.items() if n not in _AFTER})
    post = read_steps(folder, POSTPROCESSOR, {n: own[n] for n in (*_AFTER, DEVICE)})
    if _is_relative(pre) != _is_relative(post):
        raise CheckpointError(
            f"{folder}: only one of the processors uses relative actions; copy both again."
        )
    _check_complete(folder / PREPROCESSOR, pre, (*config.backbone.steps, NORMALIZER, DEVICE))
    _check_complete(folder / POSTPROCESSOR, post, (UNNORMALIZER, DEVICE))
    for step in (*pre, *post):
        _check_step(step, own, config)
    check_device(next(step for step in post if step.name == DEVICE).settings.get("device", "cpu"))
    _check_normalisation(pre, post, config)
    for step in (*pre, *post):
        _check_normalised_features(step, config)


def _own_steps(config: Any) -> dict[str, Maker]:
    """The steps that this package writes for a policy, by their registered names."""
    from lerobot.processor import ProcessorStepRegistry

    # Another package's backbone may use any of this package's steps.
    ours = type(config.backbone).__module__.startswith("ceed_vla.")
    names = config.backbone.steps if ours else ProcessorStepRegistry.list()
    kinds = {
        name: ProcessorStepRegistry.get(name) for name in names if name.startswith("ceed_vla_")
    }
    own = {n: kind for n, kind in kinds.items() if kind.__module__.startswith("ceed_vla.")}
    return {**_PLAIN, **own}


def _is_relative(steps: list[Step]) -> bool:
    """Whether a processor uses relative actions."""
    return any(
        step.settings.get("enabled") for step in steps if step.name.endswith("_actions_processor")
    )


def has_relative_actions(folder: Path) -> bool:
    """Whether the preprocessor in a folder that `check_processors` accepts makes actions relative
    to the state; False without one.
    """
    file = folder / PREPROCESSOR
    steps = read_json(file)["steps"] if file.is_file() else []
    return any(
        entry.get("config", {}).get("enabled")
        for entry in steps
        if entry["registry_name"].endswith("_actions_processor")
    )


def _check_complete(file: Path, steps: list[Step], wanted: tuple[str, ...]) -> None:
    """Raise `CheckpointError` unless a processor has every `wanted` step."""
    if missing := set(wanted) - {step.name for step in steps}:
        raise CheckpointError(f"{file} lacks the step {min(missing)!r}; copy it again.")


def _check_step(step: Step, own: dict[str, Maker], config: Any) -> None:
    """Raise `CheckpointError` unless the settings of a step fit the policy."""
    if step.name.startswith("ceed_vla_") and step.name in own:
        problem = f"{step} does not fit config.json"
        with raised_as(CheckpointError, problem, "copy both again.", CheckpointError):
            own[step.name](**step.settings).check_policy(config.backbone, config.shape)
    if step.name == DEVICE and step.settings.get("float_dtype") not in (None, "float32"):
        raise step.error(
            f"changes the dtype to {step.settings['float_dtype']}; it must be float32, which the "
            "policy reads."
        )
    if step.name == "rename_observations_processor":
        read = set(config.input_features or {})
        lost = sorted(set(step.settings.get("rename_map", {})) & read)
        if lost:
            raise step.error(
                f"renames {lost[0]}, which the policy reads by that name; copy it again."
            )


def _check_normalised_features(step: Step, config: Any) -> None:
    """Raise `CheckpointError` if a step normalises other features than the policy has."""
    inputs = config.input_features or {}
    outputs = config.output_features or {}
    features = {NORMALIZER: {**inputs, **outputs}, UNNORMALIZER: outputs}.get(step.name)
    if features is None:
        return
    wanted = {
        name: (feature.type.value, tuple(feature.shape)) for name, feature in features.items()
    }
    # Older checkpoints of lerobot-train also normalise features that the policy does not use.
    found = {name: shape for name, shape in _shapes(step).items() if config.uses(name, shape[0])}
    if found != wanted:
        raise step.error("normalises other features than config.json has; copy both again.")


def check_foreign_processors(folder: Path, config: PreTrainedConfig) -> None:
    """Validate both processors of another LeRobot policy: steps and normalisation.

    Raises:
        CheckpointError: A step is not allowed, or the normalisation does not match config.json.
    """
    pre, post = (read_steps(folder, name, _OF_OTHERS) for name in PROCESSOR_FILES)
    _check_normalisation(pre, post, config)


def _check_normalisation(pre: list[Step], post: list[Step], config: PreTrainedConfig) -> None:
    """Raise `CheckpointError` unless the processors have the normalisation of the policy's
    training, with all statistics.
    """
    modes = {
        _name(kind): _name(mode)
        for kind, mode in getattr(config, "normalization_mapping", {}).items()
    }
    features = (
        (pre, NORMALIZER, config.input_features),
        (post, UNNORMALIZER, config.output_features),
    )
    for steps, name, declared in features:
        kinds = {feature.type.value for feature in (declared or {}).values()}
        used = [kind for kind in kinds if modes.get(kind, "IDENTITY") != "IDENTITY"]
        step = next((s for s in steps if s.name == name), None)
        if step is None:
            if used:
                file = steps[0].file if steps else "The processor"
                raise CheckpointError(
                    f"{file} lacks the step {name!r} for {', '.join(sorted(used))}; copy it again."
                )
            continue
        if {str(k): str(m) for k, m in step.settings.get("norm_map", {}).items()} != modes:
            raise step.error(
                f"has the modes {short(step.settings.get('norm_map'))}, but config.json has "
                f"{modes}; copy both again."
            )
        if step.settings.get("normalize_observation_keys") is not None:
            raise step.error(
                "normalises only some keys (normalize_observation_keys); it must be null, as in "
                "training."
            )
        for feature, (kind, shape) in _shapes(step).items():
            if (mode := modes.get(kind, "IDENTITY")) != "IDENTITY":
                _check_statistics(step, feature, kind, shape, mode)


def _check_statistics(
    step: Step, feature: str, kind: str, shape: tuple[int, ...], mode: str
) -> None:
    """Raise `CheckpointError` unless the statistics of one feature can normalise it."""
    if mode not in _STATISTICS:
        raise step.error(
            f"has the mode {mode!r}; it must be one of IDENTITY, {', '.join(_STATISTICS)}."
        )
    wanted = (shape[0], 1, 1) if kind == "VISUAL" else shape
    values = []
    for name in _STATISTICS[mode]:
        value = step.tensor(f"{feature}.{name}")
        if value is None or tuple(value.shape) != wanted or not value.is_floating_point():
            found = "none" if value is None else f"{tuple(value.shape)} {value.dtype}"
            raise step.error(
                f"needs {wanted} floats {name!r} of {feature} for {mode}; it has {found}. Copy it "
                "again."
            )
        if not bool((value.double().abs() <= LARGEST_SCALE).all()):
            raise step.error(
                f"has {name!r} of {feature} that is not finite or exceeds {LARGEST_SCALE:g}; copy "
                "it again."
            )
        values.append(value.double().flatten())
    width = values[1] if mode == "MEAN_STD" else values[1] - values[0]
    # Actions are only multiplied by their range, which may be empty if they never move.
    least = 0.0 if kind == "ACTION" and mode != "MEAN_STD" else SMALLEST_SCALE
    narrow = width < least
    if bool(narrow.any()):
        at = int(narrow.nonzero()[0])
        raise step.error(
            f"divides dimension {at} of {feature} by {float(width[at]):g} ({mode}); at least "
            f"{least:g} is needed. Widen the statistics of a dimension that never moves in the "
            "data, as training with this package does."
        )


def _shapes(step: Step) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Feature -> type and shape, from the normaliser's settings."""
    with raised_as(
        CheckpointError, f"{step} has features without type and shape", "copy it again."
    ):
        return {
            str(name): (str(feature["type"]), tuple(int(side) for side in feature["shape"]))
            for name, feature in step.settings["features"].items()
        }


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))
