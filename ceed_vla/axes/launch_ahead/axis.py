"""Registration of the launch-ahead axis."""

from __future__ import annotations

from ceed_vla.axes.base import Axis
from ceed_vla.axes.launch_ahead import decoder as decoder  # registers it

AXIS = Axis("launch_ahead")
