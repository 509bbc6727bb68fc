"""A 7-joint arm with a parallel gripper over a table with coloured cubes, a bin, a plate and two edge zones."""

from __future__ import annotations
