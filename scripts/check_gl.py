"""Render one small image with MuJoCo; exit code 1 and one line if that does not work."""

import os
import sys

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")


def main() -> int:
    """Exit code: 0 if MuJoCo renders."""
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string(
            "<mujoco><worldbody><geom size='1' rgba='1 0 0 1'/></worldbody></mujoco>"
        )
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        with mujoco.Renderer(model, height=16, width=16) as renderer:
            renderer.update_scene(data)
            image = renderer.render()
        if not image.any():
            raise RuntimeError("the image is black")
    except Exception as error:  # PyOpenGL and MuJoCo raise whatever the missing library makes them raise
        backend = os.environ.get("MUJOCO_GL", "MuJoCo's default")
        print(f"check_gl: {backend}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
