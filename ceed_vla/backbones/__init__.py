"""Models behind the decoder: each file is one family, all behind the protocol of `base`."""
