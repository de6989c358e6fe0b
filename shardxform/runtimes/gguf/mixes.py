"""Which block type every tensor has in a file of a kind, as llama-quantize chooses without an importance matrix.

A kind such as Q4_K_M is a type for most weights and a wider one for those that suffer more: half of the blocks' value
and down projections, and the output. The rules are those of llama-quant.cpp (llama_tensor_get_type) at commit
0c1e57098, for the kinds whose types are written here. Pure: of names, shapes and four numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shardxform.base.tensors import BLOCKS
from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture, vocabulary
from shardxform.runtimes.gguf.keys import Recorder

__all__ = ["KINDS", "FileType", "MixFacts", "mix_facts", "mixed"]


@dataclass(frozen=True, slots=True)
class FileType:
    """What llama-quantize calls a type of files.

    Attributes:
        number: in `general.file_type`.
        base: the type of most weights.
        often: of value and down projections in the first and the last eighth of the blocks, and in every third between.
        first_values: of value projections, the first four.
        shared_values: of value projections where at least four heads share one.
        first_downs: of down projections in the first eighth of the blocks.
        output: of attention's output projections where there are eight experts.

    """

    number: int
    base: str
    often: str = ""
    first_values: str = ""
    shared_values: str = ""
    first_downs: str = ""
    output: str = ""


KINDS: Final[Mapping[str, FileType]] = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "Q4_0": FileType(2, "Q4_0"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q4_K_S": FileType(14, "Q4_K", first_values="Q5_K", first_downs="Q5_K", output="Q5_K"),
    "Q4_K_M": FileType(15, "Q4_K", often="Q6_K", output="Q5_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K", often="Q6_K"),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ4_NL": FileType(25, "IQ4_NL", shared_values="Q5_K", first_downs="Q5_K", output="Q5_K"),
    "BF16": FileType(32, "BF16"),
    "MXFP4_MOE": FileType(38, "MXFP4"),
}
"""Kinds of files by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixFacts:
    """What of a model decides beside its tensors.

    Attributes:
        architecture: llama.cpp's name of it.
        blocks: all of them, those of MTP layers too.
        experts: routed experts of a block; 0 where there are none.
        shared_heads: heads that share a key and a value in the first block.

    """

    architecture: str
    blocks: int
    experts: int
    shared_heads: int


def mix_facts(architecture: Architecture) -> MixFacts:
    """Find them in the keys that the file is to have, as llama-quantize does.

    Raises:
        SchemeError: see `metadata_of`.

    """
    recorder = Recorder(architecture.name, vocabulary())
    architecture.kind.keys(architecture, recorder)
    keys = recorder.keys()
    found = {key.name.removeprefix(f"{architecture.name}."): key.value for key in keys}
    heads, shared = (_first(found.get(f"attention.head_count{each}", 0)) for each in ("", "_kv"))
    return MixFacts(
        architecture=architecture.name,
        blocks=architecture.blocks,
        experts=int(found.get("expert_count", 0)),
        shared_heads=heads // shared if shared else 0,
    )


def _first(value: Any) -> int:  # noqa: ANN401
    """A count, or that of the first block."""
    return int(value[0] if isinstance(value, list) else value)


_OWN: Final = ("bailingmoe3", "falcon", "glm5-next")
"""Architectures for which llama-quantize has further rules."""

