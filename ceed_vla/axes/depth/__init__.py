"""Depth: forwards through the first layers, which early-exit layers read (ASE, Balcony, DSSD,
DeeR-VLA).
"""

REQUIRES: tuple[str, ...] = ()
