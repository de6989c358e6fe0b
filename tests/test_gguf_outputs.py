"""GGUF outputs of every verb: byte for byte those that converting the safetensors twin gives, and its values.

What the blocks stand for is worked out by the `gguf` package from the file, and from the twin by `values_of`, which
unpacks code by code; which tensor is which, and where its rows stand, is written out here once more.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from build import read_checkpoint, tiny, write_checkpoint, write_json
from click.testing import CliRunner
from faults import Counting, Crashing, forked, sampled
from gguf_families import checkpoint
from ggufs import fields_of, write_gguf
from llama import Llama
from smaller import BLOCKS, ROUTED, smaller
from strategies import ALL, picked
from test_convert import quantize, values_of
from test_prune import manifest_of
from test_quantize import KIND_SIZES
from test_run import looks_complete, tree
from texts import few

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import SchemeError
from shardxform.execution.runner import RunOptions, run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan import plan as plan_module
from shardxform.plan.convert import ConvertOptions, Target, plan_convert
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import draft_quantized, plan_quantize
from shardxform.plan.view import GgufOptions, ViewOptions
from shardxform.verification import verify

KINDS = ("qwen3_moe", "qwen3_6_moe", "qwen3_5_moe_text", "qwen3_5_moe")
GRIDS = ((4, 32), (8, 32), (4, -1), (8, -1))
GPT_OSS = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32}
PRE = GgufOptions(pre_tokenizer="qwen2")
ARRAY = gguf.GGUFValueType.ARRAY


def tokenizer(count: int) -> str:
    """tokenizer.json of a byte-level BPE: a token for each byte and one that is merged, as many as the model has."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [256 + n for n in range(256 - len(kept))]
    tokens = ["!!", *(chr(each) for each in (*kept, *others))][:count]
    model = {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}, "merges": [["!", "!"]]}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "ByteLevel"}})


def make(root: Path, kind: str = "qwen3_moe", **over: Any) -> Path:
    linear = kind.startswith("qwen3_") and kind != "qwen3_moe"
    heads = {"linear_key_head_dim": over.get("linear_value_head_dim", 32)} if linear else {}  # of one width
    config, tensors = tiny(kind, **{**KIND_SIZES.get(kind, GPT_OSS), **heads, **over})
    size = config.get("text_config", config)["vocab_size"]
    return write_checkpoint(root, tensors, config, shards=3, files={"tokenizer.json": tokenizer(size)})


def in_gguf(source: Path, bits: int = 4, group_size: int = 32, *, pruned: bool = False, **over: Any) -> Plan:
    scheme = Scheme(grid=Grid(bits=bits, group_size=group_size), format="gguf", **over)  # type: ignore[arg-type]
    options = ViewOptions(max_shard_bytes=1 << 30, gguf=PRE)
    return plan_quantize(Checkpoint.open(source), scheme, manifest_of(source) if pruned else None, options)


def to_gguf(source: Path, max_shard_bytes: int = 1 << 30) -> Plan:
    options = ConvertOptions(max_shard_bytes=max_shard_bytes, gguf=PRE)
    return plan_convert(Checkpoint.open(source), Target(format="gguf"), options)


def done(plan: Plan, out: Path, **options: Any) -> Path:
    run(plan, out, RunOptions(**options))
    return out


