"""Alias of `ceed_vla.compiled.engine`, for code that uses the name of earlier versions."""

from __future__ import annotations

from ceed_vla.compiled.engine import CompiledBackbone as CompiledBackbone
from ceed_vla.compiled.engine import compiled as compiled
