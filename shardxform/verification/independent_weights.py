"""Weights of a checkpoint one by one, as the second opinion sees them: read and unpacked from the formats' definitions.

Nothing here is shared with what plans and writes outputs; see `independent`.
"""

# O: rows of a weight, I: its columns, G: groups of a row.

from __future__ import annotations

import binascii
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from shardxform.verification.definitions import SMALL, PackedWeight, Shifted, Small, StoredBytes, floats

__all__ = ["ACROSS", "EXPERT", "FAULTS", "HOME", "are_values", "in_quarters", "json_object", "weights_apart", "why"]

FAULTS: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(OSError, RuntimeError, StopIteration, TypeError, ValueError, struct.error),
)
"""What reading a file that holds anything at all may raise: nothing is looked at here before it is used."""

HOME: Final = r"(?:mlp|block_sparse_moe|feed_forward|mixer|moe|ffn|layers\.\d+)"
_FUSED: Final = re.compile(rf"(.*\.{HOME}\.experts)\.(gate_up_proj|down_proj)")
_APART: Final = re.compile(r"(.*)\.moe\.(gate_proj|up_proj|down_proj)\.weight")
_BIASES: Final = re.compile(rf"(.*\.{HOME}\.experts)\.(gate_up_proj|down_proj)_bias")
_PARTS: Final = re.compile(
    rf"(.*\.{HOME}\.experts)\.((?:gate_up_proj|down_proj)_(?:blocks|scales|scale|scale_inv|activation_scale))"
)
_INDEXED: Final = re.compile(rf"(.*\.{HOME}\.experts)\.(gate_up_proj|down_proj)\.(\d+)")
_GRANITE: Final = re.compile(r"(.*\.block_sparse_moe)\.(input_linear|output_linear)\.weight")
_STACKS: Final = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}  # granite's, and what they are
_MLX: Final = re.compile(
    r"(.*\.(?:(mlp|block_sparse_moe)|layers\.\d+))\.(?:switch_mlp|experts\.switch_glu|experts)"
    r"\.(gate|up|down)_proj\.(weight|bias)"
)
_LETTERED: Final = {"gate": "w1", "up": "w3", "down": "w2"}  # projections of Mixtral and MiniMax
EXPERT: Final = re.compile(rf"(.*\.{HOME}\.experts)\.(\d+)\.(.+)")
ACROSS: Final = re.compile(r".*\.moe_statics\.e_score_correction_bias")  # [sets of experts, E]
_BOTH: Final = re.compile(rf"(.*\.{HOME}\.experts\.\d+)\.(gate|up)_proj\.(weight|bias)")
_TURNED: Final = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe")  # types whose stacks are transposed


def why(fault: BaseException) -> str:
    """What one of `FAULTS` says, for people."""
    if isinstance(fault, KeyError):
        return f"no {fault.args[0]!r} where it is expected"
    if isinstance(fault, RecursionError):
        return "nested too deeply"
    known = isinstance(fault, (OSError, UnicodeError, binascii.Error)) or type(fault) is ValueError
    return str(fault) if known and str(fault) else f"a value makes no sense there ({fault!r})"


def json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one object of JSON; raises OSError, ValueError, and RecursionError of what is too deep."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected an object")
    return value


def _config(root: Path) -> dict[str, Any]:
    """A config, with what that of its decoder declares of quantized weights where it declares nothing itself."""
    config = json_object(root / "config.json")
    inside = (each.get("quantization_config") for each in config.values() if isinstance(each, dict))
    declared = config.get("quantization_config") or next(filter(None, inside), None)
    return {**config, "quantization_config": declared} if declared else config


