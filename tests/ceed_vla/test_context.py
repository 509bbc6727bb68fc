"""Context: a scorer beside bit-equal weights chooses prefix tokens; all of them are as none, some as a mask says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ceed_vla import load
from ceed_vla.backbones.context import CONTEXT, ContextScorer, keep_best, keep_scored
from ceed_vla.checkpoints import save, weights_hash
from ceed_vla.decoding import DecodingConfig, decoder_ladders, prefill
from ceed_vla.decoding.registry import find_decoder
from ceed_vla.engine import compiled
from ceed_vla.errors import CheckpointError, ConfigError

ROWS, TOKENS = 3, 46


def random_scorer(width: int, tokens: int, seed: int = 0) -> ContextScorer:
    """One that ranks tokens by what they hold."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scorer = ContextScorer(width, tokens)
        for parameter in scorer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return scorer.requires_grad_(False)


@pytest.fixture
def student() -> tuple[Any, Any, Any]:
    policy, pre, post = load("student")
    policy.backbone.context = (random_scorer(192, TOKENS),)
    return policy, pre, post


@pytest.mark.parametrize("kept", [TOKENS, 99999])
@pytest.mark.parametrize("rest", ["", "_conf0.2_cap2", "_h_fresh"])
def test_keeping_all_is_as_without(kept: int, rest: str, student: Any, batch: dict[str, Any]) -> None:
    policy, _, _ = student
    policy.backbone.context = ()  # none is needed
    usual, all_kept = policy.decode(batch, f"jacobi{rest}"), policy.decode(batch, f"keep{kept}{rest}")
    config = policy.decoding_config(f"keep{kept}")
    assert torch.equal(prefill(policy.backbone, batch, config).logits, policy.backbone.prefill(batch).logits)
    for name in ("tokens", "iterations", "exact_tokens", "exact", "layer_forwards", "prefix_layers"):
        assert torch.equal(getattr(all_kept, name), getattr(usual, name)), name
    assert all_kept.exit_reason == usual.exit_reason


@pytest.mark.parametrize("kept", [1, 7, 30, 45])
def test_the_prefix_is_that_of_the_best_tokens(kept: int, student: Any, batch: dict[str, Any]) -> None:
    policy, _, _ = student
    backbone = policy.backbone
    embeddings = backbone.embed_prefix(batch)
    scores = backbone.context[0](*backbone.prefix_tokens(embeddings))
    assert scores.shape == (ROWS, TOKENS)
    prefix = prefill(backbone, batch, policy.decoding_config(f"keep{kept}"))
    assert (prefix.cache.prefix_length, prefix.dropped) == (kept + 1, TOKENS - kept)
    for row in range(ROWS):  # by hand, one by one; the state is the last token
        best = sorted(sorted(range(TOKENS), key=lambda i: -scores[row, i])[:kept])
        own = backbone.prefill_embeddings(embeddings[row : row + 1, [*best, TOKENS]])
        torch.testing.assert_close(prefix.logits[row : row + 1], own.logits, rtol=1e-4, atol=1e-4)
    chosen = {tuple(row.topk(kept).indices.sort().values.tolist()) for row in scores}
    assert len(chosen) > 1 or kept == 1  # rows choose for themselves


def test_behind_the_pruned_prefix_it_is_jacobi_and_proves_nothing(student: Any, batch: dict[str, Any]) -> None:
    policy, _, _ = student
    found, frozen = policy.decode(batch, "keep30"), torch.zeros(ROWS, 14, dtype=torch.int64)
    prefix = prefill(policy.backbone, batch, policy.decoding_config("keep30"))
    behind = policy.backbone.block_logits(prefix, found.tokens[:, :-1]).argmax(-1)
    assert torch.equal(torch.cat([prefix.logits.argmax(-1, keepdim=True), behind], 1), found.tokens)  # a fixed point
    assert not torch.equal(found.tokens, policy.decode(batch, "jacobi").tokens)
    assert found.exact_tokens.tolist() == [0] * ROWS
    assert not found.exact.any()
    assert not policy.decoding_config("keep30").strict
    assert policy.decode(batch, "keep30_conf0.2_cap2", frozen=frozen).exact_tokens.tolist() == [14] * ROWS
    assert policy.decode(batch, "keep30_cap1").forwards == 1