def values(path: Path) -> dict[str, np.ndarray]:
    """float32 values of every tensor of a file, slowest dimension first."""
    out: dict[str, np.ndarray] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        out[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    return out


# -- equal to what is converted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), picked(GRIDS, 2))
@pytest.mark.parametrize("kind", picked(KINDS, 2))
def test_quantizing_equals_converting_its_twin(kind: str, bits: int, group_size: int, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    direct = done(in_gguf(source, bits, group_size), tmp_path / "direct") / "model.gguf"
    for format_ in picked(("auto-round", "gptq", "compressed-tensors"), 3):
        twin = quantize(source, tmp_path / format_, format_, bits=bits, group_size=group_size)
        again = done(to_gguf(twin), tmp_path / f"from-{format_}") / "model.gguf"
        assert again.read_bytes() == direct.read_bytes()


def test_rows_that_take_turns_are_put_in_order_whatever_they_come_from(tmp_path: Path) -> None:
    """Halves of a stack in auto-round's format, gate and up projection apart in MLX's."""
    source = make(tmp_path / "source", "gpt_oss")
    direct = done(in_gguf(source), tmp_path / "direct") / "model.gguf"
    twin = quantize(source, tmp_path / "twin")
    apart = done(plan_convert(Checkpoint.open(twin), Target(format="mlx")), tmp_path / "apart")
    for each in (twin, apart):
        again = done(to_gguf(each), tmp_path / f"of-{each.name}") / "model.gguf"
        assert again.read_bytes() == direct.read_bytes()


@pytest.mark.parametrize("kind", picked(KINDS, 2))
def test_pruning_equals_converting_what_is_pruned(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    manifest = manifest_of(source)
    run(plan_prune(Checkpoint.open(source), manifest), tmp_path / "pruned")
    one = plan_prune(Checkpoint.open(source), manifest, ViewOptions(max_shard_bytes=1 << 30, gguf=PRE))
    two = done(to_gguf(tmp_path / "pruned"), tmp_path / "two") / "model.gguf"
    assert (done(one, tmp_path / "one") / "model.gguf").read_bytes() == two.read_bytes()
    quantized = done(in_gguf(source, pruned=True), tmp_path / "q") / "model.gguf"
    assert quantized.read_bytes() == (done(in_gguf(tmp_path / "pruned"), tmp_path / "p") / "model.gguf").read_bytes()


# -- values -----------------------------------------------------------------------------------------------------------


def test_blocks_stand_for_the_values_of_the_twin(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    found = values(done(in_gguf(source), tmp_path / "out") / "model.gguf")
    twin, plain = read_checkpoint(quantize(source, tmp_path / "twin")), read_checkpoint(source)
    experts = json.loads((source / "config.json").read_text())["num_experts"]
    for layer in range(2):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for part in ("gate", "up", "down"):
            names = [f"{prefix}mlp.experts.{e}.{part}_proj" for e in range(experts)]
            wanted = np.stack([values_of(twin, name, 4, 32) for name in names])
            np.testing.assert_array_equal(found[f"{block}ffn_{part}_exps.weight"], wanted)
        for ours, theirs in (("attn_q", "q_proj"), ("attn_output", "o_proj")):
            wanted = values_of(twin, f"{prefix}self_attn.{theirs}", 4, 32)
            np.testing.assert_array_equal(found[f"{block}{ours}.weight"], wanted)
        router = plain[f"{prefix}mlp.gate.weight"].float32()
        np.testing.assert_array_equal(found[f"{block}ffn_gate_inp.weight"], router)
    np.testing.assert_array_equal(found["token_embd.weight"], plain["model.embed_tokens.weight"].float32())


def test_value_heads_are_tiled_with_their_scales(tmp_path: Path) -> None:
    """Groups of 128 columns over heads of 64: a scale goes along with each of its blocks."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 64, "hidden_size": 128}
    source = make(tmp_path / "source", "qwen3_5_moe_text", **sizes)
    found = values(done(in_gguf(source, 4, 128, keep_16bit=("*.experts.*",)), tmp_path / "out") / "model.gguf")
    twin = read_checkpoint(quantize(source, tmp_path / "twin", group_size=128, keep_16bit=("*.experts.*",)))
    for name, tensor in values_by_layer(found, "ssm_out.weight"):
        wanted = values_of(twin, f"model.layers.{name}.linear_attn.out_proj", 4, 128)
        order = np.arange(4 * 64).reshape(2, 2, 64).swapaxes(0, 1).reshape(-1)
        np.testing.assert_array_equal(tensor, wanted[:, order])
    for name, tensor in values_by_layer(found, "attn_gate.weight"):
        wanted = values_of(twin, f"model.layers.{name}.linear_attn.in_proj_z", 4, 128)
        np.testing.assert_array_equal(tensor, wanted.reshape(2, 2, 64, -1).swapaxes(0, 1).reshape(wanted.shape))


def values_by_layer(found: dict[str, np.ndarray], ending: str) -> list[tuple[int, np.ndarray]]:
    out = [(int(name.split(".")[1]), value) for name, value in found.items() if name.endswith(ending)]
    assert out
    return out


def test_columns_that_leave_their_blocks_go_into_a_wider_type(tmp_path: Path) -> None:
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 16}
    source = make(tmp_path / "source", "qwen3_5_moe_text", **sizes)
    plan = in_gguf(source)
    assert any("stay in 16 bits: its columns leave" in note for note in plan.notes)
    direct = values(done(plan, tmp_path / "out") / "model.gguf")
    twin = quantize(source, tmp_path / "twin")
    plan = to_gguf(twin)
    assert any("ssm_out.weight becomes F16" in note for note in plan.notes)
    found = values(done(plan, tmp_path / "from") / "model.gguf")
    order = np.arange(4 * 16).reshape(2, 2, 16).swapaxes(0, 1).reshape(-1)
    for layer, tensor in values_by_layer(found, "ssm_out.weight"):
        name = f"model.layers.{layer}.linear_attn.out_proj"
        np.testing.assert_array_equal(tensor, values_of(read_checkpoint(twin), name, 4, 32)[:, order])
        plain = read_checkpoint(source)[f"{name}.weight"].float32()
        np.testing.assert_array_equal(direct[f"blk.{layer}.ssm_out.weight"], plain[:, order])


# -- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", picked(("Q4_K_M", "F16", "Q8_0", "MXFP4_MOE", "F32", "Q5_0"), 6))
def test_a_file_of_a_type_is_what_llama_quantize_makes(kind: str, tmp_path: Path) -> None:
    """Which types these are, and the blocks of each, other tests hold against its rules; here is that they are used."""
    source = make(tmp_path / "source", hidden_size=256, moe_intermediate_size=256)
    asked = replace(PRE, kind=kind)
    plan = plan_convert(Checkpoint.open(source), Target(format="gguf"), ConvertOptions(gguf=asked))
    out = done(plan, tmp_path / "out") / "model.gguf"
    found = {t.name: (t.tensor_type.name, t.data) for t in gguf.GGUFReader(out).tensors}
    plain = read_checkpoint(source)
    assert fields_of(out)["general.file_type"] == getattr(gguf.LlamaFileType, TYPE_NAMES.get(kind, f"MOSTLY_{kind}"))
    wide = {name for name, (dtype, _) in found.items() if dtype == "F32"}
    assert "blk.0.ffn_gate_inp.weight" in wide
    assert ("blk.0.ffn_up_exps.weight" in wide) == (kind == "F32")
    if kind == "Q4_K_M":
        assert {dtype for dtype, _ in found.values()} == {"F32", "Q4_K", "Q5_0", "Q6_K"}  # of rows of 128, Q5_0
        assert found["output.weight"][0] == "Q6_K"
    values_of_head = plain["lm_head.weight"].float32()
    if kind in ("Q8_0", "F16", "F32"):
        theirs = gguf.quantize(values_of_head, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(found["output.weight"][1].view(np.uint8), theirs.view(np.uint8))
    manifest = manifest_of(source)
    pruned = done(plan_prune(Checkpoint.open(source), manifest, ViewOptions(gguf=asked)), tmp_path / "p")
    run(plan_prune(Checkpoint.open(source), manifest), tmp_path / "pruned")
    again = plan_convert(Checkpoint.open(tmp_path / "pruned"), Target(format="gguf"), ConvertOptions(gguf=asked))
    assert (done(again, tmp_path / "a") / "model.gguf").read_bytes() == (pruned / "model.gguf").read_bytes()
    for each in (tmp_path / "out", pruned):
        report = verify(each, source=source)
        assert report.problems == ()
        assert report.values_compared == report.tensors


TYPE_NAMES = {"F32": "ALL_F32"}


def test_a_type_is_no_matter_of_a_scheme(tmp_path: Path) -> None:
    source = Checkpoint.open(make(tmp_path / "source"))
    with pytest.raises(SchemeError, match="give one of the two"):
        plan_quantize(source, Scheme(grid=Grid(), format="gguf"), None, ViewOptions(gguf=replace(PRE, kind="Q4_0")))


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_split_holds_the_same(tmp_path: Path) -> None:
    twin = quantize(make(tmp_path / "source"), tmp_path / "twin")
    whole = values(done(to_gguf(twin), tmp_path / "whole") / "model.gguf")
    done(to_gguf(twin, 60_000), tmp_path / "split")
    parts = sorted((tmp_path / "split").glob("model-*.gguf"))
    assert len(parts) > 2
    assert fields_of(parts[0])["split.count"] == len(parts)
    joined = {name: value for part in parts for name, value in values(part).items()}
    assert joined.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(joined[name], value)


def test_bytes_do_not_depend_on_jobs_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source", "qwen3_5_moe_text")
    one = done(in_gguf(source), tmp_path / "one", jobs=1)
    monkeypatch.setattr(plan_module, "STEP_BYTES", 10_000)
    assert tree(done(in_gguf(source), tmp_path / "two", jobs=4))["model.gguf"] == tree(one)["model.gguf"]


@pytest.mark.crash
def test_a_crash_at_any_effect_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 20_000)
    plan = in_gguf(make(tmp_path / "source"))
    counting = Counting()
    run(plan, tmp_path / "reference", RunOptions(jobs=1), fs=counting)
    reference = tree(tmp_path / "reference")
    for k in sampled(counting.effects, step=29, ends=3):
        out = tmp_path / f"out{k}"
        assert forked(functools.partial(run, plan, out, RunOptions(jobs=1), fs=Crashing(k))) == 9
        if out.exists() and looks_complete(out):
            assert {name: data for name, data in tree(out).items() if name in reference} == reference
        run(plan, out)
        assert tree(out) == reference, f"effect {k}"


def test_what_llama_cpp_does_not_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "tokenizer.json").unlink()
    with pytest.raises(SchemeError, match=r"tokenizer\.json"):
        in_gguf(source)
    assert config["model_type"] == "qwen3_moe"


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """transformers runs it, but GGUF would hold the embeddings alone."""
    source = make(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "tie_word_embeddings": True})
    for plan in (in_gguf, to_gguf):
        with pytest.raises(SchemeError, match=r"'lm_head\.weight' is not the embeddings that config\.json ties it to"):
            plan(source)


# -- tuned and healed -------------------------------------------------------------------------------------------------

SMALL = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
TEXT = ("--samples", "4", "--seqlen", "32", "--batch-size", "2", "-q")
WAYS = {
    "healed, then tuned": ["quantize", "--method", "auto-round", "--iters", "2", "--heal=moe", "--heal-iters", "2"],
    "healed": ["prune", "--heal=all", "--heal-iters", "2"],
}


@pytest.mark.oracle
@pytest.mark.parametrize("way", picked(WAYS, 2))
def test_blocks_that_are_healed_and_tuned_equal_those_of_the_twin(way: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    verb, *options = WAYS[way]
    keep = {str(layer): list(range(layer, layer + ROUTED // 2)) for layer in range(BLOCKS)}
    write_json(tmp_path / "keep.json", {"format": "shardxform.keep", "version": 1, "keep": keep})
    data = ["--data", few("heldout.jsonl"), *TEXT]
    group = ["--group-size", "32"] if verb == "quantize" else []
    call(verb, smaller(), tmp_path / "twin", "-m", tmp_path / "keep.json", *options, *group, *data)
    call(verb, smaller(), tmp_path / "direct", "-m", tmp_path / "keep.json", *options, "--format", "gguf", *data)
    call("convert", tmp_path / "twin", tmp_path / "again", "--to", "gguf")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "direct" / "model.gguf").read_bytes()


ONE_BY_ONE = ("kimi_k2", "kimi_k25", "lfm2_moe", "llama4_text", "mimo_v2_flash", "minimax_m2", "mixtral")
"""Of which auto-round's format finds no experts."""
UNCROSSED = (
    *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "gemma4_text"),
    *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared"),
    *("hunyuan_v1_moe", "hy_v3", "jamba", "laguna", "mellum", "mistral3", "nemotron_h", "olmoe", "qwen2_moe"),
    *("qwen3_moe", "qwen3_vl_moe", "solar_open", *ONE_BY_ONE),
)
"""Others, of which no weight stays wider in GGUF than in its twin, and whose windows are run whole."""


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["qwen3_next", *(UNCROSSED if ALL else ())])
def test_tuned_blocks_of_a_family_equal_those_of_the_twin(family: str, tmp_path: Path) -> None:
    """Rows of one matrix may go to several tensors, each of which must be written: of Qwen3-Next they do."""
    pytest.importorskip("torch")
    source, asked = checkpoint(family, tmp_path), ["--method", "auto-round", "--iters", "1", "--group-size", "32"]
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "0123456789" * 40}) + "\n")
    data = ["--data", tmp_path / "data.jsonl", "--scale-grid", "bf16", *TEXT]
    twin = "compressed-tensors" if family in ONE_BY_ONE else "auto-round"
    call("quantize", source, tmp_path / "twin", "--format", twin, *asked, *data)
    call("quantize", source, tmp_path / "direct", "--format", "gguf", "--pre-tokenizer", "gpt-2", *asked, *data)
    call("convert", tmp_path / "twin", tmp_path / "again", "--to", "gguf", "--pre-tokenizer", "gpt-2")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "direct" / "model.gguf").read_bytes()


