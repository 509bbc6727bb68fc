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
    """What `Pi0FastTokensConfig` holds of a transformers tokenizer; `ConfigError` if it has no "|"
    or no BOS token.
    """
    stop = tokenizer.convert_tokens_to_ids(STOP)
    bos = tokenizer.bos_token_id
    marker = tokenizer.encode(MARKER, add_special_tokens=False)
    if stop is None or stop == tokenizer.unk_token_id or bos is None or not marker:
        raise ConfigError(f"The text tokenizer has no {STOP!r} or no BOS token; is it PaliGemma's?")
    return {
        "words": int(tokenizer.vocab_size),
        "bos": int(bos),
        "stop": int(stop),
        "marker": [int(i) for i in marker],
    }


class Pi0FastTokenizer(VariableLengthTokens):
    """Chunks of normalised actions as pi0-FAST writes them; `settings` are a `Pi0FastTokensConfig`.

    Unlike LeRobot's detokeniser it neither fills up nor cuts off a chunk of another length, and a
    malformed one is an error instead of zeros. A token is any of the `scored` ids, else an index
    into `action_ids` (N,).
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
        # text id of FAST id 0; the others descend from it
        self._last = settings.words - 1 - settings.skip_tokens
        first = self._last - codec.vocabulary_size + 1
        if first < 0:
            raise ConfigError(
                f"The text tokenizer has {settings.words} ids, too few for {codec.vocabulary_size} "
                f"FAST ids before the last {settings.skip_tokens}; do the two tokenizers belong "
                "together?"
            )
        ids = sorted({*range(first, self._last + 1), *settings.marker, settings.stop})
        self.action_ids = torch.tensor(ids)  # (N,)
        self._text_id = list(range(scored)) or ids  # token -> text id
        self._token = {i: token for token, i in enumerate(self._text_id)}  # text id -> token
        if ids[-1] not in self._token:
            raise ConfigError(
                f"The actions take text ids up to {ids[-1]}, the model scores {scored}; do "
                "tokenizer and weights belong together?"
            )
        self.vocabulary_size = len(self._text_id)
        self.stop = self._token[settings.stop]
        self.speculative = torch.tensor([self._token[i] for i in ids])
        # normalised, about
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
            raise MalformedChunkError(
                f"its tokens do not all lie in [0, {self.vocabulary_size - 1}]."
            )
        ids = [self._text_id[token] for token in tokens]
        marker = list(self.settings.marker)
        at = 0
        # LeRobot looks at two tokens, whatever the marker takes.
        if self.settings.check_marker and ids[:2] != marker[:2]:
            raise MalformedChunkError(
                f"it begins with the text ids {ids[:3]}, not with {MARKER!r}."
            )
        while at <= len(ids) - len(marker):  # LeRobot drops the marker wherever it is
            if ids[at : at + len(marker)] == marker:
                del ids[at : at + len(marker)]
            else:
                at += 1
        return self.codec.decode([self._last - i for i in ids], self.chunk_steps, self.action_dim)
