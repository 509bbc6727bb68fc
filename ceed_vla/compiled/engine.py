"""Compilation of a backbone's block forward and, if supported, its prefill.

    policy.backbone = compiled(policy.backbone)    # then as before

Compiled code works for one shape. So ``k`` block tokens are padded to one of a few lengths, at any
position of a cache of constant shape (`StaticCache`). The padding behind the ``k`` tokens is not
committed, and the next forward overwrites it.
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

# Capacities are multiples of this, so that prompts of similar lengths share their compiled code.
ROUND = 32
# Limit on versions of compiled code, by batch size, capacity, length and depth; torch's is 8.
VERSIONS = 64


def compiled[B: Backbone](
    backbone: B, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
) -> B:
    """Compile the block forward of a backbone and, if supported, its prefill.

    Compilation happens when they first run. The result shares the weights and their names, and is
    otherwise unchanged. There is one cache per batch size, so only the newest prefix of a batch
    size can be decoded. Logits differ from the eager ones by rounding.

    Args:
        backbone: The model; `CompactBackbone` and every `TransformersBackbone` are supported.
        backend: As in ``torch.compile``.
        mode: As in ``torch.compile``; "reduce-overhead" replays CUDA graphs on a GPU (never run).

    Raises:
        ConfigError: The backbone does not support a static cache.
    """
    if "block" not in getattr(backbone, "compilable", ()):
        raise ConfigError(
            f'A {type(backbone).__name__} cannot be compiled: its `compilable` lacks "block", the '
            "block forward on a StaticCache. Use CompactBackbone or a TransformersBackbone."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    return cast("B", CompiledBackbone(cast("nn.Module", backbone), backend, mode))


class CompiledBackbone(nn.Module):
    """A backbone with compiled forwards; see `compiled`."""

    def __init__(
        self, backbone: nn.Module, backend: str | Callable[..., Any], mode: str | None = None
    ) -> None:
        super().__init__()
        # Share the module's state, so that the weights have the same names; those of a submodule
        # would have a prefix.
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[name] = backbone.__dict__[name]
        self.__dict__["backbone"] = backbone
        inner = cast("Any", backbone)
        n = self.block_length
        self.lengths = sorted({1, max(n // 2, 1), max(n - 1, 1), n})
        # Positions behind the prefix that a padded block can reach.
        self._reach = max(n - k + self._padded(k) for k in range(1, n + 1))
        self._caches: dict[tuple[Any, ...], StaticCache] = {}
        self._block = inner.block_logits
        self._shallow: Any = getattr(inner, "shallow_logits", None)
        self._prefill = inner.prefill
        self._rest = getattr(inner, "prefill_embeddings", None)  # from embeddings of kept tokens
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
        """Run the backbone's prefill, and move the result to the cache of its batch size."""
        tensors = {key: value for key, value in observation.items() if isinstance(value, Tensor)}
        return self._placed(self._run(self._prefill, tensors))

    @torch.no_grad()
    def prefill_embeddings(self, embeddings: Any) -> Prefix[StaticCache]:
        """As `prefill`, from embeddings, which are computed eagerly."""
        return self._placed(self._run(cast("Any", self._rest), embeddings))

    def _placed(self, prefix: Prefix) -> Prefix[StaticCache]:
        # Enough for a whole prefix, so that a reduced prefix shares its compiled code.
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
        """See `ReadsDepths`; compiled for each depth."""
        cache = self._placed_tokens(prefix, tokens)
        if depth in self.exits:
            self.exits[depth].check(cache.committed)
        cache.place(tokens.shape[1], shallow=depth < self.num_layers)
        return self._forward(self._shallow, prefix, tokens, depth)

    def _placed_tokens(self, prefix: Prefix, tokens: Tensor) -> StaticCache:
        """The cache of `prefix`; `TokenError` if the next `tokens` (B, k) do not fit into it."""
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
        """Run compiled code on `tokens` (B, k), padded to one of the lengths."""
        rows, k = tokens.shape
        filled = torch.zeros(rows, self._padded(k), dtype=torch.int64, device=tokens.device)
        filled[:, :k] = tokens
        return cast("Tensor", self._run(forward, prefix, filled, *more)[:, :k])

    def compile_now(self, prefix: Prefix) -> None:
        """Compile every length now, so that no chunk is delayed by compilation."""
        for k in self.lengths:
            self.block_logits(
                prefix,
                torch.zeros(len(prefix.logits), k, dtype=torch.int64, device=prefix.logits.device),
            )

    # ---- run eagerly -----------------------------------------------------------------------------

    @torch.no_grad()
    def depth_logits(
        self, prefix: Prefix, tokens: Tensor, depths: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        prefix.cache.place(tokens.shape[1], shallow=True)
        return cast(
            "tuple[list[Tensor], Tensor]", self.backbone.depth_logits(prefix, tokens, depths)
        )

    @torch.no_grad()
    def first_layers(
        self, prefix: Prefix, tokens: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        prefix.cache.place(tokens.shape[1], shallow=True)
        return cast("Any", self.backbone).first_layers(prefix, tokens, depth, depths)  # type: ignore[no-any-return]

    @torch.no_grad()
    def last_layers(
        self, prefix: Prefix, hidden: Tensor, depth: int, depths: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        prefix.cache.place(hidden.shape[1], shallow=False)
        return cast("Any", self.backbone).last_layers(prefix, hidden, depth, depths)  # type: ignore[no-any-return]

    @torch.no_grad()
    def program_logits(self, prefix: Prefix, tokens: Tensor, program: Sequence[int]) -> Tensor:
        prefix.cache.place(tokens.shape[1], shallow=True)
        return cast("Tensor", self.backbone.program_logits(prefix, tokens, program))

    def _padded(self, k: int) -> int:
        return min(length for length in self.lengths if length >= k)

    def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise ConfigError(
                f"{type(self.backbone).__name__} does not compile with these settings "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
                "use it uncompiled."
            ) from error
