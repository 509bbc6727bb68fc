"""The graphs of a policy whose layers are those of a Llama, as modules that ``torch.onnx`` can
export.

    stem      image (1, 3, H, W) [, words (1, W)]               -> tokens (1, T, d) of a camera
    prefix    words (1, L), state (1, D), all tokens of cameras -> embeddings (1, P, d)
    embed     action tokens (1, k)                              -> embeddings (1, k, d)
    layers    keys and values of P positions, embeddings (1, k) -> k slots; their keys and values

The layers read the prefix, with no positions in front of it, and the block.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ceed_vla.backbones.capabilities import SplitsPrefix, offers
from ceed_vla.backbones.transformers.backbone import TransformersBackbone
from ceed_vla.edge.feature_settings import ImageSettings, TextSettings
from ceed_vla.edge.settings import CacheSettings
from ceed_vla.errors import ConfigError
from ceed_vla.export.onnx_files import write_graph
from ceed_vla.export.slots import SLOT, read_slots

LAYERS = "LlamaModel"
MOST_PREFIX = 65_536  # positions
_VARYING = ("dynamic", "longrope")  # kinds of rotary positions that depend on the length
_LONGEST_TRACED = 4096  # bound of the axes while torch exports; the graphs have none


def check_llama(name: str, model: TransformersBackbone) -> None:
    """Raise `ConfigError` unless the model is a Llama behind a prefix that can be exported.

    Args:
        name: The checkpoint, for errors.
        model: Its backbone.
    """
    decoder = cast("Any", model.decoder)
    why = None
    if type(decoder).__name__ != LAYERS:
        why = f"its language model is a {type(decoder).__name__}, not a {LAYERS}"
    elif not offers(model, SplitsPrefix):
        why = f"a {type(model).__name__} has no camera_tokens and join_prefix"
    elif decoder.rotary_emb.rope_type in _VARYING:
        why = f"its positions ({decoder.rotary_emb.rope_type}) depend on the length of the prompt"
    elif any(p.dtype != torch.float32 for p in model.parameters()):
        why = "its weights are not float32"
    elif any(_unusual(layer) for layer in decoder.layers):
        why = "its layers are not plain matrices; merge adapters first"
    if why is not None:
        raise ConfigError(f"{name} cannot be exported: {why}. Run it with torch.")


def _unusual(layer: Any) -> bool:
    """Whether a layer's products are not all plain matrices."""
    own, mlp = layer.self_attn, layer.mlp
    products = [own.q_proj, own.k_proj, own.v_proj, own.o_proj]
    products += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return any(type(product) is not nn.Linear for product in products)


class LlamaLayer(nn.Module):
    """A layer of a Llama behind a cache."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        own = layer.self_attn
        self.layer = layer
        self.width = own.head_dim
        self.shared = own.num_key_value_groups  # heads of the query for each of the keys
        self.scale = float(own.scaling)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: (1, k, d).
            turn: Cosines and sines (k, width) of the positions of `x`.
            cached: Keys and values (heads, P, width) in front.
            mask: (k, k) added to the scores among the k tokens.

        Returns:
            (1, k, d); keys and values (heads, k, width).
        """
        own = self.layer.self_attn
        normal = self.layer.input_layernorm(x)
        query, keys, values = (
            product(normal).view(x.shape[1], -1, self.width).transpose(0, 1)
            for product in (own.q_proj, own.k_proj, own.v_proj)
        )
        query, keys = _turned(query, *turn), _turned(keys, *turn)
        k, heads = x.shape[1], keys.shape[0]
        query = query.reshape(heads, self.shared * k, self.width)  # those of one key together
        length = cached[0].shape[1]
        before = (query @ cached[0].transpose(1, 2)) * self.scale  # (heads, shared * k, P)
        among = (query @ keys.transpose(1, 2)) * self.scale
        among = (among.view(heads, self.shared, k, k) + mask).view(heads, self.shared * k, k)
        weights = torch.cat([before, among], dim=-1).softmax(-1)
        attended = weights[..., :length] @ cached[1] + weights[..., length:] @ values
        attended = attended.view(heads * self.shared, k, self.width)
        x = x + own.o_proj(attended.transpose(0, 1).reshape(1, k, -1))
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x)), keys, values


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate (heads, k, width) to its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class LlamaLayers(nn.Module):
    """All layers and the head of the action tokens."""

    frequencies: Tensor

    def __init__(self, model: TransformersBackbone, ordered: bool) -> None:
        super().__init__()
        decoder = cast("Any", model.decoder)
        self.layers = nn.ModuleList(LlamaLayer(layer) for layer in decoder.layers)
        self.norm = decoder.norm
        self.register_buffer("frequencies", decoder.rotary_emb.inv_freq.float(), persistent=False)
        self.stretch = float(decoder.rotary_emb.attention_scaling)
        self.ordered = ordered
        weight, bias = model.head_rows()
        self.head = nn.Linear(weight.shape[1], len(weight), bias is not None)
        self.head.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.head.bias = nn.Parameter(bias.detach().clone())

    def forward(self, keys: Tensor, values: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
        """Compute the slots behind embeddings.

        Args:
            keys: (layers, heads, P, width) of all positions in front.
            values: As `keys`.
            embeds: (1, k, d).
        """
        k = embeds.shape[1]
        places = torch.arange(k)
        angles = (keys.shape[2] + places)[:, None].float() * self.frequencies  # (k, width / 2)
        angles = torch.cat([angles, angles], dim=-1)
        turn = (angles.cos() * self.stretch, angles.sin() * self.stretch)
        mask = torch.zeros(k, k).masked_fill(places > places[:, None], -torch.inf)
        x, found = embeds, []
        for index, layer in enumerate(self.layers):
            x, *own = layer(x, turn, (keys[index], values[index]), mask)
            found.append(own)
        slots = read_slots(self.head(self.norm(x)), self.ordered)
        return (*slots, *(torch.stack(tensors) for tensors in zip(*found, strict=True)))


class _Stem(nn.Module):
    def __init__(self, model: TransformersBackbone, camera: str) -> None:
        super().__init__()
        self.model, self.camera = model, camera

    def forward(self, image: Tensor) -> Tensor:
        return cast("SplitsPrefix", self.model).camera_tokens(self.camera, image)


class _WordStem(_Stem):
    """A stem that reads the instruction."""

    def forward(self, image: Tensor, words: Tensor) -> Tensor:  # type: ignore[override]
        return cast("Any", self.model).camera_tokens(self.camera, image, words)  # type: ignore[no-any-return]


class _Prefix(nn.Module):
    def __init__(self, model: TransformersBackbone, lengths: list[int]) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, words: Tensor, state: Tensor, features: Tensor) -> Tensor:
        cameras = features.split(self.lengths, dim=1)
        return cast("SplitsPrefix", self.model).join_prefix(words, state, cameras)


