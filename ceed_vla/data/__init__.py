"""Read and write LeRobot datasets; the recorder, robots and training share this package."""
