"""Other ways to a chunk, for the comparison of `ceed-vla bench` only: no policy of ours decodes
like this.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.cache import KVCache
from ceed_vla.decoding import BlockRequest, DecodeResult, register_decoder
from ceed_vla.decoding.drafts import refuse_jacobi_settings
from ceed_vla.errors import ConfigError
from ceed_vla.sim.environment import Bundle, observation_batch
from ceed_vla.sim.timing import Probe


@register_decoder("pdvla", "pdvla", "PD-VLA, untrained")
@torch.no_grad()
def decode_pdvla(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Jacobi iteration with bidirectional attention in the block (arXiv 2503.02310), until it
    repeats, n times at most.

    It does not decode the model's distribution: nothing is proven, and nothing is committed.
    """
    started = request.clock()
    batch = len(prefix.logits)
    n = backbone.block_length
    if (
        not isinstance(prefix.cache, KVCache)
        or request.frozen is not None
        or request.stop is not None
    ):
        raise ConfigError(
            "pdvla needs the compact backbone, tokens of fixed length, and freezes nothing."
        )
    refuse_jacobi_settings(request.config)
    tokens, _, _ = request.begin(backbone, prefix)
    # (B,)
    forwards = 0
    running = torch.ones(batch, dtype=torch.bool)
    iterations = torch.zeros(batch, dtype=torch.int64)
    prefix.cache.causal = False
    try:
        while running.any() and forwards < n:
            new = backbone.block_logits(prefix, tokens[:, :-1]).argmax(-1)  # (B, n - 1)
            forwards = forwards + 1
            iterations = iterations + running
            running &= (new != tokens[:, 1:]).any(1).cpu()
            tokens[:, 1:] = new
    finally:
        prefix.cache.causal = True
    return DecodeResult(
        tokens=tokens,
        forwards=forwards,
        iterations=iterations,
        exit_reason=["max_iterations" if row else "converged" for row in running.tolist()],
        exact_tokens=torch.ones(batch, dtype=torch.int64),
        exact=torch.zeros(batch, dtype=torch.bool),
        seconds={"decode": request.clock() - started},
    )


decode_pdvla.relaxes = lambda _: True  # type: ignore[attr-defined]
decode_pdvla.eager_only = True  # type: ignore[attr-defined]  # its mask is not the compiled one's


def act(bundle: Bundle) -> Probe:
    """Times LeRobot's ACT at its default size, with random weights, on the policy's cameras and
    state: one forward.
    """
    config = bundle[0].config
    features = {"input_features": config.input_features, "output_features": config.output_features}
    policy: Any = ACTPolicy(
        ACTConfig(**features, device=config.device, pretrained_backbone_weights=None)
    ).eval()
    policy.to(config.device)

    @torch.inference_mode()
    def probe(observation: dict[str, Any], instruction: str) -> dict[str, float]:
        started = time.perf_counter()
        batch = observation_batch([observation], [instruction])
        batch = {
            name: value.to(config.device)
            for name, value in batch.items()
            if name in config.input_features
        }
        policy.predict_action_chunk(batch).cpu()
        return {"total": time.perf_counter() - started}

    return probe
