"""Rate: a coarse branch of one token a control step beside the first layers (Splitformer, arXiv
2506.18035).
"""

REQUIRES = ("depth",)  # its branch is a kind of exit
