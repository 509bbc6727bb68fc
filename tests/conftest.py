"""Settings of every test run: no screen, no network, one thread."""

import importlib.util
import os
import sys

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)
