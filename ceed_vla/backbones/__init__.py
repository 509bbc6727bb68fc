"""Models behind the decoder: a folder a family, all behind the protocol of `base`."""
