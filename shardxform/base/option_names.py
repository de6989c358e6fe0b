"""What records call an input, and which option of the command line gives it: messages name what the reader can change.

One table for all commands. What no option gives, such as a source's headers, keeps the name that the record has for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["in_stage", "option_of", "with_option"]

_OPTIONS: Final[Mapping[str, str]] = {
    "options.text_only": "--text-only",
    "options.mtp": "--mtp",
    "options.max_shard_bytes": "--max-shard-size",
    "manifest": "--manifest",
    "scheme.method": "--method",
    "scheme.grid.bits": "--scheme",
    "scheme.grid.group_size": "--group-size",
    "scheme.grid.scale_grid": "--scale-grid",
    "scheme.grid.search": "--search",
    "scheme.format": "--format",
    "scheme.expert_names": "--expert-names",
    "scheme.g_idx": "--g-idx",
    "scheme.keep_16bit": "--keep-16bit",
    "scheme.quantize": "--also-quantize",
    "target.format": "--to",
    "target.expert_names": "--expert-names",
    "target.g_idx": "--g-idx",
    "recipe": "--method or --heal",
    "heal": "--heal",
    "heal.what": "--heal",
    "heal.iters": "--heal-iters",
    "heal.lr": "--heal-lr",
    "heal.batch_size": "--batch-size",
    "iters": "--iters",
    "batch_size": "--batch-size",
    "inputs": "--inputs",
    "seed": "--seed",
    "samples": "--samples",
    "seqlen": "--seqlen",
    "device": "--device",
    "dtype": "--dtype",
    "windows": "windows of --data",
    "data": "--data",
    "data.data": "--data",
    "data.samples_asked": "--samples",
    "data.seqlen": "--seqlen",
    "data.seed": "--seed",
    "data.pack": "packed (--no-pack)",
    "data.chat_template": "--chat-template",
    "data.text_key": "--text-key",
    "data.sources": "--text-sources",
    "data.by_source": "--by-text-source",
    "keep": "--keep or --ratio",
    "ratio": "--ratio",
    "criterion": "--criterion",
    "protect": "--protect-super-experts",
}
_OF_STAGES: Final[Mapping[str, Mapping[str, str]]] = {  # of `compress`, where a stage has options of its own
    "quantize": {"--samples": "--tune-samples or --samples", "--seqlen": "--tune-seqlen or --seqlen"},
    "evaluate": {
        "--data": "--eval-data",
        "--samples": "--eval-samples",
        "--seqlen": "--eval-seqlen",
        "windows of --data": "windows of --eval-data",
    },
}


def option_of(path: str, stage: str = "") -> str:
    """The option that gives the input at `path` of a record, and what lies below it; `path` itself where none does."""
    key, below = path.removeprefix("recipe."), ""
    while key and key not in _OPTIONS:
        key, _, last = key.rpartition(".")
        below = f"{last}.{below}" if below else last
    if not key:
        return path
    option = _OF_STAGES.get(stage, {}).get(_OPTIONS[key], _OPTIONS[key])
    return f"{option}: {below}" if below else option


def with_option(difference: str, stage: str = "") -> str:
    """Name the option in `path: was one, now other`, or in `path: the text of something has changed since`."""
    for said in (": was ", ": the text of "):
        path, found, rest = difference.partition(said)
        if found:
            return f"{option_of(path, stage)}{found}{rest}"
    return difference


def in_stage(message: str, stage: str) -> str:
    """Name the options of a stage of `compress` where a message has those that other commands have for it."""
    own = _OF_STAGES[stage]
    return re.sub(r"--[\w-]+", lambda found: own.get(found[0], found[0]), message)
