"""A second opinion: what an output must hold, derived again from source and manifest, and held against what it holds.

The other comparisons ask the code that planned the output what must be in it, and share its mistakes. Nothing here
does: headers are read, experts renumbered, halves cut, integers unpacked and weights rounded in plain numpy, from the
formats' definitions. It knows what the families call experts, routers and MTP layers, and four formats (auto-round and
gptq, compressed-tensors' pack-quantized, MLX's affine of symmetric weights), reads local files only, and takes a run of
rows of one tensor into memory.

Every checkpoint is seen as its weights one by one: fused experts as a gate, an up and a down projection for each
expert, quantized ones as the weights that they stand for. Names are those that the output must have.
"""

# O: rows of a weight, I: its columns, G: groups of a row, R: a run of rows.

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.errors import CheckpointError, PlanError
from shardxform.verification.definitions import (
    SMALL,
    PackedWeight,
    Shifted,
    Small,
    StoredBytes,
    floats,
    nearest_bf16,
    nearest_half,
    rounded_to_grid,
)
from shardxform.verification.findings import Findings

__all__ = ["CODE", "Weights", "check_independently", "weights_of"]

CODE: Final = "independent"
"""Of every problem found here."""

_HOME: Final = r"(?:mlp|block_sparse_moe|feed_forward|mixer|moe|ffn|layers\.\d+)"
_FUSED: Final = re.compile(rf"(.*\.{_HOME}\.experts)\.(gate_up_proj|down_proj)")
_APART: Final = re.compile(r"(.*)\.moe\.(gate_proj|up_proj|down_proj)\.weight")
_BIASES: Final = re.compile(rf"(.*\.{_HOME}\.experts)\.(gate_up_proj|down_proj)_bias")
_PARTS: Final = re.compile(
    rf"(.*\.{_HOME}\.experts)\.((?:gate_up_proj|down_proj)_(?:blocks|scales|scale|scale_inv|activation_scale))"
)
_INDEXED: Final = re.compile(rf"(.*\.{_HOME}\.experts)\.(gate_up_proj|down_proj)\.(\d+)")
_GRANITE: Final = re.compile(r"(.*\.block_sparse_moe)\.(input_linear|output_linear)\.weight")
_STACKS: Final = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}  # granite's, and what they are
_MLX: Final = re.compile(
    r"(.*\.(?:(mlp|block_sparse_moe)|layers\.\d+))\.(?:switch_mlp|experts\.switch_glu|experts)"
    r"\.(gate|up|down)_proj\.(weight|bias)"
)
_LETTERED: Final = {"gate": "w1", "up": "w3", "down": "w2"}  # projections of Mixtral and MiniMax
_EXPERT: Final = re.compile(rf"(.*\.{_HOME}\.experts)\.(\d+)\.(.+)")
_ROUTER: Final = re.compile(
    rf".*\.{_HOME}\.(?:(?:(?:gate|router|experts)\.)?(?:e_score_correction_bias|expert_bias|router_bias)"
    r"|(?:gate|router)\.(?:(?:layer\.|proj\.|gate\.|wg\.|classifier\.)?(?:weight|bias)|per_expert_scale))"
)
_ACROSS: Final = re.compile(r".*\.moe_statics\.e_score_correction_bias")  # [sets of experts, E]
_OF_SET: Final = re.compile(r".*\.mlp\.gate\.weight(_1)?")  # [H, E], of the first set of experts and of the second
_SETS: Final = {"ernie4_5_moe_vl": 2, "ernie4_5_vl_moe": 2}
"""Types whose experts are in several sets, one numbered after the other; configs count those of one."""
_SEVERAL: Final = re.compile(r".*\.ffn\.experts\.mlp\.(?:w1|v1|w2)")  # [E * I, H]
_IDS: Final = re.compile(r".*\.ffn\.gate\.tid2eid")
_LAYER: Final = re.compile(
    r"(mtp\.|model\.mtp\.|(?:thinker\.)?model\.(?:language_model\.)?|language_model\.model\.(?:mtp\.)?"
    r"|transformer\.|backbone\.|)(?:layers\.|blocks\.|(?<=^mtp\.))(\d+)\."
)
_MTP: Final = ("mtp.", "model.mtp.", "model.mtp_", "language_model.model.mtp.")
_OF_TEXT: Final = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""What names begin with in multimodal checkpoints, and in those of the text alone."""
_VISION: Final = (
    "model.visual.",
    "model.vision_tower.",
    "model.embed_vision.",
    "vision_model.",
    "vision_tower.",
    "mm_projector.",
    "multi_modal_projector.",
    "patch_merge_mlp.",
)
_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MTP_COUNTS: Final = ("mtp_num_hidden_layers", "num_mtp_modules", "num_nextn_predict_layers")
_IN_TURNS: Final = ("gpt_oss",)  # types in whose stacks rows of gate and up projection take turns
_BOTH: Final = re.compile(rf"(.*\.{_HOME}\.experts\.\d+)\.(gate|up)_proj\.(weight|bias)")
_TURNED: Final = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe")  # types whose stacks are transposed
_FEWEST_STEPS: Final = 50  # of tuning, where nobody says


def check_independently(
    out: Path, source: Path, findings: Findings, manifest: Mapping[str, object] | None = None, **given: object
) -> int:
    """Hold every tensor of `out` against what `source` and the manifest give.

    Args:
        out: an output.
        source: what it was made from.
        findings: added to; problems only, under `CODE`.
        manifest: with `keep` and `mtp_keep`, lists of ids by layer; None for what shardxform.json of `out` says.
        given: `text_only` and `mtp`, likewise where not None.

    Returns:
        the number of weights that were compared.

    Raises:
        CheckpointError: the source cannot be read.

    """
    decode = _decodes(source, out)
    try:
        theirs, config = _checkpoint(source, decode=decode)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{source}: the independent check cannot read it: {e}") from e
    try:
        ours, made = _checkpoint(out, decode=decode)
        if made.get("quantization") and not config.get("quantization"):
            given = {**given, "mtp": "drop"}  # which MLX has no use for
        record = _object(out / "shardxform.json") if (out / "shardxform.json").exists() else {}
        if config.get("model_type") in _IN_TURNS and bool(config.get("quantization")) != bool(made.get("quantization")):
            theirs, ours = (dict(_quarters(of, told)) for of, told in ((theirs, config), (ours, made)))
        how = _How.of(config, record, manifest, given, theirs)
        wanted = dict(how.wanted(theirs))
    except (OSError, ValueError, KeyError, TypeError) as e:
        findings.problem(CODE, ".", f"cannot be derived: {e}")
        return 0
    _check_names(wanted, ours, findings)
    _check_counts(how, made, any(map(how.is_mtp, theirs)), findings)
    both = [name for name in wanted if name in ours]
    for name in both:
        if text := how.difference(name, wanted[name], ours[name]):
            findings.problem(CODE, ours[name].name, f"{'' if ours[name].name == name else f'{name}: '}{text}")
    return len(both)


@dataclass(frozen=True, slots=True)
class Weights:
    """What an output must hold of its source, weight by weight, whatever its container.

    Attributes:
        named: by names of one by one, experts under the numbers that they have in the output; where rows of gate and
            up projection take turns in a stack, `gate_proj.0` is what its upper half has of gate.
        config: of the source.
        experts: how many there are in a layer of the output.
        exact: grid that weights were rounded to nearest on, without a search; None where that is not known.
        offset: most that was added to a weight, in steps, before it was rounded.
        healed: whether weights of decoder blocks were healed.

    """

    named: Mapping[str, PackedWeight]
    config: Mapping[str, Any]
    experts: int
    exact: Mapping[str, Any] | None
    offset: float
    healed: bool


def weights_of(
    source: Path, record: Mapping[str, Any], manifest: Mapping[str, object] | None, given: Mapping[str, object]
) -> Weights:
    """Derive what an output must hold.

    Args:
        source: a checkpoint.
        record: shardxform.json of the output, or empty.
        manifest: as in `check_independently`.
        given: likewise.

    Raises:
        CheckpointError: the source cannot be read.
        PlanError: see `_How.of`.

    """
    try:
        theirs, config = _checkpoint(source, decode=True)
        if config.get("model_type") in _IN_TURNS:
            theirs = dict(_quarters(theirs, config))
        how = _How.of(config, record, manifest, given, theirs)
        kept = len(next(iter(how.keep.values()))) if how.keep else how.experts
        return Weights(dict(how.wanted(theirs)), config, kept, how.exact, how.offset, how.healed)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{source}: the independent check cannot read it: {e}") from e


# -- files --------------------------------------------------------------------------------------------------------


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected an object")
    return value


def _config(root: Path) -> dict[str, Any]:
    """A config, with what that of its decoder declares of quantized weights where it declares nothing itself."""
    config = _object(root / "config.json")
    inside = (each.get("quantization_config") for each in config.values() if isinstance(each, dict))
    declared = config.get("quantization_config") or next(filter(None, inside), None)
    return {**config, "quantization_config": declared} if declared else config


def _checkpoint(root: Path, *, decode: bool = False) -> tuple[dict[str, PackedWeight], dict[str, Any]]:
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


def _decodes(source: Path, out: Path) -> bool:
    """Whether small floats are compared as values: they are stored in another way, or were healed."""
    try:
        record = _object(out / "shardxform.json") if (out / "shardxform.json").exists() else {}
        healed = bool((record.get("inputs", {}).get("recipe") or {}).get("heal"))
        return healed or _form(_config(source)) != _form(_config(out))
    except (OSError, ValueError, AttributeError):
        return False  # what cannot be read is said when it is


def _is_small(config: Mapping[str, Any]) -> bool:
    """Whether weights are small floats, as far as the config says."""
    declared = config.get("quantization_config") or {}
    groups = (declared.get("config_groups") or {}).values()
    if declared.get("quant_method") == "compressed-tensors":
        return any((group.get("weights") or {}).get("type") == "float" for group in groups)
    return declared.get("quant_method") in ("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp4", "mxfp4", "mxfp8")


def _form(config: Mapping[str, Any]) -> tuple[object, object]:
    """How weights are quantized."""
    declared = config.get("quantization_config") or {}
    return declared.get("quant_method"), declared.get("format")


def _decoded(tensors: Mapping[str, StoredBytes], config: Mapping[str, Any]) -> Iterator[tuple[str, PackedWeight]]:
    """Weights with values in place of small floats, under the names that 16-bit weights have one by one."""
    if glued := next(
        (name for name, tensor in tensors.items() if _FUSED.fullmatch(name) and tensor.dtype in SMALL), ""
    ):
        raise ValueError(f"{glued}: stacks of {tensors[glued].dtype} are compared only as they are stored")
    size = _block_of(config["quantization_config"])
    used: set[str] = set()
    for name, tensor in tensors.items():
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
        shape = (math.prod(tensor.shape[:2]), columns * (2 if tensor.dtype in ("U8", "I8") else 1))
        one = Small(name, tensor, shape, (), factors=factors, block=block, times=times, over=over)
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


_CODES: Final = (".weight_packed", "_blocks", ".weight")
_FACTORS: Final = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale", "_scales")
_TIMES: Final = (".weight_scale_2",)
_OVER: Final = (".weight_global_scale",)
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
        if _ACROSS.fullmatch(name):  # one set after the other, as their experts are numbered
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


def _quarters(weights: Mapping[str, PackedWeight], config: Mapping[str, object]) -> Iterator[tuple[str, PackedWeight]]:
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
        if one := _EXPERT.fullmatch(stem):  # whose scales are in a stack
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


# -- names and numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _How:
    """How the output was made.

    Attributes:
        keep, mtp_keep: ids kept by layer; None where all are.
        experts, sets: in a layer of the source, all of them; and how many sets they are in.
        layers: decoder blocks; a block of a higher number is an MTP layer.
        mtp_blocks: blocks of an MTP layer.
        text_only, drops_mtp: whether the vision tower, and the MTP layers, are left out.
        exact: grid of our record, where weights were rounded to nearest without a search; else None.
        offset: most that was added to a weight, in steps, before it was rounded.
        healed, dequantized: whether weights were healed; whether they were quantized, and then written in 16 bits.
        quantizes, requantizes: whether `quantize` wrote it; whether it rounded again integers of the same grid.

    """

    keep: Mapping[str, list[int]] | None
    mtp_keep: Mapping[str, list[int]]
    experts: int
    sets: int
    layers: int
    mtp_blocks: int
    text_only: bool
    drops_mtp: bool
    exact: Mapping[str, Any] | None
    offset: float
    healed: bool
    dequantized: bool
    quantizes: bool = False
    requantizes: bool = False

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
        manifest: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        names: Iterable[str] = (),
    ) -> _How:
        """Read a record, and what goes before it; `names` are the source's."""
        inputs = record.get("inputs", {})
        converted = inputs.get("command") == "convert"
        if converted:
            inputs = {} if "quantization_config" in config else inputs.get("origin", {})
        manifest, options = manifest or inputs.get("manifest") or {}, inputs.get("options", {})
        scheme, recipe = inputs.get("scheme") or {}, inputs.get("recipe") or {}
        if manifest.get("width"):
            raise PlanError(
                "`independent`: experts of OUT have fewer channels, which the second opinion does not derive"
            )
        keep, text = manifest.get("keep"), _text_of(config)
        sets = _SETS.get(str(config.get("model_type")), 1)
        experts = next(_counts_of(config))[1] * sets
        prunes = keep is not None and any(len(ids) < experts for ids in keep.values())
        text_only, mtp = given.get("text_only"), given.get("mtp") or options.get("mtp", "auto")
        how = cls(
            keep=keep if prunes else None,
            mtp_keep=manifest.get("mtp_keep") or {},
            experts=experts,
            sets=sets,
            layers=len(text.get("layers_block_type") or text.get("hybrid_override_pattern") or "")
            or next(text[key] for key in ("num_hidden_layers", "num_layers", "n_layers") if key in text),
            mtp_blocks=len(text.get("mtp_hybrid_override_pattern") or text.get("mtp_layers_block_type") or "1"),
            text_only=bool(options.get("text_only") if text_only is None else text_only),
            drops_mtp=mtp == "drop" or (mtp == "auto" and prunes and not manifest.get("mtp_keep")),
            exact=scheme["grid"] if scheme.get("method") == "rtn" and not scheme["grid"]["search"] else None,
            offset=(1 + 1 / (recipe.get("iters") or _FEWEST_STEPS)) / 2 if scheme.get("method") != "rtn" else 0.0,
            healed=bool(recipe.get("heal")),
            dequantized=converted and "quantization_config" not in config,
            quantizes=inputs.get("command") == "quantize",
            requantizes=bool(scheme.get("requantize")),
        )
        # MTP layers without experts of their own have nothing to lose.
        bound = any(how.is_mtp(name) and (_EXPERT.fullmatch(name) or _ROUTER.fullmatch(name)) for name in names)
        return how if bound or mtp == "drop" else replace(how, drops_mtp=False)

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor is of an MTP layer."""
        layer = _LAYER.match(name)
        return name.startswith(_MTP) or bool(layer and layer[1] not in _MTP and int(layer[2]) >= self.layers)

    def wanted(self, weights: Mapping[str, PackedWeight]) -> Iterator[tuple[str, PackedWeight]]:
        """What the output must hold, by its names there."""
        for name, weight in weights.items():
            layer, mtp = _LAYER.match(name), self.is_mtp(name)
            if (mtp and self.drops_mtp) or (self.text_only and name.startswith(_VISION)):
                continue
            if new := self._renumbered(name, weight, self._ids(layer, mtp)):
                yield self._renamed(new[0]), new[1]

    def _ids(self, layer: re.Match[str] | None, mtp: bool) -> list[int] | None:
        """Ids kept in a layer; None where all are."""
        if layer is None or self.keep is None:
            return None
        number = int(layer[2]) - (self.layers if mtp and layer[1] not in _MTP else 0)
        return self.mtp_keep.get(str(number // self.mtp_blocks)) if mtp else self.keep.get(layer[2])

    def _renumbered(self, name: str, weight: PackedWeight, ids: list[int] | None) -> tuple[str, PackedWeight] | None:
        """A weight under its number in the output, or what stays of a router; None of an expert that goes."""
        if ids is None:
            return name, weight
        if match := _EXPERT.fullmatch(name):
            old = int(match[2])
            return (f"{match[1]}.{ids.index(old)}.{match[3]}", weight) if old in ids else None
        if self.sets > 1 and (match := _OF_SET.fullmatch(name)):
            first = self.experts // self.sets if match[1] else 0
            own = tuple(old - first for old in ids if first <= old < first + self.experts // self.sets)
            return name, replace(weight, shape=(weight.shape[0], len(own)), columns=own)
        if _IDS.fullmatch(name):
            return name, replace(weight, ids=tuple(ids))
        if not (_ROUTER.fullmatch(name) or _ACROSS.fullmatch(name) or _SEVERAL.fullmatch(name)):
            return name, weight
        each = weight.shape[0] // self.experts if _SEVERAL.fullmatch(name) else 1
        others = (self.experts * each, weight.shape[0] - self.experts * each)  # of no expert: they stay
        rows = (*((old * each, each) for old in ids), *([others] if others[1] else []))
        return name, replace(weight, shape=(sum(number for _, number in rows), *weight.shape[1:]), rows=rows)

    def _renamed(self, name: str) -> str:
        for old, new in _OF_TEXT if self.text_only else ():
            if name.startswith(old):
                return f"{new}{name.removeprefix(old)}"
        return name

    # -- values ---------------------------------------------------------------------------------------------------

    def difference(self, name: str, wanted: PackedWeight, found: PackedWeight) -> str:
        """Say how a weight is not what it must be; empty where it is."""
        if wanted.shape != found.shape:
            return f"shape {list(found.shape)}, expected {list(wanted.shape)}"
        try:
            if self.healed and _LAYER.match(name):
                return _unlike(wanted, found)
            if wanted.scales and found.scales and not self._is_anew(wanted, found):
                return _same_codes(wanted, found)
            if found.scales:
                return self._rounding(wanted, found)
            if isinstance(wanted, Small) and found.tensor.dtype == "BF16":
                pairs = ((found.bits_of(a, b), nearest_bf16(wanted.values(a, b)), a) for a, b in found.runs())
                return _first(found, pairs)
            if not wanted.scales and wanted.tensor.dtype != found.tensor.dtype and not self.dequantized:
                return f"{found.tensor.dtype}, expected {wanted.tensor.dtype}"
            return self._plain(wanted, found)
        except (ValueError, IndexError) as e:
            return f"cannot be compared: {e}"

    def _is_anew(self, wanted: PackedWeight, found: PackedWeight) -> bool:
        """Whether integers of the source were rounded to others."""
        grids = (wanted.bits, wanted.group), (found.bits, found.group)
        return self.requantizes or (self.quantizes and grids[0] != grids[1])

    def _plain(self, wanted: PackedWeight, found: PackedWeight) -> str:
        """The same bits, or where the source's weights are quantized or were on the way, those of their values."""
        if wanted.scales is None and wanted.tensor.dtype == found.tensor.dtype:
            text = _first(found, ((found.bits_of(a, b), wanted.bits_of(a, b), a) for a, b in found.runs()))
            if not text or not self.dequantized:
                return text
        if wanted.scales is None and self.exact is None:
            return _unlike(wanted, found)
        half = found.tensor.dtype == "F16"
        return _first(found, ((found.bits_of(a, b), self._dequantized(wanted, a, b, half), a) for a, b in found.runs()))

    def _dequantized(self, weight: PackedWeight, start: int, stop: int, half: bool) -> NDArray[Any]:
        if weight.scales is None:
            assert self.exact is not None
            codes, scale = rounded_to_grid(weight.values(start, stop), self.exact)
        else:
            codes, scale = weight.codes(start, stop)
        values = codes.astype(np.float32) * scale
        return nearest_half(values) if half else nearest_bf16(values)

    def _rounding(self, wanted: PackedWeight, found: PackedWeight) -> str:
        """Rounded to nearest as the record says, or by no more than offsets allow, and to no side."""
        signed, weights = 0.0, 0
        for start, stop in found.runs():
            values, (codes, scale) = wanted.values(start, stop), found.codes(start, stop)
            if self.exact is not None:
                right, expected = rounded_to_grid(values, self.exact)
                if text := _first(found, [(codes, right, start)]) or _first(found, [(scale, expected, start)], "scale"):
                    return text
                continue
            end = 2 ** (found.bits - 1)
            off = codes - np.clip(values / np.where(scale == 0, np.float32(1), scale), -end, end - 1)
            most = 0.5 + self.offset + 2.0 ** (found.bits - 23)
            if (bad := ~(np.abs(off) <= most)).any():
                row, column = np.argwhere(bad)[0]
                what = f"row {start + row}, column {column}: code {codes[row, column]} is {off[row, column]:+.2f} steps"
                return f"{int(bad.sum())} codes are no rounding, {what} from the weight, expected at most {most:.2f}"
            beyond = (np.abs(off) > 1.001).mean(axis=1)
            if beyond.max() > (most := max(self.offset - 0.5, 0) / 2 + 0.25):
                row = int(beyond.argmax())
                text = f"row {start + row}: {beyond[row]:.2f} of its codes are more than a step off"
                return f"{text}, expected at most {most:.2f}: half of what codes off by one give"
            signed += float(off.sum())
            weights += off.size
        mean, most = signed / max(weights, 1), 0.25 + 4 / max(found.size[0], 1) ** 0.5
        return f"mean signed error {mean:+.3f} codes, expected at most {most:.3f}" if abs(mean) > most else ""


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the decoder."""
    inner = next((config[home] for home in ("text_config", "thinker_config") if home in config), None)
    return config if inner is None else _text_of(inner)


def _counts_of(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Keys that count the decoder's experts, and what they say."""
    text = _text_of(config)
    for home in (text, text.get("ffn_config") or {}):
        for key in _COUNTS:
            if key in home:
                yield key, home[key][0] if isinstance(home[key], list) else home[key]


