"""Drafts: cheap guesses of the next tokens, verified by all layers (LayerSkip, Spec-VLA, DEL,
prompt lookup).
"""

REQUIRES: tuple[str, ...] = ()
