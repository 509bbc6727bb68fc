"""The learned exit: a rule that is learnt from how episodes end (S-GRPO, arXiv 2505.07686)."""

REQUIRES: tuple[str, ...] = ()
