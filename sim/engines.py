"""The engines that run the models of an evaluation: eager and compiled torch, and exports."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from copy import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig

from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.discovery import discovered
from ceed_vla.edge.settings import check_decoding
from ceed_vla.errors import CeedVLAError, ConfigError, VerificationError
from ceed_vla.export.cached import cached_policy
from ceed_vla.extras import installed, require
from ceed_vla.sim.decoders import Row
from ceed_vla.sim.edge_runner import EdgeRunner, arrays_of
from ceed_vla.sim.environment import Bundle
from ceed_vla.sim.rollout import PolicyRunner
from ceed_vla.sim.timing import PARTS, Probe, bare_parts, make_runner

if TYPE_CHECKING:
    from ceed_vla.edge import EdgePolicy

logger = logging.getLogger(__name__)

ENGINES = ("eager", "compiled", "edge", "auto", "fastest")


class Engine:
    """Eager torch, which runs every decoder.

    Args:
        bundles: Policy and processors by model.
    """

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        self.bundles = bundles

    def runs(self, model: str, decoding: DecodingConfig) -> bool:
        """Whether this engine runs a decoding of a model."""
        return True

    def runner(self, row: Row, executed_steps: int | None) -> PolicyRunner:
        """A runner of a row; its random guesses are the same in every run."""
        return make_runner(row, self.bundles, executed_steps)

    def parts(self) -> dict[str, Probe]:
        """Probes of the parts of a chunk (`PARTS`), by model."""
        return {model: bare_parts(bundle) for model, bundle in self.bundles.items()}


class CompiledEngine(Engine):
    """Compiled torch (`ceed_vla.compiled`), which shares the weights of `bundles`."""

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        super().__init__({model: _compiled(bundle) for model, bundle in bundles.items()})

    def runs(self, model: str, decoding: DecodingConfig) -> bool:
        return decoding.decoder.compiles


class EdgeEngine(Engine):
    """Exports (`ceed_vla.edge`), of the models that have one.

    Args:
        bundles: Policy and processors by model.
        exports: Exports by model.
    """

    def __init__(self, bundles: Mapping[str, Bundle], exports: Mapping[str, EdgePolicy]) -> None:
        super().__init__(bundles)
        self.exports = exports

    def runs(self, model: str, decoding: DecodingConfig) -> bool:
        try:
            check_decoding(decoding)
        except ConfigError:
            return False
        return model in self.exports

    def runner(self, row: Row, executed_steps: int | None) -> PolicyRunner:
        bundle = self.bundles[row.model]
        export = self.exports[row.model]
        return EdgeRunner(export, bundle, row.decoding, executed_steps, row.delay)

    def parts(self) -> dict[str, Probe]:
        """Probes of the models that have an export."""
        return {model: _export_parts(export) for model, export in self.exports.items()}


def resolved(name: str, config: Any) -> str:
    """The engine that an option ``engine`` stands for: "auto" is "edge" or "eager".

    Args:
        name: One of `ENGINES`.
        config: Options with `policy`, `env` and `device`.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if name != "auto":
        return name
    try:
        _check_edge(config.env, config.device or "cpu")
        cached_policy(config.policy.given(), 1, (), ",".join(discovered()))
    except (ConfigError, VerificationError) as error:
        logger.info("The engine is eager. %s", error)
        return "eager"
    return "edge"


def open_engines(
    name: str,
    bundles: Mapping[str, Bundle],
    paths: Mapping[str, str],
    env: EnvConfig,
    pin: str = "auto",
) -> dict[str, Engine]:
    """Open the engines that an option ``engine`` chooses.

    Args:
        name: One of `ENGINES`, except "auto", see `resolved`.
        bundles: Policy and processors by model.
        paths: Checkpoints by model.
        env: The environment.
        pin: Cores of the threads of exports, see `ceed_vla.scheduling.Placement`.

    Raises:
        ConfigError: The policy, or the environment, does not run in the engine.
    """
    engines: dict[str, Engine] = {}
    if name in ("eager", "fastest"):
        engines["eager"] = Engine(bundles)
    if name in ("compiled", "fastest"):
        engines["compiled"] = CompiledEngine(bundles)
    if name in ("edge", "fastest"):
        try:
            engines["edge"] = _edge_engine(bundles, paths, env, pin)
        except CeedVLAError as error:
            if name == "edge":
                raise
            logger.info("The engine edge is not used. %s", error)
    return engines


def drives(engines: Mapping[str, Engine]) -> bool:
    """Whether episodes run on exports, because no other engine was opened."""
    return list(engines) == ["edge"]


def engines_of(engines: Mapping[str, Engine], model: str, decoding: DecodingConfig) -> list[str]:
    """Names of the engines that run a decoding of a model; eager if none of them does."""
    return [name for name, own in engines.items() if own.runs(model, decoding)] or ["eager"]


def with_eager(engines: Mapping[str, Engine], bundles: Mapping[str, Bundle]) -> dict[str, Engine]:
    """The engines with eager torch, for rows that no other one runs."""
    return {"eager": Engine(bundles), **engines}


def _check_edge(env: EnvConfig, device: str) -> None:
    """Raise `ConfigError` unless exports run here, in this environment and on this device."""
    if not installed("onnxruntime"):
        require("The engine edge", "export")
    if any(processor.steps for processor in env.get_env_processors()):
        raise ConfigError(
            f"--env.type={env.type} has processors of its own, which need torch; use the engine "
            "eager."
        )
    if device != "cpu":
        raise ConfigError(f"The device is {device}; exports run on cpu. Use the engine eager.")


def _edge_engine(
    bundles: Mapping[str, Bundle], paths: Mapping[str, str], env: EnvConfig, pin: str
) -> EdgeEngine:
    """Export the models that can be exported; the policy must be among them."""
    exports = {}
    for model, bundle in bundles.items():
        try:
            _check_edge(env, str(bundle[0].config.device))
            exports[model] = cached_policy(
                paths[model], torch.get_num_threads(), (), ",".join(discovered()), pin
            )
        except CeedVLAError as error:
            if model == "policy":
                raise
            logger.info("The engine edge does not run the %s. %s", model, error)
    return EdgeEngine(bundles, exports)


def _compiled(bundle: Bundle) -> Bundle:
    policy = copy(bundle[0])
    policy._modules = dict(policy._modules)
    policy.backbone = compiled(policy.backbone)
    return policy, *bundle[1:]


def _export_parts(export: EdgePolicy) -> Probe:
    """As `bare_parts`, for an export; its checks are part of "process"."""
    n = export.vocabulary.block_length

    @export.placement.pinned()
    def probe(observation: dict[str, Any], instruction: str) -> dict[str, float]:
        times = [time.perf_counter()]
        prepared = export.prepare(arrays_of(observation), instruction)
        times += [time.perf_counter()] * 2
        prefix = export.prefill(prepared)
        times.append(time.perf_counter())
        for k in (n - 1, 1):
            export.read(prefix, np.zeros((1, k), dtype=np.int64))
            times.append(time.perf_counter())
        return {
            name: after - before
            for name, (before, after) in zip(PARTS, pairwise(times), strict=True)
        }

    return probe
