"""A backbone whose block, and where it can its prefill, is compiled: the same tokens in less time.

    policy.backbone = compiled(policy.backbone)    # then as before

Compiled code is made for one shape. So a block of ``k`` tokens is filled up to one of a few
windows, at any position of a cache of constant shape (`StaticCache`); what is written behind the
``k`` tokens is not committed, and overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.compiled.static_cache import StaticCache
from ceed_vla.errors import ConfigError, TokenError

# capacities are multiples of it, so that prompts of similar lengths share their compiled code
ROUND = 32
VERSIONS = 64  # of compiled code: batch sizes, capacities, windows and depths; torch stops at 8


def compiled[B: Backbone](
    backbone: B, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
) -> B:
    """The `backbone` with its block, and where it can its prefill, compiled when they first run.

    It shares the weights, which keep their names, and does all else as before. There is one cache a
    batch size: only the newest prefix of a batch size can be decoded. Scores differ from the eager
    ones by rounding. `ConfigError` for a backbone that knows no static cache; `CompactBackbone` and
    every `TransformersBackbone` do.

    `backend` and `mode` are those of ``torch.compile``; "reduce-overhead" replays CUDA graphs on a
    GPU (never run).
    """
    if "block" not in getattr(backbone, "compilable", ()):
        raise ConfigError(
            f"A {type(backbone).__name__} cannot be compiled: its `compilable` names no block, "
            "which runs on a StaticCache. CompactBackbone and every TransformersBackbone can."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    return cast("B", CompiledBackbone(cast("nn.Module", backbone), backend, mode))


class CompiledBackbone(nn.Module):
    """What `compiled` returns."""

    def __init__(
        self, backbone: nn.Module, backend: str | Callable[..., Any], mode: str | None = None
    ) -> None:
        super().__init__()
        # A policy saves, moves and reads the weights as ever; as those of a submodule they would
        # have other names.
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[name] = backbone.__dict__[name]
        self.__dict__["backbone"] = backbone
        inner = cast("Any", backbone)
        n = self.block_length
        self.windows = sorted({1, max(n // 2, 1), max(n - 1, 1), n})
        # Positions behind the prefix that some block reaches when it is filled up.
        self._reach = max(n - k + self._window(k) for k in range(1, n + 1))
        self._caches: dict[tuple[Any, ...], StaticCache] = {}
        self._block = inner.block_logits
        self._shallow: Any = getattr(inner, "shallow_logits", None)
        self._prefill = inner.prefill
        self._rest = getattr(inner, "prefill_embeddings", None)  # of the tokens that are kept
        options = {"fullgraph": True, "dynamic": False, "backend": backend, "mode": mode}
        parts = {"_block": "block", "_shallow": "block", "_prefill": "prefill", "_rest": "prefill"}
        for name, part in parts.items():
            function = getattr(self, name)
            if part in inner.compilable and function is not None:
                setattr(self, name, self._run(torch.compile, function, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backbone"], name)

    def train(self, mode: bool = True) -> CompiledBackbone:
        self.backbone.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def prefill(self, observation: dict[str, Tensor]) -> Prefix[StaticCache]:
        """As the backbone's; the result moves to the cache of its batch size."""
        tensors = {key: value for key, value in observation.items() if isinstance(value, Tensor)}
        return self._placed(self._run(self._prefill, tensors))

    @torch.no_grad()
    def prefill_embeddings(self, embeddings: Any) -> Prefix[StaticCache]:
        """As the backbone's; what made the embeddings runs eagerly."""
        return self._placed(self._run(cast("Any", self._rest), embeddings))

    def _placed(self, prefix: Prefix) -> Prefix[StaticCache]:
        # As much as a whole prefix needs, so that what is left of one shares its compiled code.
        whole = len(getattr(self.backbone, "kept", ())) or getattr(
            self.backbone, "prefix_length", 0
        )
        length = max(prefix.cache.length, whole)
        capacity = -(-(length + self._reach) // ROUND) * ROUND
        key = (
            len(prefix.logits),
            capacity,
            prefix.logits.device,
            prefix.cache.entries()[0][0].dtype,
        )
        self._caches[key] = cache = StaticCache(prefix.cache, capacity, self._caches.get(key))
        return cast("Prefix[StaticCache]", prefix.moved(cache))

    @torch.no_grad()
    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        cache = self._placed_tokens(prefix, tokens)
        cache.place(tokens.shape[1], shallow=False)
        return self._forward(self._block, prefix, tokens)

    @torch.no_grad()
    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        """As the backbone's (`ReadsDepths`), compiled for each depth."""
        cache = self._placed_tokens(prefix, tokens)
        if depth in self.exits:
            self.exits[depth].check(cache.committed)
        cache.place(tokens.shape[1], shallow=depth < self.num_layers)
        return self._forward(self._shallow, prefix, tokens, depth)

    def _placed_tokens(self, prefix: Prefix, tokens: Tensor) -> StaticCache:
        """The cache that the next `tokens` (B, k) go to; `TokenError` if they do not fit."""
        cache = prefix.cache
        k = tokens.shape[1]
        if not isinstance(cache, StaticCache):
            raise TokenError(
                f"The prefix is in a {type(cache).__name__}; prefill it with the compiled backbone."
            )
        if cache.committed + k > self.block_length:
            raise TokenError(
                f"{k} tokens after {cache.committed} committed ones exceed the block of "
                f"{self.block_length}."
            )
        return cache

    def _forward(
        self, forward: Callable[..., Any], prefix: Prefix, tokens: Tensor, *more: int
    ) -> Tensor:
        """Run compiled code on `tokens` (B, k), filled up to a window."""
        rows, k = tokens.shape
        filled = torch.zeros(rows, self._window(k), dtype=torch.int64, device=tokens.device)
        filled[:, :k] = tokens
        return cast("Tensor", self._run(forward, prefix, filled, *more)[:, :k])

    def compile_now(self, prefix: Prefix) -> None:
        """Compile every window, which some chunk would wait for otherwise."""
        for k in self.windows:
            self.block_logits(
                prefix,
                torch.zeros(len(prefix.logits), k, dtype=torch.int64, device=prefix.logits.device),
            )

    @torch.no_grad()
    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """As the backbone's, eagerly."""
        prefix.cache.place(tokens.shape[1], shallow=True)
        return cast(
            "tuple[list[Tensor], Tensor]", self.backbone.depth_logits(prefix, tokens, depths)
        )

    @torch.no_grad()
    def program_logits(self, prefix: Prefix, tokens: Tensor, program: Sequence[int]) -> Tensor:
        """As the backbone's, eagerly."""
        prefix.cache.place(tokens.shape[1], shallow=True)
        return cast("Tensor", self.backbone.program_logits(prefix, tokens, program))

    def _window(self, k: int) -> int:
        return min(window for window in self.windows if window >= k)

    def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise ConfigError(
                f"{type(self.backbone).__name__} does not compile with these settings "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); use it without."
            ) from error
