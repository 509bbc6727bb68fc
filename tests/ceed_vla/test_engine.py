"""The compiled engine: the eager tokens from every decoder, no recompilation, a cache that is
rolled back.

torch traces and guards as usual, and runs the traced graph with its own kernels ("eager" backend).
Only the slow tests compile the kernels, which takes minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import DECODINGS, assert_same_tokens
from torch import Tensor
from torch._dynamo.utils import counters

from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.check import check_backbone
from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.compact.model import CompactBackbone
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import decode_block
from ceed_vla.errors import ConfigError, NotFiniteError, TokenError
from ceed_vla.tokens.uniform import ActionTokenizer, UniformTokensConfig

STEPS, DIM, BINS = 4, 3, 255
N = STEPS * DIM
TOKENS = ActionTokenizer([-1.0] * DIM, [1.0] * DIM, STEPS, num_bins=BINS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Discard compiled code of other tests before and after a test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compact(layers: int = 2) -> CompactBackbone:
    torch.manual_seed(0)
    sizes = CompactConfig(
        image_size=32, stem_channels=[8] * 4, width=32, layers=layers, heads=2, mlp_width=48
    )
    shape = PolicyShape(
        {"observation.images.front": (3, 32, 32)}, 5, DIM, STEPS, UniformTokensConfig()
    )
    backbone = sizes.build(shape).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return backbone  # type: ignore[return-value]


def observe(batch: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "observation.images.front": torch.rand(batch, 3, 32, 32, generator=random),
        "observation.state": torch.randn(batch, 5, generator=random),
        "observation.language.tokens": torch.randint(1, 256, (batch, 12), generator=random),
    }


SLOW = [pytest.param(batch, marks=pytest.mark.slow) for batch in (2, 4)]


@pytest.mark.parametrize("batch", [1, 3, *SLOW])
def test_compact_tokens_are_the_eager_ones(batch: int) -> None:
    backbone = compact()
    assert_same_tokens(backbone, compiled(backbone, "eager"), observe(batch), TOKENS)


@pytest.mark.parametrize("batch", [3, pytest.param(1, marks=pytest.mark.slow), *SLOW])
def test_llama_tokens_are_the_eager_ones(batch: int, llama: Any) -> None:
    backbone, observation = llama(3, batch, N, BINS)
    assert_same_tokens(backbone, compiled(backbone, "eager"), observation, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_generated_code_gives_the_eager_tokens(backend: str) -> None:
    backbone = compact()
    assert_same_tokens(backbone, compiled(backbone, backend), observe(2), TOKENS)


@pytest.mark.parametrize("kind", ["compact", "llama"])
@torch.no_grad()
def test_nothing_is_compiled_again(kind: str, llama: Any) -> None:
    backbone, observation = (compact(), observe(2)) if kind == "compact" else llama(3, 2, N, BINS)
    engine = compiled(backbone, "eager")
    for k in (1, N // 2, N - 1):
        engine.block_logits(engine.prefill(observation), torch.zeros(2, k, dtype=torch.int64))
    made = counters["stats"]["unique_graphs"]
    assert made == (4 if kind == "compact" else 3)  # three lengths, and the prefill
    random, previous, taken = torch.Generator().manual_seed(0), None, set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for chunk, name in zip(range(50), itertools.cycle(DECODINGS), strict=False):
            request: dict[str, Any] = {
                "previous": previous,
                "shift_steps": 1,
                "executed_steps": 1 + chunk % STEPS,
                "frozen_steps": chunk % STEPS,
            }
            result = decode_block(engine, engine.prefill(observation), TOKENS, name, **request)
            previous = torch.randint(BINS, (2, N), generator=random) if chunk % 3 else result.tokens
            taken.add((name, result.forwards))
    assert len(taken) > 10  # the chunks ended at different times
    assert counters["stats"]["unique_graphs"] == made
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", ["compact", pytest.param("llama", marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_depth_and_position_scores_as_the_eager_block(kind: str, llama: Any) -> None:
    backbone, observation = (compact(), observe(2)) if kind == "compact" else llama(3, 2, N, BINS)
    layers = dict(backbone.named_modules())
    engine = compiled(backbone, "eager")
    eager, fast = backbone.prefill(observation), engine.prefill(observation)
    torch.testing.assert_close(fast.logits, eager.logits)
    tokens = torch.randint(BINS, (2, N), generator=torch.Generator().manual_seed(0))
    for c in (0, 1, N // 2, N - 1):
        for prefix, model in ((eager, backbone), (fast, engine)):
            prefix.cache.roll_back()
            model.block_logits(prefix, tokens)
            prefix.cache.commit(c)
        for k, depth in ((N - c, None), (1, 2), (N - c, 1), ((N - c + 1) // 2, None)):
            part = tokens[:, c : c + k]
            scores = [
                m.shallow_logits(p, part, depth) if depth else m.block_logits(p, part)
                for m, p in ((backbone, eager), (engine, fast))
            ]
            torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    engine.shallow_logits(fast, tokens[:, N - 1 :], 1)
    with pytest.raises(TokenError, match="Cannot commit 1"):
        fast.cache.commit(1)
    with pytest.raises(TokenError, match=f"2 tokens after {N - 1} committed"):
        engine.block_logits(fast, tokens[:, :2])
    assert dict(backbone.named_modules()) == layers


@torch.no_grad()
def test_a_new_prefix_takes_the_place_of_the_old_one() -> None:
    backbone = compact()
    engine = compiled(backbone, "eager")
    old, other = engine.prefill(observe(2)), engine.prefill(observe(1))
    token = torch.zeros(1, 1, dtype=torch.int64)
    new = engine.prefill(observe(2, seed=1))
    engine.block_logits(other, token)  # another batch size
    engine.block_logits(new, token.expand(2, 1))
    with pytest.raises(TokenError, match="overwritten this one"):
        engine.block_logits(old, token.expand(2, 1))
    with pytest.raises(TokenError, match="prefill it with the compiled backbone"):
        engine.block_logits(backbone.prefill(observe(2)), token.expand(2, 1))


def test_scores_that_are_not_finite_do_not_stay_in_the_cache() -> None:
    backbone = compact()
    engine = compiled(backbone, "eager")
    expected = decode_block(engine, engine.prefill(observe(1)), TOKENS, "jacobi").tokens
    weight = backbone.action_tokens.weight.data.clone()
    backbone.action_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        decode_block(engine, engine.prefill(observe(1)), TOKENS, "jacobi")
    backbone.action_tokens.weight.data.copy_(weight)
    assert torch.equal(
        decode_block(engine, engine.prefill(observe(1)), TOKENS, "jacobi").tokens, expected
    )


def test_inference_mode_may_come_and_go() -> None:
    backbone = compact()
    engine = compiled(backbone, "eager")
    with torch.inference_mode():
        first = decode_block(engine, engine.prefill(observe(1)), TOKENS, "ar").tokens
    assert torch.equal(decode_block(engine, engine.prefill(observe(1)), TOKENS, "ar").tokens, first)


def test_a_policy_uses_it_in_one_line(tmp_path: Any) -> None:
    policy = CeedVLAPolicy.from_pretrained("student")
    shape = policy.config.shape
    batch: dict[str, Any] = {
        **{key: torch.rand(1, *size) for key, size in shape.cameras.items()},
        "observation.state": torch.randn(1, shape.state_dim),
        "observation.language.tokens": torch.randint(1, 20, (1, policy.backbone.max_words)),
        "task": ["a text passes by"],
    }
    expected, names = policy.decode(batch, "jacobi").tokens, list(policy.state_dict())
    policy.backbone = compiled(policy.backbone, "eager")
    assert torch.equal(policy.decode(batch, "jacobi").tokens, expected)
    assert list(policy.state_dict()) == names
    assert len(policy.get_optim_params()) == len(names)
    assert not policy.train(False).backbone.backbone.training
    policy.save_pretrained(tmp_path)
    assert torch.equal(
        CeedVLAPolicy.from_pretrained(tmp_path).decode(batch, "jacobi").tokens, expected
    )


@pytest.mark.slow
def test_the_check_of_own_backbones_holds_for_it(llama: Any) -> None:
    assert check_backbone(
        compiled(llama(3, 2, 4, BINS)[0], "eager"), llama(3, 2, 4, BINS)[1], guesses=2
    )


def test_what_cannot_be_compiled_is_said(toy: Any) -> None:
    with pytest.raises(ConfigError, match="A ToyBackbone cannot be compiled"):
        compiled(toy(0, 1, N, BINS)[0])

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    with pytest.raises(ConfigError, match="does not compile"):
        compiled(compact(), broken).prefill(observe(1))
