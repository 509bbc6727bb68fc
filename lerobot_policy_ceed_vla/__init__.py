"""Plugin for LeRobot's tools: registers the policy and, with MuJoCo, the environments."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs.policies import PreTrainedConfig

import ceed_vla.configuration_ceed_vla
import ceed_vla.processor_ceed_vla
from ceed_vla.checkpoint_files import check_kinds, place_base, read_values
from ceed_vla.errors import CeedVLAError, CheckpointError, root_cause
from ceed_vla.files import read_json

if importlib.util.find_spec("mujoco") is not None:
    import ceed_vla.sim.tabletop.lerobot_env  # noqa: F401  (registers the environments)


def _is_ours(values: dict[str, Any]) -> bool:
    kind = values.get("type")
    others = [name for name in PreTrainedConfig.get_known_choices() if name != "ceed_vla"]
    return not isinstance(kind, str) or kind not in others or "action_tokens" in values


def _explaining(read: Any) -> Any:
    """Wrap `PreTrainedConfig.from_pretrained` to explain errors in our config.json files."""

    @functools.wraps(read)
    def from_pretrained(cls: Any, pretrained_name_or_path: Any, **options: Any) -> Any:
        folder = Path(str(pretrained_name_or_path))
        ours = folder.is_dir() and _is_ours(read_json(folder / "config.json"))
        try:
            if ours:
                values = read_values(folder)
                config = read(cls, folder, **options)
                check_kinds(values, draccus.encode(config))
                place_base(config, folder)
                return config
            return read(cls, pretrained_name_or_path, **options)
        except CeedVLAError:
            raise
        except Exception as error:
            if not ours:
                raise
            raise CheckpointError(
                f"{folder}: config.json cannot be used ({root_cause(error)})."
            ) from error

    return classmethod(from_pretrained)


PreTrainedConfig.from_pretrained = _explaining(PreTrainedConfig.from_pretrained.__func__)  # type: ignore[method-assign]
