"""The action vocabulary of pi0-FAST: "Action: ", FAST ids from the end of the text vocabulary, and
"|".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceed_vla.errors import ConfigError, MalformedChunkError
from ceed_vla.tokens.fast_codec import FastCodec
from ceed_vla.tokens.variable_length import VariableLengthTokens

MARKER, STOP = "Action: ", "|"


def text_ids(tokenizer: Any) -> dict[str, Any]:
    """Settings of `Pi0FastTokensConfig` from a transformers tokenizer.

    Raises:
        ConfigError: The tokenizer has no "|" or no BOS token.
    """
    stop = tokenizer.convert_tokens_to_ids(STOP)
    bos = tokenizer.bos_token_id
    marker = tokenizer.encode(MARKER, add_special_tokens=False)
    if stop is None or stop == tokenizer.unk_token_id or bos is None or not marker:
        raise ConfigError(f"The text tokenizer has no {STOP!r} or no BOS token; use PaliGemma's.")
    return {
        "words": int(tokenizer.vocab_size),
        "bos": int(bos),
        "stop": int(stop),
        "marker": [int(i) for i in marker],
    }


class Pi0FastTokenizer(VariableLengthTokens):
    """Chunks of normalised actions in the format of pi0-FAST.

    Unlike LeRobot's detokenizer, it does not pad or cut a chunk of another length, and a malformed
    chunk is an error instead of zeros. A token is any of the `scored` ids, or else an index into
    `action_ids` (N,).

    Args:
        settings: A `Pi0FastTokensConfig`.
        chunk_steps: Steps ``m`` of a chunk.
        action_dim: Action dimensions ``A``.
    """

    normalised = True

    def __init__(self, settings: Any, chunk_steps: int, action_dim: int) -> None:
        codec = FastCodec.from_json(settings.bpe, settings.scale, settings.least)
        scored = settings.scored
        self.settings = settings
        self.codec = codec
        self.scored = scored
        self.chunk_steps = chunk_steps
        self.action_dim = action_dim
        self.block_length = settings.max_tokens
        # Text id of FAST id 0; those of the other FAST ids descend from it.
        self._last = settings.words - 1 - settings.skip_tokens
        first = self._last - codec.vocabulary_size + 1
        if first < 0:
            raise ConfigError(
                f"The text tokenizer has {settings.words} ids; it must have "
                f"{codec.vocabulary_size} for FAST and {settings.skip_tokens} behind them. Take "
                "both tokenizers from the same checkpoint."
            )
        ids = sorted({*range(first, self._last + 1), *settings.marker, settings.stop})
        self.action_ids = torch.tensor(ids)  # (N,)
        self._text_id = list(range(scored)) or ids  # token -> text id
        self._token = {i: token for token, i in enumerate(self._text_id)}  # text id -> token
        if ids[-1] not in self._token:
            raise ConfigError(
                f"The actions have text ids up to {ids[-1]}, but only {scored} ids have logits; "
                "take tokenizer and weights from the same checkpoint."
            )
        self.vocabulary_size = len(self._text_id)
        self.stop = self._token[settings.stop]
        self.speculative = torch.tensor([self._token[i] for i in ids])
        # Approximate limits of normalised actions.
        self.low = -torch.ones(action_dim).double()
        self.high = torch.ones(action_dim).double()
        self.zero = self.encode(torch.zeros(1, chunk_steps, action_dim))[0]

    def _write(self, actions: Tensor) -> list[list[int]]:
        rows = [
            [*self.settings.marker, *(self._last - i for i in ids)]
            for ids in self.codec.encode(actions)
        ]
        return [[self._token[i] for i in row] for row in rows]

    def _read(self, tokens: list[int]) -> Tensor:
        if not all(0 <= token < self.vocabulary_size for token in tokens):
            raise MalformedChunkError(f"its tokens must be in [0, {self.vocabulary_size - 1}].")
        ids = [self._text_id[token] for token in tokens]
        marker = list(self.settings.marker)
        at = 0
        # LeRobot compares the first two tokens for a marker of any length.
        if self.settings.check_marker and ids[:2] != marker[:2]:
            raise MalformedChunkError(
                f"it begins with the text ids {ids[:3]}, not with {MARKER!r}."
            )
        while at <= len(ids) - len(marker):  # LeRobot removes the marker anywhere
            if ids[at : at + len(marker)] == marker:
                del ids[at : at + len(marker)]
            else:
                at += 1
        return self.codec.decode([self._last - i for i in ids], self.chunk_steps, self.action_dim)
