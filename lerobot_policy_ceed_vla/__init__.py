"""Plugin of LeRobot's tools: registers the policy `ceed_vla` and, where MuJoCo is, the simulated environments."""

import importlib.util

import ceed_vla.configuration_ceed_vla
import ceed_vla.processor_ceed_vla  # noqa: F401  (registers the processor steps that a saved pipeline names)

if importlib.util.find_spec("mujoco") is not None:
    import sim.lerobot_env  # noqa: F401
