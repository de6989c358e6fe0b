"""Load a checkpoint in transformers and let it go on with a text.

    python examples/generate.py CHECKPOINT [TEXT]

Works for 16-bit checkpoints and for those of `quantize --format compressed-tensors`; for the other two formats
auto-round must be installed. bfloat16 is required where a family has gated delta-net layers: float16 overflows there.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as _logging

NEW_TOKENS = 40
logging: Any = _logging  # untyped upstream


def load(path: str) -> Any:  # noqa: ANN401
    """The model, or the end of the program when a tensor is missing or left over: a wrong model also generates text."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM
    with contextlib.redirect_stderr(io.StringIO()):  # the bars of compressed-tensors' stages
        model, info = auto.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{path}: {kind}: {sorted(info[kind])[:5]}")
    return model


def main(path: str, text: str) -> None:
    """Print `text` and what the model adds to it."""
    model: Any = load(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(text, return_tensors="pt")
    with contextlib.redirect_stderr(io.StringIO()):
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    print(tokenizer.decode(out[0]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "In the beginning")
