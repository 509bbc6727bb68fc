"""Optimisers: Muon's computation, and its type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ceed_vla.training import optim
from ceed_vla.training.optim import Muon, build_optimizers, computes_bfloat16, orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (1, 8)])
def test_orthogonalised_matrix_keeps_its_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    # Newton-Schulz acts on each singular value separately: the same iteration on numbers.
    values = s / s.norm()
    a, b, c = optim.NEWTON_SCHULZ
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(
        orthogonalise(matrix).double(), u @ torch.diag(values) @ vh, rtol=1e-3, atol=1e-3
    )


def test_muon_in_float32_steps_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(native: bool) -> torch.Tensor:
        monkeypatch.setattr(optim, "computes_bfloat16", lambda device: native)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(12, 20))
        optimizer = Muon(
            [weight], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        for seed in range(5):
            weight.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        return weight.detach()

    ours, theirs = trained(native=False), trained(native=True)
    assert (ours - theirs).abs().max() < 0.02


def test_only_matrices_of_layers_get_muon() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 6)]), "head": nn.Linear(6, 3)})
    muon, adam = build_optimizers(model.named_parameters(), lr=1e-3, muon_lr=1e-3, weight_decay=0.0)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(6, 4)]
    assert len(adam.param_groups[0]["params"]) == 3


def test_bfloat16_is_asked_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"amx_bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert computes_bfloat16("cpu") is expected
