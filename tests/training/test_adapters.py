"""LoRA: trained weights, one base for teacher and student, checkpoints of the trained policy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_vlms import make_tiny_vlm

import ceed_vla
from ceed_vla.checkpoints import load, resolve_checkpoint, save
from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import ConfigError
from ceed_vla.lora import is_adapter
from ceed_vla.training.adapters import (
    LEARNT,
    LoRAConfig,
    adapted_layers,
    attach,
    attach_student,
    teacher_weights,
)
from ceed_vla.training.axes.depth import ExitsConfig, exits
from ceed_vla.training.distill import DistillRun, distill
from ceed_vla.training.distill_data import TrajectoriesConfig
from ceed_vla.training.teacher import TeacherRun, train

FINAL = Path("checkpoints/final/pretrained_model")
ONLINE = TrajectoriesConfig(online=True)
PLAIN = {"grounding_roots": "", "grounding_steps": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm("smolvlm", tmp_path_factory.mktemp("base"), width=96)


@pytest.fixture(scope="module")
def adapter_teacher(studio: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose checkpoint has adapters, and its base by reference."""
    folder = tmp_path_factory.mktemp("teacher")
    policy = studio.vlm_policy(base, weights="reference", proprio="projected")
    config = studio.train_config(folder, policy=policy, steps=8, lora=LoRAConfig(rank=4), **PLAIN)
    train(config)
    return folder / FINAL


def batch_of(studio: Any, pre: Any, rows: int = 6) -> Any:
    return pre(open_dataset(studio.demo).batch(np.arange(0, 5 * rows, 5), 4))


def logits_of(policy: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        prefix = policy.backbone.prefill(batch)
        tokens = torch.arange(5 * len(prefix.logits)).reshape(-1, 5)
        return policy.backbone.block_logits(prefix, tokens)


def randomise(policy: Any) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if f".{LEARNT}." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))


# ---- what learns ---------------------------------------------------------------------------------


def test_a_teacher_learns_adapters_and_what_is_named(adapter_teacher: Path) -> None:
    policy, _, _ = load(adapter_teacher)
    attach(policy, LoRAConfig(rank=4, targets="all", train="state,embed_tokens"))
    learns = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name in learns if f".{LEARNT}." not in name} == {
        "backbone.state.weight",
        "backbone.state.bias",
        "backbone.model.model.text_model.embed_tokens.weight",
    }
    assert any("vision_model" in name for name in learns)
    assert sum(f".lora_A.{LEARNT}." in name for name in learns) == len(adapted_layers(policy))
    own = sum(p.numel() for n, p in policy.named_parameters() if f".{LEARNT}." in n)
    assert own == sum(
        4 * (layer.in_features + layer.out_features) for layer in adapted_layers(policy)
    )


def test_what_learns_beside_a_policy_leaves_its_adapters_apart(
    studio: Any, adapter_teacher: Path, tmp_path: Path
) -> None:
    exits(
        ExitsConfig(
            policy_path=str(adapter_teacher),
            roots=str(studio.demo),
            output_dir=str(tmp_path / "exits"),
            layers=[1],
            steps=1,
            batch_size=4,
            eval_frames=4,
        )
    )
    weights = resolve_checkpoint(adapter_teacher) / "model.safetensors"
    assert (tmp_path / "exits" / weights.name).read_bytes() == weights.read_bytes()
    policy, pre, _ = load(tmp_path / "exits")
    before = load(adapter_teacher)[0]
    batch = batch_of(studio, pre)
    assert torch.equal(logits_of(policy, batch), logits_of(before, batch))
    assert list(policy.backbone.exits) == [1]


