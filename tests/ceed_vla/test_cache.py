"""The caches against plain concatenation, and their bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.cache import KVCache, TransformersCache
from ceed_vla.compiled.static_cache import StaticCache
from ceed_vla.errors import CeedVLAError, ConfigError, TokenError

L, B, H, D = 2, 3, 2, 4


def cache(capacity: int = 10) -> KVCache:
    return KVCache(L, B, H, capacity, D, device="cpu", dtype=torch.float32)


def entries(t: int) -> torch.Tensor:
    return torch.randn(B, H, t, D)


def prefilled(t: int = 4) -> KVCache:
    kv = cache()
    for layer in range(L):
        kv.write(layer, entries(t), entries(t))
    kv.seal_prefix(t)
    return kv


def test_bounds_are_checked() -> None:
    kv = cache()
    with pytest.raises(TokenError, match="0 were written"):
        kv.seal_prefix(2)
    with pytest.raises(TokenError, match="a cache of 10"):
        kv.write(0, entries(11), entries(11))
    kv = prefilled()
    with pytest.raises(TokenError, match="Cannot commit 1"):
        kv.commit(1)
    kv.write(0, entries(2), entries(2))
    with pytest.raises(TokenError, match="Cannot commit 1"):  # the other layer has not written them
        kv.commit(1)
    kv.write(L - 1, entries(2), entries(2))
    with pytest.raises(TokenError, match="Cannot commit 3"):
        kv.commit(3)
    with pytest.raises(TokenError, match="Cannot commit -1"):
        kv.commit(-1)
    kv.commit(2)
    with pytest.raises(CeedVLAError, match="5 tokens after position 6"):
        kv.write(0, entries(5), entries(5))
    kv.roll_back()
    with pytest.raises(TokenError, match="Cannot commit 1"):
        kv.commit(1)
    with pytest.raises(ConfigError, match="empty"):
        cache(capacity=0)


def test_writing_does_not_advance_and_does_not_reallocate() -> None:
    kv = prefilled()
    first, _ = kv.write(L - 1, entries(3), entries(3))
    address = first.data_ptr()
    assert (kv.length, kv.prefix_length, kv.committed) == (4, 4, 0)
    again, _ = kv.write(L - 1, entries(5), entries(5))
    assert again.data_ptr() == address
    assert again.shape == (B, H, 9, D)
    kv.commit(2)
    assert (kv.length, kv.prefix_length, kv.committed) == (6, 4, 2)
    kv.roll_back()
    assert (kv.length, kv.prefix_length, kv.committed) == (4, 4, 0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    prefix=st.integers(1, 5),
    moves=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.booleans()), max_size=12),
)
def test_equals_concatenation_of_the_accepted_parts(prefix, moves) -> None:
    torch.manual_seed(prefix)
    kv = cache(capacity=prefix + 8)
    kept = [(entries(prefix), entries(prefix)) for _ in range(L)]
    for layer, (k, v) in enumerate(kept):
        kv.write(layer, k, v)
    kv.seal_prefix(prefix)
    for t, accept, back in moves:
        if kv.committed + t > 8:
            kv.roll_back()
            kept = [(k[:, :, :prefix], v[:, :, :prefix]) for k, v in kept]
        for layer in range(L):
            k, v = entries(t), entries(t)
            keys, values = kv.write(layer, k, v)
            both = torch.cat([kept[layer][0], k], 2), torch.cat([kept[layer][1], v], 2)
            assert torch.equal(keys, both[0])
            assert torch.equal(values, both[1])
            kept[layer] = both
        kv.commit(min(accept, t))
        kept = [(k[:, :, : kv.length], v[:, :, : kv.length]) for k, v in kept]
        if back:
            kv.roll_back()
            kept = [(k[:, :, :prefix], v[:, :, :prefix]) for k, v in kept]


def test_transformers_cache_drops_what_was_not_committed() -> None:
    kv = TransformersCache()
    with pytest.raises(TokenError):
        kv.seal_prefix(1)
    sizes = []
    for t, commit in ((4, None), (3, 1), (2, 2), (1, 0)):
        inner = kv.begin(t)
        keys, _ = inner.update(entries(t), entries(t), 0)
        sizes.append(keys.shape[2])
        if commit is None:
            kv.seal_prefix(t)
        else:
            kv.commit(commit)
    assert sizes == [4, 7, 7, 8]
    kv.roll_back()
    assert kv.begin(1).get_seq_length() == 4
    with pytest.raises(TokenError):
        kv.commit(2)
    kv.begin(3, shallow=True)
    with pytest.raises(TokenError):
        kv.commit(1)


def test_a_static_cache_is_written_in_place_and_masks_what_is_not_written() -> None:
    before = prefilled()
    kv = StaticCache(before, 12)
    assert (kv.length, kv.prefix_length, kv.committed) == (4, 4, 0)
    kept, addresses = (
        entries(3),
        [tensor.data_ptr() for tensor in (*kv.keys, *kv.values, kv.position)],
    )
    for start, k in ((4, kept), (6, entries(2))):
        kv.place(k.shape[2], shallow=False)
        for layer in range(L):
            keys, values = kv.write(layer, k, -k)
            seen = kv.mask(k.shape[2])
            assert seen.sum(1).tolist() == list(range(start + 1, start + 1 + k.shape[2]))
            past = before.entries()[layer][0]
            written = torch.cat([past, kept[:, :, : start - 4], k], dim=2)
            assert torch.equal(keys[:, :, seen[-1]], written)
            assert torch.equal(values[:, :, seen[-1]][:, :, 4:], -written[:, :, 4:])
        assert kv.slots(2).tolist() == [start - 4, start - 3]
        assert kv.rows(torch.arange(4), 3).tolist() == [
            min(slot, 3) for slot in range(start - 4, start - 1)
        ]
        kv.commit(2)
    kv.roll_back()
    kv.place(1, shallow=True)
    assert int(kv.position) == 4
    with pytest.raises(TokenError, match="Cannot commit 1"):
        kv.commit(1)
    new = StaticCache(prefilled(3), 12, kv)
    assert [tensor.data_ptr() for tensor in (*new.keys, *new.values, new.position)] == addresses
    assert not torch.cat(new.keys + new.values)[:, :, 3:].any()
    with pytest.raises(TokenError, match="overwritten this one"):
        kv.place(1, shallow=False)
