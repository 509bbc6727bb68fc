"""Context: a scorer with bit-equal weights of the policy; keeping all tokens changes nothing,
keeping some equals a mask.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ceed_vla import load
from ceed_vla.axes.context.scorer import CONTEXT, ContextScorer, keep_scored
from ceed_vla.checkpoints import save, weights_hash
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import DecodingConfig, decoder_ladders, prefill
from ceed_vla.errors import CheckpointError, ConfigError
from tests.helpers.edits import unsealed

ROWS, TOKENS = 3, 46


def random_scorer(width: int, tokens: int, seed: int = 0) -> ContextScorer:
    """A scorer that ranks tokens by their values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scorer = ContextScorer(width, tokens)
        for parameter in scorer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return scorer.requires_grad_(False)


@pytest.fixture
def student() -> tuple[Any, Any, Any]:
    policy, pre, post = load("student_all_tokens")
    policy.backbone.context = (random_scorer(192, TOKENS),)
    return policy, pre, post


@pytest.mark.parametrize("kept", [TOKENS, 99999])
@pytest.mark.parametrize("rest", ["", "_conf0.2_cap2", "_h_fresh"])
def test_keeping_all_is_as_without(
    kept: int, rest: str, student: Any, batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    policy.backbone.context = ()  # no scorer is needed
    usual, all_kept = (
        policy.decode(batch, f"jacobi{rest}"),
        policy.decode(batch, f"keep{kept}{rest}"),
    )
    config = policy.decoding_config(f"keep{kept}")
    assert torch.equal(
        prefill(policy.backbone, batch, config).logits, policy.backbone.prefill(batch).logits
    )
    for name in (
        "tokens",
        "iterations",
        "exact_tokens",
        "exact",
        "layer_forwards",
        "prefix_layers",
    ):
        assert torch.equal(getattr(all_kept, name), getattr(usual, name)), name
    assert all_kept.exit_reason == usual.exit_reason


@pytest.mark.parametrize("kept", [1, 7, 30, 45])
def test_the_prefix_is_that_of_the_best_tokens(
    kept: int, student: Any, batch: dict[str, Any]
) -> None:
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
    assert len(chosen) > 1 or kept == 1  # rows choose independently


def test_behind_the_pruned_prefix_it_is_jacobi_and_proves_nothing(
    student: Any, batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    found = policy.decode(batch, "keep30")
    prefix = prefill(policy.backbone, batch, policy.decoding_config("keep30"))
    behind = policy.backbone.block_logits(prefix, found.tokens[:, :-1]).argmax(-1)
    # a fixed point
    assert torch.equal(torch.cat([prefix.logits.argmax(-1, keepdim=True), behind], 1), found.tokens)
    assert not torch.equal(found.tokens, policy.decode(batch, "jacobi").tokens)
    assert found.exact_tokens.tolist() == [0] * ROWS
    assert not found.exact.any()
    assert not policy.decoding_config("keep30").strict
    behind = policy.decode(batch, "keep30_conf0.2_cap2", previous=found.tokens, frozen_steps=2)
    assert behind.exact_tokens.tolist() == [14] * ROWS
    assert policy.decode(batch, "keep30_cap1").forwards == 1


def test_kept_tokens_are_ascending_and_the_state_stays(student: Any) -> None:
    backbone, generator = student[0].backbone, torch.Generator().manual_seed(3)
    # each token is its place
    embeddings = torch.arange(TOKENS + 1.0).expand(192, -1).T.repeat(ROWS, 1, 1)
    for count in range(1, TOKENS):
        scores = torch.randn(ROWS, TOKENS, generator=generator)
        kept = keep_scored(backbone, embeddings, scores, count)[..., 0]
        assert kept.shape == (ROWS, count + 1)
        assert (kept[:, 1:] > kept[:, :-1]).all()
        assert (kept[:, -1] == TOKENS).all()
        least = scores.gather(1, kept[:, :-1].long()).amin(1)
        assert ((scores > least.unsqueeze(1)).sum(1) == count - 1).all()


@pytest.mark.slow
def test_a_backbone_may_run_a_part_of_its_prefix(batch: dict[str, Any], tmp_path: Path) -> None:
    policy, pre, post = load("student_all_tokens")
    whole = policy.backbone.embed_prefix(batch)
    policy.config.backbone.kept_tokens = kept = [6, 28, 45]
    policy.backbone.keep(kept)
    # and the state
    assert torch.equal(policy.backbone.embed_prefix(batch), whole[:, [*kept, TOKENS]])
    greedy = policy.decode(batch, "ar").tokens
    for name in ("jacobi", "jacobi_random", "ngram8", "loop60"):
        assert torch.equal(policy.decode(batch, name).tokens, greedy), name
    assert policy.decode(batch, "jacobi").exact.all()
    assert not torch.equal(greedy, load("student_all_tokens")[0].decode(batch, "ar").tokens)
    save(tmp_path, policy, pre, post)
    again, _, _ = load(tmp_path)
    assert torch.equal(again.decode(batch, "ar").tokens, greedy)
    again.backbone = compiled(again.backbone, "eager")
    assert torch.equal(again.decode(batch, "jacobi").tokens, greedy)
    for wrong in ([46], [3, 3], [5, 1]):
        with pytest.raises(ConfigError, match=r"kept_tokens is .* some of 0..45, in order"):
            policy.backbone.keep(wrong)


def test_a_scorer_is_a_file_beside_bit_equal_weights(
    student: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    policy, pre, post = student
    expected = policy.decode(batch, "keep20_cap2").tokens
    save(tmp_path, policy, pre, post)
    assert weights_hash(tmp_path) == weights_hash("student_all_tokens")
    again, _, _ = load(tmp_path)
    assert torch.equal(again.decode(batch, "keep20_cap2").tokens, expected)
    assert set(again.state_dict()) == set(load("student_all_tokens")[0].state_dict())
    assert not any(parameter.requires_grad for parameter in again.backbone.context[0].parameters())
    assert again.to(torch.float64).backbone.context[0].place.dtype == torch.float64
    (unsealed(tmp_path) / CONTEXT).unlink()
    with pytest.raises(ConfigError, match="ceed-vla context"):
        load(tmp_path)[0].decode(batch, "keep20_cap2")


@pytest.mark.parametrize(
    "damage", ["width", "missing", "more", "place", "no place", "nan", "nan weight", "cut"]
)
def test_a_foreign_file_is_refused(damage: str, student: Any, tmp_path: Path) -> None:
    unsealed(save(tmp_path, *student))
    tensors = load_file(tmp_path / CONTEXT)
    if damage == "width":
        tensors = dict(random_scorer(64, TOKENS).state_dict())
    elif damage == "missing":
        del tensors["out.weight"]
    elif damage == "more":
        tensors["bias"] = torch.zeros(1)
    elif damage == "place":
        tensors["place"] = torch.zeros(TOKENS, 1)
    elif damage == "no place":
        tensors["place"] = torch.zeros(0)
    elif damage == "nan weight":
        tensors["own.weight"][0, 0] = torch.nan
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
    for name in ("keep0", "keep", "keep-1", "keep100000"):
        with pytest.raises(ConfigError, match="Unknown decoder"):
            policy.decode(batch, name)
    ladders = decoder_ladders()
    assert all(name.startswith("keep") for name in ladders["keep"])


def test_other_decoders_do_not_see_it_and_compiled_code_keeps_the_same(
    student: Any, batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    names = ("jacobi", "keep30", "keep9_cap2", "keep30")
    eager = [policy.decode(batch, name).tokens for name in names]
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    plain, policy.backbone = policy.backbone, compiled(policy.backbone, backend)
    for name, expected in zip(names, eager, strict=True):
        before = len(graphs)
        assert torch.equal(policy.decode(batch, name).tokens, expected), name
    assert len(graphs) == before  # the second call compiles nothing
    policy.backbone, plain.context = plain, ()
    assert torch.equal(policy.decode(batch, "jacobi").tokens, eager[0])


def test_a_family_without_marked_patches_says_so(llama: Any) -> None:
    backbone, observation = llama(0, 2, 6, 20)
    with pytest.raises(ConfigError, match=r"has no image patches to drop.*leave out keep"):
        prefill(backbone, observation, replace(DecodingConfig(), method="keep2"))
