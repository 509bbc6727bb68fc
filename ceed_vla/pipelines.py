"""LeRobot's processor pipelines, whose own errors are ours where they are called."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lerobot.processor import DataProcessorPipeline

from ceed_vla.errors import CeedVLAError, ObservationError, root_cause


class CheckedPipeline(DataProcessorPipeline[Any, Any]):
    """A LeRobot pipeline that says what it was given when a step cannot read it."""

    def __call__(self, data: Any) -> Any:
        try:
            return super().__call__(data)
        except CeedVLAError:
            raise
        except Exception as error:  # steps of LeRobot raise whatever Python does with a wrong type
            raise ObservationError(
                f"The {self.name} cannot read a {type(data).__name__} ({root_cause(error)}); pass what the environment "
                "gave, batched, or the policy's actions."
            ) from error


def checked(pipeline: DataProcessorPipeline[Any, Any]) -> CheckedPipeline:
    """`pipeline` as a `CheckedPipeline`."""
    return CheckedPipeline(**{item.name: getattr(pipeline, item.name) for item in fields(pipeline) if item.init})
