"""Releases at full size: names, shapes and dtypes of their tensors, from their configs and transformers' own classes.

The model is built on the meta device, its names turned back into those of releases by transformers' own mapping, and
what its `quantization_config` says is done to shapes and dtypes. Layers of multi-token prediction, which transformers
has no code for, are blocks with a few tensors beside them. Nothing here knows of shardxform: see releases/README.md for
where configs and counts are from.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

HOME = Path(__file__).parent / "releases"
CLASSES = {"kimi_k2": "deepseek_v3"}  # types that transformers does not know, and the type whose class they are of
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
SHARD = 5_000_000_000

Spec = tuple[str, tuple[int, ...]]
Tensors = dict[str, Spec]

_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is known of a release beside its config.

    Attributes:
        parameters: of the decoder with embeddings and head, as published.
        tensors, elements: in the release's own files, where somebody listed them; scales count like weights.
        mtp: where layers of multi-token prediction lie: `blocks` after the decoder's, numbered on, or `mtp` apart.
        mtp_ends: whether each has embeddings and a head of its own.
        text: whether the decoder is taken out of a multimodal config, to stand alone.
        float32: names that the release keeps in F32.
        scales: dtype of the scales of FP8 blocks.
        more: names, as in a format with `l`, of tensors in every block that no class of transformers has.
        stacked: whether experts of blocks lie in stacks, as transformers' modules have them.
        turned: whether the last two dimensions of these are the other way round.
        head: the output head's name, where it is stored though the config, as transformers wrote it, ties it.
        group_size: of quantized weights, where 128 does not fit.

    """

    parameters: float
    tensors: int = 0
    elements: int = 0
    mtp: str = ""
    mtp_ends: bool = False
    text: bool = False
    float32: str = r"e_score_correction_bias$"
    scales: str = "F32"
    more: Mapping[str, tuple[int, ...]] | None = None
    stacked: bool = False
    turned: bool = False
    head: str = ""
    group_size: int = 128


