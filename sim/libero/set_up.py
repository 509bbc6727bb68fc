"""Lets LIBERO find its folders and assets in every program, such as LeRobot's own `libero`, and
tries one task: `scripts/setup.sh libero` runs `python -m ceed_vla.sim.libero.set_up`.
"""

from __future__ import annotations

import sys

from ceed_vla.errors import CeedVLAError, SimulationError
from ceed_vla.sim.libero.env import LiberoTasks
from ceed_vla.sim.libero.installation import CONFIG_FOLDER, assets, config_file, root, write_config

TASK = "libero_object/0"


def set_up() -> str:
    """Link the assets and write LIBERO's config.yaml; return what was done.

    A file of another installation is left as it is.

    Raises:
        ConfigError: LIBERO is not installed.
        SimulationError: Its assets are incomplete.
    """
    link = root() / "assets"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(assets(), target_is_directory=True)
    path = config_file()
    if not path.exists():
        return f"wrote {write_config(path.parent)}"
    if str(root()) in path.read_text():
        return f"{path} is up to date"
    return (
        f"{path} is of another installation and stays as it is. --env.type=ceed_libero does not "
        f"need it; for LeRobot's `libero` remove it, or set {CONFIG_FOLDER} to another folder"
    )


def check() -> str:
    """Show an official initial state of one task to both cameras; return what was found.

    Raises:
        SimulationError: LIBERO cannot be imported, or an image is blank.
    """
    env = LiberoTasks([TASK])
    try:
        observation, _ = env.reset(seed=0)
        for camera, image in observation["pixels"].items():
            if image.std() < 5:
                raise SimulationError(f"{TASK}: the image of camera {camera} is blank.")
        return f"{TASK}: {env.task_description}, with both cameras"
    finally:
        env.close()


def main() -> None:
    """Set up; with the argument ``check`` also render one task."""
    try:
        print(set_up())
        if "check" in sys.argv[1:]:
            print(check())
    except (CeedVLAError, OSError) as error:
        sys.exit(f"libero: {error}")


if __name__ == "__main__":
    main()
