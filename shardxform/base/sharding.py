"""Which tensor goes into which shard, and what the shards are called: Hugging Face's policy, as pure functions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Final

from shardxform.base.tensors import TensorSpec
from shardxform.errors import PlanError

__all__ = ["natural_key", "parse_size", "shard_names", "show_size", "split"]

_UNITS: Final = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` (decimal), `512MiB` or `1000000`.

    Raises:
        PlanError: not a positive size.

    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]I?B|)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise PlanError(f"expected a size such as 5GB or 512MiB, found {text!r}")
    return size


def show_size(nbytes: float) -> str:
    """Size in decimal units, as on model hubs: `71.90 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which `layers.2` comes before `layers.10`; ids come before words."""
    return tuple(map(_part_key, name.split(".")))


@functools.lru_cache(maxsize=4096)
def _part_key(part: str) -> tuple[bool, int, str]:
    """Key of one part of a name; a checkpoint of 100,000 tensors has a few hundred parts."""
    return (False, int(part), part) if part.isascii() and part.isdigit() else (True, 0, part)


def split(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in the given order up to `max_bytes` of data each; a larger tensor has a shard of its own."""
    shards: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        if not shards or (filled and filled + spec.nbytes > max_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """`model.safetensors` for one shard, else `model-0000i-of-0000n.safetensors`."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
