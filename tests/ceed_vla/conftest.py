"""Small random models whose greedy tokens are computed by independent routes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import LogitsProcessor, LogitsProcessorList

from ceed_vla.axes import AXES
from ceed_vla.backbones.base import Prefix
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.cache import KVCache, TransformersCache
from ceed_vla.errors import TokenError

PREFIX_KEY = "prefix_ids"


class ToyBackbone(nn.Module):
    """A random two-layer attention model over a continuous prefix, with strong dependence on
    earlier tokens.
    """

    def __init__(
        self, seed: int, block_length: int, vocabulary_size: int, width: int = 16, heads: int = 2
    ) -> None:
        super().__init__()
        self.block_length, self.vocabulary_size, self.heads, self.num_layers = (
            block_length,
            vocabulary_size,
            heads,
            2,
        )
        self.num_layers = 2
        self.calls: list[int] = []
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 2 / shape[-1] ** 0.5

        self.tokens = weight(vocabulary_size, width) * width**0.5
        self.slots = weight(block_length, width) * width**0.5
        self.qkv = [weight(3 * width, width) for _ in range(2)]
        self.head = weight(vocabulary_size, width)

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:])
        batch, length, width = x.shape
        return (
            F.linear(x, weight)
            .view(batch, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )

    @staticmethod
    def _attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + attended.transpose(1, 2).flatten(2)

    def _scores(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.head)

    def prefill(self, observation: dict[str, Tensor]) -> Prefix[KVCache]:
        x = observation["prefix"]  # (B, P, d)
        batch, length, width = x.shape
        shape = (2, batch, self.heads, length + self.block_length, width // self.heads)
        cache = KVCache(*shape, device=x.device, dtype=x.dtype)
        for layer, weight in enumerate(self.qkv):
            q, k, v = self._project(x, weight)
            x = self._attend(x, q, *cache.write(layer, k, v), None)
        cache.seal_prefix(length)
        return Prefix(logits=self._scores(x[:, -1]), cache=cache)

    def block_logits(
        self, prefix: Prefix[KVCache], tokens: Tensor, depth: int | None = None
    ) -> Tensor:
        self.calls.append(tokens.shape[1])
        start, length = prefix.cache.committed, tokens.shape[1]
        mask = torch.ones(length, prefix.cache.length + length, dtype=torch.bool).tril(
            prefix.cache.length
        )
        x = self.tokens[tokens] + self.slots[start : start + length]
        for layer, weight in enumerate(self.qkv[:depth]):
            q, k, v = self._project(x, weight)
            x = self._attend(x, q, *prefix.cache.write(layer, k, v), mask)
        return self._scores(x)

    def full_logits(self, observation: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """Logits (B, k + 1, V) of slots 0..k after `tokens` (B, k), all recomputed, without any
        cache.
        """
        prefix = observation["prefix"]
        p, total = prefix.shape[1], prefix.shape[1] + tokens.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool).tril()
        mask[:p, :p] = True
        x = torch.cat([prefix, self.tokens[tokens] + self.slots[: tokens.shape[1]]], dim=1)
        for weight in self.qkv:
            x = self._attend(x, *self._project(x, weight), mask)
        return self._scores(x[:, p - 1 :])


class LlamaBackbone(TransformersBackbone):
    """A Llama whose last ids are the actions; transformers' own `generate()` runs on the same
    weights.
    """

    def __init__(self, model: LlamaForCausalLM, block_length: int, num_actions: int) -> None:
        words = model.config.vocab_size
        super().__init__(block_length, num_actions, torch.arange(words - num_actions, words))
        self.model = model

    @property
    def pretrained(self) -> LlamaForCausalLM:
        return self.model

    @property
    def decoder(self) -> nn.Module:
        return self.model.model

    def check_observation(self, batch: dict[str, Tensor]) -> int:
        return len(batch[PREFIX_KEY])

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        ids = batch[PREFIX_KEY]  # (B, P) of the whole vocabulary, without padding
        return PrefixEmbeddings.in_order(
            self.model.model.embed_tokens(ids), torch.ones_like(ids).bool()
        )


@torch.no_grad()
def depth_is_a_shorter_model(backbone: Any, observation: dict[str, Tensor]) -> None:
    """A forward to depth k equals the model of the first k layers and does not change the cache; at
    full depth it equals the ordinary forward.
    """
    n, layers, prefix = backbone.block_length, backbone.num_layers, backbone.prefill(observation)
    tokens = torch.randint(backbone.vocabulary_size, (len(prefix.logits), n - 1))
    whole = backbone.block_logits(prefix, tokens)
    assert layers > 1
    for depth in range(1, layers):
        shorter = copy.deepcopy(backbone)
        trunk = shorter.decoder if isinstance(shorter, TransformersBackbone) else shorter
        trunk.layers = trunk.layers[:depth]
        if trunk is shorter:
            shorter.num_layers = depth
        other = shorter.prefill(observation)
        for committed in (0, n // 2):
            prefix.cache.commit(committed)
            other.cache.commit(committed)
            shallow = backbone.shallow_logits(prefix, tokens[:, committed:], depth)
            assert torch.equal(shallow, shorter.block_logits(other, tokens[:, committed:]))
            assert not torch.equal(shallow, whole[:, committed:])
            with pytest.raises(TokenError, match="Cannot commit 1"):
                prefix.cache.commit(1)
            full = backbone.shallow_logits(prefix, tokens[:, committed:], layers)
            assert committed or torch.equal(full, whole)
        prefix.cache.roll_back()


@torch.no_grad()
def resumes_where_it_stopped(backbone: Any, observation: dict[str, Tensor]) -> None:
    """First and last layers together are a whole forward, also of a draft in parts and behind
    committed tokens; a prefix that is cut and extended is a whole one.
    """
    n, layers, prefix = backbone.block_length, backbone.num_layers, backbone.prefill(observation)
    tokens = torch.randint(backbone.vocabulary_size, (len(prefix.logits), n - 1))
    for depth in {1, layers - 1}:
        for committed in (0, n // 2):
            prefix.cache.roll_back()
            backbone.block_logits(prefix, tokens)
            prefix.cache.commit(committed)
            later = tokens[:, committed:]
            expected = backbone.block_logits(prefix, later)
            for part in (later.shape[1], 2):
                hidden = []
                for start in range(0, later.shape[1], part):
                    with prefix.cache.behind(start):
                        some = later[:, start : start + part]
                        hidden.append(backbone.first_layers(prefix, some, depth)[0])
                with pytest.raises(TokenError, match="Cannot commit 1"):
                    prefix.cache.commit(1)
                found, _ = backbone.last_layers(prefix, torch.cat(hidden, 1), depth)
                seen = expected.isfinite()
                torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
                prefix.cache.commit(0)
        prefix.cache.roll_back()
        cut = backbone.prefill_to(observation, depth)
        (shallow,), hidden_block = backbone.depth_logits(cut, tokens, [depth])
        own = backbone.depth_logits(prefix, tokens, [depth])[0][0]
        torch.testing.assert_close(shallow, own, rtol=1e-4, atol=1e-4)
        whole = backbone.extend(cut)
        torch.testing.assert_close(whole.logits, prefix.logits, rtol=1e-4, atol=1e-4)
        found = backbone.continue_block(whole, hidden_block, depth)
        expected = backbone.block_logits(prefix, tokens)
        seen = expected.isfinite()
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
        whole.cache.commit(2)
        prefix.cache.commit(2)
        found = backbone.block_logits(whole, tokens[:, 2:])
        expected = backbone.block_logits(prefix, tokens[:, 2:])
        seen = expected.isfinite()
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def runs_programs(backbone: Any, observation: dict[str, Tensor]) -> None:
    """A program of all layers is a whole forward; programs that skip, repeat or exchange layers are
    their parts one after the other, also behind committed tokens, and cannot be committed.
    """
    n, layers, prefix = backbone.block_length, backbone.num_layers, backbone.prefill(observation)
    tokens = torch.randint(backbone.vocabulary_size, (len(prefix.logits), n - 1))
    whole = backbone.block_logits(prefix, tokens)
    seen = whole.isfinite()  # one family ends rows in `block_logits`
    assert torch.equal(backbone.program_logits(prefix, tokens, range(layers))[seen], whole[seen])
    read: list[Tensor] = []

    def take(_: Any, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        read.append(arguments[0] if arguments else options["hidden_states"])

    for committed in (0, n // 2):
        prefix.cache.roll_back()
        handle = backbone.decoder.layers[0].register_forward_pre_hook(take, with_kwargs=True)
        expected = backbone.block_logits(prefix, tokens)[:, committed:]
        handle.remove()
        prefix.cache.commit(committed)
        later, seen = tokens[:, committed:], expected.isfinite()
        without_first, _ = backbone.last_layers(prefix, read[-1][:, committed:], 1)
        hidden, _ = backbone.first_layers(prefix, later, layers - 1)
        repeated, _ = backbone.last_layers(prefix, hidden, layers - 2)
        for program, parts in (
            (range(layers), expected),
            (range(1, layers), without_first),
            ([*range(layers - 1), layers - 2, layers - 1], repeated),
        ):
            found = backbone.program_logits(prefix, later, list(program))
            torch.testing.assert_close(found[seen], parts[seen], rtol=1e-4, atol=1e-4)
            with pytest.raises(TokenError, match="Cannot commit 1"):
                prefix.cache.commit(1)
        swapped = backbone.program_logits(prefix, later, [1, 0, *range(2, layers)])
        assert not torch.allclose(swapped[seen], expected[seen])
        again = backbone.block_logits(prefix, later)
        torch.testing.assert_close(again[seen], expected[seen], rtol=1e-4, atol=1e-4)


def trains_as_it_decodes(backbone: Any, observation: dict[str, Tensor]) -> None:
    """Packed logits equal those of decoding, also with recomputed activations; distillation does
    not change the prefix.
    """
    backbone = copy.deepcopy(backbone).train()
    rows, n = backbone.check_observation(observation), backbone.block_length
    blocks = [torch.randint(backbone.vocabulary_size, (rows, n)) for _ in range(2)]
    found = []
    for recompute in (False, True):
        if recompute:
            backbone.recompute_activations()
        state, packed = backbone.packed_logits(backbone.embed_prefix(observation), blocks)
        (torch.cat(packed).logsumexp(-1).sum() + state.sum()).backward()
        gradients = {
            name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None
        }
        found.append({"state": state, "logits": torch.cat(packed), **gradients})
        backbone.zero_grad(set_to_none=True)
        early = backbone.prefix_state(backbone.embed_prefix(observation))
        torch.testing.assert_close(early, state, rtol=1e-4, atol=1e-4)
    assert found[0].keys() == found[1].keys()
    assert set(backbone.distillation_parameters()) < found[0].keys()
    largest = max(float(value.detach().abs().max()) for value in found[0].values())
    for name, kept in found[0].items():
        torch.testing.assert_close(found[1][name], kept, rtol=1e-3, atol=1e-4 * largest)
    with torch.no_grad():
        backbone.eval()
        embeddings, order = backbone.embed_prefix(observation), torch.arange(rows - 1, -1, -1)
        _, packed = backbone.packed_logits(embeddings, blocks)
        _, (some,) = backbone.packed_logits(embeddings[order], [blocks[0][order]])
        torch.testing.assert_close(some, packed[0][order], rtol=1e-4, atol=1e-4)
        prefix = backbone.prefill(observation)
        for block, logits in zip(blocks, packed, strict=True):
            prefix.cache.roll_back()
            decoded = torch.cat(
                [prefix.logits[:, None], backbone.block_logits(prefix, block[:, :-1])], dim=1
            )
            seen = decoded.isfinite()  # tokens that a guess must not contain have logits -inf
            torch.testing.assert_close(logits[seen], decoded[seen], rtol=1e-4, atol=1e-4)
        for name in backbone.distillation_parameters():
            backbone.get_parameter(name).add_(0.01)
        assert torch.equal(backbone.embed_prefix(observation).embeds, embeddings.embeds)


class OnlyActions(LogitsProcessor):
    """Restricts `generate()` to action ids."""

    def __init__(self, action_ids: Tensor, vocabulary: int) -> None:
        self.forbidden = torch.ones(vocabulary, dtype=torch.bool)
        self.forbidden[action_ids] = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.forbidden, -torch.inf)


def _toy(
    seed: int, batch: int, block_length: int, vocabulary: int
) -> tuple[ToyBackbone, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    observation = {"prefix": torch.randn(batch, 5, 16, generator=generator)}
    return ToyBackbone(seed, block_length, vocabulary), observation


def _llama(
    seed: int, batch: int, block_length: int, vocabulary: int, layers: int = 2
) -> tuple[LlamaBackbone, dict[str, Tensor]]:
    words = vocabulary + 23
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        observation = {PREFIX_KEY: torch.randint(words, (batch, 6))}
    return LlamaBackbone(model, block_length, num_actions=vocabulary), observation


def _generate(backbone: LlamaBackbone, observation: dict[str, Tensor]) -> Tensor:
    ids = observation[PREFIX_KEY]
    output = backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=backbone.block_length,
        do_sample=False,
        logits_processor=LogitsProcessorList(
            [OnlyActions(backbone.action_ids, backbone.model.config.vocab_size)]
        ),
    )
    return output[:, ids.shape[1] :] - backbone.action_ids[0]


@pytest.fixture(scope="session")
def toy() -> Callable[[int, int, int, int], tuple[ToyBackbone, dict[str, Tensor]]]:
    """(seed, batch, block_length, vocabulary) -> random toy backbone and an observation for it."""
    return _toy


@pytest.fixture(scope="session")
def llama() -> Callable[..., tuple[LlamaBackbone, dict[str, Tensor]]]:
    """(seed, batch, block_length, vocabulary, layers=2) -> random Llama backbone and an observation
    for it.
    """
    return _llama


@pytest.fixture(scope="session", name="depth_is_a_shorter_model")
def _depth_is_a_shorter_model() -> Callable[[Any, dict[str, Tensor]], None]:
    return depth_is_a_shorter_model


@pytest.fixture(scope="session")
def keeps_the_contract() -> Callable[[Any, dict[str, Tensor]], None]:
    """Checks of all `TransformersBackbone` families, on a model and an observation for it."""

    def check(backbone: Any, observation: dict[str, Tensor]) -> None:
        torch.manual_seed(0)
        depth_is_a_shorter_model(backbone, observation)
        resumes_where_it_stopped(backbone, observation)
        runs_programs(backbone, observation)
        trains_as_it_decodes(backbone, observation)
        if "depth" in AXES:
            from exits_contract import exits_leave_the_base_alone

            exits_leave_the_base_alone(backbone, observation)

    return check


@pytest.fixture(scope="session")
def generate() -> Callable[[LlamaBackbone, dict[str, Tensor]], Tensor]:
    """Tokens (B, n) of transformers' own greedy `generate()`, restricted to action ids."""
    return _generate


@pytest.fixture
def batch(student: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Three observations of the test's own `student`: policy and processors."""
    policy, pre, _ = student
    generator = torch.Generator().manual_seed(1)
    images = {name: torch.rand(3, 3, 96, 96, generator=generator) for name in policy.config.cameras}
    state = torch.rand(3, 14, generator=generator)
    return pre({**images, "observation.state": state, "task": ["push the red cube"] * 3})  # type: ignore[no-any-return]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill unwritten, and written but uncommitted, positions of a cache with NaN."""
    plain = KVCache.__init__

    def poison(self: KVCache, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        for tensor in self._keys + self._values:
            tensor.fill_(torch.nan)

    monkeypatch.setattr(KVCache, "__init__", poison)
    begin = TransformersCache.begin

    def forget(self: TransformersCache, t: int, shallow: bool = False) -> Any:
        end = self.length + self.ahead
        for keys, values in self.entries() if self.length else ():
            keys[:, :, end:] = values[:, :, end:] = torch.nan
        return begin(self, t, shallow)

    monkeypatch.setattr(TransformersCache, "begin", forget)
