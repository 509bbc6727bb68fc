"""A causal language model behind the camera stems of a compact policy."""
