"""What clients read in a quantization_config: which linear layers they take for quantized, and which they do not.

Every client has its own rule; those of transformers and the libraries that it calls are held against their code by a
test. Names only: a module's name as it is in the checkpoint, and the class that clients give it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardxform.model.families.base import Config

__all__ = ["BLOCKS_KEY", "Asked", "Reader", "blocks_of", "readers_of"]

BLOCKS_KEY: Final = "block_name_to_quantize"

_SPECIAL: Final = re.compile(r"[*+?^$()\[\]{}|\\]")  # without one of these, vLLM takes a name for no pattern
_LM_HEAD: Final = "lm_head"
_MOST_BITS: Final = 8  # of a quantized weight


@dataclass(frozen=True, slots=True)
class Asked:
    """A module that a client asks about.

    Attributes:
        name: as in the checkpoint, experts one by one.
        experts: name of the module that holds all experts of its layer; empty for other modules.
        kind: name of its class: `Linear`, or `Embedding`.

    """

    name: str
    experts: str = ""
    kind: str = "Linear"

    @property
    def is_head(self) -> bool:
        """Whether it is the output head, which vLLM keeps apart from linear layers."""
        return self.name == _LM_HEAD

    @property
    def whole(self) -> str:
        """The name by which clients ask that hold the experts of a layer as one module."""
        return self.experts or self.name


Reader = Callable[[Asked], bool]
"""Tells whether a client takes a module for quantized."""


def readers_of(declared: Mapping[str, Any], text: Config) -> tuple[Reader, ...]:
    """Give the ways in which clients read a quantization_config, that of transformers first; none for other methods.

    Args:
        declared: the quantization_config.
        text: config of the decoder, which says whether the head is tied.

    """
    makers: Mapping[object, Callable[[Mapping[str, Any], bool], tuple[Reader, ...]]] = {
        "auto-round": _auto_round,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
    }
    method = declared.get("quant_method")
    maker = makers.get(method) if isinstance(method, str) else None
    return maker(declared, bool(text.get("tie_word_embeddings"))) if maker else ()


def blocks_of(declared: Mapping[str, Any]) -> list[str]:
    """Names of the blocks that auto-round's config says are quantized; none for all."""
    value = declared.get(BLOCKS_KEY)
    listed = value.split(",") if isinstance(value, str) else list(_flat(value))
    return [name.strip() for name in listed if name.strip()]


# -- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed_tensors(declared: Mapping[str, Any], _tied: bool) -> tuple[Reader, ...]:
    """Read targets and ignore lists: exact names, classes, and `re:` patterns from the start of a name."""
    groups = _mapping(declared.get("config_groups")).values()
    targets = _Names(name for group in groups if _mapping(group).get("weights") for name in _flat(group.get("targets")))
    ignored = _Names(_flat(declared.get("ignore")))
    return (lambda asked: targets.match(asked) and not ignored.match(asked),)


class _Names:
    """Names, classes and patterns, as compressed-tensors matches them."""

    def __init__(self, listed: Iterable[str]) -> None:
        names = list(listed)
        self._exact = {name for name in names if not name.startswith("re:")}
        self._patterns = [p for name in names if name.startswith("re:") and (p := _compiled(name[3:]))]

    def match(self, asked: Asked) -> bool:
        """Whether one of them means the module; every class of torch is a `Module`."""
        exact = not self._exact.isdisjoint((asked.name, asked.kind, "Module"))
        return exact or any(pattern.match(asked.name) for pattern in self._patterns)


# -- auto-round, gptq -------------------------------------------------------------------------------------------------


def _auto_round(declared: Mapping[str, Any], _tied: bool) -> tuple[Reader, ...]:
    return _loader_of_auto_round(declared), _vllm_auto_round(declared)


def _loader_of_auto_round(declared: Mapping[str, Any]) -> Reader:
    """Read blocks, then what leaves modules of them out, then exact names, then patterns found anywhere in a name.

    It reads configs of gptq too: `dynamic`, whose exact names it skips, and `modules_in_block_to_quantize`.
    """
    blocks, extra = tuple(blocks_of(declared)), dict(_extra_bits(declared))
    inside = _compiled_all(_flat(declared.get("modules_in_block_to_quantize")))
    left_out = _compiled_all(_flat(declared.get("modules_to_not_convert")))
    patterns = [(p, bits) for name, bits in (*_dynamic_bits(declared), *extra.items()) if (p := _compiled(name))]

    def quantizes(asked: Asked) -> bool:
        if asked.kind != "Linear":
            return False
        in_blocks = not asked.is_head and (not blocks or asked.name.startswith(blocks))
        if in_blocks and any(p.search(asked.name) for p in left_out):
            return False
        if in_blocks and inside and not any(p.search(asked.name) for p in inside):
            return False
        if asked.name in extra:
            return extra[asked.name] <= _MOST_BITS
        found = next((bits for p, bits in patterns if p.pattern != asked.name and p.search(asked.name)), None)
        return in_blocks if found is None else found <= _MOST_BITS

    return quantizes


