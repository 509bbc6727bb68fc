"""A small model that is trained from scratch: the default."""
