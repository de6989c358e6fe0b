"""Where experts lie in a GGUF file, of any architecture of llama.cpp: as slabs of tensors' slowest dimension.

llama.cpp creates the experts of every architecture alike: `blk.N.ffn_{gate,up,down,gate_up}_exps` {in, out, n_expert},
their biases and scales, the rows of `ffn_gate_inp`, the values of `exp_probs_b`. So experts are taken out by names and
shapes alone, whatever the blocks' type. What holds ids of experts, or groups of them, or counts them in another way, is
refused.

Source: src/llama-arch.cpp and src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shardxform.base.gguf import KeyValue
from shardxform.base.tensors import TensorRef
from shardxform.errors import CheckpointError, FamilyError, PlanError

__all__ = ["ARCHITECTURE", "MAX_EXPERTS", "UNNORMED_EXPERTS", "Slabs", "in_a_row", "slabs_of"]

ARCHITECTURE: Final = "general.architecture"
MAX_EXPERTS: Final = 1024
"""Most experts of a layer that llama.cpp loads."""
UNNORMED_EXPERTS: Final = 128
"""Experts of a Llama 4 by whose count llama.cpp knows Maverick, which has no norms of queries and keys."""

_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_RANKS: Final = {
    "ffn_gate_exps.weight": 3,
    "ffn_up_exps.weight": 3,
    "ffn_down_exps.weight": 3,
    "ffn_gate_up_exps.weight": 3,
    "ffn_gate_exps.bias": 2,
    "ffn_up_exps.bias": 2,
    "ffn_down_exps.bias": 2,
    "ffn_gate_up_exps.bias": 2,
    "ffn_gate_inp.weight": 2,
    "ffn_gate_inp.bias": 1,
    "exp_probs_b.bias": 1,
    "exp_probs_b": 1,
    "exp_probs_b_vl.bias": 1,
}
"""Tensors of a block whose slowest dimension counts experts, and how many dimensions they have."""

_SCALES: Final = frozenset(  # one for each expert, or one for all
    f"ffn_{name}_exps.{kind}" for name in ("gate", "up", "down", "gate_up") for kind in ("scale", "input_scale")
)
_AS_THEY_ARE: Final = re.compile(r"ffn_norm_exps\..+|attn_v_exps\..+|ffn_gate_inp_shexp\..+")
"""What is called like parts of experts and counts none: a norm before all, values of attention, a shared expert's."""

_FOREIGN: Final = (
    (re.compile(r"ffn_\w+_chexps\..+"), "chunks of several experts, as of grovemoe"),
    (re.compile(r"ffn_gate_tid2eid\..+"), "ids of experts by token, as of DeepSeek-V4"),
    (re.compile(r"ffn_(gate|up|down)\.[0-9]+\..+"), "one expert by itself, as old files have them; convert it anew"),
)
_PLAIN: Final = re.compile(r"ffn_(gate|up|down|norm|sub_norm|latent_\w+|\w+_shexp)\..+")
"""Parts of a block's feed-forward network that all tokens go through, whatever their sizes."""

_SUSPICIOUS: Final = re.compile(r"exps\b|exp_probs|ffn_gate_inp|tid2eid|chexps|_exp\.")
_VISION: Final = re.compile(r"v\..*(_exps|ffn_gate_inp)")
_INTEGERS: Final = frozenset({"UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"})
_MODEL_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "llama": ("mixtral",),
    "llama4": ("llama4_text",),
    "mistral4": ("mistral3",),
    "deepseek2": ("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe_lite"),
    "glm-dsa": ("glm_moe_dsa",),
    "glm4moe": ("glm4v_moe", "solar_open"),
    "granitehybrid": ("granitemoehybrid",),
    "granitemoe": ("granitemoeshared",),
    "hunyuan-moe": ("hunyuan_v1_moe",),
    "bailingmoe2": ("bailing_moe_v2",),
    "nemotron_h_moe": ("nemotron_h",),
    "lfm2moe": ("lfm2_moe",),
    "mimo2": ("mimo_v2_flash",),
    "qwen3vlmoe": ("qwen3_omni_moe",),
}
"""Model types of architectures that llama.cpp calls by another word altogether."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slabs:
    """What a GGUF file says of its experts.

    Attributes:
        arch: `general.architecture`.
        blocks: decoder blocks, those that predict further tokens (nextn) included, which are the last.
        nextn: how many of these there are.
        num_experts, top_k: of every block that has experts, and how many the router picks for a token.
        groups: of the router; 1 where it has none.
        top_groups: groups that it picks for a token; None where that is not said.
        homes: tensors whose slowest dimension counts experts -> their block.

    """

    arch: str
    blocks: int
    nextn: int
    num_experts: int
    top_k: int
    groups: int
    top_groups: int | None
    homes: Mapping[str, int]

    @property
    def count_key(self) -> str:
        """The key that counts experts."""
        return f"{self.arch}.expert_count"

    @property
    def num_layers(self) -> int:
        """Decoder blocks without those that predict further tokens."""
        return self.blocks - self.nextn

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder blocks with experts."""
        return tuple(sorted({block for block in self.homes.values() if block < self.num_layers}))

    @property
    def mtp_layers(self) -> tuple[int, ...]:
        """Blocks with experts that predict further tokens, counted from 0."""
        return tuple(sorted({block - self.num_layers for block in self.homes.values() if block >= self.num_layers}))

    def is_called(self, model_type: str) -> bool:
        """Whether config.json of the same model may call it so: marks between words of a name count for nothing."""
        return _plain(model_type) in {_plain(name) for name in (self.arch, *_MODEL_TYPES.get(self.arch, ()))}


