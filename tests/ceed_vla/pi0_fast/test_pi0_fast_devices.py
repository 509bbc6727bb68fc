"""Weights and inputs on a GPU: no tensor is created on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

from fake_cuda import stays_on_its_device


def test_prefill_and_block_stay_on_the_device(lab: SimpleNamespace) -> None:
    backbone, _ = lab.wrap(lab.build(0))
    stays_on_its_device(backbone, lab.observe(2))
