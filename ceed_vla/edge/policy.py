"""A policy that runs an export, with numpy and onnxruntime."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.decoding import BlockRequest, DecodeResult, DecodingConfig, named_config
from ceed_vla.decoding.exit_tracker import ExitTracker
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.loop import JacobiBlock, iterate
from ceed_vla.edge.autoregressive import decode_autoregressive
from ceed_vla.edge.forwards import GraphForwards, check_rules
from ceed_vla.edge.graphs import FAMILIES, Graphs
from ceed_vla.edge.observation import ObservationReader, feature_of, random_observation
from ceed_vla.edge.result import row_result
from ceed_vla.edge.sessions import open_sessions, run
from ceed_vla.edge.settings import check_decoding, only_exported, read_settings
from ceed_vla.edge.slots import Cache, Slots
from ceed_vla.edge.texts import open_texts
from ceed_vla.edge.vocabulary import Vocabulary
from ceed_vla.errors import ConfigError, ObservationError, VerificationError
from ceed_vla.fields import short
from ceed_vla.scheduling import Placement
from ceed_vla.tokens.increments import put_behind, steps_behind


@dataclass(frozen=True)
class StemFeatures:
    """What the stem of a camera made of one image; see `EdgePolicy.run_stem`."""

    camera: str
    words: np.ndarray | None  # (1, W) that it read, if any
    values: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """An observation as the graphs read it; see `EdgePolicy.prepare`."""

    words: np.ndarray  # (1, L) int64
    stem_words: np.ndarray | None  # (1, W) int64, if the stems read the instruction
    state: np.ndarray  # (1, D) float32
    images: dict[str, np.ndarray]  # (1, 3, H, W) float32, of the cameras without features
    features: dict[str, np.ndarray]  # what stems returned ahead of time


class EdgePolicy:
    """An exported policy for one robot. It is not safe to use from several threads.

    Args:
        folder: The export, from ``ceed-vla export``.
        threads: Threads of the forwards; 0 for one per core.
        pin: Cores of these threads, see `Placement`.

    Attributes:
        settings: What the export holds beside its graphs.
        placement: Threads and their cores. The calling thread is on its core only while it decodes.

    Raises:
        CheckpointError: A file is missing, damaged, or of another export.
        VerificationError: This machine computes other tokens than the export's own checks.
    """

    def __init__(self, folder: str | Path, threads: int = 0, pin: str = "auto") -> None:
        folder = Path(folder)
        self.settings = read_settings(folder)
        self.reader = ObservationReader(self.settings, open_texts(folder, self.settings))
        self.vocabulary = Vocabulary(self.settings.tokens)
        self.placement = Placement(threads, pin)
        sessions = open_sessions(folder, self.settings, self.placement)
        self._graphs: Graphs = FAMILIES[self.settings.family](sessions, self.settings)
        images = self.settings.images
        self._stem_of = {
            camera: sessions[f"stem_{number}"]
            for camera, number in zip(images.cameras, images.stems, strict=True)
        }
        others = len(images.cameras) - 1
        beside = min(others, self.placement.threads - 1)
        cores = iter(self.placement.cores[1:])
        self._pool = (
            ThreadPoolExecutor(beside, initializer=_pin_next, initargs=(cores,)) if beside else None
        )
        self._check(folder)

    def decoding_config(self, decoding: str | DecodingConfig) -> DecodingConfig:
        """The decoding that a name specifies for this export.

        Raises:
            ConfigError: The name is unknown, or the decoding does not run on an export.
        """
        with only_exported():
            config = named_config(decoding, self.settings.decoding, self.settings.decodings or {})
        check_decoding(config)
        return config

    def run_stem(self, camera: str, image: np.ndarray, instruction: str) -> StemFeatures:
        """Run the stem of one camera, before the rest of the observation is known.

        A chunk that is decoded with these `features` runs only the rest of its prefill.

        Args:
            camera: Feature of the camera.
            image: As in `prepare`.
            instruction: What to do; some stems depend on it.

        Raises:
            ObservationError: There is no such camera, or the image is wrong.
        """
        if camera not in self._stem_of:
            known = ", ".join(self._stem_of)
            raise ObservationError(f"There is no camera {short(camera)}; choose one of {known}.")
        words = self.reader.stem_words(instruction)
        with self.placement.pinned():
            values = self._stem(camera, self.reader.image(image, camera), words)
        return StemFeatures(camera, words, values)

    def prepare(
        self,
        observation: Mapping[str, Any],
        instruction: str,
        features: Sequence[StemFeatures] = (),
    ) -> Prepared:
        """Check an observation and convert it to the inputs of the graphs.

        Args:
            observation: Cameras (H, W, 3) uint8, or float in [0, 1], and the state (D,), by their
                features.
            instruction: What to do.
            features: What `run_stem` returned for images of this observation, which then may lack
                them. It is ignored if the stem read another instruction.

        Raises:
            ObservationError: A feature is missing or wrong.
        """
        words = self.reader.words(instruction)
        stem_words = self.reader.stem_words(instruction)
        known = {f.camera: f.values for f in features if _equal(f.words, stem_words)}
        images = {
            camera: self.reader.image(feature_of(observation, camera), camera)
            for camera in self._stem_of
            if camera not in known
        }
        return Prepared(words, stem_words, self.reader.state(observation), images, known)

    def prefill(self, prepared: Prepared) -> Slots:
        """Run the prefix; returns what it predicts for slot 0, and its keys and values."""
        with self.placement.pinned():
            features = prepared.features | self._stems(prepared.images, prepared.stem_words)
            cameras = [features[camera] for camera in self._stem_of]
            return self._graphs.prefill(prepared.words, prepared.state, cameras)

    def _stems(
        self, images: Mapping[str, np.ndarray], words: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Run the stems of all `images`, beside each other if there are threads for it."""
        if self._pool is None or not images:
            return {camera: self._stem(camera, image, words) for camera, image in images.items()}
        *others, last = images
        running = [(c, self._pool.submit(self._stem, c, images[c], words)) for c in others]
        found = {last: self._stem(last, images[last], words)}
        return found | {camera: future.result() for camera, future in running}

    def _stem(self, camera: str, image: np.ndarray, words: np.ndarray | None) -> np.ndarray:
        """Run the stem of a camera on its image (1, 3, H, W)."""
        inputs = {"image": image} if words is None else {"image": image, "words": words}
        return run(self._stem_of[camera], inputs)[0]

    def read(self, prefix: Slots, tokens: np.ndarray) -> Slots:
        """Compute the slots behind tokens (1, k), which follow a prefix."""
        with self.placement.pinned():
            return self._graphs.read(Cache(prefix), tokens)

    def decode(
        self,
        observation: Mapping[str, Any],
        instruction: str,
        decoding: str | DecodingConfig = "ceed",
        *,
        features: Sequence[StemFeatures] = (),
        **options: Any,
    ) -> DecodeResult:
        """Decode one action chunk, as ``CeedVLAPolicy.decode`` does.

        Args:
            observation: See `prepare`.
            instruction: See `prepare`.
            decoding: A decoder name, or its configuration.
            features: See `prepare`.
            options: See `decode_prepared`.

        Returns:
            The result of one row; its arrays are numpy's.

        Raises:
            ObservationError: A feature is missing or wrong.
        """
        started = time.perf_counter()
        prepared = self.prepare(observation, instruction, features)
        seconds = {"preprocess": time.perf_counter() - started}
        result = self.decode_prepared(prepared, decoding, **options)
        result.seconds = seconds | (result.seconds or {})
        return result

    def decode_prepared(
        self,
        prepared: Prepared,
        decoding: str | DecodingConfig = "ceed",
        previous: np.ndarray | None = None,
        shift_steps: int | None = None,
        executed_steps: int | None = None,
        frozen_steps: int = 0,
        on_proven: Callable[[Any, int, int], None] | None = None,
        deadline_s: float | None = None,
    ) -> DecodeResult:
        """Decode one action chunk of a prepared observation.

        Args:
            prepared: What `prepare` returned.
            decoding: A decoder name, or its configuration.
            previous: Tokens (1, n) of the previous chunk, for the warm start; None without one.
            shift_steps: Steps of `previous` that were executed; ``n_action_steps`` if None.
            executed_steps: Steps of this chunk that are executed; ``n_action_steps`` if None.
            frozen_steps: Steps at the start of this chunk, copied from `previous`.
            on_proven: See `BlockRequest`.
            deadline_s: Time limit for the block after the prefill [s].

        Returns:
            The result of one row; its arrays are numpy's.

        Raises:
            ConfigError: The decoding is unknown or does not run on an export, or an argument does
                not fit it.
            TokenError: The previous chunk does not fit, or lacks the frozen steps.
            NotFiniteError: The model's logits are NaN or infinite.
        """
        config = self.decoding_config(decoding)
        usual = self.settings.n_action_steps
        steps = self.vocabulary.chunk_steps
        executed = usual if executed_steps is None else executed_steps
        if type(executed) is not int or not 1 <= executed <= steps:
            raise ConfigError(
                f"executed_steps is {short(executed)}; it must be an int in [1, {steps}]."
            )
        if deadline_s is not None and not (isinstance(deadline_s, Real) and deadline_s > 0):
            raise ConfigError(f"deadline_s is {short(deadline_s)}; it must be a positive number.")
        if deadline_s is not None and config.method == "ar":
            raise ConfigError(
                f"deadline_s is {deadline_s}, but token-by-token decoding has no early exit; leave "
                "it out, or use jacobi."
            )
        shift = usual if shift_steps is None else shift_steps
        guess: Any = self.vocabulary.guess(config.guess, previous, shift, frozen_steps)
        request = BlockRequest(
            config=config,
            guess=guess,
            tokens_per_step=self.vocabulary.tokens_per_step,
            ordered=self.settings.tokens.ordered,
            executed_steps=executed,
            frozen_steps=frozen_steps,
            on_proven=on_proven,
            deadline_s=deadline_s,
        )
        started = time.perf_counter()
        with self.placement.pinned():
            prefix = self.prefill(prepared)
            prefilled = time.perf_counter()
            result = self._decode_block(prefix, request)
        layers = self.settings.cache.layers
        result.layer_forwards = result.iterations * layers
        result.prefix_layers = result.iterations * 0 + layers
        actions: Any = self.vocabulary.decode(guess)  # its tokens are decoded in place
        result.actions = actions
        decoded = time.perf_counter()
        result.seconds = {"prefill": prefilled - started, "decode": decoded - prefilled}
        return result

    def decode_behind(
        self,
        prepared: Prepared,
        frozen_steps: int = 0,
        executed_steps: int | None = None,
        **arguments: Any,
    ) -> DecodeResult:
        """Decode a chunk that starts with frozen steps, as `ceed_vla.real_time.decode_behind` does:
        if actions are increments, later steps compensate for the frozen ones.

        Args:
            prepared: What `prepare` returned.
            frozen_steps: Steps at the start of this chunk, copied from the previous one.
            executed_steps: Steps of this chunk that are executed; ``n_action_steps`` if None.
            arguments: See `decode_prepared`.
        """
        dims = self.settings.delta_dims
        if not frozen_steps or not dims:
            return self.decode_prepared(
                prepared, frozen_steps=frozen_steps, executed_steps=executed_steps, **arguments
            )
        usual = self.settings.n_action_steps
        chunk = self.vocabulary.chunk_steps
        executed = steps_behind(frozen_steps, executed_steps, usual, chunk)
        result = self.decode_prepared(prepared, executed_steps=executed, **arguments)
        shift = arguments.get("shift_steps")
        shift = usual if shift is None else shift
        put_behind(self.vocabulary, result, arguments.get("previous"), shift, frozen_steps, dims)
        return result

    def _check(self, folder: Path) -> None:
        """Raise `VerificationError` unless this machine reproduces the tokens of the export."""
        for check in self.settings.checks or []:
            observation, instruction = random_observation(self.settings, check.seed)
            decoding = replace(self.decoding_config(check.decoder), deadline_s=None)
            found = self.decode(observation, instruction, decoding).tokens
            if found.tolist() != [check.tokens]:
                raise VerificationError(
                    f"The export in {folder} gives other tokens on this machine than where it was "
                    f"written ({check.decoder}, seed {check.seed}); export on a machine with such "
                    "a processor, or run the checkpoint with torch."
                )

    def _decode_block(self, prefix: Slots, request: BlockRequest) -> DecodeResult:
        n = self.vocabulary.block_length
        frozen = request.frozen_tokens(n)
        watched = request.watched_tokens(n, frozen)
        tokens: Any = request.guess
        if not frozen:
            tokens[:, 0] = prefix.tokens[:, 0]
        read = self._graphs.read
        if request.config.method == "ar":
            forwards = GraphForwards(read, prefix, tokens, (), watched)
            return decode_autoregressive(forwards, prefix, request, frozen, watched)
        request = request.begun()
        block = JacobiBlock(
            tokens.copy(), request.config, frozen=frozen, watched=watched, stop=None
        )
        rows = block.rows
        exits = ExitTracker(request, rows, watched, frozen, lambda: np.ones(1, dtype=bool))
        check_rules(exits.rules)
        forwards = GraphForwards(read, prefix, tokens, exits.rules, watched)
        exits.begin(prefix.measured(exits.rules))
        iterate(block, forwards, exits, request.observers(tokens)[0])
        if not block.forwards:
            check_rows(prefix.total)
        reason = rows.exit_reasons[0]
        return row_result(
            tokens, block.forwards, reason, int(rows.iterations[0]), int(rows.exact[0])
        )


def _pin_next(cores: Iterator[int]) -> None:
    """Pin the calling thread, which is new, to the next core, if there is one."""
    core = next(cores, None)
    if core is not None:
        with suppress(OSError):  # the core is gone; `pinned` reports it
            os.sched_setaffinity(0, {core})


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether two arrays are equal, or both None."""
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
