"""Context: which tokens of a prefix run (EXIT, arXiv 2412.12559)."""

REQUIRES: tuple[str, ...] = ()
