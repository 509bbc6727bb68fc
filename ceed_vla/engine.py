"""`ceed_vla.compiled.engine`, by the name of earlier versions."""

from __future__ import annotations

from ceed_vla.compiled.engine import CompiledBackbone as CompiledBackbone
from ceed_vla.compiled.engine import compiled as compiled