def _same_codes(wanted: PackedWeight, found: PackedWeight) -> str:
    if (wanted.bits, wanted.group) != (found.bits, found.group):
        return f"{found.bits} bits in groups of {found.group}, expected {wanted.bits} in {wanted.group}"
    for start, stop in found.runs():
        for one, other, what in zip(
            found.codes(start, stop), wanted.codes(start, stop), ("code", "scale"), strict=True
        ):
            if text := _first(found, [(one, other, start)], what):
                return text
    return ""


def _unlike(wanted: PackedWeight, found: PackedWeight) -> str:
    """Healed, or rounded with tuning and dequantized: whatever it is, it is nearer to the source's than zero is."""
    distance, size = 0.0, 0.0
    for start, stop in found.runs():
        values = wanted.values(start, stop).astype(np.float64)
        codes, scale = found.codes(start, stop) if found.scales else (found.values(start, stop), np.float32(1))
        distance += float(np.square(codes * scale - values).sum())
        size += float(np.square(values).sum())
    if distance < size or not size:
        return ""
    return f"its distance from the source's is {(distance / size) ** 0.5:.2f} times the source's size, expected below 1"


def _first(found: PackedWeight, runs: Any, what: str = "") -> str:  # noqa: ANN401
    """Name the first element that is not what it must be; `runs` gives found, wanted and the first row."""
    what = what or ("code" if found.scales else "bits")
    for ours, theirs, start in runs:
        if ours.shape != theirs.shape:
            return f"{what}s of shape {list(ours.shape)}, expected {list(theirs.shape)}"
        if (differing := ours != theirs).any():
            row, column = np.argwhere(differing)[0]
            text = f"row {start + row}, column {column}: {what} {ours[row, column]}, expected {theirs[row, column]}"
            return (
                f"{text}; {int(differing.sum())} of {differing.size} differ in rows {start} to {start + len(ours) - 1}"
            )
    return ""


# -- the whole ----------------------------------------------------------------------------------------------------


def _check_names(wanted: Mapping[str, PackedWeight], found: Mapping[str, PackedWeight], findings: Findings) -> None:
    for name in wanted.keys() - found.keys():
        findings.problem(CODE, name, f"missing: the source's {wanted[name].name} gives it")
    for name in found.keys() - wanted.keys():
        findings.problem(CODE, found[name].name, f"{name}: nothing in the source gives it")


def _check_counts(how: _How, config: Mapping[str, object], had_mtp: bool, findings: Findings) -> None:
    """The config counts the experts, and the MTP layers, that are there."""
    text = _text_of(config)
    kept = {len(ids) for ids in (*(how.keep or {}).values(), *(how.mtp_keep.values() if how.keep else ()))}
    for key, count in _counts_of(config) if how.keep else ():
        if {count * how.sets} != kept:
            findings.problem(CODE, "config.json", f"{key} is {count}, but layers keep {sorted(kept)}")
    for key in _MTP_COUNTS if how.drops_mtp and had_mtp else ():
        if text.get(key):
            findings.problem(CODE, "config.json", f"{key} is {text[key]}, but the MTP layers are left out")
