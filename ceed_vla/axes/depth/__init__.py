"""Depth: forwards of the first layers alone, read by exits (ASE, Balcony, DSSD, DeeR-VLA)."""

REQUIRES: tuple[str, ...] = ()
