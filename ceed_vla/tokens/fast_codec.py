"""FAST (arXiv 2501.09747): a chunk of actions as the byte-pair-encoded string of its rounded cosine
coefficients.

    (m, A) normalised --DCT over time--> (m, A) coefficients
           --x scale, round--> integers, low frequencies first
           --one character each--> text of m * A characters --BPE--> a few ids

The text has the format of the published tokenizers, so `FastCodec` also reads their folders,
without running their code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, trainers
from torch import Tensor

from ceed_vla.errors import CheckpointError, ConfigError, MalformedChunkError, TokenError, raised_as
from ceed_vla.files import read_json, read_text
from ceed_vla.limited.tokenizers import MOST_BYTES, check_tokenizer_text

UNDECODABLE = "\ufffd"  # written by a byte-level BPE for bytes that are not a character
_BYTES = 16  # limit per coefficient: a character has four, and a decoder may drop marks
_MOST_SYMBOLS = 0xD800  # the first code point that is not a character
_MOST_CHARACTERS = 2**25  # limit over all ids, as merges of merges grow exponentially


class FastCodec:
    """Chunks of normalised actions to BPE ids and back.

    Args:
        bpe: Byte-pair encoding of coefficient texts.
        scale: Coefficients are multiplied by this before rounding; the resolution of a coefficient
            is ``1 / scale``.
        least: Coefficient of character 0; smaller ones are clipped.
        most: Largest coefficient of the encoding; None if it has every character.
    """

    def __init__(self, bpe: Tokenizer, scale: float, least: int, most: int | None = None) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale is {scale}; it must be a positive number.")
        self.bpe = bpe
        self.scale = float(scale)
        self.least = int(least)
        self.most = most
        self.vocabulary_size = int(bpe.get_vocab_size())
        # (vocabulary_size,) characters of each entry, one per byte of a coefficient.
        self._lengths = [len(bpe.id_to_token(i) or "") for i in range(self.vocabulary_size)]
        # Pairs of ids that a fitted codec joins; empty for a published folder.
        self.merges: list[tuple[int, int]] = []

    @classmethod
    def fit(cls, chunks: Tensor, vocabulary_size: int, scale: float) -> FastCodec:
        """Fit the encoding to chunks.

        Every character is one id, and merges join whole characters, so each id stands for a fixed
        number of coefficients (`id_lengths`).

        Args:
            chunks: (N, m, A), normalised to about [-1, 1].
            vocabulary_size: Maximum number of ids.
            scale: See `FastCodec`.

        Raises:
            ConfigError: The chunks need more ids.
        """
        if chunks.ndim != 3 or not chunks.numel():
            raise ConfigError(
                f"Chunks of shape {tuple(chunks.shape)} cannot be fitted; expected (N, m, A)."
            )
        rounded = _coefficients(chunks, scale)  # (N, m * A)
        least = int(rounded.min())
        most = int(rounded.max())
        symbols = most - least + 1
        if symbols > min(vocabulary_size, _MOST_SYMBOLS):
            raise ConfigError(
                f"The data have coefficients from {least} to {most}, which are {symbols} symbols, "
                f"but most_ids is {vocabulary_size}; raise it, lower the scale ({scale}), or widen "
                "the action ranges."
            )
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[chr(i) for i in range(symbols)],
        )
        tokenizer.train_from_iterator(_texts(rounded, least), trainer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        ids = {chr(i): i for i in range(symbols)}
        pairs = []
        for left, right in merges:
            pairs.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
        return cls.from_merges(pairs, scale, least, most)

    @classmethod
    def from_merges(
        cls, merges: Sequence[tuple[int, int]], scale: float, least: int, most: int
    ) -> FastCodec:
        """Build a codec from its merges.

        Args:
            merges: Id ``S + i`` joins the two earlier ids ``merges[i]``; the ``S`` ids below are
                single coefficients.
            scale: See `FastCodec`.
            least: Smallest coefficient.
            most: Largest coefficient.

        Raises:
            ConfigError: The merges are wrong.
        """
        symbols = most - least + 1
        if not 1 <= symbols <= _MOST_SYMBOLS:
            raise ConfigError(
                f"symbols is {least} to {most}; it must be a range of 1 to {_MOST_SYMBOLS} "
                "coefficients. Fit the tokens again."
            )
        texts = [chr(i) for i in range(symbols)]
        total = symbols
        for i, (left, right) in enumerate(merges):
            if not (0 <= left < len(texts) and 0 <= right < len(texts)):
                raise ConfigError(
                    f"Merge {i} joins the ids {left} and {right}; they must be below {len(texts)}. "
                    "Fit the tokens again."
                )
            texts.append(texts[left] + texts[right])
            total += len(texts[-1])
            if total > _MOST_CHARACTERS:
                raise ConfigError(
                    f"The ids up to merge {i} stand for {total} coefficients, more than "
                    f"{_MOST_CHARACTERS}; fit the tokens again."
                )
        if len(set(texts)) < len(texts):
            raise ConfigError("Two merges make the same text; fit the tokens again.")
        vocabulary = {text: i for i, text in enumerate(texts)}
        bpe = Tokenizer(
            models.BPE(
                vocab=vocabulary, merges=[(texts[left], texts[right]) for left, right in merges]
            )
        )
        bpe.decoder = decoders.Fuse()
        codec = cls(bpe, scale, least, most)
        codec.merges = list(merges)
        return codec

    @classmethod
    def from_folder(cls, path: str | Path) -> FastCodec:
        """Read the folder of a published FAST tokenizer; its Python files do not run."""
        folder = Path(path)
        settings = read_json(folder / "processor_config.json")
        # transformers 5 saves a processor's second tokenizer in a subfolder.
        files = [folder / "tokenizer.json", folder / "bpe_tokenizer" / "tokenizer.json"]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise CheckpointError(
                f"The FAST tokenizer {folder} lacks tokenizer.json; copy the whole folder."
            )
        needed = "processor_config.json must have scale and min_token, and tokenizer.json a BPE."
        with raised_as(
            CheckpointError, f"The FAST tokenizer {folder} cannot be used", needed, CheckpointError
        ):
            text = read_text(file, most=MOST_BYTES)
            return cls.from_json(text, float(settings["scale"]), int(settings["min_token"]))

    @classmethod
    def from_json(cls, bpe: str, scale: float, least: int) -> FastCodec:
        """Build the codec of a published tokenizer.

        Args:
            bpe: Contents of its tokenizer.json.
            scale: See `FastCodec`.
            least: See `FastCodec`.

        Raises:
            ConfigError: The BPE cannot be read.
        """
        check_tokenizer_text(bpe, "The FAST tokenizer's BPE", ConfigError)
        with raised_as(
            ConfigError, "The FAST tokenizer's BPE cannot be read", "copy its folder again."
        ):
            return cls(Tokenizer.from_str(bpe), scale, least)

    def id_lengths(self) -> Tensor:
        """(vocabulary_size,) int64, number of coefficients of each id of a fitted codec."""
        return torch.tensor([len(self.bpe.id_to_token(i)) for i in range(self.vocabulary_size)])

    def encode(self, chunks: Tensor, frequencies: int | None = None) -> list[list[int]]:
        """Encode chunks.

        Args:
            chunks: (B, m, A), normalised to about [-1, 1].
            frequencies: Number of low frequencies to encode, for a smoother and shorter chunk; None
                for all ``m``.

        Returns:
            The ids of every chunk.

        Raises:
            TokenError: The chunks are not finite, or the tokenizer fails.
        """
        rounded = _coefficients(chunks, self.scale)  # (B, m * A)
        if frequencies is not None:
            rounded[:, frequencies * chunks.shape[2] :] = 0
        texts = _texts(rounded.clamp(self.least, self.most), self.least)
        with raised_as(TokenError, "The FAST tokenizer fails on a chunk", "copy its folder again."):
            return [encoding.ids for encoding in self.bpe.encode_batch(texts)]

    def decode(self, ids: Sequence[int], steps: int, action_dim: int) -> Tensor:
        """Decode ids to a chunk.

        Args:
            ids: The ids.
            steps: Steps ``m``.
            action_dim: Dimensions ``A``.

        Returns:
            (m, A) float64 in normalised units.

        Raises:
            MalformedChunkError: The ids are not a chunk of this size.
        """
        unknown = [i for i in ids if not 0 <= i < self.vocabulary_size]
        if unknown:
            raise MalformedChunkError(
                f"{unknown[0]} is not a FAST id; ids are in [0, {self.vocabulary_size - 1}]."
            )
        longest = _BYTES * steps * action_dim
        # Checked before decoding, which could make a text of any length.
        if sum(self._lengths[i] for i in ids) > longest:
            raise MalformedChunkError(
                f"{len(ids)} FAST ids decode to more than {longest} bytes, too many for a chunk of "
                f"{steps} steps of {action_dim} dimensions."
            )
        with raised_as(
            MalformedChunkError, "The FAST tokenizer cannot decode them", "copy its folder again."
        ):
            text = self.bpe.decode(list(ids), skip_special_tokens=False)
        if UNDECODABLE in text or len(text) != steps * action_dim:
            broken = " with invalid bytes" if UNDECODABLE in text else ""
            raise MalformedChunkError(
                f"{len(ids)} FAST ids decode to {len(text)} coefficients{broken}; a chunk of "
                f"{steps} steps of {action_dim} dimensions has {steps * action_dim}."
            )
        rounded = torch.tensor([ord(c) for c in text], dtype=torch.float64) + self.least  # (m * A,)
        return cosine_basis(steps).T @ (rounded.view(steps, action_dim) / self.scale)


def cosine_basis(steps: int) -> Tensor:
    """The orthonormal DCT-II (m, m) float64.

    ``coefficients = basis @ chunk`` and ``chunk = basis.T @ coefficients``.
    """
    k = torch.arange(steps, dtype=torch.float64).unsqueeze(1)  # frequency
    t = torch.arange(steps, dtype=torch.float64) + 0.5  # middle of every step
    basis = torch.cos(math.pi / steps * k * t) * math.sqrt(2 / steps)
    basis[0] /= math.sqrt(2)
    return basis


def _coefficients(chunks: Tensor, scale: float) -> Tensor:
    """Rounded coefficients (B, m * A) int64 of finite chunks (B, m, A), low frequencies first."""
    chunks = chunks.detach().cpu().double()
    if not bool(torch.isfinite(chunks).all()):
        raise TokenError("The chunks have NaN or infinity; only finite actions can become tokens.")
    return (cosine_basis(chunks.shape[1]) @ chunks * scale).round().long().flatten(1)


def _texts(rounded: Tensor, least: int) -> list[str]:
    return ["".join(map(chr, row)) for row in (rounded - least).tolist()]
