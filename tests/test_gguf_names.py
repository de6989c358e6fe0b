"""What llama.cpp calls things: tensors, keys and tokens, as its own converter writes them.

`MADE` holds what that converter made of the checkpoints that `checkpoint` makes: a digest of every tensor in float32,
and one of every key. They were recorded with llama.cpp's convert_hf_to_gguf.py at 0c1e57098, told to take tokenizers as
they are in tokenizer.json; `MORE` and `OTHER` are what differs on purpose, and why.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_changes import changed, changes, edited, taken
from strategies import picked

from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats import packing
from shardxform.formats.encoding import Cut, Opener
from shardxform.formats.scheme import Grid
from shardxform.model.layout import layout_of
from shardxform.plan.view import View, pruned_view
from shardxform.runtimes.gguf import latent_attention
from shardxform.runtimes.gguf.architecture import Architecture, Named
from shardxform.runtimes.gguf.architectures import KINDS, architecture_of
from shardxform.runtimes.gguf.keys import Key, Recorder
from shardxform.runtimes.gguf.metadata import metadata_of
from shardxform.runtimes.gguf.pieces import MalformedModel, SentencePiece, pieces_of
from shardxform.runtimes.gguf.pretokenizers import BY_DIGEST, CHECKED_TEXT, NAMES
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.mlx_families import NAMES as NAMES_OF_MLX
from shardxform.runtimes.mlx_families import refuse_misread

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
VOCAB = 320
LINEAR = {"layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = {
    "layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "enable_moe_block": True,
    "moe_intermediate_size": 32,
    "per_layer_config": {"3": {"head_dim": 32}},
}
OVER: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
    "deepseek_v32": {"index_head_dim": 128},
    "gemma4_text": GEMMA,
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {**YARN, "truncate": True}},
    "kimi_k2": {},
    "minimax_m2": {},
    "mixtral": {},
    "qwen3_5_moe": {**LINEAR, "rope_parameters": {**ROTATED, "mrope_section": [1, 1, 0]}},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": LINEAR,
}
"""Model types, by what is not as `any_moe` makes them."""

MADE = {
    "deepseek_v3": ("f4943e29a623f8d5", "795de4cb2de64f1b"),
    "deepseek_v32": ("ac2424464aa04e59", "f0229df47a728051"),
    "gemma4_text": ("2680ba2bd2c2cf04", "eeb2310500b09271"),
    "glm4_moe": ("ee7a43237b64ac1e", "c9a305d7abeafc37"),
    "glm4_moe_lite": ("f4943e29a623f8d5", "7a82a3fe4a2e3fba"),
    "gpt_oss": ("62fd556990845e95", "406f32094e656e5f"),
    "kimi_k2": ("f4943e29a623f8d5", "85d32631c280b4b0"),
    "minimax_m2": ("7115d102de5918dd", "fc55cb8e2b47bcda"),
    "mixtral": ("e0a4b43b4d2a515c", "c564cadd99f137dc"),
    "qwen3_5_moe": ("f6a29943fac9bfec", "f90fcf1147f1f085"),
    "qwen3_moe": ("46b74c2fa155dbae", "d6c6767194869f46"),
    "qwen3_next": ("880384147fef47db", "e54a56850c1dff88"),
}

SIGMOID = "expert_gating_func"
MORE = {
    "deepseek_v3": (SIGMOID,),
    "deepseek_v32": (SIGMOID, "add_bos_token"),  # without which the converter refuses it
    "glm4_moe_lite": (SIGMOID,),
    "kimi_k2": (SIGMOID,),
    "minimax_m2": (SIGMOID,),
}
"""Keys that the converter writes only where a config says what is true of the whole family."""

OTHER = {
    "gemma4_text": ("final_logit_softcapping",),
    "glm4_moe": ("nextn_predict_layers",),
    "glm4_moe_lite": ("leading_dense_block_count",),
}
"""Keys that the converter finds to be 0, or does not write where a config has none, for which llama.cpp takes 30: of
logits' cap, of MTP layers, and what it takes from a key that is not written."""