_MIXES: Final = ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
_AS_THEY_ARE: Final = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(
        f"time_mix_{name}.weight"
        for name in ["first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2"]
    ),
    *("time_mix_lerp_fused.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos"),
    *(".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
"""Parts of names of tensors that are small, or that suffer."""

_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES: Final = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_NARROWER: Final = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes the place of a type whose blocks of 256 columns a row does not fill."""


def mixed(kind: str, tensors: Mapping[str, tuple[int, ...]], facts: MixFacts) -> dict[str, str]:
    """Find the type of every tensor that llama-quantize would convert; others keep their own.

    Args:
        kind: one of `KINDS`.
        tensors: shapes by the names that llama.cpp has for them, the slowest dimension first.
        facts: about the model.

    Raises:
        SchemeError: no such kind, or the architecture has rules that are not known here.

    """
    if kind not in KINDS:
        raise SchemeError(f"`gguf.kind`: expected one of {', '.join(KINDS)}, found {kind!r}")
    chosen = KINDS[kind]
    converted = {name: shape for name in sorted(tensors, key=_order) if _is_converted(name, shape := tensors[name])}
    if chosen.base not in BLOCKS:
        return dict.fromkeys(converted, chosen.base)
    if facts.architecture in _OWN:
        raise SchemeError(f"`gguf.kind` {kind}: llama-quantize has rules of its own for {facts.architecture}")
    choice = _Choice(chosen, facts, tensors)
    return {name: _fitting(choice.of(name, shape), shape) for name, shape in converted.items()}


def _order(name: str) -> tuple[int, str]:
    """The order in which llama.cpp goes through tensors: blocks by number, their names by letters."""
    return _block(name), name


def _block(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _is_converted(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a matrix, and not one that stays as it is."""
    if not any(size > 1 for size in shape[:-1]) or not name.endswith("weight"):
        return False
    return name not in ("position_embd.weight", "token_types.weight") and not any(part in name for part in _AS_THEY_ARE)


def _fitting(type_name: str, shape: tuple[int, ...]) -> str:
    """The type, or one whose blocks the rows fill."""
    for name in (type_name, _NARROWER.get(type_name, type_name)):
        if shape[-1] % BLOCKS[name][0] == 0:
            return name
    return "F16"


@dataclass(slots=True)
class _Choice:
    """What is counted on the way through the tensors."""

    kind: FileType
    facts: MixFacts
    tensors: Mapping[str, tuple[int, ...]]
    values: int = 0
    downs: int = 0
    all_values: int = field(init=False)
    tied: bool = field(init=False)

    def __post_init__(self) -> None:
        self.all_values = sum(_has(name, _VALUES) for name in self.tensors)
        self.tied = "output.weight" not in self.tensors

    def of(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of the next tensor, if its rows fill its blocks."""
        embeds = name in _EMBEDDINGS
        if name == "output.weight" or (embeds and self.tied):
            return self._output(shape)
        if self.kind.base == "MXFP4":
            return "MXFP4" if len(shape) > 2 and shape[-3] > 1 else "Q8_0"
        if embeds:
            return self.kind.base
        if _has(name, _VALUES):
            return self._value()
        if "attn_k.weight" in name:
            return "Q8_0" if self.facts.experts == 8 else self.kind.base
        if "attn_output.weight" in name and self.facts.experts == 8:
            return self.kind.output or self.kind.base
        return self._down(name) if "ffn_down" in name else self.kind.base

    def _output(self, shape: tuple[int, ...]) -> str:
        base = self.kind.base
        if base in ("Q8_0", "MXFP4") or shape[-1] % BLOCKS[base][0]:
            return "Q8_0"
        return "Q6_K"

    def _value(self) -> str:
        at, found = self.values, self.kind.base
        self.values += 1
        if self.facts.experts == 8:
            return "Q8_0"
        if self.kind.shared_values and self.facts.shared_heads >= 4:
            found = self.kind.shared_values
        elif self.kind.often and _suffers(at, self.all_values):
            found = self.kind.often
        elif self.kind.first_values and at < 4:
            found = self.kind.first_values
        wide = self.facts.architecture == "llama" and self.facts.blocks == 80 and self.facts.shared_heads > 1
        return "Q5_K" if wide and found == "Q4_K" else found

    def _down(self, name: str) -> str:
        at, blocks = _block(name) if self.facts.experts > 1 else self.downs, self.facts.blocks
        self.downs += 1
        if self.kind.often and _suffers(at, blocks):
            return self.kind.often
        return self.kind.first_downs if self.kind.first_downs and at < blocks // 8 else self.kind.base


def _suffers(at: int, count: int) -> bool:
    """Whether a block is in the first or the last eighth, or one of three between."""
    return at < count // 8 or at >= 7 * count // 8 or (at - count // 8) % 3 == 2


def _has(name: str, parts: Iterable[str]) -> bool:
    return any(part in name for part in parts)
