"""Registration of the learned-exit axis."""

from __future__ import annotations

from ceed_vla.axes.base import Axis
from ceed_vla.axes.learned import rule as rule  # registers it

AXIS = Axis("learned")
