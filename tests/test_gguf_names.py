"""What llama.cpp calls things, and what is refused: of the example and of releases, and tokenizers of all kinds."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_families import ROTATED, VOCAB, checkpoint, keys_of, of_characters, viewed

from shardxform.base.tensors import TensorSpec
from shardxform.errors import SchemeError
from shardxform.formats import packing
from shardxform.formats.encoding import Cut
from shardxform.formats.scheme import Grid
from shardxform.model.layout import layout_of
from shardxform.runtimes.gguf import latent_attention
from shardxform.runtimes.gguf.architecture import Architecture
from shardxform.runtimes.gguf.architectures import KINDS, architecture_of
from shardxform.runtimes.gguf.keys import Key, Recorder
from shardxform.runtimes.gguf.metadata import metadata_of
from shardxform.runtimes.gguf.pieces import MalformedModel, SentencePiece, pieces_of
from shardxform.runtimes.gguf.pretokenizers import BY_DIGEST, CHECKED_TEXT, NAMES
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.mlx_families import NAMES as NAMES_OF_MLX
from shardxform.runtimes.mlx_families import refuse_misread

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "small-moe"

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
        layout = layout_of({"max_position_embeddings": 4096, **json.loads(path.read_text())}, [])  # some are not whole
        if layout.family.name in KINDS:
            architecture = architecture_of(layout)
            architecture.kind.check(architecture)
            architecture.kind.keys(architecture, Recorder(architecture.name, gguf))
            seen.add(layout.family.name)
        if layout.family.name in NAMES_OF_MLX:
            refuse_misread(layout)
            seen.add(layout.family.name)
    unreleased = {"granitemoeshared", "mistral4", "qwen3_omni_moe"}
    assert seen == (KINDS.keys() | NAMES_OF_MLX.keys()) - unreleased


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no groups": ("GLM-4.5", {"topk_group": 0}, "topk_group is 0 of 1 groups"),
    "groups of which none is said": ("DeepSeek-V3", {"topk_group": None}, "topk_group is None of 8 groups"),
    "groups of one expert": ("DeepSeek-V3", {"n_group": 256, "topk_group": 8}, "256 experts in 256 groups"),
    "a scale of 0": ("Laguna-XS.2", {"moe_routed_scaling_factor": 0}, "moe_routed_scaling_factor is 0; llama.cpp"),
    "another scale of 0": ("DeepSeek-V3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0; llama.cpp"),
    "logits of 0": ("North-Mini-Code-1.0", {"logit_scale": 0.0}, "logit_scale is 0.0; llama.cpp"),
    "values of 0": ("MiMo-V2-Flash", {"attention_value_scale": 0.0}, "attention_value_scale is 0.0"),
    "nothing added in norms": ("North-Mini-Code-1.0", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    "no shared expert": ("Trinity-Nano-Preview", {"num_shared_experts": 0}, "num_shared_experts is 0"),
    "groups that nobody has": ("Trinity-Nano-Preview", {"n_group": 2}, "n_group is 2"),
    "half a pair": (
        "MiMo-V2-Flash",
        {"head_dim": 64, "swa_head_dim": 64},
        "21 of the 64 channels of a head are rotated",
    ),
    "bases that are passed over": ("MiMo-V2-Flash", {"rope_theta": 10000}, "for which transformers takes 5000000.0"),
    "queries in one step": ("DeepSeek-V3", {"num_hidden_layers": 27}, "q_lora_rank is 1536, of 27 layers"),
    "queries in two": ("DeepSeek-V2-Lite", {"num_hidden_layers": 28}, "q_lora_rank is None, of 28 layers"),
    "queries of an indexer": ("GLM-5", {"num_hidden_layers": 27, "q_lora_rank": None}, "q_lora_rank is None"),
    "long steps": ("Nemotron-3-Nano-30B-A3B", {"time_step_min": 0.01}, "time_step_min is 0.01"),
    "long steps by another name": ("Nemotron-3-Nano-30B-A3B", {"mamba_dt_min": 0.5}, "time_step_min is 0.5"),
    "scores as they are": ("Kimi-Linear-48B-A3B", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    "convolutions alone": (
        "LFM2-8B-A1B",
        {"layer_types": ["conv"] * 24},
        "llama.cpp's lfm2moe runs models that have both",
    ),
    "attention alone": ("Qwen3-Next-80B-A3B", {"layer_types": ["full_attention"] * 48}, "all of one kind"),
    "no window": ("MiMo-V2-Flash", {"hybrid_layer_pattern": [0] * 48}, "no layer attends to a window"),
    "no length": ("Jamba-1.5-Mini", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
    "shared ones unsaid": ("ERNIE-4.5-21B-A3B", {"moe_num_shared_experts": ...}, "moe_num_shared_experts is missing"),
}
"""Releases, keys that are changed or left out, and what is said of them."""


def stated(release: str, **changes: Any) -> Architecture:
    """A release as llama.cpp sees it, by its config alone, after its keys were recorded."""
    config = json.loads((Path(__file__).parent / "releases" / f"{release}.json").read_text())
    config = {"max_position_embeddings": 4096, **config, **changes}  # of some it is not known
    config = {key: value for key, value in config.items() if value is not ...}
    architecture = architecture_of(layout_of(config, []))
    architecture.kind.check(architecture)
    architecture.kind.keys(architecture, Recorder(architecture.name, pytest.importorskip("gguf")))
    return architecture


@pytest.mark.parametrize("case", REFUSED)
def test_a_release_that_says_what_llama_has_no_key_for_is_refused(case: str) -> None:
    release, changes, said = REFUSED[case]
    with pytest.raises(SchemeError, match=said):
        stated(release, **changes)


def test_queries_in_one_step_are_run_where_llama_knows_of_them() -> None:
    """As of Kanana-2, by its layers and tokens."""
    stated("DeepSeek-V3", num_hidden_layers=48, vocab_size=128256, q_lora_rank=None, n_group=1, topk_group=1)


def test_steps_that_transformers_bounds_are_told() -> None:
    notes = [*stated("Nemotron-3-Nano-30B-A3B").kind.notes(stated("Nemotron-3-Nano-30B-A3B"))]
    assert len(notes) == 1
    assert "below time_step_min for it, 0.001" in notes[0]
    unbound = stated("Nemotron-3-Nano-30B-A3B", time_step_min=0.0)
    assert not [*unbound.kind.notes(unbound)]


def test_tensors_of_other_shapes_than_the_config_gives_are_refused() -> None:
    """As where it leaves out what transformers' class has a number of its own for."""
    view, architecture = viewed(EXAMPLE)
    for key, value in (("head_dim", 8), ("shared_expert_intermediate_size", 16)):
        layout = replace(architecture.layout, text={**architecture.layout.text, key: value})
        with pytest.raises(SchemeError, match=r"by config.json it would be .*; llama.cpp loads no such file"):
            list(Architecture(architecture.kind, layout).tensors(view.checkpoint.tensors))


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
        SchemeError, match=f"family phimoe is not written as GGUF; those that are: {', '.join(sorted(KINDS))}"
    ):
        architecture_of(replace(layout, family=replace(layout.family, name="phimoe")))


