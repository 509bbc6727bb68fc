"""Launch ahead: forwards that are launched one behind the other, with one wait at the end."""

REQUIRES: tuple[str, ...] = ()
