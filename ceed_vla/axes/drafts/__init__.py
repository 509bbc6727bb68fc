"""Drafts: the next tokens are guessed cheaply and verified by all layers (LayerSkip, Spec-VLA, DEL,
prompt lookup).
"""

REQUIRES: tuple[str, ...] = ()
