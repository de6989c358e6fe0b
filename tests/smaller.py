"""The small trained checkpoint made smaller, for tests of commands that run it: half of its blocks and experts.

A block of each kind of attention, eight experts of which a token takes two: every way through the code is there, and
a command that heals or tunes takes less than half of the time. What it says is worse, which no such test looks at.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from build import Raw, read_checkpoint, write_checkpoint

WHOLE = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
BLOCKS = 2
ROUTED = 8
TOP = 2
SIDECARS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="shardxform-smaller-")  # gone with the process


def smaller(blocks: int = BLOCKS, experts: int = ROUTED, top: int = TOP) -> Path:
    """The last blocks, and the first experts of each, a token taking `top` of them; with sidecars. Read only."""
    root = Path(_folder().name, f"{blocks}-{experts}-{top}", WHOLE.name)
    if not root.exists():
        config = json.loads((WHOLE / "config.json").read_text())
        first = config["num_hidden_layers"] - blocks
        config |= {"num_hidden_layers": blocks, "layer_types": config["layer_types"][first:]}
        config |= {"num_experts": experts, "num_experts_per_tok": top}
        tensors = {}
        for name, tensor in read_checkpoint(WHOLE).items():
            found = re.search(r"\.layers\.(\d+)\.", name)
            layer = int(found[1]) - first if found else 0
            if layer >= 0:
                new = name.replace(found[0], f".layers.{layer}.") if found else name
                tensors[new] = _cut(tensor, new, experts)
        files = {name: (WHOLE / name).read_bytes() for name in SIDECARS}
        write_checkpoint(root, tensors, config, shards=2, files=files)
    return root


def _cut(tensor: Raw, name: str, experts: int) -> Raw:
    """What the first experts have of a tensor that all have a row in."""
    if ".mlp.experts." not in name and not name.endswith(".mlp.gate.weight"):
        return tensor
    size = len(tensor.data) // tensor.shape[0] * experts
    return replace(tensor, shape=(experts, *tensor.shape[1:]), data=tensor.data[:size])