def test_kept_tokens_are_ascending_and_the_state_stays(student: Any) -> None:
    backbone, generator = student[0].backbone, torch.Generator().manual_seed(3)
    embeddings = torch.arange(TOKENS + 1.0).expand(192, -1).T.repeat(ROWS, 1, 1)  # each token is its place
    for count in range(1, TOKENS):
        scores = torch.randn(ROWS, TOKENS, generator=generator)
        kept = keep_scored(backbone, embeddings, scores, count)[..., 0]
        assert kept.shape == (ROWS, count + 1)
        assert (kept[:, 1:] > kept[:, :-1]).all()
        assert (kept[:, -1] == TOKENS).all()
        least = scores.gather(1, kept[:, :-1].long()).amin(1)
        assert ((scores > least.unsqueeze(1)).sum(1) == count - 1).all()


FRONT_TOP, WRIST = ((1, 4, 0, 4), (0, 4, 0, 4)), ((0, 4, 0, 4), (2, 4, 1, 3))


@pytest.mark.parametrize("view", [FRONT_TOP, WRIST])
def test_a_view_sees_its_cells_and_nothing_else(view: Any, student: Any, batch: dict[str, Any]) -> None:
    backbone = student[0].backbone
    backbone.context[0].views = torch.tensor([view])
    whole, part = backbone.embed_prefix(batch), backbone.embed_view(batch, view)
    assert torch.equal(backbone.embed_view(batch, backbone.view), whole)
    cells = sum((bottom - top) * (right - left) for top, bottom, left, right in view)
    assert part.shape == (ROWS, 47 - 32 + cells, 192)
    torch.testing.assert_close(
        part[:, [*range(12), -1]], whole[:, [*range(12), -1]]
    )  # words and state, in their places
    other = dict(batch)
    for camera, (top, bottom, left, right) in zip(backbone.cameras, view, strict=True):
        seen = torch.zeros(96, 96, dtype=torch.bool)
        seen[24 * top : 24 * bottom, 24 * left : 24 * right] = True
        other[camera] = torch.where(seen, batch[camera], 1 - batch[camera])
    assert torch.equal(backbone.embed_view(other, view), part)
    assert not torch.equal(backbone.embed_prefix(other), whole)
    prefix = prefill(backbone, batch, student[0].decoding_config("view88"))
    assert (prefix.cache.prefix_length, prefix.dropped) == (part.shape[1], 32 - cells)
    assert torch.equal(prefix.logits, backbone.prefill_embeddings(part).logits)
    found = student[0].decode(batch, "view88_conf0.2_cap2")
    assert not found.exact.any()
    assert not student[0].decoding_config("view88").strict


def test_places_of_a_view_are_those_of_the_whole_image(student: Any) -> None:
    keypoints = student[0].backbone.stems[0].keypoints
    fine, coarse = torch.zeros(2, 64, 24, 24), torch.zeros(2, 128, 12, 12)
    fine[0, :, 15, 20] = fine[1, :, 9, 8] = 1e4 * keypoints.fine.weight[0, :, 0, 0].sign()  # a peak, or a hole, a map
    keypoints.fine.weight.data[:] = keypoints.fine.weight[:1]
    whole = keypoints(fine, coarse, 24, (0, 0))
    torch.testing.assert_close(keypoints(fine[:, :, 6:18, 6:], coarse[:, :, 3:9, 3:], 24, (6, 6)), whole)
    assert not torch.equal(whole[0], whole[1])


