"""What a server promises of its policy, which a robot compares with itself before it moves.

`described` writes it into a greeting, `Contract.read` reads it at the other end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ceed_vla.serving.data_ranges import ACTION, Range
from ceed_vla.serving.predictor_types import PolicySpec
from ceed_vla.texts import shown

# Of a `PolicySpec`, what may differ after a restart of a server.
_MAY_DIFFER = ("checkpoint", "warmup_s", "engine", "decoding")


def described(
    spec: PolicySpec, keys: Mapping[str, str], ranges: Mapping[str, Range | str]
) -> dict[str, Any]:
    """The contract as a message.

    Args:
        spec: The policy's inputs and outputs.
        keys: Key of a client's observation -> the policy's feature; "" to ignore it.
        ranges: Of the training data, or why they are unknown.
    """
    observation = {}
    for key, feature in keys.items():
        if not feature:
            continue
        if feature in spec.cameras:
            channels, height, width = spec.cameras[feature]
            shape, dtype = [height, width, channels], "uint8"
        else:
            shape, dtype = [spec.states[feature]], "float32"
        observation[key] = {"feature": feature, "shape": shape, "dtype": dtype}
    return {
        "policy_type": spec.policy_type,
        "checkpoint": spec.checkpoint,
        "decoding": spec.decoding,
        "engine": spec.engine,
        "observation": observation,
        "prompt": {"dtype": "str", "example": spec.example_instruction},
        "actions": {
            "shape": [spec.chunk_steps, spec.action_dim],
            "dtype": "float32",
            "n_action_steps": spec.n_action_steps,
            "increments": list(spec.delta_dims),
            "names": list(spec.action_names),
            "units": list(spec.units),
        },
        "control_rate_hz": spec.control_rate,
        "ranges": {
            feature: {
                "low": found.low,
                "high": found.high,
                "source": found.source,
                "measured": found.measured,
            }
            for feature, found in ranges.items()
            if isinstance(found, Range)
        },
    }


@dataclass(frozen=True)
class Contract:
    """What a server promises.

    Attributes:
        spec: The policy's inputs and outputs, by the names of its features.
        keys: Feature -> the key under which the server wants it.
        ranges: Ranges of the training data that the server knows.
        weights: Hash of the policy's weights; "" if the server does not tell it.
        settings: Hash of its other files, which hold action bins and statistics; "" as above.
    """

    spec: PolicySpec
    keys: Mapping[str, str]
    ranges: Mapping[str, Range]
    weights: str
    settings: str = ""

    @classmethod
    def read(cls, greeting: Mapping[str, Any]) -> Contract:
        """Read the contract of a greeting.

        Raises:
            Exception: Of many types, if it does not describe a policy.
        """
        cameras: dict[str, tuple[int, int, int]] = {}
        states: dict[str, int] = {}
        keys: dict[str, str] = {}
        for key, feature in greeting["observation"].items():
            shape = tuple(int(size) for size in feature["shape"])
            name = str(feature.get("feature", key))
            keys[name] = str(key)
            if len(shape) == 3:
                cameras[name] = (shape[2], shape[0], shape[1])
            else:
                states[name] = int(shape[0])
        actions = greeting["actions"]
        steps, dim = (int(size) for size in actions["shape"])
        executed = int(actions["n_action_steps"])
        if not (1 <= executed <= steps and dim >= 1):
            raise ValueError(f"chunks of {steps} steps, of which {executed} are executed")
        lengths = {**states, ACTION: dim}
        return cls(
            PolicySpec(
                checkpoint=str(greeting.get("checkpoint", "")),
                policy_type=str(greeting["policy_type"]),
                cameras=cameras,
                states=states,
                action_dim=dim,
                chunk_steps=steps,
                n_action_steps=executed,
                warmup_s=0.0,
                delta_dims=tuple(int(number) for number in actions["increments"]),
                decoding=str(greeting.get("decoding", "")),
                engine=str(greeting.get("engine", "")),
                action_names=tuple(str(name) for name in actions.get("names", ())),
                units=tuple(str(unit) for unit in actions.get("units", ())),
                control_rate=float(greeting.get("control_rate_hz", 0.0)),
                example_instruction=str(greeting.get("prompt", {}).get("example", "move")),
            ),
            keys,
            {
                str(feature): _range(found, lengths[feature])
                for feature, found in greeting.get("ranges", {}).items()
            },
            str(greeting.get("checkpoint_hash", "")),
            str(greeting.get("settings_hash", "")),
        )

    def difference(self, other: Contract) -> str:
        """How another contract differs in what a robot depends on; "" if it does not."""
        pairs: dict[str, tuple[Any, Any]] = {
            "weights": (self.weights, other.weights),
            "settings": (self.settings, other.settings),
        }
        for item in fields(PolicySpec):
            if item.name not in _MAY_DIFFER:
                pairs[item.name] = getattr(self.spec, item.name), getattr(other.spec, item.name)
        return next(
            (
                f"{name} was {shown(before)} and is {shown(after)}"
                for name, (before, after) in pairs.items()
                if before != after
            ),
            "",
        )


def _range(found: Mapping[str, Any], length: int) -> Range:
    low, high = (np.asarray(found[end], np.float64) for end in ("low", "high"))
    if low.shape != (length,) or high.shape != (length,) or not np.isfinite([low, high]).all():
        raise ValueError(f"a range of {low.shape} and {high.shape} values, expected {length}")
    return Range(low, high, str(found["source"]), bool(found["measured"]))
