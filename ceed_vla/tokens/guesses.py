"""Names of the first guesses of Jacobi decoding (`ActionTokens.guess`)."""

GUESSES = ("previous", "mid", "random")
