"""Programs: the first forward skips or repeats layers (CoLa, arXiv 2507.07996)."""

REQUIRES: tuple[str, ...] = ()