def checkpoint(family: str, folder: Path, **over: Any) -> Path:
    """A tiny random one, with a tokenizer that has one merge, and the special tokens that GLM's have."""
    import any_moe

    root = folder / family
    model = any_moe.build(family, vocab_size=VOCAB, **{**OVER[family], **over})
    any_moe.save(model, root, vocab=VOCAB, model_type=family if family == "kimi_k2" else "")
    path = root / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(of_characters(tokenizer) if family == "gemma4_text" else with_more(tokenizer)))
    config = json.loads((root / "config.json").read_text())
    if family == "minimax_m2":  # as releases have it
        config["rotary_dim"] = 8
    (root / "config.json").write_text(json.dumps(config))
    (root / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "top_p": 0.8}')
    return root


def with_more(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer of bytes with one merge and more tokens."""
    added, vocabulary = tokenizer["added_tokens"], tokenizer["model"]["vocab"]
    vocabulary.update({each["content"]: each["id"] for each in added})
    vocabulary["ab"], tokenizer["model"]["merges"] = len(vocabulary), [["a", "b"]]
    texts = ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>", "<think>")
    for at, text in enumerate(texts, len(vocabulary)):
        added.append(token(at, text, special=text != "<think>"))
    return tokenizer


def token(at: int, text: str, *, special: bool) -> dict[str, Any]:
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": at, "content": text, **kind, "special": special}


def of_characters(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer of characters that falls back to bytes, as many tokens as there are rows."""
    texts = [
        "<pad>",
        "<end>",
        "<begin>",
        "<|tool_call>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "ab",
    ]
    texts += [chr(0x4E00 + at) for at in range(VOCAB - 2 - len(texts))]
    added = [token(at, text, special=True) for at, text in enumerate(texts[1:3], 1)]
    added += [token(VOCAB - 2, "▁here", special=False), token(VOCAB - 1, "<|tool_call|>", special=False)]
    model = {**tokenizer["model"], "byte_fallback": True, "vocab": {text: at for at, text in enumerate(texts)}}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    split = {"pre_tokenizer": None, "post_processor": None, "decoder": decoder}
    return {**tokenizer, **split, "added_tokens": added, "model": {**model, "merges": [["a", "b"]]}}


def viewed(root: Path, **options: Any) -> tuple[View, Architecture]:
    view = pruned_view(Checkpoint.open(root), None, **options)
    return view, architecture_of(view.layout)


def read_from(root: Path) -> Any:
    """Fills an array with the bytes of a tensor."""

    def read(ref: TensorRef, array: np.ndarray) -> None:
        parts = []
        for each in ref.ranges:
            with (root / each.file).open("rb") as file:
                file.seek(each.offset)
                parts.append(file.read(each.length))
        array.view("u1").reshape(-1)[...] = np.frombuffer(b"".join(parts), "u1")

    return read


def values_of(root: Path, tensors: Iterable[Named]) -> dict[str, np.ndarray]:
    """Every tensor in float32."""
    opener, out = Opener(read_from(root)), {}
    for named in tensors:
        rows = [piece.open(opener).values(0, piece.shape[0]) for piece in named.pieces]
        found = np.concatenate(rows) if rows else np.array(named.values, "f4")
        out[named.name] = found.reshape(named.shape)
    return out


def digest_of_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
    return digest.hexdigest()[:16]


def digest_of_keys(keys: Mapping[str, tuple[Any, Any]], without: Iterable[str] = ()) -> str:
    """Of names, types and values; the model's name, which is its folder's, is left out."""
    left = {name: each for name, each in keys.items() if not name.endswith(("general.name", *without))}
    return hashlib.sha256(json.dumps(left, sort_keys=True).encode()).hexdigest()[:16]


def as_stored(key: Key) -> tuple[Any, list[str]]:
    """Value and types, as a reader of the file finds them."""
    value = key.value
    if "FLOAT32" in (key.type, key.of):
        value = np.array(value, "f4").tolist()
    return value, [key.type, *([key.of] if key.of else [])]


def keys_of(root: Path, pre_tokenizer: str = "gpt-2") -> dict[str, tuple[Any, list[str]]]:
    view, architecture = viewed(root)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    found = metadata_of(architecture, tensors, root, name="x", file_type=0, pre_tokenizer=pre_tokenizer)
    return {key.name: as_stored(key) for key in found}


# -- transforms --------------------------------------------------------------------------------------------------------


def test_an_order_is_that_of_an_array_whose_axes_change_places() -> None:
    heads = Order((Run(0, (3,)), Run(3, (2, 2, 2), (1, 0, 2))))
    assert heads.positions().tolist() == [0, 1, 2, 3, 4, 7, 8, 5, 6, 9, 10]
    assert heads.count == 11
    assert Order.every(2, 1, 3).positions().tolist() == [1, 3, 5]
    assert Order((Run(4, (2, 3), (), ((0, 2), (1, 3))),)).positions().tolist() == [5, 6, 8, 9]


@pytest.mark.parametrize(
    ("order", "blocks"),
    [
        (Order((Run(0, (2, 2, 32), (1, 0, 2)),)), [0, 2, 1, 3]),
        (Order((Run(0, (2, 2, 64), (1, 0, 2)),)), [0, 1, 4, 5, 2, 3, 6, 7]),
        (Order((Run(0, (2, 2, 16), (1, 0, 2)),)), None),
        (Order((Run(0, (3,)),)), None),
        (Order((Run(16, (32,)),)), None),
    ],
)
def test_columns_that_move_in_whole_blocks_keep_their_codes(order: Order, blocks: list[int] | None) -> None:
    found = order.blocks(32)
    assert (None if found is None else found.tolist()) == blocks
    assert Transform(columns=order).keeps_codes() == (blocks is not None)


def test_what_maps_values_or_turns_a_matrix_keeps_no_codes() -> None:
    rows = Order((Run(0, (2, 2), (1, 0)),))
    assert Transform(rows=rows).keeps_codes()
    assert not Transform(transposed=True).keeps_codes()
    assert not Transform(rows=rows, value="one more").keeps_codes()
    assert Transform(transposed=True, rows=Order.every(2, 0, 3)).shape(4, 6) == (3, 4)


class Floats:
    """Rows in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.all, self.count, self.fits_half = values, len(values), False

    def where(self, row: int) -> str:
        return f"row {row}"

    def values(self, start: int, stop: int) -> np.ndarray:
        return self.all[start:stop]

    def raw(self, start: int, stop: int) -> tuple[np.ndarray, Any]:
        return self.all[start:stop], "F32"

    def cut(self, cut: Any) -> Any:
        return Floats(self.all[cut.first : cut.first + cut.count])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("layout", ["gptq", "row"])
def test_integers_move_to_the_bit(bits: Any, group: int, layout: Any) -> None:
    """Rows of integers are those of their values, moved likewise, and integers still."""
    rng, grid = np.random.default_rng(0), Grid(bits=bits, group_size=group)
    words = rng.integers(-(1 << 31), 1 << 31, grid.word_shape(layout, 64, 128), "i4")
    scales = rng.standard_normal(grid.scale_shape(layout, 64, 128)).astype("f4").view("u4") >> 16
    spec = TensorSpec("w.scales", "BF16", scales.shape)
    rows = packing.IntRows(words, scales.astype("u2"), layout, grid, spec, "w", 0, 64)
    order, columns = Order((Run(8, (2, 4, 4), (1, 0, 2)),)), Order((Run(0, (2, 2, 32), (1, 0, 2)),))
    values = rows.values(0, 64)
    moved = values[8:40].reshape(2, 4, 4, 128).swapaxes(0, 1).reshape(32, 128)
    crossed = moved.reshape(32, 2, 2, 32).swapaxes(1, 2).reshape(32, 128)
    for transform, wanted in ((Transform(rows=order), moved), (Transform(rows=order, columns=columns), crossed)):
        found = transform.of(rows, 128)
        assert isinstance(found, packing.IntRows)
        assert found.count == 32
        assert np.array_equal(found.values(3, 17), wanted[3:17])
        floats = transform.of(Floats(values), 128)
        assert np.array_equal(floats.values(3, 17), wanted[3:17])
        assert np.array_equal(floats.raw(3, 17)[0], wanted[3:17])
    narrow = Order((Run(0, (2, 4, 16), (1, 0, 2)),))
    assert not isinstance(Transform(columns=narrow).of(rows, 128), packing.IntRows)


def test_values_are_turned_moved_and_mapped_in_that_order() -> None:
    values = np.random.default_rng(1).standard_normal((6, 4)).astype("f4")
    transform = Transform(transposed=True, rows=Order.every(2, 1, 2), value="one more")
    found = transform.of(Floats(values), 4)
    assert np.array_equal(found.values(0, 2), values.T[1::2] + np.float32(1))
    assert found.where(1) == "row 0, column 3"
    decayed = Transform(value="minus exp").of(Floats(values), 4).values(1, 3)
    assert decayed.tolist() == (-np.exp(values[1:3].astype("f8"))).astype("f4").tolist()
    far = Transform(rows=Order((Run(0, (2, 2000), (1, 0)),)))
    many = np.arange(4000, dtype="f4")[:, None]
    rows = far.of(Floats(many), 1)
    assert rows.values(0, 4).ravel().tolist() == [0, 2000, 1, 2001]
    assert rows.cut(Cut(2, 2)).values(0, 2).ravel().tolist() == [1, 2001]


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("family", picked(sorted(OVER), 5))
def test_tensors_and_keys_are_those_of_the_converter(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    root = checkpoint(family, tmp_path)
    view, architecture = viewed(root)
    tensors = values_of(root, architecture.tensors(view.checkpoint.tensors))
    keys = keys_of(root)
    others = (*MORE.get(family, ()), *OTHER.get(family, ()))
    assert (digest_of_tensors(tensors), digest_of_keys(keys, others)) == MADE[family]
    for key in MORE.get(family, ()):
        assert [value for name, (value, _) in keys.items() if name.endswith(key)] in ([2], [True])


@pytest.mark.oracle
@pytest.mark.parametrize("family", picked(sorted(OVER), 6))
def test_llama_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Every tensor is where llama.cpp looks for it, and means what it means there."""
    root = checkpoint(family, tmp_path)
    assert divergence(logits_of(family, root), root) <= (1e-8 if family == "gemma4_text" else 1e-10)


IDS = [1 + at * 37 % 249 for at in range(24)]


def logits_of(family: str, root: Path) -> Any:
    """What transformers computes, as log-probabilities."""
    torch = pytest.importorskip("torch")
    import any_moe

    model, _ = any_moe.load(root, torch.float32)
    if family == "gemma4_text":
        look_gelu_up(torch, model)
    with torch.no_grad():
        return torch.log_softmax(model.eval()(torch.tensor([IDS])).logits[0].double(), -1)


def divergence(wanted: Any, root: Path) -> float:
    """Mean KL divergence of llama.cpp from transformers, of a checkpoint whose values it is given in float32.

    Most is rounding of float32, in transformers' own computation: of a delta net whose heads have 16 channels it is
    2e-10 and 1e-9 (qwen3_5_moe, qwen3_next, the worst position) from its own in float64, llama.cpp is 1e-10 and 2e-10
    from that. Of gemma4, values next to the edge of two entries of the table fall into the other one.
    """
    torch = pytest.importorskip("torch")
    from gguf import GGUFValueType, GGUFWriter
    from llama import Llama

    view, architecture = viewed(root)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    path = root.parent / "out.gguf"
    writer = GGUFWriter(path, architecture.name)
    for key in metadata_of(architecture, tensors, root, name="x", file_type=0, pre_tokenizer="gpt-2")[1:]:
        writer.add_key_value(key.name, key.value, GGUFValueType[key.type], GGUFValueType[key.of] if key.of else None)
    for name, values in values_of(root, tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Llama(path) as llama:
        found = torch.log_softmax(torch.from_numpy(llama.logits(IDS)).double(), -1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


BY_DAY = (
    ("qwen3_moe", "rotated: yarn and its magnitude"),
    ("deepseek_v3", "rotated: yarn"),
    ("glm4_moe", "missing: norm_topk_prob"),
)


@pytest.mark.oracle
@pytest.mark.parametrize(("family", "kind"), changes([name for name in sorted(OVER) if name != "kimi_k2"], BY_DAY))
def test_a_config_that_is_changed_is_run_as_it_is_meant_or_refused(family: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    over, told, without = changed(family, kind, OVER[family])
    with taken():
        root = edited(checkpoint(family, tmp_path, **over), told, without)
        wanted = logits_of(family, root)
    try:
        found = divergence(wanted, root)
    except SchemeError as e:
        assert "config.json" in str(e) or "llama.cpp" in str(e)  # noqa: PT017
    else:
        assert found <= (1e-7 if family == "gemma4_text" else 1e-8)


def look_gelu_up(torch: Any, model: Any) -> None:
    """Compute GELU as llama.cpp does on the CPU, from a table of float16, which alone is a divergence of 1e-6."""

    class Table(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            value = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, 0, torch.where(x >= 10, x, value))

    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Table()


# -- the example -------------------------------------------------------------------------------------------------------


def test_the_example_is_known_whole() -> None:
    view, architecture = viewed(EXAMPLE)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    assert len(tensors) == 76
    named = {each.name: each for each in tensors}
    down = named["blk.1.ffn_down_exps.weight"]
    assert down.shape[0] == len(down.pieces) == architecture.layout.num_experts
    assert down.pieces[3].matrix == "model.layers.1.mlp.experts.3.down_proj"
    assert (down.wide, named["blk.0.ffn_gate_inp.weight"].wide, named["blk.0.ssm_conv1d.weight"].wide) == (
        False,
        True,
        True,
    )
    keys = {key.name: key for key in metadata_of(architecture, tensors, EXAMPLE, name="Small", file_type=1)}
    tokens = json.loads((EXAMPLE / "tokenizer.json").read_text())["model"]
    assert keys["tokenizer.ggml.pre"].value == "qwen35"
    assert keys["tokenizer.ggml.tokens"].value[: len(tokens["vocab"])] == sorted(
        tokens["vocab"], key=tokens["vocab"].get
    )
    assert keys["tokenizer.ggml.merges"].value == [" ".join(pair) for pair in tokens["merges"]]
    assert (keys["general.name"].value, keys["general.file_type"].value) == ("Small", 1)
    assert keys["qwen35moe.expert_count"] == Key("qwen35moe.expert_count", "UINT32", architecture.layout.num_experts)


def refused(root: Path, **changes: Any) -> str:
    """What is said of a checkpoint like the example whose config has other values."""
    view, architecture = viewed(EXAMPLE)
    text = {**architecture.layout.text, **changes}
    text = {key: value for key, value in text.items() if value is not ...}
    changed = Architecture(architecture.kind, replace(architecture.layout, text=text))
    with pytest.raises(SchemeError) as caught:
        metadata_of(changed, list(architecture.tensors(view.checkpoint.tensors)), root, name="x", file_type=0)
    return str(caught.value)


def test_what_llama_would_run_in_another_way_is_refused() -> None:
    assert "hidden_act is 'gelu', which llama.cpp would run as 'silu'" in refused(EXAMPLE, hidden_act="gelu")
    assert "norm_topk_prob is False" in refused(EXAMPLE, norm_topk_prob=False)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4}
    assert "rope_type 'dynamic'" in refused(EXAMPLE, rope_parameters=rope, rope_theta=...)
    assert "factor is missing" in refused(EXAMPLE, rope_parameters={**rope, "rope_type": "yarn"}, rope_theta=...)
    assert "rope_theta is missing" in refused(EXAMPLE, rope_parameters={}, rope_theta=...)
    assert "mrope_section is [99, 0, 0, 0]" in refused(
        EXAMPLE, rope_parameters={**rope, "rope_type": None, "mrope_section": [99]}
    )
    assert (
        refused(EXAMPLE, linear_conv_kernel_dim=None)
        == "config.json: linear_conv_kernel_dim is None; GGUF needs a count"
    )
    assert "cannot be qwen35moe.embedding_length, a UINT32" in refused(EXAMPLE, hidden_size="64")
    assert "rms_norm_eps" in refused(EXAMPLE, rms_norm_eps=...)
    assert "rms_norm_eps is 0.01" in refused(EXAMPLE, rms_norm_eps=0.01)
    assert "attention_bias is True" in refused(EXAMPLE, attention_bias=True)
    both = {"rope_parameters": rope, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert "rope_parameters and rope_scaling differ" in refused(EXAMPLE, **both)
    odd = {**rope, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    assert "extrapolation_factor is 0.5" in refused(EXAMPLE, rope_parameters={**odd, "extrapolation_factor": 0.5})
    assert "mscale is '1'; expected a number" in refused(
        EXAMPLE, rope_parameters={**odd, "mscale": "1", "mscale_all_dim": 1}
    )


def test_what_is_multiplied_by_is_told_where_llama_does_not_find_it_out() -> None:
    """As 0.1 log(factor) + 1, which it does."""
    view, architecture = viewed(EXAMPLE)
    text, found = architecture.layout.text, []
    yarn = {**ROTATED, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mrope_section": [1]}
    for more in ({}, {"attention_factor": 1.5}, {"mscale": 0.7}, {"mscale": 0.5, "mscale_all_dim": 1.0}):
        changed = replace(architecture.layout, text={**text, "rope_parameters": {**yarn, **more}})
        tensors = list(architecture.tensors(view.checkpoint.tensors))
        keys = metadata_of(Architecture(architecture.kind, changed), tensors, EXAMPLE, name="x", file_type=0)
        told = {key.name: key.value for key in keys}
        assert told["qwen35moe.rope.scaling.type"] == "yarn"
        found.append(told.get("qwen35moe.rope.scaling.attn_factor"))
    usual, half = 1.1386294361, 1.0693147181
    assert found == [None, pytest.approx(1.5 / usual, 1e-6), None, pytest.approx(half / usual / usual, 1e-6)]


def test_no_release_says_what_is_refused() -> None:
    """Of every config of a release, llama.cpp and mlx-lm run what it says."""
    gguf, seen = pytest.importorskip("gguf"), set()
    for path in sorted((Path(__file__).parent / "releases").glob("*.json")):
        layout = layout_of(json.loads(path.read_text()), [])
        if layout.family.name in KINDS:
            architecture = architecture_of(layout)
            architecture.kind.check(architecture)
            architecture.kind.keys(architecture, Recorder(architecture.name, gguf))
            seen.add(layout.family.name)
        if layout.family.name in NAMES_OF_MLX:
            refuse_misread(layout)
            seen.add(layout.family.name)
    assert seen == KINDS.keys() | NAMES_OF_MLX.keys()


@pytest.mark.parametrize("width", [16, 96, 192])
def test_widths_of_an_indexer_at_which_llama_aborts_are_refused(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, architecture = viewed(EXAMPLE)
    layout = replace(architecture.layout, text={**architecture.config, "index_head_dim": width})
    monkeypatch.setattr(latent_attention, "_latent_check", lambda _: None)
    with pytest.raises(SchemeError, match=f"index_head_dim is {width}; llama.cpp runs powers of two from 64 on"):
        KINDS["deepseek_v32"].check(Architecture(KINDS["deepseek_v32"], layout))


def test_a_tensor_that_is_missing_or_unknown_is_refused() -> None:
    view, architecture = viewed(EXAMPLE)
    tensors = dict(view.checkpoint.tensors)
    norm = tensors.pop("model.norm.weight")
    with pytest.raises(SchemeError, match=r"tensor 'model.norm.weight' is missing"):
        list(architecture.tensors(tensors))
    tensors |= {"model.norm.weight": norm, "model.other.weight": norm.renamed("model.other.weight")}
    with pytest.raises(SchemeError, match=r"tensor 'model.other.weight': unknown to family qwen3_5_moe"):
        list(architecture.tensors(tensors))


def test_a_family_that_is_not_written_is_refused_with_those_that_are() -> None:
    layout = viewed(EXAMPLE)[1].layout
    with pytest.raises(
        SchemeError, match=f"family olmoe is not written as GGUF; those that are: {', '.join(sorted(KINDS))}"
    ):
        architecture_of(replace(layout, family=replace(layout.family, name="olmoe")))


# -- tokenizers --------------------------------------------------------------------------------------------------------


def tokenizer_keys(tmp_path: Path, change: Any, pre_tokenizer: str = "") -> dict[str, Any]:
    """Keys of the example's tokenizer after a change of its file."""
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text())
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    view, architecture = viewed(EXAMPLE)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    found = metadata_of(architecture, tensors, tmp_path, name="x", file_type=0, pre_tokenizer=pre_tokenizer)
    return {key.name.removeprefix("tokenizer.ggml."): key.value for key in found}


QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(tokenizer: dict[str, Any], pattern: str) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: split_by(t, QWEN_2), "qwen2"),
        (lambda t: split_by(t, QWEN_2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "smaug-bpe"),
        (
            lambda t: t.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
            "gpt-2",
        ),
        (lambda t: (split_by(t, QWEN_2), t.update(normalizer={"type": "NFC"})), "qwen2"),
        (lambda t: (split_by(t, QWEN_2), t.update(normalizer={"type": "Sequence", "normalizers": []})), "qwen2"),
    ],
)
def test_pre_tokenizers_are_told_by_their_patterns(change: Any, name: str, tmp_path: Path) -> None:
    assert tokenizer_keys(tmp_path, change)["pre"] == name


@pytest.mark.parametrize(
    "change",
    [
        lambda t: split_by(t, r"\p{L}+"),
        lambda t: t["model"].update(ignore_merges=True),
        lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}),
        lambda t: t["model"].update(end_of_word_suffix="</w>"),
    ],
)
def test_another_pre_tokenizer_is_refused_unless_it_is_named(change: Any, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="name its pre-tokenizer that does with `pre_tokenizer`"):
        tokenizer_keys(tmp_path, change)
    assert tokenizer_keys(tmp_path, change, "kimi-k2")["pre"] == "kimi-k2"
    with pytest.raises(SchemeError, match=r"`pre_tokenizer` mine: unknown to llama.cpp; expected one of a\.x-4\.0, "):
        tokenizer_keys(tmp_path, change, "mine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "expected a model of type BPE, found 'WordPiece'"),
        (lambda t: t["model"].update(byte_fallback=True), "expected a BPE of bytes"),
        (lambda t: t["model"].update(merges=[]), "no merges"),
        (
            lambda t: t["model"]["vocab"].update(more=10**6),
            "token 'more' has id 1000000, but config.json: vocab_size",
        ),
        (lambda t: t["added_tokens"].append({"id": 7000}), "expected an id and a content"),
        (
            lambda t: t["added_tokens"].append({"id": 10**5, "content": "<x>"}),
            "'<x>' has id 100000, but is loaded",
        ),
    ],
)
def test_malformed_tokenizers_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=said):
        tokenizer_keys(tmp_path, change)