def test_a_scorer_is_a_file_beside_bit_equal_weights(student: Any, batch: dict[str, Any], tmp_path: Path) -> None:
    policy, pre, post = student
    expected = policy.decode(batch, "keep20_cap2").tokens
    save(tmp_path, policy, pre, post)
    assert weights_hash(tmp_path) == weights_hash("student")
    again, _, _ = load(tmp_path)
    assert torch.equal(again.decode(batch, "keep20_cap2").tokens, expected)
    assert set(again.state_dict()) == set(load("student")[0].state_dict())
    assert not any(parameter.requires_grad for parameter in again.backbone.context[0].parameters())
    assert again.to(torch.float64).backbone.context[0].place.dtype == torch.float64
    (tmp_path / CONTEXT).unlink()
    with pytest.raises(ConfigError, match="ceed-vla context"):
        load(tmp_path)[0].decode(batch, "keep20_cap2")


@pytest.mark.parametrize("damage", ["width", "missing", "more", "place", "nan", "cut", "views", "outside", "empty"])
def test_a_foreign_file_is_refused(damage: str, student: Any, tmp_path: Path) -> None:
    save(tmp_path, *student)
    tensors = load_file(tmp_path / CONTEXT)
    if damage == "width":
        tensors = dict(random_scorer(64, TOKENS).state_dict())
    elif damage == "missing":
        del tensors["out.weight"]
    elif damage == "more":
        tensors["bias"] = torch.zeros(1)
    elif damage == "place":
        tensors["place"] = torch.zeros(TOKENS, 1)
    elif damage in ("views", "outside", "empty"):
        views = {
            "views": torch.zeros(2, 3),
            "outside": torch.tensor([[[0, 5, 0, 4]] * 2]),
            "empty": [[[0, 4, 2, 2]] * 2],
        }
        tensors["views"] = torch.as_tensor(views[damage])
    elif damage == "nan":
        tensors["place"][3] = torch.nan
    save_file(tensors, tmp_path / CONTEXT)
    if damage == "cut":
        (tmp_path / CONTEXT).write_bytes((tmp_path / CONTEXT).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=CONTEXT):
        load(tmp_path)


def test_what_cannot_be_is_said(student: Any, batch: dict[str, Any]) -> None:
    policy, _, _ = student
    policy.backbone.context = (random_scorer(192, 5),)
    with pytest.raises(ConfigError, match="3 of 46 prefix tokens needs"):
        policy.decode(batch, "keep3")
    with pytest.raises(ConfigError, match=r"view50 needs a checkpoint whose context.safetensors has a view so small"):
        policy.decode(batch, "view50")
    for name in ("keep0", "keep", "keep-1", "keep100000", "view0", "view100", "view"):
        with pytest.raises(ConfigError, match="Unknown decoder"):
            policy.decode(batch, name)
    ladders = decoder_ladders()
    assert all(name.startswith(kind) for kind in ("keep", "view") for name in ladders[kind])


def test_other_decoders_and_compiled_code_do_not_see_it(student: Any, batch: dict[str, Any]) -> None:
    policy, _, _ = student
    with_scorer = policy.decode(batch, "jacobi").tokens
    assert find_decoder("keep3")[0].make.eager_only
    policy.backbone.context = ()
    assert torch.equal(policy.decode(batch, "jacobi").tokens, with_scorer)
    policy.backbone = compiled(policy.backbone, "eager")
    assert torch.equal(policy.decode(batch, "jacobi").tokens, with_scorer)


def test_a_family_without_marked_patches_says_so(llama: Any) -> None:
    backbone, observation = llama(0, 2, 6, 20)
    with pytest.raises(ConfigError, match="marks no image patches"):
        keep_best(backbone, backbone.embed_prefix(observation), 2)
    for name in ("keep2", "view50"):
        with pytest.raises(ConfigError, match=f"leave out {name[:4]}"):
            prefill(backbone, observation, replace(DecodingConfig(), method=name))
