"""The compiled engine: the same tokens in less time, at shapes that never change."""