def _vllm_auto_round(declared: Mapping[str, Any]) -> Reader:
    """Read exact names, then blocks by what a name begins with, then names with special characters as patterns."""
    blocks, extra = tuple(blocks_of(declared)), dict(_extra_bits(declared))
    patterns = [(p, bits) for name, bits in extra.items() if _SPECIAL.search(name) and (p := _compiled(name))]

    def quantizes(asked: Asked) -> bool:
        if asked.kind != "Linear":
            return False
        if named := [extra[name] for name in (asked.name, asked.whole) if name in extra]:
            return named[0] <= _MOST_BITS
        quantized = not asked.is_head and (not blocks or asked.name.startswith(blocks))
        found = next((bits for p, bits in patterns if p.search(asked.name)), None)
        return quantized if found is None else found <= _MOST_BITS

    return quantizes


def _gptq(declared: Mapping[str, Any], _tied: bool) -> tuple[Reader, ...]:
    """Read `lm_head`, the modules of a block, and `dynamic` from the start of a name; or the head by its flag alone."""
    inside = list(_flat(declared.get("modules_in_block_to_quantize")))
    rules = [(re.sub(r"^[-+]:", "", name), name[:2] != "-:") for name in _mapping(declared.get("dynamic"))]
    dynamic = [(p, quantized) for name, quantized in rules if (p := _compiled(name))]
    head = declared.get("lm_head") is True

    def vllm(asked: Asked) -> bool:
        if asked.kind != "Linear" or (asked.is_head and not head):
            return False
        named = asked.is_head or not inside or any(part in asked.name or asked.name in part for part in inside)
        return named and next((quantized for p, quantized in dynamic if p.match(asked.name)), True)

    loader = _loader_of_auto_round(declared)
    return vllm, lambda asked: head if asked.is_head else loader(asked)


def _extra_bits(declared: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names and patterns in auto-round's `extra_config`, with the width that they say."""
    for name, scheme in _mapping(declared.get("extra_config")).items():
        bits = _mapping(scheme).get("bits", declared.get("bits"))
        if type(bits) is int:
            yield name, bits


def _dynamic_bits(declared: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Patterns in gptq's `dynamic`, with the width that auto-round's loader gives them."""
    for name, rule in _mapping(declared.get("dynamic")).items():
        bits = 16 if name.startswith("-:") else _mapping(rule).get("bits", declared.get("bits"))
        if type(bits) is int and name[:2] in ("-:", "+:") and (rule or bits == 16):
            yield name[2:], bits


# -- fp8, awq ---------------------------------------------------------------------------------------------------------


def _fp8(declared: Mapping[str, Any], tied: bool) -> tuple[Reader, ...]:
    listed = declared.get("modules_to_not_convert")
    skipped = list(_flat(listed)) if listed is not None else _default_skips(tied)
    ignored = list(_flat(declared.get("ignored_layers"))) or list(_flat(listed))
    names = set(ignored)

    def vllm(asked: Asked) -> bool:
        of_experts = bool(asked.experts) and any(asked.experts in name for name in ignored if "experts" in name)
        return asked.kind == "Linear" and not (asked.is_head or asked.name in names or of_experts)

    return _transformers_skips(skipped, of_experts=True), vllm


def _awq(declared: Mapping[str, Any], tied: bool) -> tuple[Reader, ...]:
    listed = list(_flat(declared.get("modules_to_not_convert")))

    def vllm(asked: Asked) -> bool:
        return asked.kind == "Linear" and not (asked.is_head or any(part in asked.name for part in listed))

    return _transformers_skips([*_default_skips(tied), *listed], of_experts=False), vllm


def _default_skips(tied: bool) -> list[str]:
    """What transformers leaves out by itself: the head, and what it is tied to."""
    return [_LM_HEAD, "model.embed_tokens"] if tied else [_LM_HEAD]


def _transformers_skips(listed: Sequence[str], *, of_experts: bool) -> Reader:
    """Read a list of modules as transformers does: by the start of a name up to a dot, as a pattern, or as its end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    patterns = [p for key in listed if (p := _compiled(rf"(?:{key}){boundary}"))]
    ends = tuple(listed)

    def quantizes(asked: Asked) -> bool:
        name = asked.whole if of_experts else asked.name
        return asked.kind == "Linear" and not (name.endswith(ends) or any(p.match(name) for p in patterns))

    return quantizes


# -- values of a stranger's -------------------------------------------------------------------------------------------


def _compiled(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None


def _compiled_all(texts: Iterable[str]) -> list[re.Pattern[str]]:
    return [pattern for text in texts if (pattern := _compiled(text))]


def _flat(value: object) -> Iterator[str]:
    """Strings of a list, or of lists in it."""
    for item in value if isinstance(value, list) else ():
        yield from _flat(item) if isinstance(item, list) else (item,) if isinstance(item, str) else ()


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
