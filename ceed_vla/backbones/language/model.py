r"""A causal language model behind frozen camera stems.

    cameras, words --stems--> patches, keypoints --project--> \
    instruction --tokenizer--> ids --embed------------------->  (B, P, d) --layers--> action token 0
    state --linear------------------------------------------> /      |
    action tokens, embedded by rows of their own --------------------+--------> action tokens 1..n-1

The prefix is causal, as the language model was trained. Embedding and head of the action tokens are
new matrices, so the words keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from transformers import PreTrainedModel

from ceed_vla.backbones.config import PolicyShape
from ceed_vla.backbones.features import check_features
from ceed_vla.backbones.language.stems import WORDS_KEY, StemConfig, Stems
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.errors import ObservationError
from ceed_vla.images import check_model_images

STATE_LIMIT = 5.0  # of the normalised state, as in the compact backbone


class LanguageBackbone(TransformersBackbone):
    """A causal language model of transformers with the `Backbone` protocol.

    Args:
        model: The language model without its head.
        shape: Inputs and outputs of the policy.
        stems: Settings of the camera stems.
    """

    new_parts = ("project", "state", "action_tokens", "head")

    def __init__(self, model: PreTrainedModel, shape: PolicyShape, stems: StemConfig) -> None:
        super().__init__(shape.block_length, shape.vocabulary_size, None)
        self.language_model = model
        self.cameras = self.augmented_images = tuple(shape.cameras)
        self.state_dim, self.max_words = shape.state_dim, stems.max_instruction_words
        self.image_size = stems.image_size
        words = cast("nn.Embedding", model.get_input_embeddings())
        self.words, width = words.weight.shape
        self.stems = Stems(stems, self.cameras)
        self.project = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(own), nn.Linear(own, width)) for own in stems.widths
        )
        self.state = nn.Linear(self.state_dim, width)
        self.action_tokens = nn.Embedding(self.vocabulary_size, width)
        self.head = nn.Linear(width, self.vocabulary_size, bias=False)
        if shape.auxiliary_dim:
            layers = (nn.Linear(width, width), nn.SiLU(), nn.Linear(width, shape.auxiliary_dim))
            self.auxiliary = nn.Sequential(*layers)
        words.requires_grad_(False)

    @torch.no_grad()
    def begin(self) -> None:
        """Initialise what is new, so that its vectors have the size of the words' embeddings."""
        words = cast("nn.Embedding", self.pretrained.get_input_embeddings()).weight
        size = float(words.std())
        projections = [cast("Any", projection)[1] for projection in self.project]
        for linear in (*projections, self.state):
            nn.init.normal_(linear.weight, std=size * linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.action_tokens.weight, std=size)
        nn.init.normal_(self.head.weight, std=0.02)

    @property
    def pretrained(self) -> PreTrainedModel:
        """The model, which has no head of its own."""
        return self.language_model

    @property
    def decoder(self) -> nn.Module:
        return self.pretrained

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Validate a batch with cameras (B, 3, any, any) in [0, 1], a finite state (B, D), tokens
        and mask of the instruction (B, L), padded on the right, and its words (B, W); return its
        rows.
        """
        wanted: dict[str, tuple[int | None, ...]] = {
            **dict.fromkeys(self.cameras, (3, None, None)),
            OBS_STATE: (self.state_dim,),
            OBS_LANGUAGE_TOKENS: (None,),
            OBS_LANGUAGE_ATTENTION_MASK: (None,),
            WORDS_KEY: (self.max_words,),
        }
        ids = {OBS_LANGUAGE_TOKENS: self.words, WORDS_KEY: self.stems.word_codes.num_embeddings}
        rows = check_features(batch, wanted, [OBS_STATE], ids)
        check_model_images({camera: batch[camera] for camera in self.cameras})
        if batch[OBS_LANGUAGE_ATTENTION_MASK].shape != batch[OBS_LANGUAGE_TOKENS].shape:
            raise ObservationError(
                f"{OBS_LANGUAGE_ATTENTION_MASK} and {OBS_LANGUAGE_TOKENS} have the shapes "
                f"{tuple(batch[OBS_LANGUAGE_ATTENTION_MASK].shape)} and "
                f"{tuple(batch[OBS_LANGUAGE_TOKENS].shape)}; they must be equal."
            )
        return rows

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        ids = batch[OBS_LANGUAGE_TOKENS]
        cameras = [self.camera_tokens(c, batch[c], batch[WORDS_KEY]) for c in self.cameras]
        embeds = self.join_prefix(ids, batch[OBS_STATE], cameras)
        behind = embeds.shape[1] - ids.shape[1]
        real = F.pad(batch[OBS_LANGUAGE_ATTENTION_MASK].bool(), (0, behind), value=True)  # (B, P)
        patches = torch.zeros_like(real)
        patches[:, ids.shape[1] : -1] = True
        return replace(PrefixEmbeddings.in_order(embeds, real), patches=patches)

    def camera_tokens(self, camera: str, image: Tensor, words: Tensor) -> Tensor:
        """Tokens (B, T, d) of a camera's images (B, 3, H, W), for words (B, W)."""
        groups = zip(self.project, self.stems(camera, image, words), strict=True)
        return torch.cat([projection(tokens) for projection, tokens in groups], dim=1)

    def join_prefix(self, ids: Tensor, state: Tensor, cameras: Sequence[Tensor]) -> Tensor:
        """Embed instruction, cameras and the state, which is last: it predicts slot 0."""
        words = cast("nn.Embedding", self.pretrained.get_input_embeddings())(ids)  # (B, L, d)
        last = self.state(state.clamp(-STATE_LIMIT, STATE_LIMIT)).unsqueeze(1)
        return torch.cat([words, *cameras, last], dim=1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.action_tokens(tokens))

    def score(self, hidden: Tensor) -> Tensor:
        return cast("Tensor", self.head(hidden))

    def head_rows(self) -> tuple[Tensor, Tensor | None]:
        return self.head.weight, None

    def distillation_parameters(self) -> list[str]:
        """Layers, last norm, and embedding and head of the action tokens."""
        learns = {id(p) for part in (self.action_tokens, self.head) for p in part.parameters()}
        learns |= {id(p) for p in self.decoder.parameters()}
        learns -= {id(p) for p in self.pretrained.get_input_embeddings().parameters()}
        return [name for name, p in self.named_parameters() if id(p) in learns]

    def refer(self) -> None:
        """Make checkpoints refer to the language model's weights, which stay trainable."""
        self.referenced = [name for name in self.state_dict() if name.startswith("language_model.")]