RELEASES = {
    "DBRX-Instruct": Release(parameters=132e9),
    "DeepSeek-V2-Lite": Release(parameters=15.7e9, tensors=5_291, elements=15_706_484_224),
    "DeepSeek-V3": Release(parameters=671e9, tensors=91_991, elements=684_531_386_000, mtp="blocks", mtp_ends=True),
    "DeepSeek-V3.1": Release(parameters=671e9, mtp="blocks", mtp_ends=True),
    "DeepSeek-V3.2": Release(
        parameters=671e9,
        tensors=92_425,
        elements=685_396_921_376,
        mtp="blocks",
        mtp_ends=True,
        float32=r"e_score_correction_bias$|norm\.(weight|bias)$",
    ),
    "ERNIE-4.5-21B-A3B": Release(parameters=21.8e9),
    "FlexOlmo-7x7B-1T": Release(parameters=33.3e9, elements=33_270_665_216, tensors=963, float32=r"."),
    "GLM-4.5": Release(parameters=355e9, mtp="blocks", mtp_ends=True),
    "GLM-4.5V": Release(parameters=106e9, tensors=18_106, elements=107_710_933_120),
    "GLM-4.7-Flash": Release(parameters=30e9, tensors=9_703, elements=31_221_488_576, mtp="blocks", mtp_ends=True),
    "GLM-5": Release(parameters=744e9, tensors=59_870, elements=753_864_139_008, mtp="blocks"),
    "GLM-5.2": Release(parameters=744e9, tensors=59_585, elements=753_329_940_480, mtp="blocks"),
    "Gemma-4-26B-A4B": Release(parameters=25.2e9, stacked=True, group_size=64),
    "Granite-3.1-1B-A400M": Release(parameters=1.33e9),
    "Granite-4.0-H-Small": Release(parameters=32e9),
    "Hunyuan-A13B": Release(parameters=80e9),
    "Hy3": Release(parameters=295e9),
    "Jamba-1.5-Mini": Release(parameters=51.6e9),
    "K-EXAONE-236B-A23B": Release(parameters=236e9),
    "Kimi-K2-Instruct": Release(
        parameters=1.026e12,
        tensors=139_644,
        elements=1_026_470_731_056,
        more={"model.layers.{l}.self_attn.rotary_emb.inv_freq": (56,)},
    ),
    "Kimi-K2.6": Release(parameters=1.026e12, tensors=208_215, elements=170_267_038_208, text=True),
    "Kimi-Linear-48B-A3B": Release(
        parameters=49.1e9, tensors=20_493, elements=49_122_681_728, float32=r"A_log$|dt_bias$"
    ),
    "LFM2-8B-A1B": Release(parameters=8.3e9),
    "Laguna-XS.2": Release(parameters=33e9),
    "Ling-3.0-flash": Release(parameters=124e9),
    "Llama-4-Scout-17B-16E": Release(parameters=109e9, stacked=True),
    "Mellum2.1-12B-A2.5B": Release(parameters=12e9),
    "MiMo-V2-Flash": Release(parameters=309e9),
    "MiniMax-M2": Release(
        parameters=230e9,
        tensors=96_103,
        elements=228_703_644_928,
        float32=r"e_score_correction_bias$|block_sparse_moe\.gate\.weight$",
    ),
    "MiniMax-M3": Release(parameters=426e9, tensors=23_416, elements=427_040_140_160),
    "Mixtral-8x7B-v0.1": Release(parameters=46.7e9),
    "Nemotron-3-Nano-30B-A3B": Release(parameters=31.6e9, group_size=64),
    "North-Mini-Code-1.0": Release(parameters=30.5e9),
    "OLMoE-1B-7B-0924": Release(parameters=6.92e9, tensors=3_219, elements=6_919_161_856),
    "Phi-3.5-MoE": Release(parameters=41.9e9),
    "Qwen2-57B-A14B": Release(parameters=57.4e9),
    "Qwen3-235B-A22B": Release(parameters=235e9),
    "Qwen3-30B-A3B": Release(parameters=30.5e9),
    "Qwen3-30B-A3B-FP8": Release(parameters=30.5e9, tensors=37_491, elements=30_533_947_392, scales="BF16"),
    "Qwen3-Next-80B-A3B": Release(parameters=80e9, tensors=75_944, elements=81_324_862_720, mtp="mtp"),
    "Qwen3-VL-30B-A3B": Release(
        parameters=30.5e9, tensors=882, elements=31_070_754_032, stacked=True, turned=True, head="lm_head.weight"
    ),
    "Qwen3.5-35B-A3B": Release(
        parameters=35e9,
        tensors=1_811,
        elements=35_951_822_704,
        mtp="mtp",
        stacked=True,
        float32=r"A_log$|linear_attn\.norm\.weight$",
    ),
    "Solar-Open-100B": Release(parameters=102e9),
    "Trinity-Nano-Preview": Release(parameters=6.1e9),
    "dots.llm1": Release(parameters=142e9),
    "gpt-oss-120b": Release(parameters=116.8e9, group_size=64),
    "gpt-oss-20b": Release(parameters=20.9e9, tensors=459, elements=11_956_805_184, group_size=64),
}
"""Releases of families that shardxform knows."""

NAMED_OTHERWISE = ("DeepSeek-V4-Flash", "DeepSeek-V4-Flash-0731")
"""Releases that are not what transformers saves under another spelling: see `tensors_of_v4`."""


def config_of(name: str, blocks: int = 0) -> dict[str, Any]:
    """A release's config.json; with `blocks`, as if it had no more of them."""
    config: dict[str, Any] = json.loads((HOME / f"{name}.json").read_text())
    config = config["text_config"] if name in RELEASES and RELEASES[name].text else config
    if not blocks:
        return config
    every = config["num_hidden_layers"]
    cut = {key: value[:blocks] for key, value in config.items() if isinstance(value, list) and len(value) == every}
    return {**config, **cut, "num_hidden_layers": blocks}


def shapes_of(name: str, blocks: int = 0) -> dict[str, tuple[int, ...]]:
    """Every tensor that a release would have if none of its weights were quantized; of the first `blocks`."""
    if listing(name):
        return {tensor: shape for tensor, (_, shape) in listing(name).items()}
    release, config = RELEASES[name], config_of(name, blocks)
    text = config.get("text_config") or config
    shapes = _decoder(config, release.stacked)
    if release.turned:
        stacks = [tensor for tensor, shape in shapes.items() if ".experts." in tensor and len(shape) == 3]
        shapes |= {tensor: (shapes[tensor][0], *shapes[tensor][:0:-1]) for tensor in stacks}
    if release.head:
        shapes[release.head] = (text["vocab_size"], text["hidden_size"])
    for pattern, shape in (release.more or {}).items():
        shapes |= {pattern.format(l=layer): shape for layer in range(text["num_hidden_layers"])}
    return shapes | dict(_mtp(release, text, shapes))


