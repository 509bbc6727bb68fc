"""Offline training: teacher, Jacobi trajectories, consistency distillation."""