@pytest.mark.parametrize("of_adapters", [True, False])
def test_a_student_starts_as_its_teacher_and_learns_its_adapter_alone(
    studio: Any, adapter_teacher: Path, of_adapters: bool
) -> None:
    student, pre, _ = load(adapter_teacher, merge_adapters=not of_adapters)
    teacher, _, _ = load(adapter_teacher)
    batch = batch_of(studio, pre)
    expected = logits_of(teacher, batch)
    attach_student(student, LoRAConfig(rank=4))
    assert all(f".{LEARNT}." in name for name, p in student.named_parameters() if p.requires_grad)
    torch.testing.assert_close(logits_of(student, batch), expected, rtol=1e-4, atol=1e-4)
    randomise(student)
    assert (logits_of(student, batch) - expected).abs().max() > 0.1
    with teacher_weights(student):
        torch.testing.assert_close(logits_of(student, batch), expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(student, batch) - expected).abs().max() > 0.1


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.slow
def test_copies_of_the_base_in_memory(
    studio: Any, base: Path, adapter_teacher: Path, tmp_path: Path, rank: int
) -> None:
    gc.collect()
    before = {id(p) for p in gc.get_objects() if isinstance(p, torch.nn.Parameter)}
    config = studio.distill_config(
        tmp_path, teacher_path=str(adapter_teacher), trajectories=ONLINE, lora=LoRAConfig(rank=rank)
    )
    run = DistillRun(config, None)
    gc.collect()
    new = [p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter) and id(p) not in before]
    held = sum({p.data_ptr(): p.numel() for p in new}.values())
    size = sum(weight.numel() for weight in load_file(base / "model.safetensors").values())
    assert (run.objective.copy == [None]) == bool(rank)
    copies = 1 if rank else 2
    assert copies * size <= held <= (copies + 0.3) * size


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "action_ids", "also"),
    [
        ("reference", "last", ""),
        ("copied", "last", ""),
        ("reference", "added", "embed_tokens,lm_head"),
        ("copied", "added", "embed_tokens,lm_head"),
    ],
)
def test_a_checkpoint_is_the_trained_policy(
    studio: Any,
    base: Path,
    tmp_path: Path,
    weights: str,
    action_ids: str,
    also: str,
    read_log: Callable[..., dict[int, float]],
) -> None:
    policy = studio.vlm_policy(base, weights=weights, action_ids=action_ids, proprio="projected")
    lora = LoRAConfig(rank=4, alpha=12, targets="all", train=f"state,{also}")
    run = TeacherRun(
        studio.train_config(tmp_path, policy=policy, steps=4, lora=lora, **PLAIN), None, None
    )
    run.run()
    losses = list(read_log(tmp_path).values())
    assert losses[-1] < losses[0]
    loaded, pre, _ = ceed_vla.load(tmp_path / FINAL)
    batch = batch_of(studio, pre)
    run.policy.eval()
    torch.testing.assert_close(
        logits_of(loaded, batch), logits_of(run.policy, batch), rtol=1e-3, atol=1e-4
    )
    untrained = ceed_vla.CeedVLAPolicy(studio.vlm_policy(base, proprio="projected")).eval()
    assert (logits_of(untrained, batch) - logits_of(loaded, batch)).abs().max() > 0.05
    kept = load_file(tmp_path / FINAL / "model.safetensors")
    assert any(map(is_adapter, kept)) == (weights == "reference")
    assert any("q_proj.weight" in name for name in kept) == (weights == "copied")


@pytest.mark.slow
def test_a_student_of_adapters(
    studio: Any, adapter_teacher: Path, tmp_path: Path, read_log: Callable[..., dict[int, float]]
) -> None:
    config = studio.distill_config(
        tmp_path,
        teacher_path=str(adapter_teacher),
        trajectories=ONLINE,
        lora=LoRAConfig(rank=4),
        lr=1e-2,
        eval_every=5,
    )
    run = DistillRun(config, None)
    run.run()
    assert read_log(tmp_path, "teacher_agreement")[0] == 1.0
    assert read_log(tmp_path, "anchor_loss")[1] == pytest.approx(0, abs=1e-6)
    student, pre, _ = ceed_vla.load(tmp_path / FINAL)
    teacher, _, _ = ceed_vla.load(adapter_teacher)
    batch = batch_of(studio, pre)
    run.policy.eval()
    torch.testing.assert_close(
        logits_of(student, batch), logits_of(run.policy, batch), rtol=1e-3, atol=1e-4
    )
    assert (logits_of(student, batch) - logits_of(teacher, batch)).abs().max() > 0.05
    embeddings = [policy.backbone.embed_prefix(batch).embeds for policy in (student, teacher)]
    assert torch.equal(*embeddings)

    longer = replace(
        config, output_dir=str(tmp_path / "longer"), student_path=str(tmp_path / FINAL)
    )
    second = DistillRun(longer, None)
    second.policy.eval()
    torch.testing.assert_close(
        logits_of(second.policy, batch), logits_of(student, batch), rtol=1e-3, atol=1e-4
    )
    with teacher_weights(second.policy):
        torch.testing.assert_close(
            logits_of(second.policy, batch), logits_of(teacher, batch), rtol=1e-3, atol=1e-4
        )


