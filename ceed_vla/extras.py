"""Which parts of this package need which extra, and the error where one is not installed.

The base installation has the clients of a policy server, the command line and the robot's parts
that run without torch; everything heavier is an extra of setup.py. `EXTRAS` names a few modules of
each, whose absence means that the extra is not installed.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from ceed_vla.errors import ConfigError

SETUP = Path(__file__).resolve().parents[1] / "scripts" / "setup.sh"  # in a clone


@dataclass(frozen=True)
class Extra:
    """An extra.

    Attributes:
        purpose: What it is for.
        modules: Modules that are there if it is installed.
        includes: Extras that it contains.
        instead: Another way to get it.
    """

    purpose: str
    modules: tuple[str, ...]
    includes: tuple[str, ...] = ()
    instead: str = ""


EXTRAS = {
    "policy": Extra("policies with torch", ("torch", "transformers", "lerobot", "safetensors")),
    "sim": Extra(
        "the simulated table, evaluation, plots",
        ("mujoco", "gymnasium", "imageio", "imageio_ffmpeg", "matplotlib", "plotly"),
    ),
    "train": Extra(
        "data sets, training and distillation",
        ("accelerate", "datasets", "pandas", "pyarrow", "av", "tensorboard", "matplotlib"),
        includes=("policy",),
    ),
    "ros2": Extra(
        "ROS 2 from wheels, without a ROS distribution",
        ("rclpy", "sensor_msgs"),
        instead="or source a ROS 2 installation that has the packages of package.xml",
    ),
    "bags": Extra("data sets from bags", ("rosbags",)),
    "vlm": Extra(
        "OpenVLA, pi0-FAST and image-text models, LoRA",
        ("peft", "timm", "sentencepiece", "scipy", "num2words"),
        includes=("policy",),
    ),
    "edge": Extra("running exports, without torch", ("onnxruntime",)),
    "prompts": Extra(
        "running exports of language models, without torch", ("tokenizers",), includes=("edge",)
    ),
    "export": Extra("making exports", ("onnx", "onnxscript", "onnxruntime"), includes=("policy",)),
    "cluster": Extra("episodes on a Ray cluster", ("ray",)),
    "viz": Extra("recordings for Rerun's viewer", ("rerun",)),
    "metaworld": Extra("Meta-World's tasks", ("metaworld",), includes=("policy", "sim")),
    "libero": Extra("LIBERO's tasks", ("libero", "robosuite"), includes=("policy", "sim")),
}
# Module -> the first extra that has it; of the packages that come with others, too.
EXTRA_OF = {
    "torchvision": "policy",
    "huggingface_hub": "policy",
    "einops": "policy",
    "torchcodec": "train",
    **{module: name for name in reversed(EXTRAS) for module in EXTRAS[name].modules},
}


class MissingExtraError(ConfigError, ImportError):
    """Something that was asked for needs an extra that is not installed."""


def contained(*extras: str) -> tuple[str, ...]:
    """Extras, each behind those that it includes."""
    return tuple(
        dict.fromkeys(name for extra in extras for name in (*EXTRAS[extra].includes, extra))
    )


def lacks(*extras: str) -> list[str]:
    """Modules of extras that are not installed."""
    modules = (module for name in contained(*extras) for module in EXTRAS[name].modules)
    return [module for module in modules if not installed(module)]


def require(what: str, *extras: str) -> None:
    """Raise `MissingExtraError` unless the extras that `what` needs are installed."""
    if absent := lacks(*extras):
        raise _missing(what, absent[0], *extras)


def require_module(what: str, module: str) -> None:
    """Raise `MissingExtraError` unless a module that `what` needs is installed."""
    if not installed(module):
        raise _missing(what, module, EXTRA_OF[module])


def explained(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError | MissingExtraError:
    """The error to raise where `what` cannot be imported: it names the extra, if one is known."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return error
    return _missing(what, module, EXTRA_OF[module])


def remedy(*extras: str) -> str:
    """How to install extras, in a clone or beside a wheel."""
    if SETUP.is_file():
        text = f"run `{' '.join(('scripts/setup.sh', *extras))}`"
    else:
        text = f"pip install 'ceed_vla[{','.join(extras)}]'"
    return ", ".join((text, *(EXTRAS[name].instead for name in extras if EXTRAS[name].instead)))


def again(*extras: str) -> str:
    """How to repair an installation."""
    if SETUP.is_file():
        return remedy(*extras)
    chosen = f"[{','.join(extras)}]" if extras else ""
    return f"pip install --upgrade 'ceed_vla{chosen}'"


def _missing(what: str, module: str, *extras: str) -> MissingExtraError:
    return MissingExtraError(f"{what} needs {module}, which is not installed: {remedy(*extras)}.")


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None
