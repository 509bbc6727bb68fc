"""FAST tokens that are fitted to data: codec, tokenizer, grammar, configuration, and the compact
backbone with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ceed_vla.decoding import DecodeResult, DecodingConfig, decode_block
from ceed_vla.errors import CheckpointError, ConfigError, MalformedChunkError, TokenError
from ceed_vla.tokens.fast import FastTokenizer, FastTokensConfig
from ceed_vla.tokens.fast_codec import FastCodec, cosine_basis
from ceed_vla.tokens.grammar import Grammar

STEPS, DIM = 8, 7
LOW, HIGH = [-1.0] * 6 + [0.0], [1.0] * 5 + [2.0, 1.0]


def smooth_chunks(count: int, seed: int = 0) -> Tensor:
    """(N, m, A) arcs within the ranges, with a gripper that closes or opens somewhere."""
    random = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(count, 1, DIM, generator=random)

    time = torch.linspace(0, 1, STEPS)[None, :, None]
    chunks = 0.9 * draw() * torch.sin(6 * draw() + 3 * draw() * time)
    switch = torch.randint(STEPS, (count, 1), generator=random)
    chunks[..., -1] = (torch.arange(STEPS) < switch).float()
    return chunks


@pytest.fixture(scope="module")
def tokens() -> FastTokensConfig:
    config = FastTokensConfig(most_ids=300, action_low=LOW, action_high=HIGH)
    config.fit_chunks(smooth_chunks(600))
    return config


@pytest.fixture
def tokenizer(tokens: FastTokensConfig) -> FastTokenizer:
    built = tokens.build(STEPS, DIM)
    assert isinstance(built, FastTokenizer)
    return built


# ---- codec ---------------------------------------------------------------------------------------


def test_cosine_basis_is_scipys_orthonormal_dct() -> None:
    from scipy.fft import dct

    chunk = torch.randn(11, 3, dtype=torch.float64)
    assert np.allclose(cosine_basis(11) @ chunk, dct(chunk.numpy(), axis=0, norm="ortho"))
    assert torch.allclose(cosine_basis(11).T @ cosine_basis(11), torch.eye(11, dtype=torch.float64))


def test_round_trip_errs_by_the_rounding_alone(tokenizer: FastTokenizer) -> None:
    chunks = smooth_chunks(50, seed=1)
    decoded = tokenizer.decode(tokenizer.encode(chunks))
    half_range = (tokenizer.high - tokenizer.low) / 2
    # An orthonormal transform preserves the norm; each coefficient has an error of at most half a
    # step of 1 / scale.
    bound = 0.5 / tokenizer.codec.scale * STEPS**0.5 * half_range
    error = (decoded - chunks)[..., :-1].norm(dim=1)  # (B, A - 1)
    assert bool((error <= bound[:-1] + 1e-6).all())
    assert torch.equal(decoded[..., -1], chunks[..., -1])  # the gripper is exact
    assert tokenizer.clipped == 0


def test_blocks_are_much_shorter_than_one_token_a_value(tokenizer: FastTokenizer) -> None:
    lengths = (tokenizer.encode(smooth_chunks(200, seed=2)) != tokenizer.stop).sum(1).float()
    assert lengths.mean() < 0.6 * STEPS * DIM
    assert lengths.max() < tokenizer.block_length


def test_fit_is_reproducible_and_rebuilt_from_its_merges() -> None:
    chunks = smooth_chunks(300) * 0.5
    first, second = FastCodec.fit(chunks, 200, 10.0), FastCodec.fit(chunks, 200, 10.0)
    assert first.merges == second.merges
    assert first.vocabulary_size <= 200
    assert first.most is not None
    again = FastCodec.from_merges(first.merges, 10.0, first.least, first.most)
    assert again.encode(chunks) == first.encode(chunks)
    lengths = first.id_lengths()
    assert all(int(lengths[ids].sum()) == STEPS * DIM for ids in first.encode(chunks[:20]))


def test_published_folders_of_transformers_5_are_read(tmp_path: Path) -> None:
    codec = FastCodec.fit(smooth_chunks(100), 200, 10.0)
    (tmp_path / "bpe_tokenizer").mkdir()
    codec.bpe.save(str(tmp_path / "bpe_tokenizer" / "tokenizer.json"))
    settings_file = tmp_path / "processor_config.json"
    settings_file.write_text(json.dumps({"scale": 10, "min_token": codec.least}))
    read = FastCodec.from_folder(tmp_path)
    chunks = smooth_chunks(5, seed=4)
    assert read.encode(chunks) == codec.encode(chunks)
    settings_file.write_text(json.dumps({"scale": 10}))
    with pytest.raises(CheckpointError, match="must have scale and min_token"):
        FastCodec.from_folder(tmp_path)


def test_codec_refuses_what_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match=r"expected \(N, m, A\)"):
        FastCodec.fit(torch.zeros(0, STEPS, DIM), 200, 10.0)
    with pytest.raises(ConfigError, match="raise it, lower the scale"):
        FastCodec.fit(smooth_chunks(100), 20, 10.0)
    with pytest.raises(ConfigError, match="scale is 0"):
        FastCodec.from_merges([], 0.0, -3, 3)
    with pytest.raises(ConfigError, match="Merge 0 joins the ids 0 and 9"):
        FastCodec.from_merges([(0, 9)], 10.0, -3, 3)
    with pytest.raises(TokenError, match="NaN or infinity"):
        FastCodec.from_merges([], 10.0, -3, 3).encode(torch.full((1, 2, 2), float("nan")))


# ---- tokenizer -----------------------------------------------------------------------------------


def test_blocks_are_padded_with_the_stop_token_and_read_up_to_it(tokenizer: FastTokenizer) -> None:
    block = tokenizer.encode(smooth_chunks(1))
    length = int((block != tokenizer.stop).sum())
    assert block.shape == (1, tokenizer.block_length)
    assert bool((block[0, length:] == tokenizer.stop).all())
    noisy = block.clone()
    noisy[0, length + 1 :] = 3
    assert torch.equal(tokenizer.decode(noisy), tokenizer.decode(block))
    weight = tokenizer.weight(noisy)
    assert weight.sum() == length + 1  # the stop token itself is trained


def test_malformed_blocks_are_counted_errors(tokenizer: FastTokenizer) -> None:
    block = tokenizer.encode(smooth_chunks(3))
    block[1, 2:] = tokenizer.stop
    block[2, 0] = tokenizer.vocabulary_size + 4
    with pytest.raises(
        MalformedChunkError, match=r"2 of 3 chunks are malformed, the first in row 1"
    ):
        tokenizer.decode(block)
    assert tokenizer.malformed == 2
    assert tokenizer.readable(block).tolist() == [True, False, False]
    assert tokenizer.readable(block[:1]).all()
    assert tokenizer.malformed == 2


def test_values_outside_are_clipped_and_counted(tokenizer: FastTokenizer) -> None:
    chunks = smooth_chunks(2)
    chunks[0, 3, 2] = 9.0
    decoded = tokenizer.decode(tokenizer.encode(chunks))
    assert tokenizer.clipped == 1
    assert bool((decoded <= tokenizer.high.float()).all())
    chunks[1, 0, 4] = float("inf")
    with pytest.raises(TokenError, match=r"actions\[1, 0, 4\] is inf"):
        tokenizer.encode(chunks)
    with pytest.raises(TokenError, match=r"expected \(B, 8, 7\)"):
        tokenizer.encode(chunks[:, :4])


def test_chunks_that_overfill_a_block_are_smoothed_and_counted(tokens: FastTokensConfig) -> None:
    short = replace(tokens, max_tokens=20).build(STEPS, DIM)
    assert isinstance(short, FastTokenizer)
    noise = torch.rand(4, STEPS, DIM, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[..., -1] = 1.0
    decoded = short.decode(short.encode(noise))
    assert short.smoothed == 4
    # the low frequencies remain
    assert torch.allclose(decoded.mean(1)[:, :5], noise.mean(1)[:, :5], atol=0.1)
    with pytest.raises(ConfigError, match="too few for a chunk of zeros"):
        replace(tokens, max_tokens=1).build(STEPS, DIM)


# ---- grammar -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    total=st.integers(1, 12),
    spare=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_every_walk_through_the_grammar_is_a_chunk(
    lengths: list[int], total: int, spare: int, seed: int
) -> None:
    lengths = [1, *lengths]
    stop, n = len(lengths), -(-total // max(lengths)) + max(lengths) + spare
    grammar = Grammar(torch.tensor([*lengths, 0]), stop, total, n)
    random = np.random.default_rng(seed)
    used, walk = 0, []
    for slot in range(n):
        allowed = (
            grammar.allowed(torch.tensor([[used]]), torch.tensor([slot]))[0, 0]
            .nonzero()
            .flatten()
            .tolist()
        )
        token = int(random.choice(allowed))
        if token == stop:
            break
        walk.append(token)
        used += lengths[token]
    assert used == total
    assert sum(lengths[token] for token in walk) == total


Toy = Callable[[int, int, int, int], tuple[Any, dict[str, Tensor]]]


def toy_decode(
    toy: Toy, tokenizer: FastTokenizer, seed: int, config: DecodingConfig, **more: Any
) -> DecodeResult:
    backbone, observation = toy(seed, 3, tokenizer.block_length, tokenizer.vocabulary_size)
    return decode_block(backbone, backbone.prefill(observation), tokenizer, config, **more)


@pytest.mark.parametrize("seed", range(3))
def test_jacobi_is_greedy_under_the_grammar_and_always_a_chunk(
    toy: Toy, tokenizer: FastTokenizer, seed: int
) -> None:
    greedy = toy_decode(toy, tokenizer, seed, DecodingConfig(method="ar"))
    assert tokenizer.decode(greedy.tokens).shape == (3, STEPS, DIM)
    for config in (
        DecodingConfig(guess="mid"),
        DecodingConfig(guess="random", window=5),
        # continues, as two iterations do not give a chunk
        DecodingConfig(guess="random", max_iterations=2),
        DecodingConfig(watch="executed"),  # every step needs every token
    ):
        result = toy_decode(toy, tokenizer, seed, config, record_states=True)
        assert torch.equal(result.tokens, greedy.tokens), config
        assert result.forwards <= tokenizer.block_length + 2
        assert result.states is not None
        assert torch.equal(result.states[-1], result.tokens)
        assert len(result.states) == result.forwards + 1


def test_a_cap_ends_where_every_row_holds_a_chunk(toy: Toy, tokenizer: FastTokenizer) -> None:
    greedy = toy_decode(toy, tokenizer, 0, DecodingConfig(method="ar"))
    config = DecodingConfig(guess="previous", max_iterations=1)
    result = toy_decode(toy, tokenizer, 0, config, previous=greedy.tokens, shift_steps=0)
    assert result.forwards == 1
    assert set(result.exit_reason) <= {"stop", "max_iterations"}
    assert tokenizer.readable(result.tokens).all()
    # decoding never stops on a block that does not decode to a chunk
    late = toy_decode(toy, tokenizer, 0, DecodingConfig(guess="mid", deadline_s=1e-6))
    assert tokenizer.readable(late.tokens).all()
    soon = DecodingConfig(guess="previous", deadline_s=1e-6)
    late = toy_decode(toy, tokenizer, 0, soon, previous=greedy.tokens, shift_steps=0)
    assert late.forwards == 1  # the first iteration gives a chunk already
    assert set(late.exit_reason) <= {"stop", "deadline"}
    with pytest.raises(ConfigError, match="do not belong to steps"):
        toy_decode(toy, tokenizer, 0, config, previous=greedy.tokens, frozen_steps=1)
    with pytest.raises(ConfigError, match="fixed number of tokens"):
        toy_decode(toy, tokenizer, 0, DecodingConfig(method="sure1p0.5"))
    with pytest.raises(ConfigError, match="do not stand for neighbouring actions"):
        toy_decode(toy, tokenizer, 0, DecodingConfig(confidence=0.5))


# ---- configuration, training ---------------------------------------------------------------------


def test_tokens_must_be_fitted_for_the_policys_chunk(tokens: FastTokensConfig) -> None:
    with pytest.raises(ConfigError, match="not fitted yet"):
        FastTokensConfig().build(STEPS, DIM)
    with pytest.raises(ConfigError, match="fitted to chunks of 8 steps, but the policy's have 4"):
        tokens.build(4, DIM)
    with pytest.raises(ConfigError, match="has 7 values, the action has 6"):
        tokens.validate_features(6)
    with pytest.raises(ConfigError, match="most_ids is 1"):
        FastTokensConfig(most_ids=1)


def test_file_holds_the_tokens(tokens: FastTokensConfig, tmp_path: Path) -> None:
    file = tokens.write(tmp_path / "deep" / "tokens.json")
    read = FastTokensConfig(path=str(file))
    assert (
        read.build(STEPS, DIM).vocabulary_size
        == tokens.build(STEPS, DIM).vocabulary_size
        == tokens.vocabulary_size
    )
    chunks = smooth_chunks(5)
    assert torch.equal(
        read.build(STEPS, DIM).encode(chunks), tokens.build(STEPS, DIM).encode(chunks)
    )
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="has no fitted tokens"):
        FastTokensConfig(path=str(file))
    with pytest.raises(CheckpointError, match="no file"):
        FastTokensConfig(path=str(tmp_path / "none.json"))
