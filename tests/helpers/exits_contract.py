"""The contract of a backbone's exits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ceed_vla.axes import AXES
from ceed_vla.axes.depth.exits import KINDS, make_exits
from ceed_vla.backbones.capabilities import CutsPrefix, MakesLayers, offers
from ceed_vla.decoding import BlockRequest, DecodingConfig, decode_autoregressive
from ceed_vla.errors import ConfigError, TokenError


def exits_leave_the_base_alone(backbone: Any, observation: dict[str, Tensor]) -> None:
    """Assert that exits leave the base bit-equal, train as they decode, and draft exactly."""
    backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
    n, layers, rows = (
        backbone.block_length,
        backbone.num_layers,
        backbone.check_observation(observation),
    )
    tokens = torch.randint(backbone.vocabulary_size, (rows, n))
    prefix = backbone.prefill(observation)
    base, names = backbone.block_logits(prefix, tokens[:, :-1]), set(backbone.state_dict())
    greedy = decode_autoregressive(backbone, prefix, BlockRequest(DecodingConfig(method="ar")))
    for kind in KINDS:
        if kind == "coarse" and not offers(backbone, MakesLayers):
            with pytest.raises(ConfigError, match="kind coarse needs a model with the capability"):
                make_exits(backbone, [1], kind)
            continue
        backbone.exits = make_exits(backbone, range(1, layers), kind)
        assert set(backbone.state_dict()) == names
        for own in backbone.exits.values():
            for parameter in own.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        again = backbone.prefill(observation)
        assert torch.equal(again.logits, prefix.logits)
        with torch.no_grad():
            assert torch.equal(backbone.block_logits(again, tokens[:, :-1]), base)
            for depth in backbone.exits:
                shallow = backbone.shallow_logits(again, tokens[:, :-1], depth)
                with pytest.raises(TokenError, match="Cannot commit 1"):
                    again.cache.commit(1)
                (packed,) = backbone.packed_depth_logits(
                    backbone.embed_prefix(observation), [tokens], depth
                )
                seen = shallow.isfinite()
                torch.testing.assert_close(packed[:, 1:][seen], shallow[seen], rtol=1e-4, atol=1e-4)
                reads_slot_0_as_in_decoding(backbone, observation, depth, packed)
        (packed,) = backbone.packed_depth_logits(backbone.embed_prefix(observation), [tokens], 1)
        packed[:, 1:].logsumexp(-1).sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.exits[1].parameters()
        )
        if kind != "layer":
            with torch.no_grad():
                several, _ = backbone.depth_logits(again, tokens[:, :-1], list(backbone.exits))
            for depth, logits in zip(backbone.exits, several, strict=True):
                alone = backbone.shallow_logits(again, tokens[:, :-1], depth)
                seen = alone.isfinite()
                torch.testing.assert_close(logits[seen], alone[seen], rtol=1e-5, atol=1e-5)
        drafts = ("spec1x3", "del") if kind == "linear" and "drafts" in AXES else ()
        for name in ("depth1", *drafts):
            config = DecodingConfig(method=name)
            result = config.decoder.decode(backbone, again, BlockRequest(config, tokens))
            assert torch.equal(result.tokens, greedy.tokens), name
            assert bool(result.exact.all())
            assert bool((result.layer_forwards >= result.iterations).all())


def reads_slot_0_as_in_decoding(
    backbone: Any, observation: dict[str, Tensor], depth: int, packed: Tensor
) -> None:
    """Assert that training reads slot 0 where a cut prefix does."""
    if backbone.exits[depth].kind == "linear" and offers(backbone, CutsPrefix):
        cut = backbone.prefill_to(observation, depth).logits
        torch.testing.assert_close(packed[:, 0], cut, rtol=1e-4, atol=1e-4)
