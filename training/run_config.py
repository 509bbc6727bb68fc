"""The settings that every training run has."""

from __future__ import annotations

from dataclasses import dataclass, field

from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.fields import COUNTS, SEEDS, THREADS, Checked, chosen, ranged
from ceed_vla.training.adapters import LoRAConfig
from ceed_vla.training.clipping import MOST_CLIPPED
from ceed_vla.training.held_out import SHARE
from ceed_vla.training.held_out import SHARES as HELD_OUT_SHARES
from ceed_vla.training.settings import BATCHES, NONE_OR_COUNTS, NONE_OR_RATES, RATES, SHARES

ANY_NUMBER = 10**9  # of steps: as many as a budget allows


@dataclass
class RunConfig(Checked):
    """Settings of every training run.

    Attributes:
        output_dir: Where checkpoints, logs and states go.
        steps: Optimiser steps.
        max_minutes: Take only as many steps as fit into so long, by the speed so far (every
            `log_every` steps), and lower the learning rate accordingly; 0: all. A resumed run may
            take so long again for what was left. Validation at the end comes on top.
        batch_size: Frames a step, over all processes and all of its parts.
        gradient_accumulation: Parts that a process's share of a batch is run in, one after another.
        gradient_checkpointing: Keep only the layers' inputs for the backward pass; less memory, a
            third more time.
        lora: Low-rank adapters instead of all weights.
        lr: Peak learning rate of AdamW.
        muon_lr: Peak learning rate of Muon (the trunk's matrices); 0 gives these to AdamW too.
        warmup: Warm-up steps.
        validate_every: Steps between closed-loop validations (0: only at the end).
        save_every: Steps between resumable states.
        log_every: Steps between log lines.
        mixed_precision: "bf16", "no", or "auto": bf16 where the device computes in it and does not
            emulate it.
        seed: Seed of weights, batches and augmentation.
        threads: CPU threads; 0 leaves torch's default.
        held_out: Share of every data set's episodes, whole ones, that are not trained on; the
            summary at the end measures on them. Data sets of fewer than ten spare none.
        max_clipped: Largest share of a dimension's actions far outside the policy's range.
        streaming: Which data sets are decoded into files, and how much of the others is in memory.
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
