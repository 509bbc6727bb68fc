"""Times of an intervention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """Times of an intervention.

    Attributes:
        timeout: Without a message for this time, a device in charge is lost [s].
        release: Without being moved for this time, the device gives back to the policy [s]; a
            button gives back at once.
        by_button: Whether a button takes over, not the device's motion.
    """

    timeout: float
    release: float
    by_button: bool