def tensors_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Every tensor of a release: dtype and shape by name."""
    if listing(name):
        return listing(name)
    config = config_of(name)
    found: Tensors = {}
    for tensor, shape in shapes.items():
        found |= _stored(tensor, shape, config.get("text_config") or config, RELEASES[name])
    return found


@cache
def listing(name: str) -> Tensors:
    """Every tensor of a release as somebody listed it, a line for all that differ in a number; nothing where not."""
    path = HOME / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    found: Tensors = {}
    for pattern, dtype, shape in map(str.split, lines):
        found |= dict.fromkeys(_numbered(pattern), (dtype, tuple(map(int, shape.split(",")))))
    return found


def _numbered(pattern: str) -> Iterator[str]:
    """All names of a pattern whose numbers are ranges such as `0-59`."""
    match = re.search(r"(?<=\.)(\d+)-(\d+)(?=\.)", pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _numbered(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}")


def tensors_of_v4(config: Mapping[str, Any]) -> Tensors:
    """Every tensor of a DeepSeek-V4, as listed; its layers of multi-token prediction are of one kind or another."""
    hidden, vocabulary, ratios = config["hidden_size"], config["vocab_size"], config["compress_ratios"]
    drafts = range(3 if "dspark_block_size" in config else config["num_nextn_predict_layers"])
    found = dict(_streams_v4(config, "hc_head", config["hc_mult"], 1))
    found |= {f"{end}.weight": ("BF16", (vocabulary, hidden)) for end in ("embed", "head")}
    found["norm.weight"] = ("BF16", (hidden,))
    for layer in range(config["num_hidden_layers"]):
        hashed = layer < config["num_hash_layers"]
        found |= _block_v4(config, f"layers.{layer}.", ratios[layer], hashed=hashed)
    for layer in drafts:
        found |= _block_v4(config, f"mtp.{layer}.", 0, hashed=False)
    if not drafts:
        return found
    last = f"mtp.{drafts[-1]}."
    found |= {**_streams_v4(config, f"{last}hc_head", config["hc_mult"], 1), f"{last}norm.weight": ("BF16", (hidden,))}
    if "dspark_block_size" not in config:
        found |= {f"mtp.0.{norm}.weight": ("BF16", (hidden,)) for norm in ("enorm", "hnorm")}
        return found | _fp8_v4("mtp.0.e_proj", hidden, hidden) | _fp8_v4("mtp.0.h_proj", hidden, hidden)
    rank, looked_at = config["dspark_markov_rank"], len(config["dspark_target_layer_ids"])
    found |= {f"{last}markov_head.markov_w{n}.weight": ("BF16", (vocabulary, rank)) for n in (1, 2)}
    found[f"{last}confidence_head.proj.weight"] = ("BF16", (1, hidden + rank))
    found["mtp.0.main_norm.weight"] = ("BF16", (hidden,))
    return found | _fp8_v4("mtp.0.main_proj", hidden, looked_at * hidden)


def _block_v4(config: Mapping[str, Any], home: str, ratio: int, *, hashed: bool) -> Tensors:
    hidden, head, rank, size = (
        config[key] for key in ("hidden_size", "head_dim", "q_lora_rank", "moe_intermediate_size")
    )
    heads, groups, experts = (config[key] for key in ("num_attention_heads", "o_groups", "n_routed_experts"))
    out, ffn, streams = groups * config["o_lora_rank"], f"{home}ffn.", config["hc_mult"]
    found = _fp8_v4(f"{home}attn.wkv", head, hidden) | _fp8_v4(f"{home}attn.wq_a", rank, hidden)
    found |= _fp8_v4(f"{home}attn.wq_b", heads * head, rank) | _fp8_v4(f"{home}attn.wo_b", hidden, out)
    found |= _fp8_v4(f"{home}attn.wo_a", out, heads * head // groups)
    norms = {"attn.kv_norm": head, "attn.q_norm": rank, "attn_norm": hidden, "ffn_norm": hidden}
    found |= {f"{home}{norm}.weight": ("BF16", (width,)) for norm, width in norms.items()}
    found[f"{home}attn.attn_sink"] = ("F32", (heads,))
    for part in ("attn", "ffn"):
        found |= _streams_v4(config, f"{home}hc_{part}", streams * (2 + streams), 3)
    shapes = {"w1": (size, hidden), "w2": (hidden, size), "w3": (size, hidden)}
    for part, (rows, columns) in shapes.items():
        found |= _fp8_v4(f"{ffn}shared_experts.{part}", rows, columns)
        for expert in range(experts):
            found[f"{ffn}experts.{expert}.{part}.weight"] = ("I8", (rows, columns // 2))
            found[f"{ffn}experts.{expert}.{part}.scale"] = ("F8_E8M0", (rows, columns // 32))
    found[f"{ffn}gate.weight"] = ("BF16", (experts, hidden))
    if hashed:
        found[f"{ffn}gate.tid2eid"] = ("I64", (config["vocab_size"], config["num_experts_per_tok"]))
    else:
        found[f"{ffn}gate.bias"] = ("F32", (experts,))
    if ratio:
        found |= _compressor_v4(f"{home}attn.compressor.", ratio, head, hidden)
    if ratio == 4:
        index, indexer = config["index_head_dim"], f"{home}attn.indexer."
        found |= _compressor_v4(f"{indexer}compressor.", ratio, index, hidden)
        found |= _fp8_v4(f"{indexer}wq_b", config["index_n_heads"] * index, rank)
        found[f"{indexer}weights_proj.weight"] = ("BF16", (config["index_n_heads"], hidden))
    return found


def _compressor_v4(home: str, ratio: int, width: int, hidden: int) -> Tensors:
    columns = 2 * width if ratio == 4 else width
    found: Tensors = {f"{home}ape": ("F32", (ratio, columns)), f"{home}norm.weight": ("BF16", (width,))}
    return found | {f"{home}{part}.weight": ("BF16", (columns, hidden)) for part in ("wgate", "wkv")}


def _streams_v4(config: Mapping[str, Any], home: str, count: int, scales: int) -> Tensors:
    wide = config["hc_mult"] * config["hidden_size"]
    return {
        f"{home}_base": ("F32", (count,)),
        f"{home}_fn": ("F32", (count, wide)),
        f"{home}_scale": ("F32", (scales,)),
    }


def _fp8_v4(name: str, rows: int, columns: int) -> Tensors:
    scales = (-(-rows // 128), -(-columns // 128))
    return {f"{name}.weight": ("F8_E4M3", (rows, columns)), f"{name}.scale": ("F8_E8M0", scales)}


def write(root: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """A checkpoint whose shards are headers and holes: no data, no space."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config))
    shards = list(_shards(tensors.items()))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header, end = {}, 0
        for tensor, (dtype, shape) in shard.items():
            begin, end = end, end + nbytes(dtype, shape)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        head = json.dumps(header, separators=(",", ":")).encode()
        with (root / file).open("wb") as out:
            out.write(struct.pack("<Q", len(head)) + head)
            out.truncate(8 + len(head) + end)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return BYTES[dtype] * math.prod(shape)


