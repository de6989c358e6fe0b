"""Which option of the command line gives a field of the library.

The library knows fields alone: in its messages a field stands in backquotes, by the path that records have for it or by
the last part of that, and is replaced by its option before a person reads it. A field that no option gives, such as the
headers of a source, keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["option_of", "with_options"]

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
    "score": {},
    "select": {},
    "quantize": {"--samples": "--tune-samples or --samples", "--seqlen": "--tune-seqlen or --seqlen"},
    "verify": {},
    "evaluate": {
        "--data": "--eval-data",
        "--samples": "--eval-samples",
        "--seqlen": "--eval-seqlen",
        "windows of --data": "windows of --eval-data",
    },
    "card": {},
}
_SHORT: Final[Mapping[str, str]] = {  # by which messages name fields, and such as no record has
    **{path.rpartition(".")[2]: option for path, option in reversed(list(_OPTIONS.items()))},
    **_OPTIONS,
    "any_source": "--any-source",
    "base_model": "--base-model",
    "blocks": "--blocks",
    "branch": "--revision",
    "cache_bytes": "--cache-limit",
    "create": "--create",
    "force": "--force",
    "full_verify": "--full-verify",
    "plot": "--plot",
    "private": "--private",
    "ray": "--ray",
    "replace": "--replace",
    "results": "--results",
    "sort": "`shardxform manifest convert --sort`",
    "source": "--source",
    "work": "--work",
}


def option_of(path: str) -> str:
    """The option that gives the field at `path`, and what lies below it; `path` itself where none does.

    A path may begin with the stage of `compress` that the field belongs to.
    """
    stage, _, rest = path.partition(".")
    own = _OF_STAGES.get(stage) if rest else None
    path = path if own is None else rest
    key, below = path.removeprefix("recipe."), ""
    if "." not in key:
        option = _SHORT.get(key, "")
        return (own or {}).get(option, option) or path
    while key and key not in _OPTIONS:
        key, _, last = key.rpartition(".")
        below = f"{last}.{below}" if below else last
    if not key:
        return path
    option = (own or {}).get(_OPTIONS[key], _OPTIONS[key])
    return f"{option}: {below}" if below else option


def with_options(message: str, stage: str = "") -> str:
    """The message with options in place of fields; a `stage` of `compress` may have options of its own for them."""
    start = f"{stage}." if stage else ""
    return re.sub(r"`([^`\s]+)`", lambda found: option_of(start + found[1]), message)
