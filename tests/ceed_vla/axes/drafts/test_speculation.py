"""Self-speculation: greedy tokens, near tokens, and choice online."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exits_of_student import student_with_exits

from ceed_vla.axes.drafts.speculation import PRIOR, _Online
from ceed_vla.compiled.engine import compiled
from ceed_vla.errors import ConfigError

make_exits = pytest.importorskip(
    "ceed_vla.axes.depth.exits", reason="the axis of depth was deleted"
).make_exits
ROWS = 3


@pytest.fixture
def student() -> tuple[Any, Any, Any]:
    return student_with_exits()


@pytest.mark.parametrize("name", ["spec1x4", "spec3x9", "del"])
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.usefixtures("poisoned")
def test_tokens_are_greedy(
    name: str, frozen: int, student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    previous = torch.randint(255, (ROWS, 56), generator=torch.Generator().manual_seed(2))
    behind = {"previous": previous, "frozen_steps": frozen}
    expected = policy.decode(batch, "ar", **behind).tokens
    result = policy.decode(batch, name, **behind)
    assert torch.equal(result.tokens, expected)
    assert (result.exact_tokens == 56).all()
    assert (result.layer_forwards > 4 * result.iterations).all()


def test_near_ones_need_bins(student: tuple[Any, Any, Any], batch: dict[str, Any]) -> None:
    policy, _, _ = student
    policy.tokenizer.ordered = False
    with pytest.raises(ConfigError, match="bins"):
        policy.decode(batch, "spec1x4r2")
    policy.decode(batch, "spec1x4")


@pytest.mark.parametrize("name", ["spec1x6r3", "spec2x3r40", "spec2x3r0"])
@pytest.mark.usefixtures("poisoned")
def test_relaxed_drafts_are_near_what_follows_them(
    student: tuple[Any, Any, Any], batch: dict[str, Any], name: str
) -> None:
    policy, n = student[0], student[0].config.block_length
    bins, guess = (
        int(name.partition("r")[2]),
        torch.randint(255, (ROWS, n), generator=torch.Generator().manual_seed(3)),
    )
    found = policy.decode(batch, name, previous=guess, shift_steps=0)
    prefix = policy.backbone.prefill(batch)
    behind = policy.backbone.block_logits(prefix, found.tokens[:, :-1]).argmax(-1)
    # (B, n), each behind the tokens so far
    greedy = torch.cat([prefix.logits.argmax(-1, keepdim=True), behind], 1)
    apart = (greedy - found.tokens).abs()
    assert apart.max() <= bins
    assert not apart.view(ROWS, -1, 7)[..., 6].any()  # grippers are exact
    first = torch.where(apart.any(1), (apart > 0).int().argmax(1), n)
    assert torch.equal(found.exact_tokens, first)
    assert torch.equal(found.exact, first == n)
    assert found.exit_reason == ["converged" if slot == n else "near" for slot in first.tolist()]
    assert policy.decoding_config(name).strict == (not bins)
    exact = policy.decode(batch, name.partition("r")[0], previous=guess, shift_steps=0)
    assert found.forwards < exact.forwards if bins else found.forwards == exact.forwards
    if bins:
        assert not found.exact.all()
    behind = policy.decode(batch, "spec1x1r255", previous=guess, shift_steps=0)
    again = policy.backbone.block_logits(
        policy.backbone.prefill(batch), behind.tokens[:, :-1]
    ).argmax(-1)
    # the token behind the draft is not drafted
    assert torch.equal(behind.tokens[:, 2::2], again[:, 1::2])


@pytest.mark.slow
def test_compiled_code_drafts_the_same(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    expected = policy.decode(batch, "ar").tokens
    policy.backbone = compiled(policy.backbone, "eager")
    for name in ("del", "spec2x3"):
        assert torch.equal(policy.decode(batch, name).tokens, expected)


def test_what_they_cannot_decode(student: tuple[Any, Any, Any], batch: dict[str, Any]) -> None:
    policy, _, _ = student
    refused = {
        "spec4x2": "with 4 layers; .* from 1 to 3 layers",
        "spec2x0": "at least 1 token",
        "del_cap2": "leave them out",
    }
    for name, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            policy.decode(batch, name)
    policy.backbone.exits = {}
    with pytest.raises(ConfigError, match="ceed-vla exits"):
        policy.decode(batch, "del")
    policy.backbone.exits = make_exits(policy.backbone, [1, 2], "layer")
    for name, message in {"del": "linear exits", "spec1x3": "kind linear"}.items():
        with pytest.raises(ConfigError, match=message):
            policy.decode(batch, name)


def test_the_online_choice_follows_what_it_saw() -> None:
    chooser = _Online([1, 2], 4)
    assert chooser.counts == {1: list(PRIOR), 2: list(PRIOR)}
    for _ in range(20):
        chooser.update(1, 1, 10)
        chooser.update(2, 10, 10)
    assert chooser.depth == 2
    assert chooser.length > 4  # nearly always right: long drafts are best
    for _ in range(200):
        chooser.update(2, 1, 10)
    assert chooser.length == 1  # nearly always wrong
