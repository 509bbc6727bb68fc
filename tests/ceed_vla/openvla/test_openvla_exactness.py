"""OpenVLA models decode the tokens of their reference: the project's fixtures, and random folders
through other code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import assert_same_tokens

from ceed_vla import CeedVLAPolicy
from ceed_vla.compiled.engine import compiled
from ceed_vla.convert import ConvertConfig
from ceed_vla.convert.openvla import published_policy
from ceed_vla.decoding import DecodingConfig
from ceed_vla.verify import VerifyConfig, verify

FRONT, IDS = "observation.images.front", "observation.openvla.input_ids"
TASKS = [
    "Put the red cube on the plate",
    "open the drawer",
    "put the blue cube on the red plate",
    "open",
]
FIXTURES = Path(__file__).parents[4] / "shared" / "fixtures"
KINDS = ("fused", "siglip", "clip")


@pytest.fixture(scope="module")
def models(published: Callable[[str], Path]) -> Callable[[str], tuple[CeedVLAPolicy, Any]]:
    made: dict[str, tuple[CeedVLAPolicy, Any]] = {}

    def get(kind: str) -> tuple[CeedVLAPolicy, Any]:
        if kind not in made:
            source = ConvertConfig(str(published(kind)), unnorm_key="kitchen", chunk_size=3)
            policy, pre, _ = published_policy(source)
            made[kind] = policy, pre
        return made[kind]

    return get


def observation(pictures: np.ndarray, rows: int) -> dict[str, Any]:
    image = torch.from_numpy(pictures[:rows]).permute(0, 3, 1, 2).float() / 255
    return {FRONT: image, "task": TASKS[:rows]}


@pytest.mark.parametrize("name", ["openvla-fused", "openvla-siglip"])
def test_the_fixtures_are_reproduced(name: str) -> None:
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"no {name} beside the repository")
    assert "equal the reference" in verify(VerifyConfig(str(FIXTURES / name)))


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_jacobi_ar_and_generate_agree(
    kind: str,
    rows: int,
    models: Any,
    pictures: np.ndarray,
    reference_pixels: Any,
    reference_tokens: Any,
    published: Any,
) -> None:
    policy, pre = models(kind)
    batch = pre(observation(pictures, rows))
    autoregressive, strict = policy.decode(batch, "ar"), policy.decode(batch, "jacobi")
    random = policy.decode(batch, DecodingConfig(guess="random"))
    assert torch.equal(autoregressive.tokens, strict.tokens)
    assert torch.equal(autoregressive.tokens, random.tokens)
    ids, mask = batch[IDS], batch["observation.openvla.attention_mask"].bool()
    for row in range(rows):  # one by one, without padding
        pixels = reference_pixels(pictures[row], published(kind))
        torch.testing.assert_close(
            batch["observation.openvla.pixel_values"][row], pixels, atol=1e-6, rtol=0
        )
        expected = reference_tokens(policy.backbone, ids[row][mask[row]].tolist(), pixels, 9)
        assert [31999 - token for token in strict.tokens[row].tolist()] == expected
    # the rows differ, so the inputs matter
    assert len(set(map(tuple, strict.tokens.tolist()))) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_depth(
    kind: str, models: Any, pictures: np.ndarray, keeps_the_contract: Any
) -> None:
    policy, pre = models(kind)
    keeps_the_contract(policy.backbone, pre(observation(pictures, 3)))


def test_the_loss_teaches_a_block(published: Any, pictures: np.ndarray) -> None:
    policy, pre, _ = published_policy(
        ConvertConfig(str(published("siglip")), unnorm_key="kitchen", chunk_size=3)
    )
    batch = pre(observation(pictures, 2)) | {"action": torch.rand(2, 3, 3) * 0.4}
    policy.train()
    optimizer, losses = torch.optim.Adam(policy.get_optim_params(), 3e-3), []
    for _ in range(30):
        loss, _ = policy(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, published: Any, pictures: np.ndarray) -> None:
    source = ConvertConfig(
        str(published("siglip")), unnorm_key="kitchen", chunk_size=3, dtype=dtype
    )
    policy, pre, _ = published_policy(source)
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
    result = policy.decode(pre(observation(pictures, 2)), "ar")
    assert torch.isfinite(result.actions).all()
    assert result.actions.dtype == torch.float32


def test_one_action_by_default_and_select_action(published: Any, pictures: np.ndarray) -> None:
    policy, pre, post = published_policy(
        ConvertConfig(str(published("siglip")), unnorm_key="garage")
    )
    batch = pre(observation(pictures, 2))
    action = post(policy.select_action(batch))
    assert action.shape == (2, 3)
    low, high = policy.tokenizer.low, policy.tokenizer.high
    assert ((action >= low) & (action <= high)).all()
    assert high[0] == 300


@pytest.mark.parametrize(
    "rows", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_compiled_tokens_are_the_eager_ones(rows: int, models: Any, pictures: np.ndarray) -> None:
    policy, pre = models("siglip")
    engine, batch = compiled(policy.backbone, "eager"), pre(observation(pictures, rows))
    assert_same_tokens(policy.backbone, engine, batch, policy.tokenizer)