def weights_apart(root: Path, *, decode: bool = False) -> tuple[dict[str, PackedWeight], dict[str, Any]]:
    """Weights of a checkpoint under their own names, small floats as values if told to `decode`, and its config."""
    config = _config(root)
    tensors: dict[str, StoredBytes] = {}
    for path in sorted(root.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                raise ValueError(f"{path.name}: header of {length} bytes")
            header = json.loads(file.read(length))
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                if not 0 <= begin <= end <= path.stat().st_size - 8 - length:
                    raise ValueError(f"{path.name}: {name} lies outside the file")
                tensors[name] = StoredBytes(path, info["dtype"], tuple(info["shape"]), 8 + length + begin)
    if decode and _is_small(config):
        return dict(_decoded(tensors, config)), config
    return dict(weight for name in tensors for weight in _weights(name, tensors, config)), config


def are_values(source: Path, out: Path) -> bool:
    """Whether small floats are compared as values: they are stored in another way, or were healed."""
    try:
        record = json_object(out / "shardxform.json") if (out / "shardxform.json").exists() else {}
        healed = bool((record.get("inputs", {}).get("recipe") or {}).get("heal"))
        return healed or _form(_config(source)) != _form(_config(out))
    except FAULTS:
        return False  # what cannot be read is said when it is


def _is_small(config: Mapping[str, Any]) -> bool:
    """Whether weights are small floats, or integers of a byte each, as far as the config says."""
    declared = config.get("quantization_config") or {}
    groups = (declared.get("config_groups") or {}).values()
    if declared.get("quant_method") == "compressed-tensors":
        return _is_whole_bytes(declared) or any((group.get("weights") or {}).get("type") == "float" for group in groups)
    return declared.get("quant_method") in ("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp4", "mxfp4", "mxfp8")


def _is_whole_bytes(declared: Mapping[str, Any]) -> bool:
    """Whether weights are integers of a byte each (W8A8)."""
    groups = (declared.get("config_groups") or {}).values()
    return "int-quantized" in (declared.get("format"), *(group.get("format") for group in groups))


def _form(config: Mapping[str, Any]) -> tuple[object, object]:
    """How weights are quantized."""
    declared = config.get("quantization_config") or {}
    return declared.get("quant_method"), declared.get("format")


def _decoded(tensors: Mapping[str, StoredBytes], config: Mapping[str, Any]) -> Iterator[tuple[str, PackedWeight]]:
    """Weights with values in place of small floats, under the names that 16-bit weights have one by one."""
    size, whole_bytes = _block_of(config["quantization_config"]), _is_whole_bytes(config["quantization_config"])
    used: set[str] = set()
    for name, tensor in tensors.items():
        if (match := _FUSED.fullmatch(name)) and tensor.dtype in SMALL:
            used |= {name, *(f"{name}{last}" for last in (*_OF_STACKS, "_activation_scale"))}
            yield from _of_floats(name, tensors, match, config)
            continue
        stem = next((name.removesuffix(last) for last in _CODES if name.endswith(last)), "")
        beside = [f"{stem}{last}" for last in _FACTORS if stem and f"{stem}{last}" in tensors]
        if not beside or tensor.dtype not in SMALL:
            continue
        part = {last: tensors.get(f"{stem}{last}") for last in (*_TIMES, *_OVER)}
        used |= {name, *beside, *(f"{stem}{last}" for last in (*part, *_UNUSED))}
        factors = tensors[beside[0]]
        block = size if factors.dtype not in ("U8", "F8_E4M3") and tensor.dtype not in ("U8", "I8") else None
        times, over = (next((part[last] for last in names if part[last]), None) for names in (_TIMES, _OVER))
        columns = math.prod(tensor.shape[2:] if len(tensor.shape) == 4 else tensor.shape[-1:])
        halves = tensor.dtype in ("U8", "I8") and not whole_bytes  # of a byte
        shape = (math.prod(tensor.shape[:2]), columns * (2 if halves else 1))
        one = Small(name, tensor, shape, (), factors=factors, block=block, times=times, over=over)
        one = replace(one, whole_bytes=whole_bytes)
        if len(tensor.shape) == 4:
            count, rows = tensor.shape[:2]
            home, _, stack = stem.rpartition(".")
            for expert in range(count):
                for half, first, number in _halves(stack, expert * rows, rows):
                    whole = replace(one, shape=(number, shape[1]), rows=((first, number),))
                    yield f"{home}.{expert}.{half}.weight", whole
        else:
            yield f"{stem}.weight", replace(one, shape=(tensor.shape[0], shape[1]), rows=((0, tensor.shape[0]),))
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    for name in rest:
        yield from _weights(name, rest, config)


def _of_floats(
    name: str, tensors: Mapping[str, StoredBytes], match: re.Match[str], config: Mapping[str, Any]
) -> Iterator[tuple[str, PackedWeight]]:
    """The matrices of a stack of small floats; scales [E, S, T] lie as it does, or as matrices do, or are one each."""
    tensor, turned = tensors[name], config.get("model_type") in _TURNED
    factors = next((tensors[f"{name}{last}"] for last in _OF_STACKS if f"{name}{last}" in tensors), None)
    if factors is None or len(tensor.shape) != 3 or factors.shape[:1] != tensor.shape[:1]:
        raise ValueError(f"{name}: a stack of {tensor.dtype} without a scale for each of its matrices")
    rows, columns = tensor.shape[:0:-1] if turned else tensor.shape[1:]
    block = _block_of(config["quantization_config"]) if factors.count > factors.shape[0] else None
    scales_turned = False
    if turned and block:
        straight = -(-rows // block[0]), -(-columns // block[1])
        if straight[0] == straight[1] or block[0] != block[1]:
            raise ValueError(f"{name}: scales {list(factors.shape)} may lie either way")
        scales_turned = factors.shape[1:] != straight
    for expert in range(tensor.shape[0]):
        one = Small(
            *(name, tensor.slab(expert), (rows, columns), ()),
            factors=factors.slab(expert),
            block=block,
            turned=turned,
            scales_turned=scales_turned,
        )
        for part, first, number in _halves(match[2], 0, rows):
            key = f"{match[1]}.{expert}.{part}.weight"
            yield key, replace(one, shape=(number, columns), rows=((first, number),))


_CODES: Final = (".weight_packed", "_blocks", ".weight")
_FACTORS: Final = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale", "_scales")
_TIMES: Final = (".weight_scale_2",)
_OVER: Final = (".weight_global_scale",)
_OF_STACKS: Final = ("_scale_inv", "_scale")
_UNUSED: Final = (".input_scale", ".input_global_scale", ".activation_scale", ".qscale_act")


def _block_of(declared: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the config says so."""
    found = declared.get("weight_block_size")
    for group in (declared.get("config_groups") or {}).values():
        found = (group.get("weights") or {}).get("block_structure") or found
    return (int(found[0]), int(found[1])) if found else None


def _weights(
    name: str, tensors: Mapping[str, StoredBytes], config: Mapping[str, object]
) -> Iterator[tuple[str, PackedWeight]]:
    """The weights that a tensor holds, each under a name of its own; none for parts that stand beside words."""
    tensor, (stem, _, last) = tensors[name], name.rpartition(".")
    if config.get("model_type") in _TURNED and (match := _FUSED.fullmatch(name) or _BIASES.fullmatch(name)):
        yield from _transposed(name, tensor, match)
    elif match := _PARTS.fullmatch(name):
        yield from _of_stacks(name, tensor, match)
    elif last in ("qweight", "weight_packed") and not _is_small(config):
        yield from _unpacked(name, tensors, config.get("quantization_config", {}))
    elif tensor.dtype == "U32" or _MLX.fullmatch(name):
        yield from _of_mlx(name, tensors, config)
    elif _stands_beside(stem, last, tensors, config):
        return
    elif (match := _FUSED.fullmatch(name) or _GRANITE.fullmatch(name)) and len(tensor.shape) == 3:
        count, rows, columns = tensor.shape
        home, stack = (f"{match[1]}.experts", _STACKS[match[2]]) if match.re is _GRANITE else match.groups()
        for expert in range(count):
            for part, first, number in _halves(stack, expert * rows, rows):
                key = f"{home}.{expert}.{part}.weight"
                yield key, PackedWeight(name, tensor, (number, columns), ((first, number),))
    elif (match := _APART.fullmatch(name)) and len(tensor.shape) == 3:
        count, rows, columns = tensor.shape
        for expert in range(count):
            whole = PackedWeight(name, tensor, (rows, columns), ((expert * rows, rows),))
            yield f"{match[1]}.mlp.experts.{expert}.{match[2]}.weight", whole
    else:
        if ACROSS.fullmatch(name):  # one set after the other, as their experts are numbered
            tensor = replace(tensor, shape=(tensor.count,))
        rows = math.prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else tensor.count
        yield name, PackedWeight(name, tensor, tensor.shape, ((0, rows),))


def _stands_beside(stem: str, last: str, tensors: Mapping[str, StoredBytes], config: Mapping[str, object]) -> bool:
    """Whether a tensor is a part of a quantized weight beside its words."""
    if config.get("quantization"):
        return last in ("scales", "biases")
    return (
        not _is_small(config)
        and last != "bias"
        and (f"{stem}.qweight" in tensors or f"{stem}.weight_packed" in tensors)
    )


def _of_stacks(name: str, tensor: StoredBytes, match: re.Match[str]) -> Iterator[tuple[str, PackedWeight]]:
    """What stands beside a stack, or for it, expert by expert."""
    rows = math.prod(tensor.shape[1:-1])
    shape = (rows, tensor.shape[-1]) if len(tensor.shape) > 1 else (1, 1)
    for expert in range(tensor.shape[0]):
        yield f"{match[1]}.{expert}.{match[2]}", PackedWeight(name, tensor, shape, ((expert * rows, rows),))


def _transposed(name: str, tensor: StoredBytes, match: re.Match[str]) -> Iterator[tuple[str, PackedWeight]]:
    """gpt-oss: stacks [E, I, O] and biases [E, O], the halves of the first one by one as auto-round reads them."""
    last = "bias" if name.endswith("bias") else "weight"
    for expert in range(tensor.shape[0]):
        for part, first, number in _halves(match[2], 0, tensor.shape[-1]):
            shape = (number, *tensor.shape[1:-1])
            yield (
                f"{match[1]}.{expert}.{part}.{last}",
                PackedWeight(name, tensor, shape, ((0, number),), slab=(expert, first)),
            )


def in_quarters(
    weights: Mapping[str, PackedWeight], config: Mapping[str, object]
) -> Iterator[tuple[str, PackedWeight]]:
    """Rows that are together both in the halves of a stack and in what takes turns in it, which MLX has as such.

    Row r of a stack of two times n rows is of gate where it is even, else of up; it is in the upper half where r < n.
    """
    for name, weight in weights.items():
        match, count = _BOTH.fullmatch(name), weight.shape[0]
        if match is None:
            yield name, weight
            continue
        turn = int(match[2] == "up")
        for other in (0, 1):
            if config.get("quantization"):  # it is what takes turns, and `other` the half
                row = {0: 0, 1: (count - turn + 1) // 2}
                first, number, step = row[other], row[1] if other == 0 else count - row[1], 1
                key = f"{match[1]}.{match[2]}_proj.{other}.{match[3]}"
            else:  # it is a half, and `other` what takes turns
                first, step = (other - turn * count) % 2, 2
                number = (count - first + 1) // 2
                key = f"{match[1]}.{('gate', 'up')[other]}_proj.{turn}.{match[3]}"
            yield key, replace(weight, shape=(number, *weight.shape[1:]), part=(first, step))


def _halves(projection: str, first: int, rows: int) -> Iterator[tuple[str, int, int]]:
    """Gate above, up below, where the two are one."""
    if projection == "gate_up_proj":
        yield "gate_proj", first, rows // 2
        yield "up_proj", first + rows // 2, rows // 2
    else:
        yield projection, first, rows


def _unpacked(name: str, tensors: Mapping[str, StoredBytes], declared: Any) -> Iterator[tuple[str, PackedWeight]]:  # noqa: ANN401
    """The weights that packed words stand for; bits and groups are told by what stands beside them."""
    words, (stem, _, last) = tensors[name], name.rpartition(".")
    told = {part: tensors.get(f"{stem}.{part}") for part in ("qzeros", "weight_zero_point", "g_idx", "weight_g_idx")}
    packing = str(declared.get("packing_format"))
    awq = declared.get("quant_method") == "awq" or "awq" in packing
    gptq = last == "qweight"
    scales = tensors[f"{stem}.scales" if gptq else f"{stem}.weight_scale"]
    zeros = told["qzeros" if gptq else "weight_zero_point"]
    if gptq:
        rows = scales.shape[1]
        bits = tensors[f"{stem}.qzeros"].shape[1] * 32 // rows
        columns = words.shape[0] * (1 if awq else 32 // bits)
        count = scales.shape[0]
    else:
        zeros, (rows, columns) = (
            told["weight_zero_point"],
            (int(n) for n in tensors[f"{stem}.weight_shape"].array().reshape(-1).tolist()),
        )
        bits, count = words.shape[1] * 32 // columns, scales.shape[1]
    said = set(_said(declared, ("bits", "num_bits", "w_bit")))
    if bits not in (4, 8) or bits not in said or (awq and bits != 4) or columns % count:
        raise ValueError(f"{name}: {bits} bits in {count} groups of {columns} columns")
    whole = PackedWeight(name, words, (rows, columns), (), scales, bits, columns // count)
    middle = np.uint32(0x77777777 if bits == 4 else 0x7F7F7F7F)
    own = declared.get("checkpoint_format") == "gptq_v2" or packing in ("auto_round", "auto_round:gptqmodel")
    usual = gptq and not awq and not own
    groups = told["g_idx" if gptq else "weight_g_idx"]
    if zeros and not (usual and not declared.get("desc_act") and (zeros.array().view(np.uint32) == middle).all()):
        whole = Shifted(
            *(name, words, (rows, columns), (), scales, bits, columns // count),
            zeros=zeros,
            groups=groups,
            awq=awq,
            less=int(usual),
        )
    match = _INDEXED.fullmatch(stem)
    for part, first, number in _halves(match[2], 0, rows) if match else [("", 0, rows)]:
        key = f"{match[1]}.{match[3]}.{part}.weight" if match else f"{stem}.weight"
        yield key, replace(whole, shape=(number, columns), rows=((first, number),))


def _said(declared: Any, keys: tuple[str, ...]) -> Iterator[object]:  # noqa: ANN401
    """Everything that a config says under one of these keys, wherever it does."""
    for key, value in declared.items() if isinstance(declared, Mapping) else ():
        if key in keys:
            yield value
        yield from _said(value, keys)


def _of_mlx(
    name: str, tensors: Mapping[str, StoredBytes], config: Mapping[str, Any]
) -> Iterator[tuple[str, PackedWeight]]:
    """The weights in a stack of experts, or the one weight of words: code 0 of each stands for its bias."""
    tensor, match, stem = tensors[name], _MLX.fullmatch(name), name.removesuffix(".weight")
    if match and match[4] == "bias":
        for expert in range(tensor.shape[0]):
            key = f"{match[1]}.experts.{expert}.{match[3]}_proj.bias"
            yield key, PackedWeight(name, tensor, tensor.shape[1:], ((0, tensor.shape[1]),), slab=(expert, 0))
        return
    count, rows, columns = tensor.shape if match else (1, *tensor.shape)
    scales, scaled_from, bits, group = None, 0, 0, 0
    if tensor.dtype == "U32":
        bits, group = config["quantization"]["bits"], config["quantization"]["group_size"]
        if type(bits) is not int or bits not in (4, 8) or type(group) is not int:
            raise ValueError(f"{name}: {bits!r} bits in groups of {group!r}")
        if one := EXPERT.fullmatch(stem):  # whose scales are in a stack
            stem, scaled_from = f"{one[1].removesuffix('.experts')}.switch_mlp.{one[3]}", int(one[2]) * rows
        scales, biases, columns = tensors[f"{stem}.scales"], tensors[f"{stem}.biases"], columns * 32 // bits
        zeros = (floats(np.asarray(each.array()), each.dtype) for each in (scales, biases))
        if not np.array_equal(next(zeros) * np.float32(-(2 ** (bits - 1))), next(zeros)):
            raise ValueError(f"{stem}.biases: code 0 stands for something else than in a symmetric weight")
    for expert in range(count):
        key = name
        if match:
            part = _LETTERED[match[3]] if match[2] == "block_sparse_moe" else f"{match[3]}_proj"
            key = f"{match[1]}.experts.{expert}.{part}.weight"
        found = ((expert * rows, rows),)
        yield key, PackedWeight(name, tensor, (rows, columns), found, scales, bits, group, scaled_from=scaled_from)
