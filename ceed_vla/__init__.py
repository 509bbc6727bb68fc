"""CEED-VLA: vision-language-action policies that decode their action tokens in parallel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_EXPORTS = {
    "ActionTokenizer": "ceed_vla.tokens.uniform",
    "CeedVLAConfig": "ceed_vla.configuration_ceed_vla",
    "CeedVLAPolicy": "ceed_vla.modeling_ceed_vla",
    "DecodeResult": "ceed_vla.decoding",
    "DecodingConfig": "ceed_vla.decoding",
    "CeedVLAError": "ceed_vla.errors",
    "load": "ceed_vla.checkpoints",
    "pretrained_path": "ceed_vla.checkpoints",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from ceed_vla.checkpoints import load as load
    from ceed_vla.checkpoints import pretrained_path as pretrained_path
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig as CeedVLAConfig
    from ceed_vla.decoding import DecodeResult as DecodeResult
    from ceed_vla.decoding import DecodingConfig as DecodingConfig
    from ceed_vla.errors import CeedVLAError as CeedVLAError
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy as CeedVLAPolicy
    from ceed_vla.tokens.uniform import ActionTokenizer as ActionTokenizer


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are first used."""
    if name not in _EXPORTS:
        raise AttributeError(
            f"module 'ceed_vla' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    try:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        from ceed_vla.extras import explained

        raise explained(f"ceed_vla.{name}", error) from error


def __dir__() -> list[str]:
    """All names, also of parts that are not imported yet, so that shells can complete them."""
    return sorted({*globals(), *__all__})
