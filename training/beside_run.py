"""The steps of a module that learns beside a frozen policy; an interrupted run can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import load as load_numbers  # no code: weights_only
from torch import nn
from tqdm import tqdm

from ceed_vla.checkpoint_files import weights_hash
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import settle
from ceed_vla.outputs import claim_folder, owned_folder
from ceed_vla.training.beside import BesideConfig
from ceed_vla.training.distill_data import DistillData
from ceed_vla.training.run_folder import (
    RunFolder,
    check_origin,
    described_settings,
    warn_of_other_settings,
)
from ceed_vla.training.states import check_optimizers, optimizer_settings
from ceed_vla.training.trajectories import origin_of

UNFINISHED = "unfinished"  # subfolder of the output folder, until the checkpoint is written
STATE = "training.pt"  # weights of the module, and its optimiser


class BesideRun[C: BesideConfig]:
    """One run of a command that trains a module beside a frozen policy.

    Args:
        config: The settings.
        output: The output folder, locked for this process.

    Raises:
        ConfigError: The folder holds a run that is not to be resumed.
        CheckpointError: There is no run to resume, or its progress is damaged.
    """

    def __init__(self, config: C, output: Path) -> None:
        self.config = config
        self.output = output
        self.settings = described_settings(config)
        self.folder = RunFolder(str(output / UNFINISHED), config.resume)
        self.before = self.folder.read_progress(config.steps) if config.resume else {}
        self.found: dict[str, Any] = {}

    def find(self, name: str, found: Callable[[], str]) -> str:
        """What a run finds before its first step; a resumed run returns what was found then.

        Raises:
            CheckpointError: The run that is resumed did not store it.
        """
        if self.config.resume and not isinstance(self.before.get(name), str):
            raise CheckpointError(
                f"The progress in {self.folder.path} has no {name}; start again in a new folder."
            )
        self.found[name] = self.before[name] if self.config.resume else found()
        return str(self.found[name])

    def steps(
        self, name: str, data: DistillData, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Iterator[int]:
        """Numbers of the remaining steps; a state is saved before the first and between them.

        Args:
            name: Label of the progress bar.
            data: What the module learns from.
            module: The module; a resumed run overwrites its weights.
            optimizer: Its optimiser.

        Raises:
            CheckpointError: The run that is resumed had other data or another policy, or its state
                cannot be read.
            CeedVLAError: The state cannot be written.
        """
        config = self.config
        origin = origin_of(data.stores, data.held_out_share)
        origin |= {"policy": weights_hash(config.policy_path)}
        first = 0
        if config.resume:
            check_origin(self.before, origin, self.folder.path)
            warn_of_other_settings(self.before, self.settings)
            first = self.before["step"]
            self._load(module, optimizer, first)
        else:
            self._save(0, origin, module, optimizer)
        with tqdm(
            total=config.steps, initial=first, desc=name, unit="step", dynamic_ncols=True
        ) as self.bar:
            for step in range(first, config.steps):
                yield step
                self.bar.update()
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    self._save(step + 1, origin, module, optimizer)

    def show(self, **values: float) -> None:
        """Show measured values of a step behind the progress bar."""
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})

    def _save(self, step: int, origin: dict[str, Any], module: nn.Module, optimizer: Any) -> None:
        """Write the state after `step` steps; the one before stays valid until it is complete."""
        with self.folder.writing():
            state = self.folder.next_state(self.config.steps)
            file = self.folder.path / state / STATE
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
            settle(file)
            done = {"step": step, "state": state, "origin": origin, "settings": self.settings}
            self.folder.write_progress({**done, **self.found})

    def _load(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Restore the state after `step` steps; learning rates are those of the settings."""
        file = self.folder.path / self.before["state"] / STATE
        advice = "repeat the settings that it was started with, or start again in another folder."
        with raised_as(CheckpointError, f"{file} cannot be resumed", advice, passing=()):
            settings = optimizer_settings([optimizer])
            rates = [group["lr"] for group in optimizer.param_groups]
            state = load_numbers(file, map_location="cpu")
            if any(not torch.isfinite(weight).all() for weight in state["module"].values()):
                raise ValueError("its weights are not finite")
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            check_optimizers([optimizer], settings, step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = group["initial_lr"] = rate


@contextmanager
def beside_run[C: BesideConfig](config: C) -> Iterator[BesideRun[C]]:
    """A run in a new or empty output folder, or one that is resumed, as the settings require.

    At the end its states are removed.

    Raises:
        ConfigError: The folder is not empty, and no run is to be resumed.
        CheckpointError: There is no run to resume, or its progress is damaged.
    """
    with owned_folder("output_dir", config.output_dir) as output:
        run = BesideRun(config, output)
        if not config.resume:
            claim_folder("output_dir", config.output_dir, (), ())
        yield run
        shutil.rmtree(run.folder.path)