def test_the_table_of_digests_is_of_names_that_llama_knows() -> None:
    assert set(BY_DIGEST.values()) <= NAMES
    assert len(BY_DIGEST) == 89
    assert hashlib.sha256(CHECKED_TEXT.encode()).hexdigest()[:16] == "a36179c1e2b1cfcf"


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value > 0x7F else bytes([value])


def field(number: int, wire: int, data: bytes) -> bytes:
    return varint(number << 3 | wire) + (varint(len(data)) if wire == 2 else b"") + data


def piece(text: str, score: float, kind: int = 1) -> bytes:
    data = field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score))
    return field(1, 2, data + (field(3, 0, varint(kind)) if kind != 1 else b""))


PIECES = (
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("<0x00>", 0.0, 6),
    ("▁a", -1.0, 1),
    ("<sep>", 0.0, 4),
    ("x" * 200, -2.5, 1),
)


def test_a_sentencepiece_model_is_its_pieces() -> None:
    data = b"".join(piece(*each) for each in PIECES) + field(2, 2, field(3, 0, varint(5)) + field(9, 1, b"8 bytes."))
    assert list(pieces_of(data)) == [SentencePiece(*each) for each in PIECES]
    for cut in (1, 5, len(data) - 1):
        with pytest.raises(MalformedModel):
            list(pieces_of(data[:cut]))
    for bad in (
        field(1, 0, varint(1)),
        field(1, 2, field(1, 2, b"\xff")),
        field(1, 2, field(2, 1, b"8 bytes.")),
        b"\x0b",
    ):
        with pytest.raises(MalformedModel):
            list(pieces_of(bad))


