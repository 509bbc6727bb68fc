"""Settings of LeRobot's pi0-FAST (`ceed_vla.backbones.pi0_fast`) and of its action vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ceed_vla.action_tokens_config import ActionTokensConfig
from ceed_vla.backbones.config import BackboneConfig
from ceed_vla.errors import ConfigError

if TYPE_CHECKING:
    from ceed_vla.backbones.base import TrainableBackbone
    from ceed_vla.backbones.pi0_fast_tokens import Pi0FastTokenizer
    from ceed_vla.configuration_ceed_vla import CeedVLAConfig

WEIGHTS = ("copied", "reference")


@ActionTokensConfig.register_subclass("pi0_fast")
@dataclass
class Pi0FastTokensConfig(ActionTokensConfig):
    """The text that pi0-FAST writes; actions are in normalised units, which the post-processor undoes.

    Everything but `max_tokens` and `check_marker` is filled by `ceed-vla convert --from pi0_fast`.

    Attributes:
        max_tokens: Slots ``n`` of a block; LeRobot's ``max_decoding_steps``.
        check_marker: Refuse chunks that do not begin with "Action:"; LeRobot's ``validate_action_token_prefix``.
        skip_tokens: Text ids behind the FAST ids; LeRobot's ``fast_skip_tokens``.
        scored: Text ids that the model scores, all of which a token may be; 0 restricts tokens to actions.
        num_tokens: Values of a token.
        bpe: The FAST tokenizer's BPE (JSON).
        scale: Its quantisation.
        least: Its smallest coefficient.
        words: Ids of the text tokenizer.
        bos: Id that ends the prompt.
        stop: Id of "|".
        marker: Ids of "Action: ".
    """

    ordered = False

    gripper_dims: list[int] = field(default_factory=list)
    max_tokens: int = 256
    check_marker: bool = True
    skip_tokens: int = 128
    scored: int = 0
    num_tokens: int = 0
    bpe: str = field(default="", repr=False)
    scale: float = 10.0
    least: int = 0
    words: int = 0
    bos: int = 0
    stop: int = 0
    marker: list[int] = field(default_factory=list)

    @property
    def vocabulary(self) -> int:
        return self.num_tokens

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        return self.max_tokens

    def build(self, chunk_steps: int, action_dim: int) -> Pi0FastTokenizer:
        from ceed_vla.backbones.pi0_fast_tokens import Pi0FastTokenizer, TextIds
        from ceed_vla.fast_codec import FastCodec

        if not self.bpe:
            raise ConfigError(
                "action_tokens.type is pi0_fast without its tokenizers; make the policy with "
                "`ceed-vla convert --from pi0_fast`. For FAST tokens of own data set action_tokens.type=fast."
            )
        codec = FastCodec.from_json(self.bpe, self.scale, self.least)
        text = TextIds(self.words, self.bos, self.stop, tuple(self.marker))
        return Pi0FastTokenizer(
            codec,
            text,
            chunk_steps,
            action_dim,
            self.max_tokens,
            self.skip_tokens,
            self.scored,
            self.check_marker,
        )


@BackboneConfig.register_subclass("pi0_fast")
@dataclass
class Pi0FastConfig(BackboneConfig):
    """LeRobot's pi0-FAST with the weights of one of its checkpoints; made by `ceed-vla convert --from pi0_fast`.

    Attributes:
        path: LeRobot's checkpoint folder (config.json, model.safetensors).
        weights: "copied" into checkpoints, which then need nothing else, or by "reference": checkpoints hold only
            what was trained, and read the rest from `path`.
        architecture: LeRobot's configuration (JSON); filled when a policy is new.
    """

    path: str = ""
    weights: str = "copied"
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"backbone.weights is {self.weights!r}; choose one of {', '.join(WEIGHTS)}.")

    def build(self, policy: CeedVLAConfig) -> TrainableBackbone:
        from ceed_vla.backbones import pi0_fast_loading as loading
        from ceed_vla.backbones.pi0_fast import Pi0FastBackbone

        tokens = policy.action_tokens
        if not isinstance(tokens, Pi0FastTokensConfig):
            raise ConfigError(
                f"The backbone pi0_fast writes action tokens of type pi0_fast, not {tokens.type!r}; make the policy "
                "with `ceed-vla convert --from pi0_fast`."
            )
        new = not self.architecture
        if new:
            self.architecture = loading.read_architecture(self.path)
        tokenizer = tokens.build(policy.chunk_size, policy.action_dim)
        backbone = Pi0FastBackbone(loading.build_model(self.architecture), tokenizer)
        if new or self.weights == "reference":
            loading.load_weights(backbone, self.path)
            if self.weights == "reference":
                backbone.refer()
        return backbone

    def processor_steps(self, policy: CeedVLAConfig, instructions: Sequence[str]) -> list[Any]:
        raise ConfigError(
            "A pi0-FAST policy brings the processors of its LeRobot checkpoint. Fine-tune it with lerobot-train "
            "--policy.type=pi0_fast, then `ceed-vla convert --from pi0_fast`."
        )
