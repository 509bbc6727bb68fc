r"""Any transformers image-text-to-text model as a backbone: LLaVA, LLaVA-OneVision, Qwen2.5-VL,
SmolVLM, PaliGemma.

    images --vision tower, projector--> \
    prompt --embed--------------------->  (B, P, d) --language model--> cache, action token 0
    state  --as text, or projected----> /                  |
    action ids, one row of the embedding each -------------+----------> action tokens 1..n-1

The model's own code runs up to its language model, whose arguments (embeddings, positions, masks)
are recorded. So positions of Qwen's rotary axes and PaliGemma's bidirectional prefix are those of
the original model. The block continues behind the prefix as in `generate()`, with a cache that can
be cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ceed_vla.backbones.features import check_features
from ceed_vla.backbones.transformers.backbone import TransformersBackbone, check_left_padding
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.backbones.vlm.inputs import FLAT_KEY, IDS, MASK, ROW_KEY
from ceed_vla.backbones.vlm.square_images import square_tokens
from ceed_vla.errors import ConfigError, ObservationError, raised_as
from ceed_vla.fields import short

STATE_KEY = "observation.state"
STATE_RANGE = 3.0  # the bins of a state span +- this many standard deviations
_DROPPED = ("input_ids", "past_key_values", "use_cache", "cache_position")
IDS_KEY = ROW_KEY + IDS
MASK_KEY = ROW_KEY + MASK
PIXELS = "pixel_values"


class VLMBackbone(TransformersBackbone):
    """A transformers image-text-to-text model (``AutoModelForImageTextToText``) with the `Backbone`
    protocol.

    Args:
        model: The model.
        action_ids: (V,) vocabulary ids of the action bins 0..V-1.
        block_length: Tokens ``n`` of a block.
        state_dim: Length of the normalised ``observation.state`` at the end of the prefix; 0 for
            none.
        project_state: Whether the state is projected to one token instead of written as `state_dim`
            action tokens.
        auxiliary_dim: Outputs of the auxiliary regression; 0 for none.
    """

    action_ids: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        action_ids: Sequence[int],
        block_length: int,
        *,
        state_dim: int = 0,
        project_state: bool = False,
        auxiliary_dim: int = 0,
    ) -> None:
        embedding = cast("nn.Embedding", model.get_input_embeddings())
        rows = embedding.num_embeddings
        different = len(set(action_ids))
        if (
            block_length < 1
            or not 0 < different == len(action_ids)
            or min(action_ids) < 0
            or max(action_ids) >= rows
        ):
            raise ConfigError(
                f"block_length is {block_length} and the action ids are {short(list(action_ids))}; "
                "a block needs at least one token, and the ids must be distinct and in "
                f"[0, {rows - 1}], the rows of the model's embedding."
            )
        super().__init__(
            block_length, len(action_ids), torch.tensor(list(action_ids), device=model.device)
        )
        _make_causal(model)
        self.model = model
        width, device = embedding.embedding_dim, model.device
        self.state_dim = state_dim
        # Both modules are trained, so they are float32 with any dtype of the model.
        self.state = nn.Linear(state_dim, width, device=device) if project_state else None
        if auxiliary_dim:
            layers = (nn.Linear(width, width), nn.SiLU(), nn.Linear(width, auxiliary_dim))
            self.auxiliary = nn.Sequential(*layers).to(device)
        self._accepted = set(inspect.signature(self.trunk.forward).parameters) - {"labels"}

    @property
    def pretrained(self) -> PreTrainedModel:
        return self.model

    @property
    def trunk(self) -> nn.Module:
        """The model without its head."""
        return cast("nn.Module", self.model.model)

    @property
    def decoder(self) -> nn.Module:
        return language_model(self.model)

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Validate a batch with the processor's tensors, padded on the left, and the state if the
        model reads it; return its rows ``B``.
        """
        found = batch.items() if isinstance(batch, Mapping) else ()
        inputs = {
            k: v
            for k, v in found
            if str(k).startswith((ROW_KEY, FLAT_KEY)) and isinstance(v, Tensor)
        }
        wanted: dict[str, tuple[int | None, ...]] = {IDS_KEY: (None,), MASK_KEY: (None,)}
        wanted |= {key: (None,) * (value.ndim - 1) for key, value in inputs.items()}
        finite = [key for key, value in inputs.items() if value.is_floating_point()]
        if self.state_dim:
            wanted[STATE_KEY] = (self.state_dim,)
            finite.append(STATE_KEY)
        words = int(cast("Any", self.model).get_input_embeddings().num_embeddings)
        rows = check_features(batch, wanted, finite, {IDS_KEY: words})
        if not any(key.endswith(PIXELS) for key in inputs):
            raise ObservationError(
                f"The observation lacks {ROW_KEY}{PIXELS}; use the checkpoint's preprocessor."
            )
        check_left_padding(batch, IDS_KEY, MASK_KEY)
        return rows

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        """Run the model up to its language model, on the tensors of `VLMInputsStep` and the
        normalised state.
        """
        arguments = self._model_inputs(batch)
        real = arguments["attention_mask"].bool()
        advice = (
            "its processor and its configuration disagree, or another preprocessor made the "
            "observation."
        )
        with raised_as(
            ObservationError, f"{type(self.model).__name__} cannot read the observation", advice
        ):
            inputs = language_model_arguments(self.trunk, self.decoder, arguments)
        if "inputs_embeds" not in inputs:
            raise ConfigError(
                f"{type(self.model).__name__} does not put its images into the input of its "
                "language model (it may read them by cross-attention), so it cannot be used; "
                "choose another model."
            )
        embeds = inputs.pop("inputs_embeds")  # (B, P, d)
        positions = inputs.get("position_ids")  # (B, P) or (axes, B, P)
        if positions is None:
            raise ObservationError(
                f"The observation has only {', '.join(sorted(arguments))}; "
                f"{type(self.model).__name__} computes positions from further tensors, for example "
                f"{ROW_KEY}mm_token_type_ids. Use the checkpoint's preprocessor."
            )
        if self.state is not None:
            # (B, d)
            token = self.state(batch[STATE_KEY].to(self.state.weight.dtype)).to(embeds.dtype)
            embeds = torch.cat([embeds[:, :-1], token.unsqueeze(1)], dim=1)
        last = positions.amax(dim=(0, 2)) if positions.ndim == 3 else positions.amax(dim=1)
        return PrefixEmbeddings(embeds, real, (last + 1).expand(len(embeds)), inputs)

    def _model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Arguments of the model's forward pass, with the positions of padded rows."""
        rows = {k.removeprefix(ROW_KEY): v for k, v in batch.items() if k.startswith(ROW_KEY)}
        flat = {
            k.removeprefix(FLAT_KEY): v.flatten(0, 1)
            for k, v in batch.items()
            if k.startswith(FLAT_KEY)
        }
        arguments = {k: v for k, v in {**rows, **flat}.items() if k in self._accepted}
        arguments[PIXELS] = arguments[PIXELS].to(self.model.dtype)
        if self.state_dim and self.state is None:
            ids = arguments["input_ids"]
            arguments["input_ids"] = torch.cat(
                [ids[:, : -self.state_dim], self.state_ids(batch[STATE_KEY])], dim=1
            )
        # Models with several rotary axes compute their own positions.
        if not hasattr(self.trunk, "get_rope_index"):
            # PaliGemma counts from 1, but only if it computes the positions itself.
            first = 1 if self.model.config.model_type == "paligemma" else 0
            mask = arguments["attention_mask"].long()
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + first
        return arguments

    def camera_tokens(self, camera: str, image: Tensor) -> Tensor:
        """See `SplitsPrefix`; raises `ConfigError` if `square_tokens` does not know the model."""
        return square_tokens(self.model, image)

    def join_prefix(self, ids: Tensor, state: Tensor, cameras: Sequence[Tensor]) -> Tensor:
        if self.state_dim and self.state is None:
            ids = torch.cat([ids[:, : -self.state_dim], self.state_ids(state)], dim=1)
        embeds = cast("nn.Embedding", self.model.get_input_embeddings())(ids)
        seen = torch.cat(list(cameras), dim=1)[0]  # (T, d)
        places = ids == self.model.config.image_token_id  # (1, P), True T times
        of_place = (places.long().cumsum(1) - 1).clamp(min=0)
        embeds = torch.where(places.unsqueeze(-1), seen[of_place], embeds)
        if self.state is not None:
            embeds = torch.cat([embeds[:, :-1], self.state(state).unsqueeze(1)], dim=1)
        return embeds

    def state_ids(self, state: Tensor) -> Tensor:
        """Map the normalised state (B, D) to ids (B, D) of action bins, clipped to +-
        `STATE_RANGE`.
        """
        share = (state.float().clamp(-STATE_RANGE, STATE_RANGE) + STATE_RANGE) / (2 * STATE_RANGE)
        return self.action_ids[(share * (self.vocabulary_size - 1)).round().long()]

    def refer(self, new_rows: bool = True) -> None:
        """Make checkpoints refer to the model's weights, which stay trainable.

        Args:
            new_rows: Whether checkpoints store the embeddings, because they may have new rows.
        """
        vocabulary = (
            (self.model.get_input_embeddings(), self.model.get_output_embeddings())
            if new_rows
            else ()
        )
        own = {id(p) for module in vocabulary for p in module.parameters()}
        state = self.model.state_dict(keep_vars=True)
        self.referenced = [
            f"model.{name}" for name, tensor in state.items() if id(tensor) not in own
        ]


