"""Runs one checkpoint or export from raw observation to actions, in the inference worker's process
or thread.

The module itself imports neither torch nor lerobot, so that a node whose policy runs in another
process stays light.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.discovery import discover
from ceed_vla.errors import (
    CeedVLAError,
    CheckpointError,
    ConfigError,
    InstructionError,
    NotFiniteError,
    ObservationError,
    TokenError,
)
from ceed_vla.serving.failure_log import FailureLog
from ceed_vla.serving.predictor_loading import declared_spec, load_served
from ceed_vla.serving.predictor_types import (
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
from ceed_vla.serving.served_policy import Decoded, DecodeOptions
from ceed_vla.texts import short

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

_ROW_BY_ROW = ("ar", "jacobi")  # decoders whose rows do not wait for each other's drafts
_MOST_KNOWN = 64  # decodings that are remembered
_PLAN_CALLS = 10  # calls that time a plan
_LEAST_DEADLINE = 1e-4  # [s]; the first iteration runs in any case


class Predictor:
    """A loaded and warmed-up policy; `wait` sleeps for ``settings.delay_s``.

    Attributes:
        spec: The policy's inputs and outputs.
        failures: Failures since the last chunk for which no request is to blame.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of a kind that cannot be served.
        ConfigError: The decoder name is unknown, or a package cannot be imported.
    """

    def __init__(
        self, settings: PredictorSettings, wait: Callable[[float], object] = time.sleep
    ) -> None:
        discover(settings.discover_packages, "discover_packages")
        self._settings = settings
        self._wait = wait
        self.spec = declared_spec(settings.checkpoint)
        self._policy = load_served(settings, self.spec)
        word = min(self._policy.vocabulary, default=self.spec.example_instruction)
        self.spec = replace(self.spec, engine=self._policy.engine, example_instruction=word)
        self._known: dict[tuple[str, bool], Any] = {}  # decodings of requests
        self._decoding = self._decoding_config(settings.decoding, settings.replan_steps)
        self._prefill_s = 0.0
        self.failures = 0
        self._failures: FailureLog | None = None  # during the warm-up, an error ends loading
        self.spec = self._warm_up()
        if self._decoding is not None:
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
            return self._failed(request, error)
        return self._finished(response, started)

    def predict_together(
        self,
        asked: Sequence[tuple[Request, float | None]],
        early: Callable[[Response], None] | None = None,
    ) -> list[Response]:
        """Decode several chunks at once, if the policy can; never raises.

        Args:
            asked: Requests that share all but the observation, the instruction and the tokens, with
                deadlines as in `predict`. Deadlines of several requests are not used.
            early: As in `predict`, for a single request.

        Returns:
            The answer to each: the tokens are those that it gets alone, up to ties of rounding.
        """
        decoding = asked[0][0].decoding
        if len(asked) == 1 or not self._joins(decoding):
            return [self.predict(request, deadline, early) for request, deadline in asked]
        answers: dict[int, Response] = {}
        alike: dict[Hashable, list[tuple[int, Any]]] = {}  # places and inputs of one shape
        started = time.monotonic()
        for place, (request, _) in enumerate(asked):
            try:
                inputs = self._policy.read(request)
            except Exception as error:  # of this request alone
                answers[place] = self._failed(request, error)
                continue
            alike.setdefault(self._policy.shape_of(inputs), []).append((place, inputs))
        preprocess = (time.monotonic() - started) / len(asked)
        for group in alike.values():
            places = [place for place, _ in group]
            requests = [asked[place][0] for place in places]
            began = time.monotonic()
            try:
                found = self._policy.decode_together(
                    [inputs for _, inputs in group], requests, self._options(requests[0], None)
                )
            except Exception as error:  # perhaps of one of them, which then fails alone
                logger.warning("Requests are decoded one by one: %s", short(error))
                found = []
                answers |= {place: self.predict(*asked[place]) for place in places}
            answers |= {
                place: self._finished(_response(request, decoded, preprocess), began)
                for place, request, decoded in zip(places, requests, found, strict=False)
            }
        return [answers[place] for place in range(len(asked))]

    def _joins(self, decoding: str) -> bool:
        """Whether several chunks of a decoding can be decoded together as each alone."""
        config = self._decoding
        try:
            config = self._decoding_config(decoding, None) if decoding else config
        except CeedVLAError:
            return False
        return (
            self._policy.joins
            and config is not None
            and config.method in _ROW_BY_ROW
            and config.guess != "random"
            and config.deadline_s is None
            and config.window is None
        )

    @property
    def joins(self) -> bool:
        """Whether several chunks can be decoded at once."""
        return self._policy.joins

    def _failed(self, request: Request, error: Exception) -> Response:
        """The answer to a request that cannot be decoded."""
        if self._failures is not None:
            self._failures.add(error)
        text = str(error)
        if not isinstance(error, CeedVLAError):
            text = f"{type(error).__name__}: {error}"
        if not _of_the_request(error):
            self.failures += 1
        codes = {InstructionError: BAD_INSTRUCTION, NotFiniteError: NOT_FINITE}
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), "")
        return Response(request.id, error=short(text), code=code)

    def _finished(self, response: Response, started: float) -> Response:
        """The answer with its time, or the error if its actions are not finite."""
        if not np.isfinite(response.actions).all():
            text = f"The policy {short(self.spec.checkpoint)} returned NaN or infinity."
            return Response(response.id, error=text, code=NOT_FINITE)
        self.failures = 0
        if self._settings.delay_s:
            self._wait(self._settings.delay_s)
        response.seconds["total"] = time.monotonic() - started
        return response

    def _predict(
        self, request: Request, deadline: float | None, early: Callable[[Response], None] | None
    ) -> Response:
        started = time.monotonic()
        inputs = self._policy.read(request)
        prepared = time.monotonic()
        options = self._options(request, deadline)
        width = self._policy.tokens_per_step
        if early is not None and request.stream and width and not request.frozen_steps:
            options = replace(options, on_proven=self._first_steps(request.id, started, early))
        decoded = self._policy.decode(inputs, request, options)
        self._prefill_s = decoded.seconds["prefill"]
        return _response(request, decoded, prepared - started)

    def _first_steps(
        self, number: int, started: float, early: Callable[[Response], None]
    ) -> Callable[..., None]:
        """Return a callback that passes the steps that are certain to `early`.

        When all steps are certain, they are the answer, which `predict` returns.
        """
        width, chunk_steps = self._policy.tokens_per_step, self._policy.chunk_steps
        assert width is not None
        assert chunk_steps is not None
        told = 0

        def on_proven(tokens: Any, exact: int, forwards: int) -> None:
            nonlocal told
            steps = exact // width
            if told < steps < chunk_steps:
                actions = self._policy.actions(tokens)
                seconds = time.monotonic() - started
                part = Response(number, actions[:steps], forwards=forwards, whole=False)
                early(replace(part, seconds={"total": seconds}))
                told = steps

        return on_proven

    def _options(self, request: Request, deadline: float | None) -> DecodeOptions:
        """Return how to decode a request."""
        decoding = self._decoding
        executed = request.executed_steps or self._settings.replan_steps
        if decoding is not None and (request.decoding or request.executed_steps):
            decoding = self._decoding_config(request.decoding or self.spec.decoding, executed)
        if decoding is None:
            return DecodeOptions()
        allowed = None
        if deadline is not None and decoding.decoder.timed:
            # The decoder's own deadline starts after the prefill, whose time is estimated by that
            # of the last one.
            left = deadline - time.monotonic() - self._prefill_s
            own = decoding.deadline_s
            allowed = max(left if own is None else min(left, own), _LEAST_DEADLINE)
        behind = request.previous is not None and self._policy.tokens_per_step
        return DecodeOptions(
            decoding,
            executed_steps=executed,
            frozen_steps=request.frozen_steps if behind else 0,
            deadline_s=allowed,
        )

    def _decoding_config(self, name: str, executed_steps: int | None) -> Any:
        """Return the named configuration, for the steps executed before the next replan."""
        key = (name, executed_steps is not None)
        if key not in self._known:
            config = self._policy.decoding_config(name)
            # Greedy decoding of all steps leaves no unconverged guesses that the next chunk could
            # freeze.
            if config is not None and executed_steps is not None and config.method != "ar":
                config = replace(config, watch="executed")
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = config
        return self._known[key]

    def _warm_up(self, calls: int = 0) -> PolicySpec:
        """Decode a blank observation several times, and complete the specification with the result.

        ``warmup_s`` is the time of the last call; with `calls`, it is the time of the slowest of
        `calls` calls [s].
        """
        observation: dict[str, NDArray[Any]] = {
            **{key: np.zeros((h, w, 3), np.uint8) for key, (_, h, w) in self.spec.cameras.items()},
            **{key: np.zeros(length, np.float32) for key, length in self.spec.states.items()},
        }
        word = self.spec.example_instruction
        self._policy.compile(Request(0, observation, word), self._decoding)
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
        executed = min(int(self._policy.n_action_steps or steps), steps)
        seconds = max(times) if calls else times[-1]
        return replace(self.spec, chunk_steps=steps, n_action_steps=executed, warmup_s=seconds)

    def _choose_plan(self) -> PolicySpec:
        """For the decoding "plan", time the checkpoint's plan<MS> here and select one.

        Among the plans of a search, a slower plan has more success, so the slowest plan within the
        limit is selected; if none is within the limit, the fastest.
        """
        chosen = self._settings.decoding
        found = [name for name in self._policy.decodings if re.fullmatch("plan.+", name)]
        if chosen != "plan" or not found:
            return replace(self.spec, decoding=chosen)
        found.sort(key=lambda name: float(name.removeprefix("plan")), reverse=True)
        for chosen in found:
            self._decoding = self._decoding_config(chosen, self._settings.replan_steps)
            spec = self._warm_up(_PLAN_CALLS)
            limit = self._settings.chunk_deadline
            text = "%s: %.1f ms per chunk, deadline %.1f ms"
            logger.info(text, chosen, 1e3 * spec.warmup_s, 1e3 * limit)
            if spec.warmup_s <= limit:
                break
        return replace(spec, decoding=chosen)


def _of_the_request(error: Exception) -> bool:
    """Whether a request, and not the server, is the reason for an error.

    An error that only encloses one of a library, as of a device, may look like one of the request.
    """
    enclosed = error.__cause__
    ours = enclosed is None or isinstance(enclosed, CeedVLAError)
    kinds = (ObservationError, ConfigError, TokenError, NotFiniteError)
    return isinstance(error, InstructionError) or (isinstance(error, kinds) and ours)


def _response(request: Request, decoded: Decoded, preprocess: float) -> Response:
    """The answer to a request; `preprocess` is the time of reading it [s]."""
    return Response(
        request.id,
        decoded.actions,
        decoded.tokens,
        decoded.forwards,
        decoded.exit_reason,
        {"preprocess": preprocess, **decoded.seconds},
    )
