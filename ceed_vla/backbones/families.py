"""Registers the families of this package, settings and steps; another's registers itself where it is defined."""

import ceed_vla.backbones.compact.config
import ceed_vla.backbones.openvla.config
import ceed_vla.backbones.pi0_fast.config
import ceed_vla.backbones.vlm.config  # noqa: F401
