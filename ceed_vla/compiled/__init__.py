"""The compiled engine: the same tokens in less time, with constant shapes."""
