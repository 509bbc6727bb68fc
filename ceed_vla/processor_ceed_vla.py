"""Preprocessor and postprocessor of a new policy: the backbone's own steps, state normalisation,
batching.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from lerobot.processor import (
    DataProcessorPipeline,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import ObservationError, raised_as

LEAST_DEVIATION = 1e-3  # of a dimension of a feature, in its own units


def make_ceed_vla_pre_post_processors(
    config: CeedVLAConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    dataset_meta: Any | None = None,
    instructions: Iterable[str] | None = None,
) -> tuple[CheckedPipeline, CheckedPipeline]:
    """Make the LeRobot pipelines (preprocessor, postprocessor) of a new policy.

    Args:
        config: The policy's configuration.
        dataset_stats: LeRobot's statistics, with mean and standard deviation of the state.
        dataset_meta: LeRobot's metadata of the dataset.
        instructions: Instructions for the backbone's own steps, from which the compact backbone
            builds its vocabulary; those of the metadata if None.

    Returns:
        Preprocessor and postprocessor.
    """
    if instructions is None:
        # lerobot-train stores the metadata in this attribute.
        meta = dataset_meta or getattr(config, "_runtime_dataset_meta", None)
        instructions = [] if meta is None else [str(task) for task in meta.tasks.index]
    stats = None
    if dataset_stats is not None:  # a dataset may have more features than the policy reads
        used = {**(config.input_features or {}), **(config.output_features or {})}
        stats = {name: dict(values) for name, values in dataset_stats.items() if name in used}
    widen(stats)
    steps = make_default_policy_processor_steps(config, stats)
    inputs = config.backbone.processor_steps(config.shape, list(instructions))
    pre, post = make_policy_processor_pipelines(
        [steps.rename_observations, steps.add_batch_dim, *inputs, steps.to_device, steps.normalize],
        [steps.unnormalize, steps.to_cpu],
    )
    return checked(pre), checked(post)


def widen(stats: Mapping[str, Any] | None) -> None:
    """Raise the deviations and ranges in statistics to a minimum, in place, so that normalisation
    never divides by zero.
    """
    for values in (stats or {}).values():
        if "std" in values:
            values["std"] = np.maximum(np.asarray(values["std"]), LEAST_DEVIATION)
        for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
            if low in values and high in values:
                values[high] = np.maximum(
                    np.asarray(values[high]), np.asarray(values[low]) + LEAST_DEVIATION
                )


class CheckedPipeline(DataProcessorPipeline[Any, Any]):
    """A LeRobot pipeline whose errors name the type of the data that a step cannot read."""

    def __call__(self, data: Any) -> Any:
        advice = "pass a batched observation of the environment, or the policy's actions."
        with raised_as(
            ObservationError, f"The {self.name} cannot read a {type(data).__name__}", advice
        ):
            return super().__call__(data)


def checked(pipeline: DataProcessorPipeline[Any, Any]) -> CheckedPipeline:
    """The same pipeline as a `CheckedPipeline`."""
    return CheckedPipeline(
        **{item.name: getattr(pipeline, item.name) for item in fields(pipeline) if item.init}
    )