@pytest.mark.oracle
def test_tokens_of_characters_have_the_scores_of_their_merges(tmp_path: Path) -> None:
    """A SentencePiece model decides; without one the merges do, in whose order they are to be merged."""
    pytest.importorskip("transformers")
    root = checkpoint("mixtral", tmp_path)
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(of_characters(tokenizer)))
    keys = {name.removeprefix("tokenizer.ggml."): value for name, (value, _) in keys_of(root, "").items()}
    at = keys["tokens"].index("ab")
    assert (keys["model"], keys["pre"], len(keys["tokens"])) == ("llama", "default", VOCAB)
    assert (keys["scores"][at], keys["scores"][at - 1], keys["token_type"][at]) == (0.0, -1000.0, 1)
    assert (keys["token_type"][1], keys["token_type"][4], keys["token_type"][-1]) == (3, 6, 4)
    (root / "tokenizer.model").write_bytes(b"".join(piece(*each) for each in PIECES))
    decoder = {"4": {"content": "<sep>", "special": False}, "7": {"content": "▁b", "special": False}}
    (root / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "add_prefix_space": True}))
    (root / "added_tokens.json").write_text('{"<more>": 6}')
    keys = {name.removeprefix("tokenizer.ggml."): value for name, (value, _) in keys_of(root, "").items()}
    assert keys["tokens"][:9] == ["<unk>", "<s>", "<0x00>", "▁a", "<sep>", "x" * 200, "<more>", " b", "[PAD8]"]
    assert keys["scores"][:9] == [0.0, 0.0, 0.0, -1.0, -1000.0, -2.5, -1000.0, -1000.0, -10000.0]
    assert keys["token_type"][:9] == [2, 3, 6, 1, 4, 1, 4, 4, 5]
    assert keys["add_space_prefix"] is True
