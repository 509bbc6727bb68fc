"""Which seeds are for what, in every environment."""

from __future__ import annotations

from ceed_vla.errors import ConfigError

# Seed ranges of every environment. Validation and evaluation seeds are never recorded.
RECORDING_SEEDS = (0, 30_000)
TAKEOVER_SEEDS = (30_000, 40_000)
VALIDATION_SEED = 40_000
EVALUATION_SEEDS = 50_000  # nothing is recorded, trained or tuned on seeds from here on


def check_choice(seed: int, episodes: int) -> None:
    """Raise `ConfigError` unless the seeds are all in the range for choices, such as tuning."""
    if not VALIDATION_SEED <= seed <= EVALUATION_SEEDS - episodes:
        raise ConfigError(
            f"The seeds are {seed} to {seed + episodes - 1}; choices are made on seeds "
            f"{VALIDATION_SEED} to {EVALUATION_SEEDS - 1} only. Change --seed or --episodes."
        )