def test_an_earlier_student_needs_adapters_that_are_kept_apart(
    studio: Any, adapter_teacher: Path, tmp_path: Path
) -> None:
    merged = save(tmp_path / "merged", *load(adapter_teacher))
    common = {"teacher_path": str(adapter_teacher), "trajectories": ONLINE}
    with pytest.raises(ConfigError, match=r"differs from the teacher in .*, but with adapters"):
        DistillRun(
            studio.distill_config(
                tmp_path / "a", student_path=str(merged), lora=LoRAConfig(rank=4), **common
            ),
            None,
        )


@pytest.mark.slow
def test_a_run_with_adapters_resumes_to_the_same_losses(
    studio: Any,
    adapter_teacher: Path,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    read_log: Callable[..., dict[int, float]],
) -> None:
    settings = {
        "teacher_path": str(adapter_teacher),
        "trajectories": ONLINE,
        "lora": LoRAConfig(rank=4),
        "lr": 1e-2,
        "batch_size": 4,
    }
    distill(studio.distill_config(tmp_path / "whole", **settings))
    interrupt_at(4)
    with pytest.raises(KeyboardInterrupt):
        distill(studio.distill_config(tmp_path / "run", **settings))
    interrupt_at(-1)
    distill(studio.distill_config(tmp_path / "run", **settings, resume=True))
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    state = load_file(tmp_path / "run" / "state_a" / "model.safetensors")
    assert all(f".{LEARNT}." in name for name in state)


def test_weights_that_were_trained_in_full_are_kept(
    studio: Any, base: Path, tmp_path: Path
) -> None:
    policy = studio.vlm_policy(base, weights="reference")
    run = TeacherRun(studio.train_config(tmp_path, policy=policy, steps=2, **PLAIN), None, None)
    run.run()
    loaded, pre, _ = ceed_vla.load(tmp_path / FINAL)
    batch = batch_of(studio, pre)
    run.policy.eval()
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(run.policy, batch))


# ---- online trajectories, precision, recomputed activations --------------------------------------


@pytest.mark.parametrize("states", ["online", "stored"])
def test_online_trajectories_are_the_teachers(studio: Any, tmp_path: Path, states: str) -> None:
    config = studio.distill_config(tmp_path, trajectories=ONLINE, states=states, loss="paper")
    data = DistillRun(config, None).data
    teacher, _, _ = ceed_vla.load(studio.teacher)
    rows = np.array([0, 3, 14, 17, 51])  # the first frames of their episodes have no previous chunk
    batch = data.batch(rows)
    assert torch.equal(batch["fixed_point"], teacher.decode(batch, "ar").tokens)
    assert (batch["previous"] < 0).all(1).tolist() == [True, False, True, False, True]
    before = data.batch(rows[[1, 3]] - 2)  # two steps are executed between chunks
    assert torch.equal(batch["previous"][[1, 3]], before["fixed_point"])
    assert np.isfinite(data.delta_max)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["smolvlm", "paligemma"])
