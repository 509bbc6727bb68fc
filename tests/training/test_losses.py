"""Both distillation losses, compared with slow loops in float64; and inputs they must not use."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.backbones.compact.model import LANGUAGE_KEY, STATE_KEY, CompactBackbone
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.tokens.uniform import UniformTokensConfig
from ceed_vla.training import losses
from ceed_vla.training.distill import distill
from ceed_vla.training.losses import (
    DistillationTerms,
    after_first_divergence,
    chunk_distance,
    forward_kl,
    masked_mean,
    mixed_labels,
    paper_loss,
    trust_region_loss,
)

B, N, V = 5, 8, 9
CAMERA = "observation.images.front"


# ---- the reference: plain loops ------------------------------------------------------------------


def probabilities(row: NDArray[np.float64]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def reference_kl(target: NDArray[np.float64], model: NDArray[np.float64]) -> float:
    p, q = probabilities(target), probabilities(model)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def reference_consistency(
    target: NDArray[np.float64], model: NDArray[np.float64], states: Tensor, fixed: Tensor
) -> float:
    """Mean KL over the entries after the first wrong token of a row; entry i predicts token i."""
    terms = []
    for b in range(len(states)):
        first = next((i for i in range(N) if states[b, i] != fixed[b, i]), N)
        terms += [reference_kl(target[b, i], model[b, i]) for i in range(first + 1, N)]
    return sum(terms) / len(terms) if terms else 0.0


def reference_soft_label(label: int, sigma: float) -> list[float]:
    if sigma == 0:
        return [float(v == label) for v in range(V)]
    weights = [math.exp(-((v - label) ** 2) / (2 * sigma**2)) for v in range(V)]
    return [weight / sum(weights) for weight in weights]


@pytest.fixture
def case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    fixed = torch.randint(V, (B, N), generator=generator)
    states = fixed.clone()
    states[0, 2:5] = (states[0, 2:5] + 1) % V  # heals after slot 4, which counts all the same
    states[1, N - 1] = (states[1, N - 1] + 1) % V  # only the last token: no entry left to learn
    states[2] = (states[2] + torch.arange(1, N + 1)) % V  # wrong from slot 0 on; slot 8 wraps round
    states[3, 6] = (states[3, 6] + 3) % V
    logits = {
        name: torch.randn(B, N, V, generator=generator) * 2
        for name in ("teacher", "fixed", "state", "label")
    }
    labels = torch.randint(V, (B, N), generator=generator)
    weight = torch.ones(B, N)
    weight[4, 3:] = 0
    return {
        **{f"{k}_logits": v for k, v in logits.items()},
        "states": states,
        "fixed_point": fixed,
        "labels": labels,
        "label_weight": weight,
    }


def numpy64(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


# ---- values --------------------------------------------------------------------------------------


def test_slots_behind_the_end_of_a_chunk_teach_nothing(case: dict[str, Tensor]) -> None:
    live = torch.ones(B, N)
    live[:, 5:] = 0
    for loss, keys in (
        (
            trust_region_loss,
            ("teacher_logits", "fixed_logits", "state_logits", "states", "fixed_point"),
        ),
        (
            paper_loss,
            ("fixed_logits", "state_logits", "label_logits", "states", "fixed_point", "labels"),
        ),
    ):
        given = {key: case[key] for key in keys}
        more = {"omega": 2.0} if loss is trust_region_loss else {"omega": 2.0, "sigma": 0.0}
        weight = {} if loss is trust_region_loss else {"label_weight": live}
        cut = {key: value[:, :5] for key, value in given.items()}
        whole = loss(**given, **more, **weight, live=live).total
        part = loss(**cut, **more, **{key: value[:, :5] for key, value in weight.items()}).total
        assert whole.item() == pytest.approx(part.item(), rel=1e-5)


def test_trust_region_equals_the_loops(case: dict[str, Tensor]) -> None:
    keys = ("teacher_logits", "fixed_logits", "state_logits", "states", "fixed_point")
    terms = trust_region_loss(**{key: case[key] for key in keys}, omega=2.5)
    teacher, fixed = numpy64(case["teacher_logits"]), numpy64(case["fixed_logits"])
    anchor = np.mean([reference_kl(teacher[b, i], fixed[b, i]) for b in range(B) for i in range(N)])
    consistency = reference_consistency(
        teacher, numpy64(case["state_logits"]), case["states"], case["fixed_point"]
    )
    assert terms.consistency.item() == pytest.approx(consistency, rel=1e-5)
    assert terms.anchor.item() == pytest.approx(anchor, rel=1e-5)
    assert terms.total.item() == pytest.approx(consistency + 2.5 * anchor, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_paper_loss_equals_the_loops(case: dict[str, Tensor], sigma: float) -> None:
    arguments = {key: value for key, value in case.items() if key != "teacher_logits"}
    terms = paper_loss(**arguments, omega=0.5, sigma=sigma)
    fixed, states = numpy64(case["fixed_logits"]), numpy64(case["state_logits"])
    consistency = reference_consistency(fixed, states, case["states"], case["fixed_point"])
    entropies = []
    for b in range(B):
        for i in range(N):
            if case["label_weight"][b, i]:
                q = probabilities(numpy64(case["label_logits"])[b, i])
                soft = reference_soft_label(int(case["labels"][b, i]), sigma)
                entropies.append(-sum(a * math.log(b) for a, b in zip(soft, q, strict=True)))
    anchor = sum(entropies) / len(entropies)
    assert terms.consistency.item() == pytest.approx(consistency, rel=1e-5)
    assert terms.anchor.item() == pytest.approx(anchor, rel=1e-5)
    assert terms.total.item() == pytest.approx(consistency + 0.5 * anchor, rel=1e-5)


def test_kl_is_zero_on_equal_distributions_and_ignores_a_shift_of_the_logits(
    case: dict[str, Tensor],
) -> None:
    logits = case["teacher_logits"]
    torch.testing.assert_close(forward_kl(logits, logits + 4), torch.zeros(B, N), atol=1e-5, rtol=0)
    assert (forward_kl(logits, case["fixed_logits"]) > 0).all()


def test_kl_stays_finite_where_the_model_is_certain_and_wrong() -> None:
    target, model = torch.zeros(1, 1, 3), torch.tensor([[[0.0, -1e4, -1e4]]])
    kl = forward_kl(target, model)
    assert torch.isfinite(kl).all()
    assert kl.item() == pytest.approx(2 / 3 * 1e4 - math.log(3), rel=1e-4)


# ---- the mask ------------------------------------------------------------------------------------


def test_mask_starts_behind_the_first_wrong_token_and_stays(case: dict[str, Tensor]) -> None:
    mask = after_first_divergence(case["states"], case["fixed_point"])
    firsts = [2, N - 1, 0, 6, None]
    for row, first in zip(mask, firsts, strict=True):
        expected = [float(first is not None and i > first) for i in range(N)]
        assert row.tolist() == expected


@pytest.mark.parametrize("wrong", [None, N - 1])
def test_an_empty_mask_gives_zero_with_a_gradient(
    case: dict[str, Tensor], wrong: int | None
) -> None:
    states = case["fixed_point"].clone()
    if wrong is not None:
        states[:, wrong] = (states[:, wrong] + 1) % V
    logits = case["state_logits"].requires_grad_()
    terms = trust_region_loss(
        case["teacher_logits"], case["fixed_logits"], logits, states, case["fixed_point"], omega=0.0
    )
    assert terms.total.item() == 0.0
    terms.total.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_masked_mean() -> None:
    values, mask = torch.tensor([[1.0, 2.0], [3.0, 10.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, torch.zeros(2, 2)).item() == 0.0


@pytest.fixture(scope="module")
def backbone() -> CompactBackbone:
    torch.manual_seed(0)
    sizes = CompactConfig(
        words=8,
        max_instruction_words=4,
        image_size=16,
        image_grid=2,
        stem_channels=[4] * 4,
        width=16,
        layers=2,
        heads=2,
        mlp_width=16,
    )
    model = sizes.build(
        PolicyShape({CAMERA: (3, 16, 16)}, 3, 1, N, UniformTokensConfig(num_bins=V))
    )
    with torch.no_grad():  # let tokens matter as in a trained model
        model.action_tokens.weight.mul_(50)
    return model


@pytest.mark.parametrize("first", range(N))
def test_changing_token_f_changes_the_logits_from_entry_f_plus_1_on(
    backbone: CompactBackbone, first: int
) -> None:
    observation = {
        CAMERA: torch.rand(2, 3, 16, 16),
        STATE_KEY: torch.randn(2, 3),
        LANGUAGE_KEY: torch.tensor([[2, 3, 0, 0], [4, 2, 5, 0]]),
    }
    fixed = torch.randint(V, (2, N))
    states = fixed.clone()
    states[:, first] = (states[:, first] + 1) % V
    with torch.no_grad():
        _, (on_fixed, on_states) = backbone.packed_logits(
            backbone.embed_prefix(observation), [fixed, states]
        )
    changed = (on_fixed - on_states).abs().amax(-1) > 1e-5  # (2, n)
    mask = after_first_divergence(states, fixed).bool()
    torch.testing.assert_close(changed, mask)
    assert mask.sum(1).tolist() == [N - 1 - first] * 2


# ---- gradients -----------------------------------------------------------------------------------


def test_no_gradient_into_the_targets(case: dict[str, Tensor]) -> None:
    leaves = {key: case[key].clone().requires_grad_() for key in case if key.endswith("_logits")}
    blocks = {key: case[key] for key in ("states", "fixed_point")}
    teacher, fixed, states = (
        leaves["teacher_logits"],
        leaves["fixed_logits"],
        leaves["state_logits"],
    )
    trust_region_loss(teacher, fixed, states, **blocks, omega=1.0).total.backward()
    assert teacher.grad is None
    assert fixed.grad is not None
    assert states.grad is not None
    fixed.grad = states.grad = None
    paper = paper_loss(
        fixed,
        states,
        leaves["label_logits"],
        **blocks,
        labels=case["labels"],
        label_weight=case["label_weight"],
        omega=1.0,
        sigma=0.0,
    )
    paper.total.backward()
    assert fixed.grad is None  # the paper's target is the student itself, with a stop-gradient
    assert states.grad is not None
    assert leaves["label_logits"].grad is not None
    assert not leaves["label_logits"].grad[4, 3:].any()  # past the end of the demonstration


def test_a_small_step_lowers_the_loss(case: dict[str, Tensor]) -> None:
    logits = {key: case[key].clone().requires_grad_() for key in ("fixed_logits", "state_logits")}
    blocks = {key: case[key] for key in ("states", "fixed_point")}
    before = trust_region_loss(case["teacher_logits"], **logits, **blocks, omega=1.0).total
    before.backward()
    stepped = {key: (value - 0.1 * value.grad).detach() for key, value in logits.items()}
    assert trust_region_loss(case["teacher_logits"], **stepped, **blocks, omega=1.0).total < before


# ---- labels --------------------------------------------------------------------------------------


def test_chunk_distance_counts_valid_steps_in_normalised_units() -> None:
    actions = torch.tensor(
        [[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]], [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]]
    )
    demonstration = torch.zeros(2, 3, 2)
    valid = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    distance = chunk_distance(actions, demonstration, valid, half_range=torch.tensor([1.0, 2.0]))
    # row 0: steps 0 and (1/1 + 1/2)/2 over two steps; row 1: (1/1 + 2/2)/2 over three
    torch.testing.assert_close(distance, torch.tensor([0.75 / 2, 1 / 3]))


def test_labels_are_the_demonstration_only_beyond_delta_max() -> None:
    fixed, demonstration = torch.zeros(3, N, dtype=torch.long), torch.ones(3, N, dtype=torch.long)
    labels, replaced = mixed_labels(
        fixed, demonstration, torch.tensor([0.1, 0.2, 0.3]), delta_max=0.2
    )
    assert replaced.tolist() == [False, False, True]
    assert labels[:, 0].tolist() == [0, 0, 1]


def test_a_loss_without_counts_is_the_same_in_one_part_and_in_two(
    studio: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_log: Callable[..., dict[int, float]],
) -> None:
    def plain(state_logits: Any, fixed_logits: Any, fixed_point: Any) -> DistillationTerms:
        consistency, anchor = (
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), fixed_point)
            for logits in (state_logits, fixed_logits)
        )
        return DistillationTerms(consistency, anchor, consistency + anchor)

    monkeypatch.setitem(losses._LOSSES, "plain", plain)
    for parts in (1, 2):
        settings = {"loss": "plain", "gradient_accumulation": parts, "mixed_precision": "no"}
        distill(studio.distill_config(tmp_path / str(parts), **settings))
    one, two = (list(read_log(tmp_path / name, "loss").values()) for name in ("1", "2"))
    assert one
    assert two == pytest.approx(one, rel=1e-3)