def slabs_of(metadata: Mapping[str, KeyValue], tensors: Mapping[str, TensorRef], where: str) -> Slabs:
    """Find the experts of a GGUF file from its keys, and names and shapes of its tensors.

    Raises:
        CheckpointError: the keys are not there, or none that llama.cpp takes.
        FamilyError: no experts, or keys that contradict the tensors.
        PlanError: tensors that hold, or count, experts in a way in which they cannot be taken out.

    """
    keys = _Keys(metadata, where)
    arch = keys.arch
    if metadata.get(f"{arch}.expert_count") is None:
        raise FamilyError(f"{where}: no key {arch}.expert_count: a model without experts")
    experts, top_k = keys.count("expert_count"), keys.count("expert_used_count")
    blocks, nextn = keys.count("block_count"), keys.count("nextn_predict_layers", 0)
    groups, top_groups = keys.count("expert_group_count", 1) or 1, keys.count("expert_group_used_count", 0)
    if not 0 < experts <= MAX_EXPERTS or not 0 < top_k <= experts:
        raise FamilyError(
            f"{where}: {arch}.expert_count is {experts}, of which {top_k} are used: expected 1 to {MAX_EXPERTS}, and no"
            " more used than there are"
        )
    if nextn >= blocks or experts % groups or top_groups > groups:
        raise FamilyError(
            f"{where}: {arch} has {blocks} blocks, {nextn} of them nextn, and {experts} experts in {groups} groups,"
            f" {top_groups} of which are used: expected fewer nextn than blocks, groups of one size, and no more used"
            " than there are"
        )
    _refuse_lists(metadata, arch, experts, blocks, where)
    slabs = Slabs(
        arch=arch,
        blocks=blocks,
        nextn=nextn,
        num_experts=experts,
        top_k=top_k,
        groups=groups,
        top_groups=top_groups or None,
        homes=dict(_homes(tensors, experts, where)),
    )
    _refuse_incomplete(slabs, tensors, where)
    _refuse_other_dense(slabs, keys)
    return slabs


def _refuse_lists(metadata: Mapping[str, KeyValue], arch: str, experts: int, blocks: int, where: str) -> None:
    """Refuse keys that have a value for every expert."""
    for key, found in metadata.items():
        of_experts = key.startswith(f"{arch}.") and "expert" in key and found.kind == "ARRAY"
        if of_experts and found.count == experts != blocks:
            raise PlanError(f"{where}: {key}: {experts} values, one for each expert it seems; not pruned")


class _Keys:
    """Keys of one architecture, read as counts."""

    def __init__(self, metadata: Mapping[str, KeyValue], where: str) -> None:
        found = metadata.get(ARCHITECTURE)
        if found is None or not isinstance(found.value, str):
            raise CheckpointError(f"{where}: no key {ARCHITECTURE}; expected the file of a model")
        self._metadata, self.where, self.arch = metadata, where, found.value

    def found(self, name: str) -> int | None:
        """The count under a key that not every architecture has; None where it is no single one."""
        each = self._metadata.get(f"{self.arch}.{name}")
        return each.value if each and each.kind in _INTEGERS and isinstance(each.value, int) else None

    def count(self, name: str, default: int | None = None) -> int:
        """The count under a key.

        Raises:
            CheckpointError: the key is missing, and there is no default.
            PlanError: it is no plain count, such as a list with one for each block.

        """
        key = f"{self.arch}.{name}"
        found = self._metadata.get(key)
        if found is None:
            if default is None:
                raise CheckpointError(f"{self.where}: no key {key}")
            return default
        value = found.value if found.kind in _INTEGERS else None
        if not isinstance(value, int) or value < 0:
            kind = f"an array of {found.count}" if found.kind == "ARRAY" else f"{found.kind} {found.value!r}"
            raise PlanError(f"{self.where}: {key}: expected one count for all blocks, found {kind}")
        return value


