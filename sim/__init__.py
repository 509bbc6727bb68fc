"""Simulated environments, scripted experts, recording and evaluation."""

from __future__ import annotations

import os
import sys

# MuJoCo reads this when it is imported: render off screen where there is no display.
if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

if __name__ == "sim":  # the name of earlier versions
    from ceed_vla.former_names import redirect

    redirect(__name__)
