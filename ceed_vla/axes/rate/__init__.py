"""Rate: a coarse branch with one token per control step, parallel to the first layers (Splitformer,
arXiv 2506.18035).
"""

REQUIRES = ("depth",)  # the branch belongs to a kind of exit