def _decoder(config: dict[str, Any], stacked: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that a release in 16 bits has, without what transformers has no code for."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    kept["model_type"] = CLASSES.get(kept["model_type"], kept["model_type"])
    if "ffn_config" in kept:  # whose class takes no whole number for a power
        kept["ffn_config"] = {**kept["ffn_config"], "moe_normalize_expert_weights": 1.0}
    with torch.device("meta"):
        build = getattr(transformers, config.get("architectures", [""])[0], AutoModelForCausalLM.from_config)
        model = build(AutoConfig.for_model(**kept))
    state = {name: value for name, value in model.state_dict().items() if name not in _tied(model)}
    layers: dict[tuple[str, int], list[tuple[str, torch.Tensor]]] = {}
    found = {name: tuple(value.shape) for name, value in state.items() if stacked and ".experts." in name}
    state = {name: value for name, value in state.items() if name not in found}
    some = dict(state)
    for name, value in state.items():
        if match := _LAYER.match(name):
            layers.setdefault((match[1], int(match[2])), []).append((match[3], value))
            del some[name]
    kinds: dict[Any, int] = {}
    same: dict[int, list[int]] = {}
    for (prefix, layer), parts in layers.items():  # the blocks of a kind are alike: one of each is turned back
        kind = kinds.setdefault((prefix, tuple((part, tuple(value.shape)) for part, value in parts)), len(kinds))
        same.setdefault(kind, []).append(layer)
        if len(same[kind]) == 1:
            some |= {f"{prefix}{kind}{part}": value for part, value in parts}
    for name, value in revert_weight_conversion(model, some).items():
        match = _LAYER.match(name)
        for layer in same[int(match[2])] if match else ():
            found[f"{match[1]}{layer}{match[3]}"] = tuple(value.shape)  # type: ignore[index]
        if not match:
            found[name] = tuple(value.shape)
    return found


def _tied(model: Any) -> frozenset[str]:
    config = model.config.get_text_config()
    return frozenset(model._tied_weights_keys or ()) if config.tie_word_embeddings else frozenset()


def _mtp(
    release: Release, text: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Layers of multi-token prediction: copies of a block with full attention and experts, and what joins them."""
    if not release.mtp:
        return
    hidden, last = text["hidden_size"], text["num_hidden_layers"] - 1
    ends = {"embed_tokens": (text["vocab_size"], hidden), "shared_head.head": (text["vocab_size"], hidden)}
    if release.mtp == "blocks":
        prefix, norms = f"model.layers.{last + 1}.", ("enorm", "hnorm", "shared_head.norm")
        yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
        if release.mtp_ends:
            yield from ((f"{prefix}{end}.weight", shape) for end, shape in ends.items())
    else:
        prefix, norms = "mtp.layers.0.", ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        yield "mtp.fc.weight", (hidden, 2 * hidden)
    for norm in norms:
        yield f"{prefix if release.mtp == 'blocks' else 'mtp.'}{norm}.weight", (hidden,)
    like = _fullest(shapes)
    for name, shape in shapes.items():
        match = _LAYER.match(name)
        if not match or int(match[2]) != like or name.endswith("inv_freq"):
            continue
        if match[3].startswith(".mlp.experts.") and len(shape) == 3:  # those that lie stacked in blocks do not here
            yield from _unstacked(prefix + match[3][1:], shape)
        else:
            yield prefix + match[3][1:], shape


def _fullest(shapes: Iterable[str]) -> int:
    """The last of the blocks with full attention that have most tensors."""
    counts = Counter(int(match[2]) for name in shapes if (match := _LAYER.match(name)))
    full = {int(match[2]) for name in shapes if ".self_attn." in name and (match := _LAYER.match(name))}
    return max(full, key=lambda layer: (counts[layer], layer))


def _unstacked(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    home, _, stack = name.rpartition(".")
    count, rows, columns = shape
    for expert in range(count):
        if stack == "down_proj":
            yield f"{home}.{expert}.down_proj.weight", (rows, columns)
        else:
            yield f"{home}.{expert}.gate_proj.weight", (rows // 2, columns)
            yield f"{home}.{expert}.up_proj.weight", (rows // 2, columns)


def _stored(name: str, shape: tuple[int, ...], text: Mapping[str, Any], release: Release) -> Tensors:
    """How the release stores a tensor: as it is, or as a quantized weight and what belongs to it."""
    plain: Tensors = {name: ("F32" if re.search(release.float32, name) else "BF16", shape)}
    quantization = text.get("quantization_config")
    if quantization is None:
        return plain
    if quantization["quant_method"] == "mxfp4":
        return _mxfp4(name, shape) if re.search(r"experts\.(gate_up|down)_proj$", name) else plain
    if len(shape) != 2 or not re.search(r"(proj|proj_with_mqa|w[123kq]|wq_b)\.weight$", name) or "eh_proj" in name:
        return plain
    rows, columns = shape
    if quantization["quant_method"] == "fp8":
        kept = (*quantization.get("ignored_layers", ()), *quantization.get("modules_to_not_convert", ()))
        if name.endswith("weights_proj.weight") or name.removesuffix(".weight") in kept:
            return plain
        scales = tuple(-(-size // block) for size, block in zip(shape, quantization["weight_block_size"], strict=True))
        return {name: ("F8_E4M3", shape), f"{name}_scale_inv": (release.scales, scales)}
    if not _EXPERT.search(name):
        return plain
    weights = quantization["config_groups"]["group_0"]["weights"]
    return {
        f"{name}_packed": ("I32", (rows, columns * weights["num_bits"] // 32)),
        f"{name}_scale": ("BF16", (rows, columns // weights["group_size"])),
        f"{name}_shape": ("I32", (2,)),
    }


def _mxfp4(name: str, shape: tuple[int, ...]) -> Tensors:
    count, inputs, outputs = shape
    blocks = (count, outputs, inputs // 32)
    return {f"{name}_blocks": ("U8", (*blocks, 16)), f"{name}_scales": ("U8", blocks)}


def _shards(tensors: Iterable[tuple[str, Spec]]) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for name, spec in tensors:
        if shard and size + nbytes(*spec) > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += nbytes(*spec)
    yield shard
