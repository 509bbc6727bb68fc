"""Decoding configurations: wrong values, names, and LeRobot's configuration files."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from multiprocessing.reduction import ForkingPickler

import draccus
import pytest

import ceed_vla.decoding
from ceed_vla.decoding import DecodingConfig, find_decoder, named_config
from ceed_vla.decoding.measures import mass_near
from ceed_vla.decoding.registry import find_exit
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
        ("watch", "all"),
        ("exits", 3),
        ("window", 0),
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


@pytest.mark.parametrize("rule", [{"max_iterations": 2}, {"confidence": 0.5}, {"deadline_s": 0.1}])
def test_exit_rules_of_ar_are_refused_and_not_ignored(rule: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(rule))):
        DecodingConfig(method="ar", **rule)
    with pytest.raises(ConfigError, match=r"'nobodys3'; known: .*--discover_packages_path"):
        DecodingConfig(exits=("nobodys3",))
    assert not DecodingConfig(**rule).strict


def test_the_defaults_are_strict() -> None:
    assert DecodingConfig().strict
    assert DecodingConfig(method="ar").strict
    assert not DecodingConfig(watch="executed").strict


def test_names() -> None:
    ceed, some = DecodingConfig(max_iterations=2, watch="executed"), {"watch": "executed"}
    expected = {
        "ar": DecodingConfig(method="ar"),
        "ar_h": DecodingConfig(method="ar", **some),
        "jacobi": DecodingConfig(),
        "jacobi_h": DecodingConfig(**some),
        "jacobi_random": DecodingConfig(guess="random"),
        "ceed": ceed,
        "ceed_mid": replace(ceed, guess="mid"),
        "ceed_fresh": replace(ceed, tail="fresh"),
        "cap3_fresh_mid": DecodingConfig(max_iterations=3, tail="fresh", guess="mid", **some),
        "cap2": DecodingConfig(max_iterations=2, **some),
        "conf0.2_cap3": DecodingConfig(max_iterations=3, confidence=0.2, **some),
        "conf.5_mid": DecodingConfig(confidence=0.5, guess="mid", **some),
    }
    for name, config in expected.items():
        assert named_config(name, ceed) == config, name
        assert named_config(config, ceed) is config
    for wrong in (
        "CEED",
        "",
        None,
        3,
        "cap",
        "cap2_",
        "mid",
        "_",
        "h",
        "ar_mid",
        "ceed_h",
        "cap2_cap",
        "c" * 99,
    ):
        with pytest.raises(ConfigError, match=r"Unknown decoder .*ceed, ar, jacobi"):
            named_config(wrong, ceed)  # type: ignore[arg-type]
    for wrong, reason in {
        "cap0": "its cap K is 0",
        "conf1.5_cap2": "its confidence P",
        "ar_cap2": "no iterations",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            named_config(wrong, ceed)


@dataclass
class Holder:
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


@pytest.mark.parametrize(
    "config",
    [
        DecodingConfig(),
        DecodingConfig(max_iterations=2, watch="executed", confidence=0.7, deadline_s=0.05, seed=3),
        DecodingConfig(method="ar", guess="mid", window=3),
    ],
)
def test_survives_draccus(config: DecodingConfig, tmp_path) -> None:
    path = tmp_path / "config.json"
    with draccus.config_type("json"):
        path.write_text(json.dumps(draccus.encode(Holder(config))))
        assert draccus.parse(Holder, config_path=path, args=[]).decoding == config


def test_can_be_set_from_the_command_line() -> None:
    parsed = draccus.parse(
        Holder, args=["--decoding.max_iterations=3", "--decoding.watch=executed"]
    )
    assert parsed.decoding == DecodingConfig(max_iterations=3, watch="executed")


def test_a_decoding_goes_to_another_process() -> None:
    config = named_config("conf0.2_cap2")
    assert config.decoder.shown == "jacobi"
    assert ForkingPickler.dumps(config)
    again = copy.copy(config)
    assert again == config
    assert "decoder" not in vars(again)
    assert again.decoder is config.decoder


def test_long_names_are_unknown() -> None:
    """A checkpoint's own name may stand for any text, and a name may be arbitrarily long."""
    with pytest.raises(ConfigError, match="Unknown decoder 'cap2_cap2"):
        named_config("risk0.05", own={"risk0.05": "cap2_" * 40})
    with pytest.raises(ConfigError, match="Unknown decoder 'previous'"):
        named_config("previous")
    with pytest.raises(ConfigError, match=r"decoding\.method is 'j+'; known"):
        find_decoder("j" * 99)


def test_names_that_the_package_lacks() -> None:
    with pytest.raises(AttributeError, match=r"'ceed_vla\.decoding' has no attribute 'speculate'"):
        _ = ceed_vla.decoding.speculate
    assert "decode_block" in dir(ceed_vla.decoding)
    assert ceed_vla.decoding.exits.mass_near is mass_near  # its former place
    with pytest.raises(AttributeError, match="no attribute 'mass_far'"):
        _ = ceed_vla.decoding.exits.mass_far
    assert find_decoder("jacobi").home == "ceed_vla.decoding.decoders"
    assert find_exit("cap2").home == "ceed_vla.decoding.exits"
