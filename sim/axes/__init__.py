"""Rollouts that axes of early exit learn from; one file an axis."""