def _homes(tensors: Mapping[str, TensorRef], experts: int, where: str) -> Iterator[tuple[str, int]]:
    """Tensors that count experts, and their blocks."""
    for name, ref in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            if _VISION.match(name):
                raise PlanError(f"{where}: tensor '{name}': experts of a vision tower, which are not pruned")
            continue
        rest, shape = match[2], ref.spec.shape
        if why := next((why for pattern, why in _FOREIGN if pattern.fullmatch(rest)), ""):
            raise PlanError(f"{where}: tensor '{name}' cannot be pruned: {why}")
        if rest in _SCALES and shape in ((), (1,)) and experts > 1:
            continue
        rank = 1 if rest in _SCALES else _RANKS.get(rest)
        if rank is not None:
            if in_a_row(shape, rank):
                shape = shape[1:]
            if len(shape) != rank or shape[0] != experts:
                raise FamilyError(
                    f"{where}: tensor '{name}' is {list(shape)}: expected {rank} dimensions, the slowest of"
                    f" {experts} experts"
                )
            yield name, int(match[1])
        elif _is_suspicious(rest, shape, experts):
            raise PlanError(
                f"{where}: tensor '{name}' {list(shape)} looks like a part of experts or a router, but is none that is"
                " known; not pruned"
            )


def in_a_row(shape: tuple[int, ...], rank: int = 1) -> bool:
    """Tell whether what counts experts has a dimension of one before it, as ERNIE's correction bias [1, E]."""
    return len(shape) == rank + 1 and shape[0] == 1 and rank == 1


def _is_suspicious(rest: str, shape: tuple[int, ...], experts: int) -> bool:
    """Whether a tensor may count experts though its name is not known for it: by its name, or by its shape."""
    if _AS_THEY_ARE.fullmatch(rest) or _is_router_scale(rest, shape, experts):
        return False
    counts = rest.startswith("ffn_") and len(shape) > 1 and shape[0] == experts and not _PLAIN.fullmatch(rest)
    return counts or bool(_SUSPICIOUS.search(rest))


def _is_router_scale(rest: str, shape: tuple[int, ...], experts: int) -> bool:
    """Whether a tensor scales what goes into a router, as Gemma's, and so counts channels."""
    return rest == "ffn_gate_inp.scale" and len(shape) == 1 and shape[0] != experts


def _refuse_incomplete(slabs: Slabs, tensors: Mapping[str, TensorRef], where: str) -> None:
    """Refuse blocks beyond the count, blocks that have experts in part, and nextn where there is none."""
    there: dict[int, list[str]] = {}
    for name in tensors:
        match = _BLOCK.fullmatch(name)
        if match:
            there.setdefault(int(match[1]), []).append(match[2])
        if match and int(match[1]) >= slabs.blocks:
            raise FamilyError(f"{where}: tensor '{name}', but {slabs.arch}.block_count is {slabs.blocks}")
        if match and match[2].startswith("nextn.") and int(match[1]) < slabs.num_layers:
            raise FamilyError(
                f"{where}: tensor '{name}', but by {slabs.arch}.nextn_predict_layers the blocks that predict further"
                f" tokens begin at {slabs.num_layers}"
            )
    if len(there) < slabs.blocks:
        lost = next(number for number in range(slabs.blocks) if number not in there)
        raise FamilyError(f"{where}: no tensor of block {lost}, though {slabs.arch}.block_count is {slabs.blocks}")
    for number in range(slabs.num_layers, slabs.blocks):
        if not any(name.startswith("nextn.") for name in there[number]):
            key = f"{slabs.arch}.nextn_predict_layers"
            raise FamilyError(f"{where}: block {number} has no nextn tensor, though {key} is {slabs.nextn}")
    if not slabs.homes:
        raise FamilyError(f"{where}: no expert tensor, though {slabs.count_key} is {slabs.num_experts}")
    for block in sorted(set(slabs.homes.values())):
        parts = {name.split(".", 2)[2] for name, home in slabs.homes.items() if home == block}
        inner = {"ffn_up_exps.weight", "ffn_gate_up_exps.weight"}
        if not {"ffn_gate_inp.weight", "ffn_down_exps.weight"} <= parts or not inner & parts:
            raise FamilyError(
                f"{where}: block {block} has {', '.join(sorted(parts))}: expected a router, ffn_gate_inp.weight, and"
                " experts, ffn_down_exps.weight and ffn_up_exps.weight or ffn_gate_up_exps.weight"
            )


def _refuse_other_dense(slabs: Slabs, keys: _Keys) -> None:
    """Refuse a count of leading dense blocks that tensors contradict: llama.cpp looks for experts by it alone."""
    dense = keys.found("leading_dense_block_count")
    if dense is None:
        return
    sparse = set(slabs.moe_layers)
    every = keys.found("interleave_moe_layer_step") in (None, 0, 1)
    lost = (block for block in range(dense, slabs.num_layers) if every and block not in sparse)
    wrong = next((block for block in slabs.moe_layers if block < dense), next(lost, None))
    if wrong is not None:
        raise FamilyError(
            f"{keys.where}: block {wrong} has {'' if wrong in sparse else 'no '}experts, though"
            f" {slabs.arch}.leading_dense_block_count is {dense}"
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
