"""The settings common to all training runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.fields import COUNTS, SEEDS, THREADS, Checked, chosen, ranged
from ceed_vla.training.adapters import LoRAConfig
from ceed_vla.training.clipping import MOST_CLIPPED
from ceed_vla.training.held_out import SHARE
from ceed_vla.training.held_out import SHARES as HELD_OUT_SHARES
from ceed_vla.training.settings import BATCHES, NONE_OR_COUNTS, NONE_OR_RATES, RATES, SHARES

ANY_NUMBER = 10**9  # steps without a limit of their own: as many as a budget allows


@dataclass
class RunConfig(Checked):
    """Settings of every training run.

    Attributes:
        output_dir: Folder for checkpoints, logs and states.
        steps: Optimiser steps.
        max_minutes: Budget of the steps [min]; 0: none. Steps and learning rate follow from the
            speed. A resumed run has it for the rest; validation at the end is extra.
        batch_size: Frames per step, over all processes and parts.
        gradient_accumulation: Parts of a process's share of a batch, run one after another.
        gradient_checkpointing: Store only the inputs of the layers for the backward pass, which
            takes less memory and a third more time.
        lora: Low-rank adapters instead of all weights.
        lr: Peak learning rate of AdamW.
        muon_lr: Peak learning rate of Muon (the trunk's matrices); 0 uses AdamW for these, too.
        warmup: Warm-up steps.
        validate_every: Steps between closed-loop validations; 0 validates only at the end.
        save_every: Steps between resumable states.
        log_every: Steps between log lines.
        mixed_precision: "bf16", "no", or "auto": bf16 if the device computes in it without
            emulation.
        seed: Seed of weights, batches and augmentation.
        threads: CPU threads; 0 leaves torch's default.
        held_out: Share of every dataset's episodes that are not trained on; the summary at the end
            measures on them. Datasets of fewer than ten episodes hold out none.
        max_clipped: Largest share of a dimension's actions far outside the policy's range.
        streaming: Which datasets are decoded into files, and how much of the others is in memory.
        resume: Continue an interrupted run in `output_dir`.
    """

    output_dir: str = ""
    steps: int = ranged(1000, COUNTS)
    max_minutes: float = ranged(0.0, "[0, 1e6]")
    batch_size: int = ranged(32, BATCHES)
    gradient_accumulation: int = ranged(1, BATCHES)
    gradient_checkpointing: bool = False
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    lr: float = ranged(1e-3, RATES)
    muon_lr: float = ranged(1e-3, NONE_OR_RATES)
    warmup: int = ranged(50, NONE_OR_COUNTS)
    validate_every: int = ranged(0, NONE_OR_COUNTS)
    save_every: int = ranged(200, COUNTS)
    log_every: int = ranged(20, COUNTS)
    mixed_precision: str = chosen("auto", ("auto", "bf16", "no"))
    seed: int = ranged(0, SEEDS)
    threads: int = ranged(0, THREADS)
    held_out: float = ranged(SHARE, HELD_OUT_SHARES)
    max_clipped: float = ranged(MOST_CLIPPED, SHARES)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    resume: bool = False