def test_recomputed_activations_train_the_same(
    studio: Any,
    tmp_path: Path,
    family: str,
    lora: LoRAConfig,
    read_log: Callable[..., dict[int, float]],
) -> None:
    base = make_tiny_vlm(family, tmp_path / "base")
    common = {"steps": 3, "batch_size": 4, "lora": lora, "lr": 1e-3, "muon_lr": 1e-3}
    for name, recompute in (("kept", False), ("recomputed", True)):
        both = {**common, "gradient_checkpointing": recompute}
        policy = studio.vlm_policy(base)
        train(studio.train_config(tmp_path / name, policy=policy, **both, **PLAIN))
        distill(
            studio.distill_config(
                tmp_path / f"{name}_student",
                teacher_path=str(tmp_path / "kept" / FINAL),
                trajectories=ONLINE,
                **both,
            )
        )
    for kind in ("", "_student"):
        kept, recomputed = (read_log(tmp_path / f"{name}{kind}") for name in ("kept", "recomputed"))
        np.testing.assert_allclose(list(recomputed.values()), list(kept.values()), rtol=1e-4)


@pytest.fixture
def start_anew() -> Iterator[Callable[[], None]]:
    """Reset accelerate's precision, as in a new process."""
    from accelerate.state import AcceleratorState

    yield lambda: AcceleratorState._reset_state(True)
    AcceleratorState._reset_state(True)


def test_adapters_on_a_base_in_bfloat16(
    studio: Any,
    base: Path,
    tmp_path: Path,
    read_log: Callable[..., dict[int, float]],
    start_anew: Callable[[], None],
) -> None:
    for dtype, precision in (("bfloat16", "bf16"), ("bfloat16", "no"), ("float32", "no")):
        start_anew()
        policy = studio.vlm_policy(base, weights="reference", dtype=dtype)
        config = studio.train_config(
            tmp_path / f"{dtype}_{precision}",
            policy=policy,
            steps=4,
            mixed_precision=precision,
            lora=LoRAConfig(rank=4),
            **PLAIN,
        )
        run = TeacherRun(config, None, None)
        run.run()
        kinds = {p.dtype for n, p in run.policy.named_parameters() if not p.requires_grad}
        assert kinds == {getattr(torch, dtype)}
        assert {p.dtype for p in run.policy.parameters() if p.requires_grad} == {torch.float32}
        ceed_vla.load(tmp_path / f"{dtype}_{precision}" / FINAL)
    exact = list(read_log(tmp_path / "float32_no").values())
    for name in ("bfloat16_bf16", "bfloat16_no"):
        np.testing.assert_allclose(list(read_log(tmp_path / name).values()), exact, rtol=0.02)


def test_weights_do_not_learn_in_half_precision(studio: Any, base: Path, tmp_path: Path) -> None:
    policy = studio.vlm_policy(base, weights="reference", dtype="bfloat16")
    config = studio.train_config(
        tmp_path / "out", policy=policy, steps=1, mixed_precision="no", **PLAIN
    )
    with pytest.raises(
        ConfigError, match=r"Weights would learn in torch.bfloat16, which rounds .* --lora.train"
    ):
        TeacherRun(config, None, None)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, r"lora.rank is -1.*\[0, 4096\]"),
        ({"alpha": -1}, "lora.alpha is -1"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"targets": "vision"}, "one of language, all"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**settings)


def test_a_part_that_no_weight_has_is_refused(studio: Any, base: Path, tmp_path: Path) -> None:
    policy = studio.vlm_policy(base, weights="reference")
    config = studio.train_config(
        tmp_path / "out", policy=policy, lora=LoRAConfig(rank=4, train="embed_token"), **PLAIN
    )
    with pytest.raises(
        ConfigError, match=r"--lora.train has 'embed_token', which is not in the name of any weight"
    ):
        TeacherRun(config, None, None)


def test_adapters_of_another_rank(studio: Any, adapter_teacher: Path, tmp_path: Path) -> None:
    config = studio.distill_config(
        tmp_path, teacher_path=str(adapter_teacher), trajectories=ONLINE, lora=LoRAConfig(rank=3)
    )
    with pytest.raises(
        ConfigError, match=r"lora\.rank is 3, but the checkpoint has adapters of rank 4"
    ):
        distill(config)