def _make_causal(model: PreTrainedModel) -> None:
    """Make attention without a mask causal.

    Without a mask, the Gemma in PaliGemma attends in both directions. Its bidirectional prefix has
    a mask, and `generate()` then passes one token at a time; a block has many tokens.
    """
    for module in language_model(model).modules():
        if getattr(module, "is_causal", True) is False:
            if model.config._attn_implementation == "flash_attention_2":
                raise ConfigError(
                    f"backbone.attention is flash_attention_2, which does not support a causal "
                    f"block behind the bidirectional prefix of {type(model).__name__}; set "
                    "--policy.backbone.attention=sdpa."
                )
            cast("Any", module).is_causal = True


def language_model(model: PreTrainedModel) -> nn.Module:
    """The language model inside `model`, without its head; `ConfigError` if there is none."""
    trunk = getattr(model, "model", None)
    decoder = trunk.get_decoder() if isinstance(trunk, PreTrainedModel) else None
    if decoder is None or decoder is trunk or model.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(model).__name__} has no causal language model that can run without its vision "
            "tower; use LLaVA, LLaVA-OneVision, Qwen2.5-VL, SmolVLM, PaliGemma or a similar model."
        )
    return cast("nn.Module", decoder)


class _Arrived(Exception):  # noqa: N818  (a signal, not an error)
    """The forward pass has reached the language model."""


def language_model_arguments(
    trunk: nn.Module, decoder: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, Any]:
    """Run `trunk` on `inputs` up to its language model `decoder`.

    Returns:
        The arguments of the language model, without the cache.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        raise _Arrived(kwargs)

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        trunk(**inputs, use_cache=False)
    except _Arrived as arrived:
        return {k: v for k, v in arrived.args[0].items() if v is not None and k not in _DROPPED}
    finally:
        handle.remove()
    raise ConfigError(
        f"{type(trunk).__name__} did not call its language model {type(decoder).__name__}; use "
        "another model."
    )
