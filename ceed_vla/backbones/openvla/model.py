r"""OpenVLA: vision towers, a projector and a Llama, with the `Backbone` protocol and published
weights.

    <s>   --embed-------------------> \
    image --towers, projector------->  inputs_embeds (B, P, d) --Llama--> cache, action token 0
    words, empty token 29871 --embed> /                            |
                              action ids 31999 - bin --embed-------+----> action tokens 1..n-1

Only the action ids have logits: the last ``V`` ids before the padding of the vocabulary, in
descending order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ceed_vla.backbones.features import check_features
from ceed_vla.backbones.openvla.inputs import IDS_KEY, MASK_KEY, PIXELS_KEY
from ceed_vla.backbones.transformers.backbone import TransformersBackbone, check_left_padding
from ceed_vla.backbones.transformers.prefix import PrefixEmbeddings
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.extras import require_module


class VisionTowers(nn.Module):
    """One timm tower, or two whose patch features are concatenated.

    The attributes have the names of the published weights.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.featurizer = _tower(values, 0)
        self.fused_featurizer = _tower(values, 1) if values["use_fused_vision_backbone"] else None
        self.width = sum(tower.embed_dim for tower in self._towers())  # features of one patch

    def _towers(self) -> list[Any]:
        return [tower for tower in (self.featurizer, self.fused_featurizer) if tower is not None]

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, 3 * towers, S, S) to patch features (B, patches, width), the output of
        each tower's second-to-last layer.
        """
        pairs = zip(self._towers(), pixels.split(3, dim=1), strict=True)
        features = [
            tower.get_intermediate_layers(part, n=[len(tower.blocks) - 2])[0]
            for tower, part in pairs
        ]
        return torch.cat(features, dim=2)


def _tower(values: dict[str, Any], index: int) -> nn.Module:
    """A timm model without its classifier."""
    require_module("the vision tower of OpenVLA", "timm")
    import timm

    name = values["timm_model_ids"][index]
    sizes = values["image_sizes"]
    activations = values.get("timm_override_act_layers")
    settings = {
        "img_size": sizes[index],
        "act_layer": activations[index] if activations else None,
        # `check_config` has validated both lists.
        **(values.get("timm_model_kwargs") or [{}, {}])[index],
    }
    with raised_as(
        CheckpointError, f"timm cannot build {name!r} of config.json", "copy the folder again."
    ):
        tower: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    if len(getattr(tower, "blocks", ())) < 2:
        raise CheckpointError(
            f"The vision tower {name!r} must be a transformer of at least 2 blocks."
        )
    return tower


class Projector(nn.Module):
    """Maps patch features to embeddings (B, patches, d): 2 layers for one tower, 3 for two."""

    def __init__(self, vision_width: int, width: int, fused: bool) -> None:
        super().__init__()
        middle = 4 * vision_width if fused else width
        self.fc1 = nn.Linear(vision_width, middle)
        self.fc2 = nn.Linear(middle, width)
        self.fc3 = nn.Linear(width, width) if fused else None
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc2(self.activation(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(self.activation(x))


class OpenVLABackbone(TransformersBackbone):
    """An OpenVLA model, with random weights until `fill`.

    Args:
        values: The configuration, from `check_config`.
        block_length: Tokens ``n`` of a block; one action in published models, several in
            fine-tuned ones.
        bins: Values ``V`` of a token.
        dtype: Data type of the weights.
    """

    def __init__(self, values: dict[str, Any], block_length: int, bins: int, dtype: str) -> None:
        settings = dict(values["text_config"])
        # Ids before the padding of the vocabulary.
        words = int(settings["vocab_size"]) - int(values["pad_to_multiple_of"])
        super().__init__(block_length, bins, torch.arange(words - 1, words - 1 - bins, -1))
        self.words = words
        self.dtype = getattr(torch, dtype)
        with no_init_weights():
            what = "text_config in config.json does not describe a model"
            with raised_as(CheckpointError, what, "copy the folder again."):
                config = AutoConfig.for_model(settings.pop("model_type"), **settings)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, trust_remote_code=False
                )
            self.language_model = cast("PreTrainedModel", model)
            self.language_model.tie_weights()
            self.vision_backbone = VisionTowers(values).to(self.dtype)
            sizes = self.vision_backbone.width, config.hidden_size
            self.projector = Projector(*sizes, fused=values["use_fused_vision_backbone"]).to(
                self.dtype
            )

    def own_name(self, published: str) -> str:
        if published.endswith("rotary_emb.inv_freq"):  # saved by older transformers; now computed
            return ""
        # Published weights rename timm's LayerScale.
        return published.replace(".scale_factor", ".gamma")

    def check_observation(self, batch: Mapping[str, Any]) -> int:
        """Validate a batch with ids (B, L), their mask with padding on the left, and pixels (B, C,
        S, S); return its rows ``B``.
        """
        channels = 3 if self.vision_backbone.fused_featurizer is None else 6
        shapes: dict[str, tuple[int | None, ...]] = {
            PIXELS_KEY: (channels, None, None),
            IDS_KEY: (None,),
            MASK_KEY: (None,),
        }
        ids = {IDS_KEY: int(self.language_model.config.vocab_size)}
        rows = check_features(batch, shapes, finite=[PIXELS_KEY], ids=ids)
        check_left_padding(batch, IDS_KEY, MASK_KEY)
        return rows

    def embed_prefix(self, batch: dict[str, Tensor]) -> PrefixEmbeddings:
        """Embed the words, and insert the image patches behind the first word of every row."""
        ids = batch[IDS_KEY]
        real = batch[MASK_KEY].bool()
        # (B, p, d)
        patches = self.projector(self.vision_backbone(batch[PIXELS_KEY].to(self.dtype)))
        words = self.language_model.get_input_embeddings()(ids)  # (B, L, d)
        first = real.long().argmax(dim=1).tolist()
        # each (P, d)
        rows = [
            torch.cat([w[: i + 1], p, w[i + 1 :]])
            for w, p, i in zip(words, patches, first, strict=True)
        ]
        real = F.pad(real, (0, patches.shape[1]), value=True)  # padding is on the left
        embeddings = PrefixEmbeddings.in_order(torch.stack(rows), real)
        # (B, P)
        place = torch.arange(real.shape[1], device=real.device) - real.long().argmax(
            dim=1, keepdim=True
        )
        embeddings.patches = (place > 0) & (place <= patches.shape[1])
        return embeddings


def quantize(module: nn.Module, kind: str, device: str) -> None:
    """Replace the linear layers inside a module by quantised ones, in place.

    bitsandbytes quantises the weights when the module moves to a GPU.

    Args:
        module: The module.
        kind: "8bit" (LLM.int8) or "4bit" (NF4).
        device: Device that the module will run on.

    Raises:
        ConfigError: The device is not a GPU, or bitsandbytes is not installed.
    """
    if not str(device).startswith("cuda"):
        raise ConfigError(
            f"backbone.quantization is {kind!r}, but the device is {device!r}; quantisation needs "
            "a GPU (device=cuda)."
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f'backbone.quantization {kind!r} needs bitsandbytes; install it, or set "none".'
        ) from error
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _quantized(bitsandbytes, child, kind))


def _quantized(bitsandbytes: Any, linear: nn.Linear, kind: str) -> nn.Module:
    layers = bitsandbytes.nn
    bias = linear.bias is not None
    weight = linear.weight.detach()
    if kind == "8bit":
        layer = layers.Linear8bitLt(
            linear.in_features, linear.out_features, bias, has_fp16_weights=False
        )
        layer.weight = layers.Int8Params(
            weight.to(torch.float16), requires_grad=False, has_fp16_weights=False
        )
    else:
        layer = layers.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias,
            compute_dtype=weight.dtype,
            quant_type="nf4",
        )
        layer.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return cast("nn.Module", layer)
