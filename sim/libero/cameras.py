"""Images of a LIBERO simulation, in its own quality or fast."""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

from ceed_vla.edge.resizing import resized
from ceed_vla.sim.libero.tasks import RENDERED
from ceed_vla.sim.render import coarsen, render, shrink, tune

SHOWN = (1, 2)  # groups of geometry that LIBERO shows: without the collision shapes
MESH_CELL = 0.003  # [m]
TEXTURE = 512  # largest side of a simplified texture [px]


def simplify(model: mujoco.MjModel) -> None:
    """Prepare a model for fast images; what moves and collides does not change."""
    tune(model)
    coarsen(model, MESH_CELL)
    shrink(model, TEXTURE)


def photograph(
    scene: str,
    model: mujoco.MjModel,
    data: mujoco.MjData,
    camera: str,
    size: int,
    *,
    effects: bool = True,
) -> NDArray[np.uint8]:
    """Render an image (size, size, 3) of a state.

    Args:
        scene: Name of the model.
        model: The model.
        data: State to render.
        camera: Name of the camera in the model.
        size: Side of the image [px]; it is rendered with 256 and reduced as policies reduce images.
        effects: With the shadows and reflections of the model.

    Raises:
        SimulationError: No GL context can be created.
    """
    image = render(scene, model, data, camera, RENDERED, groups=SHOWN, effects=effects)
    image = image[:, ::-1]  # what turning LIBERO's upside-down image by 180 degrees gives
    if size == RENDERED:
        return np.ascontiguousarray(image)
    planes = resized(np.moveaxis(image, 2, 0).astype(np.float32), size)
    return np.ascontiguousarray(np.moveaxis(planes.round().astype(np.uint8), 0, 2))
