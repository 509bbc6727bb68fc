"""Programs: layers that a first forward leaves out or repeats (CoLa, arXiv 2507.07996)."""

REQUIRES: tuple[str, ...] = ()
