"""Exits: a separate file, bit-equal weights, shallow passes that prove nothing, exact depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exits_of_student import student_with_exits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ceed_vla import load
from ceed_vla.axes.depth.exits import EXITS, KINDS, make_exits
from ceed_vla.checkpoints import save, weights_hash
from ceed_vla.compiled.engine import compiled
from ceed_vla.decoding import DecodingConfig, prefill
from ceed_vla.decoding.measures import mass_near
from ceed_vla.errors import CheckpointError, ConfigError, NotFiniteError
from tests.helpers.edits import unsealed

ROWS = 3


@pytest.fixture
def student() -> tuple[Any, Any, Any]:
    return student_with_exits()


@pytest.mark.parametrize(
    "name",
    ["depth1", "depth3", "depth1-2", "deer3t0", "sure3p1", "depth2_h"],
)
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.usefixtures("poisoned")
def test_without_an_exit_rule_tokens_are_greedy(
    name: str, frozen: int, student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    previous = torch.randint(255, (ROWS, 56), generator=torch.Generator().manual_seed(2))
    behind = {"previous": previous, "frozen_steps": frozen}
    expected = policy.decode(batch, "ar", **behind).tokens
    result = policy.decode(batch, name, **behind)
    right = (frozen + 4) * 7 if name.endswith("_h") else 56
    assert torch.equal(result.tokens[:, :right], expected[:, :right])
    assert (result.exact_tokens >= right).all()
    assert (result.layer_forwards < 4 * (result.iterations + 1)).all()


def test_scores_that_are_not_finite_agree_on_nothing(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    for own in policy.backbone.exits.values():
        own.linear.weight.fill_(torch.nan)
    for name in ("deer3t255", "sure3p0.1"):
        with pytest.raises(NotFiniteError):
            policy.decode(batch, name)


@pytest.mark.parametrize("name", ["deer3t4", "sure3p0.1", "conf0.2_cap2", "agree4"])
def test_what_compares_bins_needs_bins(
    student: tuple[Any, Any, Any], batch: dict[str, Any], name: str
) -> None:
    policy, _, _ = student
    policy.tokenizer.ordered = False
    with pytest.raises(ConfigError, match="neighbouring"):
        policy.decode(batch, name)
    policy.decode(batch, "gap0.5_cap2")


def test_exits_go_where_the_policy_goes(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    for how, dtype in (("double", torch.float64), ("float", torch.float32)):
        getattr(torch.nn.ModuleList([policy]), how)()
        assert {own.linear.weight.dtype for own in policy.backbone.exits.values()} == {dtype}


@pytest.mark.parametrize("name", ["deer3t1", "sure3p0.2"])
def test_states_that_are_not_kept_and_compiled_code_are_refused(
    name: str, student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    with pytest.raises(ConfigError, match="record_states=False"):
        policy.decode(batch, name, record_states=True)
    policy.backbone = compiled(policy.backbone, backend="eager")
    with pytest.raises(ConfigError, match="eagerly only"):
        policy.decode(batch, name)


def test_frozen_slots_do_not_make_depths_agree(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    behind = {
        "previous": policy.decode(batch, "ar").tokens,
        "shift_steps": 0,
        "frozen_steps": 2,
        "executed_steps": 4,
    }
    seen: list[Any] = []
    depths = policy.backbone.depth_logits
    policy.backbone.depth_logits = lambda *a: seen.append(found := depths(*a)) or found
    policy.decode(batch, "deer3t0", **behind)
    # of the slots behind the frozen ones
    lower, upper = (scores.argmax(-1)[:, 13:] for scores in seen[0][0])
    apart = (lower - upper).abs().double().mean(1)  # (B,)
    assert apart.min() > 0
    del policy.backbone.depth_logits
    found = policy.decode(batch, f"deer3t{0.9 * apart.min():.4f}", **behind)
    assert "depths_agree" not in found.exit_reason
    found = policy.decode(batch, f"deer3t{apart.max() + 0.01:.4f}", **behind)
    assert set(found.exit_reason) == {"depths_agree"}


def test_rows_whose_exits_agree_are_done_behind_a_cut_prefix(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    previous = policy.decode(batch, "jacobi").tokens
    far = policy.decode(batch, "deer3t255", previous=previous, shift_steps=0)
    assert far.exit_reason == ["depths_agree"] * ROWS
    assert far.iterations.tolist() == [1] * ROWS
    assert far.layer_forwards.tolist() == far.prefix_layers.tolist() == [3] * ROWS
    assert far.exact_tokens.tolist() == [0] * ROWS
    # Rows end independently: the distances differ, so some threshold separates them.
    for bins in range(1, 120):
        some = policy.decode(batch, f"deer3t{bins / 4}_cap3", previous=previous, shift_steps=0)
        if (
            0
            < (done := [reason == "depths_agree" for reason in some.exit_reason]).count(True)
            < ROWS
        ):
            break
    else:
        pytest.fail("no threshold splits the rows")
    for row, ended in enumerate(done):
        assert int(some.prefix_layers[row]) == (3 if ended else 4)
        forwards = 4 * int(some.iterations[row])  # the first of 3 if its first token differs
        assert int(some.layer_forwards[row]) in ((3,) if ended else (forwards, forwards - 1))
        alone = {
            name: value[row : row + 1] for name, value in batch.items() if torch.is_tensor(value)
        }
        own = policy.decode(
            alone, f"deer3t{bins / 4}_cap3", previous=previous[row : row + 1], shift_steps=0
        )
        assert own.exit_reason == [some.exit_reason[row]]
        assert torch.equal(own.tokens[0], some.tokens[row])


@pytest.mark.parametrize("name", ["sure3p{}", "deer3t{}", "skip2p{}"])
def test_rows_that_ended_wait_unchanged(
    name: str, student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    seen: list[tuple[torch.Tensor, int]] = []
    first = {"depth_sure", "depths_agree", "program_sure"}
    for limit in (0.02, 0.05, 0.1, 0.2, 0.3, 5, 10, 15, 20, 40):
        if limit > 1 and "deer" not in name:
            continue
        seen.clear()
        found = policy.decode(
            batch, name.format(limit), on_proven=lambda t, k, _: seen.append((t.clone(), k))
        )
        done = torch.tensor([reason in first for reason in found.exit_reason])
        if 0 < int(done.sum()) < ROWS:
            break
    else:
        pytest.fail("no limit splits the rows")
    assert found.forwards == found.iterations.max()
    assert len(seen) in (found.forwards, found.forwards - 1)
    for tokens, proven in seen:
        assert torch.equal(tokens[done], found.tokens[done])
        assert torch.equal(tokens[:, :proven], found.tokens[:, :proven])


def test_a_depth_without_an_exit_names_the_depths(llama: Any) -> None:
    backbone, observation = llama(0, 2, 6, 20, layers=4)
    for name in ("sure5p0.2", "deer5t1", "sure0p0.2"):
        with pytest.raises(ConfigError, match=r"it must be in \[1, 3\]"):
            prefill(backbone, observation, DecodingConfig(method=name))


@pytest.mark.parametrize("name", ["depth2", "depth1-2", "program0-1-3"])
def test_states_begin_with_the_guess(
    name: str, student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    found = policy.decode(batch, name, record_states=True)
    usual = policy.decode(batch, "jacobi", record_states=True)
    assert torch.equal(found.states[0], usual.states[0])
    assert torch.equal(found.states[-1], found.tokens)
    assert len(found.states) == found.forwards + 1


def test_rows_whose_exit_is_confident_are_done(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    previous = policy.decode(batch, "jacobi").tokens
    masses, config = [], policy.decoding_config("sure2p0")
    with torch.no_grad():
        prefix = prefill(policy.backbone, batch, config)
        tokens = torch.cat([prefix.logits.argmax(-1, keepdim=True), previous[:, 1:]], dim=1)
        (logits,), _ = policy.backbone.depth_logits(prefix, tokens[:, :-1], (2,))
        first, rest = mass_near(prefix.logits, tokens[:, 0]), mass_near(logits, logits.argmax(-1))
        masses = torch.cat([first[:, None], rest], dim=1).amin(1).tolist()  # (B,)
    assert len({round(mass, 4) for mass in masses}) == ROWS
    limit = sorted(masses)[1] - 1e-5  # two rows continue
    found = policy.decode(batch, f"sure2p{limit:.6f}", previous=previous, shift_steps=0)
    done = [mass > limit for mass in masses]
    assert [reason == "depth_sure" for reason in found.exit_reason] == done
    assert found.prefix_layers.tolist() == [2 if row else 4 for row in done]
    assert torch.equal(found.tokens[done][:, 1:], logits.argmax(-1)[done])


def test_a_row_that_goes_on_takes_what_the_decoder_takes_without(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    previous = policy.decode(batch, "jacobi").tokens
    for name in ("conf0.2_cap2", "cap1", "conf0.5_cap3"):
        usual = policy.decode(batch, name, previous=previous)
        going = policy.decode(batch, f"deer3t0_{name}", previous=previous)
        assert torch.equal(going.tokens, usual.tokens)
        again = (going.layer_forwards - usual.layer_forwards) // 3  # forwards that start over
        assert torch.equal(going.layer_forwards, usual.layer_forwards + 3 * again)
        assert torch.equal(going.iterations, usual.iterations + again)
        assert going.forwards == usual.forwards + int(again.max())
        assert going.exit_reason == usual.exit_reason
        alone = [
            {k: v[r : r + 1] for k, v in batch.items() if torch.is_tensor(v)} for r in range(ROWS)
        ]
        rows = [
            policy.decode(one, f"deer3t0_{name}", previous=previous[r : r + 1])
            for r, one in enumerate(alone)
        ]
        assert (
            torch.cat([row.layer_forwards for row in rows]).tolist()
            == going.layer_forwards.tolist()
        )


def test_a_cap_counts_the_shallow_forward(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    result = policy.decode(batch, "depth2_cap2")
    assert (result.forwards, result.iterations.tolist(), result.layer_forwards.tolist()) == (
        2,
        [2] * ROWS,
        [6] * ROWS,
    )
    refused = {
        "depth2_cap1": "Use cap2",
        "depth1-2_cap2": "Use cap3",
        "depth2-4": r"\[1, 3\]",
        "depth4": r"\[1, 3\]",
        "deer1t1": r"\[1, 3\]",
    }
    for name, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            policy.decode(batch, name)
    policy.backbone.exits = make_exits(policy.backbone, [1, 2], "layer")
    with pytest.raises(ConfigError, match="train kind linear"):
        policy.decode(batch, "deer2t1")


def test_compiled_code_is_the_same(student: tuple[Any, Any, Any], batch: dict[str, Any]) -> None:
    policy, _, _ = student
    expected = policy.decode(batch, "ar").tokens
    policy.backbone = compiled(policy.backbone, "eager")
    assert torch.equal(policy.decode(batch, "depth2").tokens, expected)


def test_a_deadline_counts_the_shallow_forward(
    student: tuple[Any, Any, Any], batch: dict[str, Any]
) -> None:
    policy, _, _ = student
    for name in ("depth2_deadline0.001", "deer3t0_deadline0.001"):  # some row starts over
        result = policy.decode(batch, name)
        assert (result.forwards, set(result.exit_reason)) == (2, {"deadline"})


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_a_file_beside_bit_equal_weights(
    kind: str, student: tuple[Any, Any, Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    policy, pre, post = student
    policy.backbone.exits = make_exits(policy.backbone, [1, 3], kind)
    for own in policy.backbone.exits.values():
        for parameter in own.parameters():
            parameter.data += 0.01
    for name in ("jacobi_mid", "ceed"):  # they do not change the full depth
        mine, without = (
            policy.decode(batch, name),
            load("student_all_tokens")[0].decode(batch, name),
        )
        assert torch.equal(mine.tokens, without.tokens)
        assert torch.equal(mine.iterations, without.iterations)
    expected = policy.decode(batch, "depth1_cap2").tokens
    save(tmp_path, policy, pre, post)
    assert weights_hash(tmp_path) == weights_hash("student_all_tokens")
    with safe_open(tmp_path / EXITS, "pt") as file:
        assert file.metadata() == {"kind": kind, "depths": "1,3"}
    again, _, _ = load(tmp_path)
    assert not any(
        p.requires_grad for own in again.backbone.exits.values() for p in own.parameters()
    )
    assert torch.equal(again.decode(batch, "depth1_cap2").tokens, expected)
    other, own_pre, own_post = load("teacher")
    save(tmp_path, other, own_pre, own_post)  # overwrites it completely
    assert not (tmp_path / EXITS).exists()
    assert load(tmp_path)[0].backbone.exits == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "linear", "depths": "1,x"}, "The depths in"),
        ({"kind": "linear", "depths": "1,9"}, "does not belong"),
        ({"kind": "wide", "depths": "1,3"}, "does not belong"),
        ({"kind": "layer", "depths": "1,3"}, "does not belong"),
        ({"kind": "coarse", "depths": "1,3"}, "does not belong"),
        ({"kind": "linear", "depths": "1,2"}, "does not belong"),
        ({"kind": "linear", "depths": "1,2,3"}, "does not belong"),
        (None, "The depths in"),
    ],
)
def test_a_foreign_file_is_refused(
    metadata: dict[str, str] | None, message: str, student: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    policy, pre, post = student
    del policy.backbone.exits[2]
    unsealed(save(tmp_path, policy, pre, post))
    save_file(load_file(tmp_path / EXITS), tmp_path / EXITS, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_exits_that_there_cannot_be(student: tuple[Any, Any, Any]) -> None:
    for depths in ([], [0], [4]):
        with pytest.raises(ConfigError, match=r"in \[1, 3\]"):
            make_exits(student[0].backbone, depths, "linear")


def test_an_exit_of_a_bfloat16_model_learns_in_float32(llama: Any) -> None:
    backbone, observation = llama(0, 2, 6, 20)
    backbone.to(torch.bfloat16)
    backbone.exits = make_exits(backbone, [1], "linear")
    assert {p.dtype for p in backbone.exits[1].parameters()} == {torch.float32}
    embeddings = backbone.embed_prefix(observation)
    (logits,) = backbone.packed_depth_logits(
        embeddings, [torch.zeros(2, 6, dtype=torch.int64)], depth=1
    )
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert backbone.exits[1].linear.weight.grad.abs().sum() > 0


def test_compiled_code_behind_an_exit_is_the_same_at_every_position(llama: Any) -> None:
    backbone, observation = llama(0, 2, 6, 20)
    backbone.exits = make_exits(backbone, [1], "linear")
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    engine, found = compiled(backbone, backend), []
    for committed in (1, 2, 3):
        prefix = engine.prefill(observation)
        engine.block_logits(prefix, torch.zeros(2, 5, dtype=torch.int64))
        prefix.cache.commit(committed)
        engine.shallow_logits(prefix, torch.zeros(2, 1, dtype=torch.int64), 1)
        found.append(len(graphs))
    assert found[0] == found[-1]
    backbone.exits = make_exits(backbone, [1], "layer")
    with pytest.raises(ConfigError, match="has not seen the committed tokens"):
        engine.shallow_logits(prefix, torch.zeros(2, 1, dtype=torch.int64), 1)
