"""Runs one LeRobot checkpoint from raw observation to actions, in the inference worker's process or
thread.

The module itself imports neither torch nor lerobot, so that a node whose policy runs in another
process stays light.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ceed_vla.discovery import discover
from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError, NotFiniteError
from ceed_vla.ros_nodes.robot.failure_log import FailureLog
from ceed_vla.ros_nodes.robot.predictor_loading import declared_spec, load_policy
from ceed_vla.ros_nodes.robot.predictor_types import (
    BAD_IMAGE,
    BAD_INSTRUCTION,
    ENGINES,
    LOOK,
    NOT_FINITE,
    PolicySpec,
    PredictorSettings,
    Request,
    Response,
)
from ceed_vla.ros_nodes.robot.request_reader import InstructionError, RequestReader
from ceed_vla.ros_nodes.robot.texts import short

__all__ = [
    "BAD_IMAGE",
    "BAD_INSTRUCTION",
    "ENGINES",
    "LOOK",
    "NOT_FINITE",
    "PolicySpec",
    "Predictor",
    "PredictorSettings",
    "Request",
    "Response",
    "declared_spec",
]

logger = logging.getLogger(__name__)

_PLAN_CALLS = 10  # calls that time a plan
_LEAST_DEADLINE = 1e-4  # [s]; the first iteration runs in any case


class Predictor:
    """A loaded and warmed-up policy; `wait` sleeps for ``settings.delay_s``.

    Attributes:
        spec: The policy's inputs and outputs.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of a kind that cannot be served.
        ConfigError: The decoder name is unknown, or a package cannot be imported.
    """

    def __init__(
        self, settings: PredictorSettings, wait: Callable[[float], object] = time.sleep
    ) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        discover(settings.discover_packages, "discover_packages")
        self._settings = settings
        self._wait = wait
        self.spec = declared_spec(settings.checkpoint)
        self._policy, preprocess, self._postprocess = load_policy(settings, self.spec.policy_type)
        self._is_ceed = self.spec.policy_type == "ceed_vla"
        if settings.engine == "compiled":
            if not self._is_ceed:
                raise ConfigError(
                    f"engine is compiled; a {self.spec.policy_type} checkpoint supports only eager."
                )
            from ceed_vla.compiled import engine

            self._policy.backbone = engine.compiled(self._policy.backbone)
        self._decoding = self._decoding_config(settings.decoding) if self._is_ceed else None
        # Tokens of one step; None for tokens of variable length, which can be neither frozen nor
        # counted in steps.
        self._tokens: int | None = self._policy.tokenizer.tokens_per_step if self._is_ceed else None
        self._prefill_s = 0.0
        self._failures: FailureLog | None = None  # during the warm-up, an error ends loading
        steps = preprocess.steps if self._is_ceed else ()
        vocabulary: set[str] = {word for step in steps for word in getattr(step, "vocabulary", ())}
        self._reader = RequestReader(self.spec, preprocess, vocabulary)
        self.spec = self._warm_up()
        if self._is_ceed:
            self.spec = self._choose_plan()
        self._failures = FailureLog(logger)

    def predict(
        self,
        request: Request,
        deadline: float | None = None,
        early: Callable[[Response], None] | None = None,
    ) -> Response:
        """Decode one chunk; never raises, because the response has the error.

        Args:
            request: The observation and the instruction.
            deadline: Time on `time.monotonic`'s clock at which the answer is needed [s]; None: no
                limit.
            early: Receives the first parts of the answer, if the request is for a `stream`.

        Returns:
            The whole chunk, or the error.
        """
        started = time.monotonic()
        try:
            response = self._predict(request, deadline, None if self._settings.delay_s else early)
        # Third-party policies may raise any type, and the worker must continue.
        except Exception as error:
            if self._failures is not None:
                self._failures.add(error)
            text = str(error)
            if not isinstance(error, CeedVLAError):
                text = f"{type(error).__name__}: {error}"
            codes = {InstructionError: BAD_INSTRUCTION, NotFiniteError: NOT_FINITE}
            code = next((code for kind, code in codes.items() if isinstance(error, kind)), "")
            return Response(request.id, error=short(text), code=code)
        if not np.isfinite(response.actions).all():
            text = f"The policy {short(self.spec.checkpoint)} returned NaN or infinity."
            return Response(request.id, error=text, code=NOT_FINITE)
        if self._settings.delay_s:
            self._wait(self._settings.delay_s)
        response.seconds["total"] = time.monotonic() - started
        return response

    def _predict(
        self, request: Request, deadline: float | None, early: Callable[[Response], None] | None
    ) -> Response:
        import torch

        from ceed_vla.real_time import decode_behind

        started = time.monotonic()
        with torch.inference_mode():
            batch = self._reader.read(request)
            prepared = time.monotonic()
            times = {"preprocess": prepared - started, "prefill": 0.0}
            if not self._is_ceed:
                chunk = self._policy.predict_action_chunk(batch)  # (1, m, A)
                seconds = {**times, "decode": time.monotonic() - prepared}
                return Response(request.id, self._actions(chunk), seconds=seconds)
            arguments = self._decode_arguments(request, deadline)
            if early is not None and request.stream and self._tokens and not request.frozen_steps:
                arguments["on_proven"] = self._first_steps(request.id, self._tokens, started, early)
            result = decode_behind(self._policy, batch, **arguments)
            self._prefill_s = result.seconds["prefill"]
            return Response(
                request.id,
                self._actions(result.actions),
                result.tokens[0].cpu().numpy(),
                result.forwards,
                result.exit_reason[0],
                {**times, **result.seconds},
            )

    def _actions(self, actions: Any) -> NDArray[np.float32]:
        """Return the actions (m, A) from the policy's (1, m, A)."""
        return cast("NDArray[np.float32]", self._postprocess(actions).float().cpu().numpy()[0])

    def _first_steps(
        self, number: int, width: int, started: float, early: Callable[[Response], None]
    ) -> Callable[..., None]:
        """Return a callback that passes the steps that are certain to `early`.

        A step has `width` tokens. When all steps are certain, they are the answer, which `predict`
        returns.
        """
        told = 0

        def on_proven(tokens: Any, exact: int, forwards: int) -> None:
            nonlocal told
            steps = exact // width
            if told < steps < self._policy.tokenizer.chunk_steps:
                actions = self._actions(self._policy.tokenizer.decode(tokens))
                seconds = time.monotonic() - started
                part = Response(number, actions[:steps], forwards=forwards, whole=False)
                early(replace(part, seconds={"total": seconds}))
                told = steps

        return on_proven

    def _decode_arguments(self, request: Request, deadline: float | None) -> dict[str, Any]:
        """Return the arguments of `decode_behind` except the batch."""
        import torch

        assert self._decoding is not None
        steps = self._settings.replan_steps
        arguments: dict[str, Any] = {
            "decoding": self._decoding,
            "executed_steps": steps,
        }
        if deadline is not None and self._decoding.method == "jacobi":
            # The decoder's own deadline starts after the prefill, whose time is estimated by that
            # of the last one.
            left = deadline - time.monotonic() - self._prefill_s
            own = self._decoding.deadline_s
            allowed = max(left if own is None else min(left, own), _LEAST_DEADLINE)
            arguments["deadline_s"] = allowed
        if request.previous is not None:
            previous = torch.as_tensor(request.previous).unsqueeze(0)  # (1, n)
            arguments |= {"previous": previous, "shift_steps": request.shift_steps}
            if self._tokens:
                arguments["frozen_steps"] = request.frozen_steps
        return arguments

    def _decoding_config(self, name: str) -> Any:
        """Return the named configuration, for the steps executed before the next replan."""
        steps = self._settings.replan_steps
        config = self._policy.decoding_config(name)
        if self._settings.engine == "compiled" and not config.decoder.compiles:
            raise ConfigError(f"engine is compiled; {name} ({config.method}) supports only eager.")
        # Greedy decoding of all steps leaves no unconverged guesses that the next chunk could
        # freeze.
        if steps is None or config.method == "ar":
            return config
        return replace(config, watch="executed")

    def _warm_up(self, calls: int = 0) -> PolicySpec:
        """Decode a blank observation several times, and complete the specification with the result.

        ``warmup_s`` is the time of the last call; with `calls`, it is the time of the slowest of
        `calls` calls [s].
        """
        observation: dict[str, NDArray[Any]] = {
            **{key: np.zeros((h, w, 3), np.uint8) for key, (_, h, w) in self.spec.cameras.items()},
            **{key: np.zeros(length, np.float32) for key, length in self.spec.states.items()},
        }
        word = min(self._reader.vocabulary, default="move")  # a valid instruction
        if self._settings.engine == "compiled" and self._decoding is not None:
            self._compile(Request(0, observation, word), self._decoding)
        response = Response(0)
        times = []
        for _ in range(calls or self._settings.warmup):
            frozen = 1 if len(response.actions) > 1 else 0
            request = Request(0, observation, word, response.tokens, frozen, frozen)
            response = self.predict(request)
            if response.error is not None:
                raise CheckpointError(
                    f"The checkpoint {self.spec.checkpoint} cannot be run: {response.error}"
                )
            times.append(response.seconds["total"])
        steps, dim = response.actions.shape
        if dim != self.spec.action_dim:
            raise CheckpointError(
                f"The checkpoint {self.spec.checkpoint} returns actions of {dim} dimensions and "
                f"declares {self.spec.action_dim}."
            )
        executed = min(int(getattr(self._policy.config, "n_action_steps", steps)), steps)
        seconds = max(times) if calls else times[-1]
        return replace(self.spec, chunk_steps=steps, n_action_steps=executed, warmup_s=seconds)

    def _compile(self, request: Request, decoding: Any) -> None:
        """Compile everything that decoding a request needs, before anything is timed."""
        import torch

        from ceed_vla.decoding import prefill

        with torch.inference_mode():  # as for requests
            batch = self._reader.read(request)
            backbone = self._policy.backbone
            backbone.compile_now(prefill(backbone, batch, decoding))

    def _choose_plan(self) -> PolicySpec:
        """For the decoding "plan", time the checkpoint's plan<MS> here and select one.

        Among the plans of a search, a slower plan has more success, so the slowest plan within the
        limit is selected; if none is within the limit, the fastest.
        """
        chosen = self._settings.decoding
        found = [name for name in self._policy.config.decodings if re.fullmatch("plan.+", name)]
        if chosen != "plan" or not found:
            return replace(self.spec, decoding=chosen)
        found.sort(key=lambda name: float(name.removeprefix("plan")), reverse=True)
        for chosen in found:
            self._decoding = self._decoding_config(chosen)
            spec = self._warm_up(_PLAN_CALLS)
            limit = self._settings.chunk_deadline
            text = "%s: %.1f ms per chunk, deadline %.1f ms"
            logger.info(text, chosen, 1e3 * spec.warmup_s, 1e3 * limit)
            if spec.warmup_s <= limit:
                break
        return replace(spec, decoding=chosen)