# -- tokenizers --------------------------------------------------------------------------------------------------------


def tokenizer_keys(tmp_path: Path, change: Any, pre_tokenizer: str = "", **kind: Any) -> dict[str, Any]:
    """Keys of the example's tokenizer after a change of its file; `kind` is what is another of its architecture."""
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text())
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return keys_from(tmp_path, pre_tokenizer, **kind)


def keys_from(root: Path, pre_tokenizer: str = "", **kind: Any) -> dict[str, Any]:
    """Keys of the example with the tokenizer of a folder."""
    view, architecture = viewed(EXAMPLE)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    changed = replace(architecture, kind=replace(architecture.kind, **kind))
    found = metadata_of(changed, tensors, root, name="x", file_type=0, pre_tokenizer=pre_tokenizer)
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


def test_what_ends_turns_is_a_control_token_and_the_template_is_that_of_its_file(tmp_path: Path) -> None:
    """As of Laguna, whose tokenizer says neither: where its template is to be, there is the name of a file."""

    def change(tokenizer: dict[str, Any]) -> None:
        first = tokenizer["added_tokens"][0]
        tokenizer["added_tokens"].append({**first, "id": 1, "content": "!", "special": False})

    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% include \'chat_template.jinja\' %}"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    plain = tokenizer_keys(tmp_path, change)
    assert (plain["token_type"][1], plain["tokenizer.chat_template"]) == (4, "{{ messages }}")
    ended = tokenizer_keys(tmp_path, change, specials={"eot": "!"})
    assert (ended["token_type"][1], ended["eot_token_id"]) == (3, 1)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SchemeError, match="malformed"):
        tokenizer_keys(tmp_path, change)


def test_a_tokenizer_in_another_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="put the release's there"):
        keys_from(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"IQ== 0")
    with pytest.raises(SchemeError, match="other files of tokenizers are not read here"):
        keys_from(tmp_path)


PREPENDED = {"type": "Prepend", "prepend": "▁"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@pytest.mark.parametrize(
    ("normalizer", "split", "begins"),
    [
        ({"type": "Sequence", "normalizers": [PREPENDED, SPACES]}, None, True),
        (SPACES, None, False),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
        ({"type": "Lowercase"}, None, "'Lowercase'"),
        ({**SPACES, "content": "_"}, None, "'Replace'"),
    ],
)
def test_a_space_is_put_before_texts_where_the_tokenizer_does(
    normalizer: Any, split: Any, begins: Any, tmp_path: Path
) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer.update(of_characters(tokenizer), normalizer=normalizer, pre_tokenizer=split)

    if isinstance(begins, bool):
        assert tokenizer_keys(tmp_path, change, tokenizer="llama")["add_space_prefix"] is begins
        return
    with pytest.raises(SchemeError, match=begins):
        tokenizer_keys(tmp_path, change, tokenizer="llama")


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
