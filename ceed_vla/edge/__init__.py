"""Exported policies, which run with numpy and onnxruntime, without torch.

policy = EdgePolicy("outputs/student-export")
result = policy.decode({"observation.images.front": image, ...}, "put the cube in the bin")
"""

from ceed_vla.edge.policy import EdgePolicy

__all__ = ["EdgePolicy"]
