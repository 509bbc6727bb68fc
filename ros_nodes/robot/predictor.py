"""One LeRobot checkpoint from raw observation to actions: what the inference worker runs, wherever
it runs it.

The module itself imports neither torch nor lerobot, so that a node whose policy runs in another
process stays light.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ceed_vla.discovery import discover
from ceed_vla.errors import (
    CeedVLAError,
    CheckpointError,
    ConfigError,
    NotFiniteError,
    ObservationError,
    raised_as,
)
from ceed_vla.fields import COUNTS, Checked, chosen, ranged
from ceed_vla.ros_nodes.robot.failure_log import FailureLog
from ceed_vla.ros_nodes.robot.images import Seen
from ceed_vla.ros_nodes.robot.texts import short, shown

logger = logging.getLogger(__name__)

ENGINES = ("eager", "compiled")
BAD_INSTRUCTION = "bad_instruction"
NOT_FINITE = "not_finite"
BAD_IMAGE = "bad_image"
LOOK = 0  # id of a request that only decodes its images
_PLAN_CALLS = 10  # on which a plan is timed
_LEAST_DEADLINE = 1e-4  # [s]: the first iteration runs in any case


@dataclass(frozen=True)
class PolicySpec:
    """What a checkpoint wants and gives."""

    checkpoint: str  # name or folder, as given
    policy_type: str  # LeRobot's name: "ceed_vla", "act", ...
    # feature name ("observation.images.front") -> (3, H, W)
    cameras: dict[str, tuple[int, int, int]]
    # name of every other observation feature ("observation.state") -> its length
    states: dict[str, int]
    action_dim: int  # A
    chunk_steps: int  # m
    n_action_steps: int  # steps that the checkpoint executes before it replans
    warmup_s: float  # time of the last warm-up call [s]
    delta_dims: tuple[int, ...] = ()  # dimensions of actions that are increments
    decoding: str = ""  # name of the decoding that is used; "" for policies that have one way


@dataclass(frozen=True)
class Request:
    """One chunk to decode."""

    id: int  # repeated in the response
    # Feature name -> vector (D,) of floats, or an image: `Shown` until `images.decode`, then (H, W,
    # 3) uint8.
    observation: Mapping[str, Any]
    instruction: str
    previous: NDArray[np.int64] | None = (
        None  # tokens (n,) of the running chunk, for the warm start
    )
    shift_steps: int = 0  # steps of `previous` that are consumed
    frozen_steps: int = 0  # leading steps of the new chunk that stay as they are in `previous`
    deadline_s: float | None = (
        None  # until the answer is needed, from `InferenceWorker.submit` on [s]
    )
    stream: bool = (
        False  # answer with steps that are certain before the whole chunk; not behind frozen ones
    )


@dataclass(frozen=True)
class Response:
    """One decoded chunk, or why there is none."""

    id: int  # of the request
    # (m, A) in the environment's units, finite; empty (0, 0) on error.
    actions: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    tokens: NDArray[np.int64] | None = None  # (n,); None for policies without
    forwards: int = 0  # model calls after the prefill; 0 for policies that do not say
    exit_reason: str = ""  # rule that ended decoding; "" for policies that do not say
    # "preprocess", "prefill", "decode", "total" [s]; without stages all is in "decode".
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # why there are no actions; None if all went well
    code: str = ""  # `BAD_INSTRUCTION`, `NOT_FINITE`, `BAD_IMAGE`, or "" for any other error
    # whether no more is to come; otherwise `actions` (k, A) are the first steps of the chunk
    whole: bool = True
    seen: Seen = field(default_factory=Seen)  # what decoding the images has found


class _InstructionError(ObservationError):
    """The policy does not take the instruction."""


@dataclass(frozen=True)
class PredictorSettings(Checked):
    """How to run a checkpoint; `ConfigError` for a value that cannot be."""

    checkpoint: str  # LeRobot checkpoint folder, or "teacher" / "student"
    discover_packages: str = (
        ""  # comma-separated, to import before: they register what the checkpoint names
    )
    decoding: str = (
        "ceed"  # a name that `CeedVLAPolicy.decoding_config` knows; other policies have one way
    )
    # Steps behind the frozen ones that must have converged; None: the checkpoint's own.
    replan_steps: int | None = ranged(None, COUNTS)
    threads: int = ranged(1, COUNTS)  # of torch
    device: str = "cpu"
    engine: str = chosen("eager", ENGINES)  # compiled: some minutes longer to load, then faster
    # by which decoding "plan" chooses among the plan<MS> [s]
    chunk_deadline: float = ranged(1.0, "(0, inf)")
    warmup: int = ranged(3, COUNTS)  # calls on a blank observation before the first request
    # added to every chunk, to see what slow inference does [s]
    delay_s: float = ranged(0.0, "[0, 60)")


class Predictor:
    """A loaded and warmed-up policy; `wait` sleeps for ``settings.delay_s``.

    Attributes:
        spec: What the policy wants and gives.

    `CheckpointError`: Missing, damaged, or of a kind that cannot be served. `ConfigError`: An
    unknown way to decode, or a package that cannot be imported.
    """

    def __init__(
        self, settings: PredictorSettings, wait: Callable[[float], object] = time.sleep
    ) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        discover(settings.discover_packages, "discover_packages")
        self._settings, self._wait = settings, wait
        self.spec = declared_spec(settings.checkpoint)
        self._policy, self._preprocess, self._postprocess = _load(settings, self.spec.policy_type)
        self._is_ceed = self.spec.policy_type == "ceed_vla"
        if settings.engine == "compiled":
            if not self._is_ceed:
                raise ConfigError(
                    f"engine is compiled; a {self.spec.policy_type} checkpoint runs eager only."
                )
            from ceed_vla import engine

            self._policy.backbone = engine.compiled(self._policy.backbone)
        self._decoding = self._decoding_config(settings.decoding) if self._is_ceed else None
        # Of one step; tokens of variable length belong to none: they can be neither frozen nor
        # counted in steps.
        self._tokens: int | None = self._policy.tokenizer.tokens_per_step if self._is_ceed else None
        self._prefill_s = 0.0
        self._failures: FailureLog | None = None  # while it warms up, an error ends the load
        steps = self._preprocess.steps if self._is_ceed else ()
        self._vocabulary: set[str] = {
            word for step in steps for word in getattr(step, "vocabulary", ())
        }
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
        """Decode one chunk; never raises, an error is in the response.

        `deadline` is the time on `time.monotonic`'s clock at which the answer is needed [s].
        `early` gets the first parts of the answer, if the request is for a `stream`.
        """
        started = time.monotonic()
        try:
            response = self._predict(request, deadline, None if self._settings.delay_s else early)
        # a policy of any make may raise anything, and the worker must go on
        except Exception as error:
            if self._failures is not None:
                self._failures.add(error)
            text = (
                str(error)
                if isinstance(error, CeedVLAError)
                else f"{type(error).__name__}: {error}"
            )
            codes = {_InstructionError: BAD_INSTRUCTION, NotFiniteError: NOT_FINITE}
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
            batch = self._prepare(request)
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
        """Actions (m, A) of the policy's (1, m, A)."""
        return cast("NDArray[np.float32]", self._postprocess(actions).float().cpu().numpy()[0])

    def _first_steps(
        self, number: int, width: int, started: float, early: Callable[[Response], None]
    ) -> Callable[..., None]:
        """What tells `early` whenever another step, of `width` tokens, is certain; all are the
        answer itself.
        """
        told = 0

        def on_proven(tokens: Any, exact: int, forwards: int) -> None:
            nonlocal told
            steps = exact // width
            if told < steps < self._policy.tokenizer.chunk_steps:
                actions = self._actions(self._policy.tokenizer.decode(tokens))
                seconds = time.monotonic() - started
                early(
                    Response(
                        number,
                        actions[:steps],
                        None,
                        forwards,
                        seconds={"total": seconds},
                        whole=False,
                    )
                )
                told = steps

        return on_proven

    def _decode_arguments(self, request: Request, deadline: float | None) -> dict[str, Any]:
        """What `decode_behind` takes besides the batch."""
        import torch

        assert self._decoding is not None
        steps = self._settings.replan_steps
        arguments: dict[str, Any] = {
            "decoding": self._decoding,
            "executed_steps": steps,
            "frozen": None,
        }
        if deadline is not None and self._decoding.method == "jacobi":
            # The decoder's own deadline starts after the prefill, which takes about as long as the
            # last one.
            left = deadline - time.monotonic() - self._prefill_s
            own = self._decoding.deadline_s
            allowed = max(left if own is None else min(left, own), _LEAST_DEADLINE)
            arguments["deadline_s"] = allowed
        if request.previous is not None:
            previous = torch.as_tensor(request.previous).unsqueeze(0)  # (1, n)
            arguments |= {"previous": previous, "shift_steps": request.shift_steps}
            if request.frozen_steps and self._tokens:
                begin = request.shift_steps * self._tokens
                arguments["frozen"] = previous[
                    :, begin : begin + request.frozen_steps * self._tokens
                ]
        return arguments

    def _prepare(self, request: Request) -> Any:
        """The request as the policy reads it. The instruction is what a blank observation did not
        test.
        """
        from ceed_vla.backbones.compact.words import split_words

        batch = self._batch(request)
        words = split_words(request.instruction)
        try:
            unknown = [word for word in words if word not in self._vocabulary]
            # A few known words among nonsense would still drive the arm at full speed.
            if self._vocabulary and (not words or 2 * len(unknown) > len(words)):
                raise ObservationError(
                    f"The policy knows {len(words) - len(unknown)} of the {len(words)} words of "
                    f"the instruction {shown(request.instruction)}; it must know at least half of "
                    f"them, such as {', '.join(sorted(self._vocabulary)[:8])}."
                )
            return self._preprocess(batch)
        except ObservationError as error:
            raise _InstructionError(str(error)) from error

    def _batch(self, request: Request) -> dict[str, Any]:
        """The request as a LeRobot batch of one: images (1, 3, H, W) in [0, 1], vectors (1, D), the
        task.
        """
        import torch

        batch: dict[str, Any] = {"task": [request.instruction]}
        for key in (*self.spec.cameras, *self.spec.states):
            if key not in request.observation:
                have = ", ".join(sorted(request.observation)) or "nothing"
                raise ObservationError(f"The observation lacks {key!r}; it has {have}.")
            value = np.asarray(request.observation[key])
            if key in self.spec.cameras:
                if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
                    raise ObservationError(
                        f"{key} is {value.dtype} {value.shape}, expected uint8 (H, W, 3)."
                    )
                batch[key] = torch.tensor(value).permute(2, 0, 1).unsqueeze(0).float() / 255.0
                continue
            if value.shape != (self.spec.states[key],) or not np.isfinite(value).all():
                raise ObservationError(
                    f"{key} is {shown(value.tolist())}, expected {self.spec.states[key]} finite "
                    "numbers."
                )
            batch[key] = torch.tensor(value, dtype=torch.float32).unsqueeze(0)
        return batch

    def _decoding_config(self, name: str) -> Any:
        """The named configuration, for the steps that are executed before the next replan."""
        steps = self._settings.replan_steps
        config = self._policy.decoding_config(name)
        if self._settings.engine == "compiled" and not config.decoder.compiles:
            raise ConfigError(f"engine is compiled; {name} ({config.method}) runs eager only.")
        # Greedy decoding of all steps has no tail of guesses that the next chunk could freeze.
        return (
            config if steps is None or config.method == "ar" else replace(config, watch="executed")
        )

    def _warm_up(self, calls: int = 0) -> PolicySpec:
        """Decode a blank observation a few times, and complete the specification with what comes
        out.

        ``warmup_s`` is the last call's time, or the slowest of so many `calls`.
        """
        observation: dict[str, NDArray[Any]] = {
            **{key: np.zeros((h, w, 3), np.uint8) for key, (_, h, w) in self.spec.cameras.items()},
            **{key: np.zeros(length, np.float32) for key, length in self.spec.states.items()},
        }
        # one that it does not warn of
        response = Response(0)
        word = min(self._vocabulary, default="move")
        # before anything is timed
        if self._settings.engine == "compiled" and self._decoding is not None:
            import torch

            from ceed_vla.decoding import prefill

            with torch.inference_mode():  # as requests are answered
                batch = self._prepare(Request(0, observation, word))
                self._policy.backbone.compile_now(
                    prefill(self._policy.backbone, batch, self._decoding)
                )
        times = []
        for _ in range(calls or self._settings.warmup):
            frozen = 1 if len(response.actions) > 1 else 0
            request = Request(0, observation, word, response.tokens, frozen, frozen)
            response = self.predict(request)
            if response.error is not None:
                raise CheckpointError(
                    f"The checkpoint {self.spec.checkpoint} cannot act: {response.error}"
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

    def _choose_plan(self) -> PolicySpec:
        """Where the decoding is "plan": time the checkpoint's plan<MS> here, and take the most
        generous that fits.

        Of a search's plans the slower one solves more. If none fits, it is the fastest.
        """
        chosen = self._settings.decoding
        found = [n for n in self._policy.config.decodings if re.fullmatch("plan.+", n)]
        if chosen != "plan" or not found:
            return replace(self.spec, decoding=chosen)
        for chosen in sorted(
            found, key=lambda name: float(name.removeprefix("plan")), reverse=True
        ):
            self._decoding = self._decoding_config(chosen)
            spec = self._warm_up(_PLAN_CALLS)
            logger.info(
                "%s: %.1f ms a chunk, deadline %.1f",
                chosen,
                1e3 * spec.warmup_s,
                1e3 * self._settings.chunk_deadline,
            )
            if spec.warmup_s <= self._settings.chunk_deadline:
                break
        return replace(spec, decoding=chosen)


def declared_spec(checkpoint: str) -> PolicySpec:
    """What a checkpoint's config.json says, without loading it: `chunk_steps` is 0 where it does
    not say.

    `CheckpointError`: No such folder, or a config.json that is none of a LeRobot policy.
    """
    from ceed_vla.checkpoints.manifest import read_config
    from ceed_vla.folders import resolve_checkpoint

    config = read_config(resolve_checkpoint(checkpoint))
    try:
        features = {
            name: (feature["type"], feature["shape"])
            for name, feature in config["input_features"].items()
        }
        if not isinstance(config["type"], str):
            raise TypeError
        return PolicySpec(
            checkpoint=checkpoint,
            policy_type=config["type"],
            cameras={
                k: (int(s[0]), int(s[1]), int(s[2]))
                for k, (kind, s) in features.items()
                if kind == "VISUAL"
            },
            states={k: int(s[0]) for k, (kind, s) in features.items() if kind in ("STATE", "ENV")},
            action_dim=int(config["output_features"]["action"]["shape"][0]),
            chunk_steps=int(config.get("chunk_size") or 0),
            n_action_steps=int(config.get("n_action_steps") or 0),
            warmup_s=0.0,
            delta_dims=tuple(int(dim) for dim in config.get("delta_dims") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{short(checkpoint)}: config.json lacks a type, or input_features and output_features "
            "with type and shape; copy it again."
        ) from error


def _load(settings: PredictorSettings, kind: str) -> tuple[Any, Any, Any]:
    """(policy in evaluation mode, pre-processor, post-processor) of any LeRobot checkpoint
    folder.
    """
    from ceed_vla.checkpoints import load, resolve_checkpoint
    from ceed_vla.devices import check_device

    folder = resolve_checkpoint(settings.checkpoint)
    device = check_device(settings.device)
    if kind == "ceed_vla":
        return load(folder, device=device)
    # Every policy of LeRobot fails in its own way.
    what = f"The checkpoint {settings.checkpoint} of type {kind!r} cannot be loaded"
    with raised_as(CheckpointError, what, "see what its type needs in LeRobot, or copy it again."):
        return _load_other(folder, kind, device)


def _load_other(folder: Path, kind: str, device: str) -> tuple[Any, Any, Any]:
    """Another policy of LeRobot, whose type, settings and steps are listed; never asks a hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported from here on
    import draccus
    import huggingface_hub.constants

    from ceed_vla.checkpoints.allowed import read_allowed
    from ceed_vla.folders import WEIGHTS
    from ceed_vla.processor_steps import check_foreign_processors
    from ceed_vla.weights import check_floating, check_weights

    # It may have been imported before; this is read at every request.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    values = read_allowed(folder, device)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    policy_class = get_policy_class(kind)
    settings = {name: value for name, value in values.items() if name != "type"}
    config: Any = draccus.decode(PreTrainedConfig.get_choice_class(kind), settings)
    if config.n_obs_steps > 1:
        raise CheckpointError(
            f"The policy reads {config.n_obs_steps} observations at once; the node gives one."
        )
    check_foreign_processors(folder, config)
    check_floating([folder / WEIGHTS])
    policy = policy_class.from_pretrained(folder, config=config, strict=True)
    check_weights(policy, folder / WEIGHTS)
    overrides = {"device_processor": {"device": device}}
    pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    return policy.eval(), pre, post
