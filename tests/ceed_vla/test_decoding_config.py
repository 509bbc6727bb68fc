"""Decoding configurations: bad values, names, and the way through LeRobot's configuration files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import draccus
import pytest

from ceed_vla.decoding import DecodingConfig, named_config
from ceed_vla.errors import CeedVLAError, ConfigError


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("method", "diffusion"),
        ("guess", "prompt"),
        ("guess", None),
        ("max_iterations", 0),
        ("max_iterations", 1.5),
        ("max_iterations", True),
        ("stable_iterations", 0),
        ("executed_steps", -1),
        ("tolerance_bins", -1),
        ("tolerance_bins", (1, -2)),
        ("tolerance_bins", ()),
        ("tolerance_bins", 0.5),
        ("tolerance_bins", "3"),
        ("confidence", 0.0),
        ("confidence", 1.1),
        ("confidence", float("nan")),
        ("confidence", "high"),
        ("deadline_s", 0.0),
        ("deadline_s", float("inf")),
        ("deadline_s", "soon"),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_bad_values_are_named(field_name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field_name) as caught:
        DecodingConfig(**{field_name: value})
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, CeedVLAError)


@pytest.mark.parametrize(
    "rule", [{"max_iterations": 2}, {"tolerance_bins": 1}, {"confidence": 0.5}, {"deadline_s": 0.1}]
)
def test_exit_rules_of_ar_are_refused_and_not_ignored(rule: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(rule))):
        DecodingConfig(method="ar", **rule)
    assert not DecodingConfig(**rule).strict


def test_the_defaults_are_strict() -> None:
    assert DecodingConfig().strict
    assert DecodingConfig(method="ar").strict
    assert DecodingConfig(tolerance_bins=(0, 0)).strict
    assert not DecodingConfig(executed_steps=4).strict


def test_names() -> None:
    ceed = DecodingConfig(max_iterations=2, executed_steps=4)
    assert named_config("ar", ceed) == DecodingConfig(method="ar")
    assert named_config("jacobi", ceed).strict
    assert named_config("ceed", ceed) is ceed
    own = replace(ceed, guess="mid")
    assert named_config(own, ceed) is own
    for wrong in ("CEED", "", None, 3):
        with pytest.raises(ConfigError, match="choose one of ar, jacobi, ceed"):
            named_config(wrong, ceed)  # type: ignore[arg-type]


@dataclass
class Holder:
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


@pytest.mark.parametrize(
    "config",
    [
        DecodingConfig(),
        DecodingConfig(max_iterations=2, executed_steps=4, confidence=0.7, deadline_s=0.05, seed=3),
        DecodingConfig(tolerance_bins=2, stable_iterations=2),
        DecodingConfig(tolerance_bins=(1, 1, 1, 2, 2, 2, 0)),
    ],
)
def test_survives_draccus(config: DecodingConfig, tmp_path) -> None:
    path = tmp_path / "config.json"
    with draccus.config_type("json"):
        path.write_text(json.dumps(draccus.encode(Holder(config))))
        assert draccus.parse(Holder, config_path=path, args=[]).decoding == config


def test_can_be_set_from_the_command_line() -> None:
    parsed = draccus.parse(Holder, args=["--decoding.max_iterations=3", "--decoding.tolerance_bins=[1,0]"])
    assert parsed.decoding == DecodingConfig(max_iterations=3, tolerance_bins=(1, 0))
    assert draccus.parse(Holder, args=["--decoding.tolerance_bins=2"]).decoding.tolerance_bins == 2
