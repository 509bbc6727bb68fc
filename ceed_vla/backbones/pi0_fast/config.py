"""Settings of LeRobot's pi0-FAST and of its action vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import ceed_vla.backbones.pi0_fast.inputs  # noqa: F401  (registers its step)
from ceed_vla.backbones.base import TrainableBackbone
from ceed_vla.backbones.config import BackboneConfig, PolicyShape
from ceed_vla.backbones.pi0_fast.tokens import Pi0FastTokenizer
from ceed_vla.backbones.transformers.config import TransformersConfig, read_architecture
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.fields import ranged
from ceed_vla.tokens.base import ActionTokensConfig


@ActionTokensConfig.register_subclass("pi0_fast")
@dataclass
class Pi0FastTokensConfig(ActionTokensConfig):
    """The text that pi0-FAST writes. Actions have normalised units; the postprocessor converts
    them.

    `ceed-vla convert --from pi0_fast` sets every field except `max_tokens` and `check_marker`.

    Attributes:
        max_tokens: Slots ``n`` of a block; LeRobot's ``max_decoding_steps``.
        check_marker: Whether chunks that do not begin with "Action:" are an error; LeRobot's
            ``validate_action_token_prefix``.
        skip_tokens: Number of text ids behind the FAST ids; LeRobot's ``fast_skip_tokens``.
        scored: Number of text ids that have logits, if a token can be any of them; 0 restricts
            tokens to actions.
        num_tokens: Number of values of a token.
        bpe: The FAST tokenizer's BPE (JSON).
        scale: Quantisation scale of the FAST tokenizer.
        least: Smallest coefficient of the FAST tokenizer.
        words: Number of ids of the text tokenizer.
        bos: Text id that ends the prompt.
        stop: Text id of "|".
        marker: Text ids of "Action: ".
    """

    ordered = False

    gripper_dims: list[int] = ranged([], "[-1000, 1000]")
    max_tokens: int = ranged(256, "[2, 65536]")
    check_marker: bool = True
    skip_tokens: int = ranged(128, "[0, 1e7]")
    scored: int = ranged(0, "[0, 1e7]")
    num_tokens: int = ranged(0, "[0, 1e7]")
    bpe: str = field(default="", repr=False)
    scale: float = ranged(10.0, "(0, 1e6]")
    least: int = ranged(0, "[-1e9, 1e9]")
    words: int = ranged(0, "[0, 1e7]")
    bos: int = ranged(0, "[0, 1e7]")
    stop: int = ranged(0, "[0, 1e7]")
    marker: list[int] = ranged([], "[0, 1e7]")

    @property
    def vocabulary_size(self) -> int:
        return self.num_tokens

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        return self.max_tokens

    def build(self, chunk_steps: int, action_dim: int) -> Pi0FastTokenizer:
        if not self.bpe:
            raise ConfigError(
                "action_tokens.type is pi0_fast, but its tokenizers are missing; make the policy "
                "with `ceed-vla convert --from pi0_fast`. For FAST tokens that are fitted to your "
                "data, set action_tokens.type=fast."
            )
        return Pi0FastTokenizer(self, chunk_steps, action_dim)


@BackboneConfig.register_subclass("pi0_fast")
@dataclass
class Pi0FastConfig(TransformersConfig):
    """LeRobot's pi0-FAST with the weights of a checkpoint; `ceed-vla convert --from pi0_fast` makes
    it.
    """

    steps: ClassVar[tuple[str, ...]] = (
        "pi0_fast_prepare_state_tokenizer_processor_step",
        "ceed_vla_pi0_fast_prompt",
    )

    def build(self, shape: PolicyShape) -> TrainableBackbone:
        from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPytorch

        from ceed_vla.backbones.pi0_fast.model import (
            Pi0FastBackbone,
            decode_architecture,
            describe_model,
        )

        tokens = shape.action_tokens
        if not isinstance(tokens, Pi0FastTokensConfig):
            raise ConfigError(
                f"The action tokens are of type {tokens.type!r}; the backbone pi0_fast needs "
                "pi0_fast. Make the policy with `ceed-vla convert --from pi0_fast`."
            )
        new = not self.architecture
        if new:
            self.describe(describe_model(self.path))
            self.check_size(shape)
        # LeRobot's model needs no tokenizer here, as the ids are known.
        model = PI0FastPytorch(decode_architecture(self.architecture))
        backbone = Pi0FastBackbone(model, tokens.build(shape.chunk_size, shape.action_dim))
        backbone.fill(Path(self.path), new=new, reference=self.weights == "reference")
        return backbone

    def least_sizes(self, shape: PolicyShape) -> tuple[int, int]:
        # LeRobot maps the names of variants to fixed sizes.
        from lerobot.policies.pi0_fast import modeling_pi0_fast

        variant = read_architecture(self.architecture).get("paligemma_variant", "gemma_2b")
        with raised_as(CheckpointError, "LeRobot's config.json cannot be used", "copy it again."):
            sizes = modeling_pi0_fast.get_gemma_config(variant)
        return sizes.depth, sizes.depth * 3 * sizes.width * sizes.mlp_dim

    def processor_steps(self, shape: PolicyShape, instructions: Sequence[str]) -> list[Any]:
        raise ConfigError(
            "The backbone pi0_fast cannot make processors for new data; a pi0-FAST policy has "
            "those of its LeRobot checkpoint. Fine-tune it with lerobot-train "
            "--policy.type=pi0_fast, then run `ceed-vla convert --from pi0_fast`."
        )
