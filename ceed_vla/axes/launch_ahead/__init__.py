"""Launch ahead: forwards that are launched back to back, with one synchronization at the end."""

REQUIRES: tuple[str, ...] = ()
