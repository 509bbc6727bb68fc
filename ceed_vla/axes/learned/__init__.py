"""The learned exit: an exit rule trained on the outcomes of episodes (S-GRPO, arXiv 2505.07686)."""

REQUIRES: tuple[str, ...] = ()
