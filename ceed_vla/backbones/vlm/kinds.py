"""Model types of transformers that need a distinction. Free of torch."""

SQUARE_IMAGES = ("idefics3", "smolvlm")  # whose images are squares, embedded one by one