class _Embed(nn.Module):
    """The embedding of action tokens; its rows are those of the tokens alone."""

    def __init__(self, model: TransformersBackbone) -> None:
        super().__init__()
        tokens = torch.arange(model.vocabulary_size)
        self.rows = nn.Parameter(model.embed_tokens(tokens).detach().clone())

    def forward(self, read: Tensor) -> Tensor:
        return self.rows[read]


@dataclass(frozen=True)
class WrittenLlama:
    """What `write_llama` found out."""

    cache: CacheSettings
    stems: list[int]  # number of every camera's stem
    longest: int  # prompt [tokens]


@torch.no_grad()
def write_llama(
    folder: Path,
    model: TransformersBackbone,
    ordered: bool,
    images: ImageSettings,
    text: TextSettings,
    state_dim: int,
) -> WrittenLlama:
    """Write the graphs.

    Args:
        folder: Where the graphs are written.
        model: The backbone.
        ordered: Whether neighbouring tokens stand for neighbouring actions.
        images: Its images.
        text: Its instructions.
        state_dim: Length of the state.
    """
    cameras = []
    for index, camera in enumerate(images.cameras):
        seen = {"image": torch.rand(1, 3, *images.read_size(index))}
        if text.stem_vocabulary:
            seen["words"] = torch.ones(1, text.stem_words, dtype=torch.int64)
        stem = (_WordStem if "words" in seen else _Stem)(model, camera)
        cameras.append(stem(*seen.values()))
        write_graph(folder / f"stem_{index}.onnx", stem, seen, ["out"])
    features = torch.cat(cameras, dim=1)
    words = torch.tensor([_example(model, text, features.shape[1])])
    state = torch.zeros(1, state_dim)
    length = torch.export.Dim("L", min=1, max=_LONGEST_TRACED)
    prefix = _Prefix(model, [tokens.shape[1] for tokens in cameras])
    more = prefix(words, state, features).shape[1] - words.shape[1]  # positions besides the words
    inputs = {"words": words, "state": state, "features": features}
    write_graph(folder / "prefix.onnx", prefix, inputs, ["embeds"], {"words": {1: length}})
    k = torch.export.Dim("k", min=1, max=_LONGEST_TRACED)
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    embed = _Embed(model)
    write_graph(folder / "embed.onnx", embed, {"read": tokens}, ["embeds"], {"read": {1: k}})
    decoder = cast("Any", model.decoder)
    layers = LlamaLayers(model, ordered)
    own = decoder.layers[0].self_attn
    heads, width = own.k_proj.out_features // own.head_dim, own.head_dim
    keys = torch.zeros(len(decoder.layers), heads, 11, width)
    positions = torch.export.Dim("P", min=1, max=_LONGEST_TRACED)
    inputs = {"keys": keys, "values": keys.clone(), "embeds": embed(tokens)}
    write_graph(
        folder / "layers.onnx",
        layers,
        inputs,
        [*SLOT, "new_keys", "new_values"],
        {"keys": {2: positions}, "values": {2: positions}, "embeds": {1: k}},
    )
    most = min(int(decoder.config.max_position_embeddings) - model.block_length, MOST_PREFIX)
    longest = min(text.longest, most - more - len(text.behind))
    if longest < 1:
        raise ConfigError(
            f"The prefix may have {most} positions, and images and state take "
            f"{more + len(text.behind)}; none are left for the instruction. Use smaller images."
        )
    prefix_length = longest + len(text.behind) + more
    cache = CacheSettings(len(decoder.layers), heads, width, prefix_length)
    return WrittenLlama(cache, _shared(folder, len(images.cameras)), longest)


def _example(model: TransformersBackbone, text: TextSettings, image_tokens: int) -> list[int]:
    """Ids with which the prefix is traced."""
    image = getattr(model.pretrained.config, "image_token_id", None)
    return [0, *([] if image is None else [image] * image_tokens), 0, 0, *text.behind]


def _shared(folder: Path, count: int) -> list[int]:
    """Remove stems that equal an earlier one; returns the number of every camera's stem."""
    known: dict[str, int] = {}
    found = []
    for index in range(count):
        file = folder / f"stem_{index}.onnx"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest in known:
            file.unlink()
        else:
            known[digest] = len(known)
            file.rename(folder / f"stem_{known[digest]}.onnx")
        found.append(known[digest])
    return found