@pytest.mark.oracle
def test_what_the_other_formats_leave_alone_stays_so(tmp_path: Path) -> None:
    """Gates of a few heads: their rows fill no words of integers, though they fill blocks."""
    pytest.importorskip("transformers")
    options = ViewOptions(gguf=GgufOptions(pre_tokenizer="gpt-2"))
    source, scheme = (
        Checkpoint.open(checkpoint("laguna", tmp_path)),
        Scheme(grid=Grid(bits=4, group_size=32), format="gguf"),
    )
    draft, _, selection = draft_quantized(source, scheme, None, options)
    found = {each.named.name: each.spec.dtype for each in draft.contents.written}
    assert (found["blk.0.attn_gate.weight"], found["blk.1.attn_q.weight"]) == ("BF16", "Q4_0")
    assert selection.misfits["model.layers.0.self_attn.g_proj"] == "[4, 64] is no multiple of 32"
    assert not selection.misfits.keys() - {f"model.layers.{layer}.self_attn.g_proj" for layer in range(3)}


def call(*args: object) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert not result.exit_code, result.output
    return result.output


# -- llama.cpp --------------------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen3_5_moe_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32},
}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", picked(SIZES, 2))
def test_llama_cpp_computes_what_transformers_does_of_the_twin(kind: str, tmp_path: Path) -> None:
    """Of values in float32 on both sides, since kernels for blocks round activations."""
    source = make(tmp_path / "source", kind, vocab_size=320, **SIZES[kind])
    plain = done(to_gguf(source), tmp_path / "plain") / "model.gguf"
    assert divergence(source, widened(plain, tmp_path / "wide.gguf")) < 1e-10
    direct = done(in_gguf(source), tmp_path / "direct") / "model.gguf"
    with Llama(direct) as llama:  # loads as it is
        assert np.isfinite(llama.logits([1, 2, 3])).all()
    twin = dequantized(quantize(source, tmp_path / "twin"), tmp_path / "values")
    assert divergence(twin, widened(direct, tmp_path / "wide-4.gguf")) < 1e-10


