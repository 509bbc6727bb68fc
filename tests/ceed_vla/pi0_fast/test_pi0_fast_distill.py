"""A converted pi0-FAST through distillation on recorded data: its layers are trained, and decoding
is exact.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_pi0_fast import tiny_sizes, write_pi0_fast

from ceed_vla.checkpoints import load
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.errors import ConfigError
from ceed_vla.training.imitation import Imitated


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_converted_model_is_distilled(recompute: bool, tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    from ceed_vla.data.frames import open_dataset
    from ceed_vla.sim.record import record
    from ceed_vla.sim.recording.config import RecordConfig
    from ceed_vla.training.distill import DistillConfig, TrajectoriesConfig, distill

    record(RecordConfig(root=tmp_path / "data", episodes=2, progress=False))
    store = open_dataset(tmp_path / "data")
    chunks, _ = store.chunks(np.arange(len(store)), 4)
    with tiny_sizes():
        source = write_pi0_fast(tmp_path / "tiny", chunks, state_dim=14)
        teacher = tmp_path / "teacher"
        convert(
            ConvertConfig(
                str(source),
                str(teacher),
                from_="pi0_fast",
                vocabulary="actions",
                weights="reference",
            )
        )
        student = distill(
            DistillConfig(
                teacher_path=str(teacher),
                trajectories=TrajectoriesConfig(online=True),
                roots=str(tmp_path / "data"),
                output_dir=str(tmp_path / "student"),
                steps=3,
                batch_size=4,
                eval_every=0,
                eval_frames=8,
                gradient_checkpointing=recompute,
                mixed_precision="no",
            )
        )
        before, after = load(teacher)[0], load(student)
    policy, pre, _ = after
    learnt = set(load_file(student / "model.safetensors"))  # the other weights did not change
    assert learnt == {f"backbone.{name}" for name in policy.backbone.distillation_parameters()}
    batch = pre(store.batch(np.arange(4), 4))
    assert not torch.equal(
        before.backbone.prefill(batch).logits, policy.backbone.prefill(batch).logits
    )
    # After three steps from random weights, tokens are not whole chunks; they are compared
    # undecoded.
    greedy = policy.decode(batch, "ar", read=False)
    assert torch.equal(greedy.tokens, policy.decode(batch, "jacobi", read=False).tokens)


def test_a_policy_of_other_statistics_is_not_imitated(tmp_path: Path) -> None:
    source = write_pi0_fast(tmp_path / "tiny", torch.randn(40, 4, 3))
    teacher = str(tmp_path / "teacher")
    with tiny_sizes():
        convert(ConvertConfig(str(source), teacher, from_="pi0_fast", weights="reference"))
        policy, _, post = load(teacher)
        assert Imitated(teacher, policy, post).policy.tokenizer.normalised
        next(s for s in post.steps if hasattr(s, "stats"))._tensor_stats["action"]["std"] *= 2.0
        with pytest.raises(ConfigError, match="normalised by the statistics of other data"):
            Imitated(teacher, policy, post)
