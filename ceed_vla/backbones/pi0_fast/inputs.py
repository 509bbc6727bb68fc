"""pi0-FAST's prompt as text ids."""

from ceed_vla.backbones.transformers.prompt_tokens import LONGEST_PROMPT as LONGEST_PROMPT
from ceed_vla.backbones.transformers.prompt_tokens import PromptTokensStep as PromptTokensStep
from ceed_vla.backbones.transformers.prompt_tokens import (
    load_text_tokenizer as load_text_tokenizer,
)