@pytest.mark.oracle
def test_llama_cpp_runs_the_small_checkpoint(tmp_path: Path) -> None:
    plan = plan_convert(Checkpoint.open(SMALL), Target(format="gguf"))
    found = done(plan, tmp_path / "plain") / "model.gguf"
    assert divergence(SMALL, widened(found, tmp_path / "wide.gguf")) < 1e-10


def dequantized(twin: Path, out: Path) -> Path:
    """A checkpoint of the values in float32 that a quantized one stands for."""
    stored, config = read_checkpoint(twin), json.loads((twin / "config.json").read_text())
    bits, group = config["quantization_config"]["bits"], config["quantization_config"]["group_size"]
    del config["quantization_config"]
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in stored.items():
        stem, _, last = name.rpartition(".")
        if last == "qweight":
            tensors[f"{stem}.weight"] = values_of(stored, stem, bits, group).astype(np.float32)
        elif last not in ("qzeros", "scales"):
            tensors[name] = tensor.float32()
    return write_checkpoint(out, tensors, {**config, "dtype": "float32"})


def widened(path: Path, out: Path) -> Path:
    """The same model with every tensor in float32."""
    keys = gguf.GGUFReader(path).fields
    metadata = {
        name: (field.types[0], field.contents())
        for name, field in keys.items()
        if not name.startswith("GGUF.") and name != "general.architecture" and field.types[0] != ARRAY
    }
    lists = {name: field.contents() for name, field in keys.items() if field.types[0] == ARRAY and field.contents()}
    write_gguf(out, {**metadata, **lists}, values(path), arch=keys["general.architecture"].contents())
    return out


def divergence(reference: Path, file: Path) -> float:
    """Mean KL divergence of llama.cpp's next tokens from those of transformers, both in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = np.random.default_rng(7).integers(0, 320, 24).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    with Llama(file) as llama:
        found = torch.from_numpy(llama.logits(ids)).double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())
