"""What `verify` calls sound loads as it should, and what it would not call sound is not written: one opinion of all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, names_of, random_scales, random_tensor, tiny, write_checkpoint
from click.testing import CliRunner
from strategies import picked

from shardxform.ask.manifest import Manifest
from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import PlanError, SchemeError
from shardxform.execution.runner import run
from shardxform.formats.scheme import Format, Grid, Scheme
from shardxform.model.layout import layout_of
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification import verify
from shardxform.verification.findings import Findings
from shardxform.verification.structure import check_structure, firsts_planned, refuse_unsound

FILES = {"tokenizer.json": "{}\n", "preprocessor_config.json": "{}\n"}
Config = dict[str, Any]
Tensors = dict[str, Raw]
WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 32}


def write(root: Path, config: Config, tensors: Tensors) -> Path:
    return write_checkpoint(root, tensors, config, files=FILES)


def codes(root: Path, **options: Any) -> tuple[list[str], list[str]]:
    """Codes of problems, and of warnings."""
    report = verify(root, **options)
    return [p.code for p in report.problems], [p.code for p in report.warnings]


# -- FP8 as released --------------------------------------------------------------------------------------------------

BLOCK = (8, 4)


def fp8(kind: str = "deepseek_v3", block: tuple[int, int] | None = BLOCK, **declared: Any) -> tuple[Config, Tensors]:
    """A checkpoint as the release of DeepSeek-V3 is: all linear layers of blocks in FP8, with scales in blocks."""
    config, tensors = tiny(kind)
    for name in [n for n in tensors if n.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in n]:
        rows, columns = tensors[name].shape
        tensors[name] = Raw("F8_E4M3", (rows, columns), bytes([0x38]) * (rows * columns))
        shape = (math.ceil(rows / block[0]), math.ceil(columns / block[1])) if block else ()
        tensors[f"{name}_scale_inv"] = random_scales(name, "F32", shape)
    size = {"weight_block_size": list(block)} if block else {}
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", **size, **declared}
    return config, tensors


NAME = "model.layers.1.self_attn.kv_b_proj.weight"  # 30 rows of 10 columns: partial blocks both ways


@pytest.mark.parametrize("block", [BLOCK, (128, 128), (1, 3), None])
@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_fp8_with_its_scales_is_sound_and_so_is_what_is_pruned_of_it(
    kind: str, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    config, tensors = fp8(kind, block)
    source = write(tmp_path / "source", config, tensors)
    assert codes(source) == ([], [])
    layout = layout_of(config, tensors)
    keep = Manifest(keep=dict.fromkeys(layout.moe_layers, (0, 1, 4, 5)))
    run(plan_prune(Checkpoint.open(source), keep), tmp_path / "out")
    assert codes(tmp_path / "out", source=source) == ([], [])


@pytest.mark.parametrize("last", ["F32", "BF16", "F16"])
def test_scales_may_be_of_every_type_that_releases_have(last: str, tmp_path: Path) -> None:
    config, tensors = fp8()
    for name in names_of(tensors, "_scale_inv"):
        tensors[name] = random_scales(name, last, tensors[name].shape)
    assert codes(write(tmp_path / "out", config, tensors)) == ([], [])


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: random_tensor(name, dtype, shape)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(f"{NAME}_scale_inv"), "missing: its weight is F8_E4M3"),
        (without("model.layers.2.mlp.experts.3.up_proj.weight_scale_inv"), "missing: its weight is F8_E4M3"),
        (replaced(f"{NAME}_scale_inv", "F32", (3, 3)), "shape [3, 3], expected [4, 3] for a weight [30, 10] in blocks"),
        (replaced(f"{NAME}_scale_inv", "F32", (3, 4)), "shape [3, 4], expected [4, 3]"),
        (replaced(f"{NAME}_scale_inv", "F32", (1,)), "shape [1], expected [4, 3]"),
        (replaced(f"{NAME}_scale_inv", "I32", (4, 3)), "I32, expected BF16 or F16 or F32"),
        (replaced(f"{NAME}_scale_inv", "F8_E8M0", (4, 3)), "F8_E8M0, expected BF16 or F16 or F32"),
        (replaced("model.layers.0.self_attn.o_proj.weight", "BF16", (16, 14)), "a scale beside a weight that is BF16"),
        (lambda t: t.update({f"{NAME}_scale": t.pop(f"{NAME}_scale_inv")}), "clients do not read weight_scale"),
    ],
)
def test_a_scale_that_is_missing_or_misshapen_is_found(
    change: Callable[[Tensors], object], said: str, tmp_path: Path
) -> None:
    config, tensors = fp8()
    change(tensors)
    report = verify(write(tmp_path / "out", config, tensors), quick=True)
    scales = [p for p in report.problems if p.code == "scale"]
    assert len(scales) == 1, report.problems
    assert said in scales[0].message
    assert {p.code for p in report.problems} <= {"scale", "not-quantized", "merged"}


def test_powers_of_two_are_scales_where_the_config_says_so(tmp_path: Path) -> None:
    config, tensors = fp8(scale_fmt="ue8m0")
    replaced(f"{NAME}_scale_inv", "F8_E8M0", (4, 3))(tensors)
    assert codes(write(tmp_path / "out", config, tensors), quick=True) == ([], [])


@pytest.mark.parametrize("block", [0, [128], ["128", 128], [0, 128], "128"])
def test_blocks_that_are_none_are_reported(block: object, tmp_path: Path) -> None:
    config, tensors = fp8(weight_block_size=block)
    assert codes(write(tmp_path / "out", config, tensors), quick=True)[0] == ["quantization-config"]


@pytest.mark.parametrize(("strategy", "shape"), [("channel", (30, 1)), ("tensor", (1,))])
def test_fp8_of_compressed_tensors_has_a_scale_a_row_or_one(
    strategy: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    config, tensors = fp8("qwen3_moe")
    for name in names_of(tensors, "_scale_inv"):
        rows = tensors[name.removesuffix("_scale_inv")].shape[0]
        tensors[name.removesuffix("_inv")] = random_tensor(name, "F32", (rows, 1) if len(shape) == 2 else (1,))
        del tensors[name]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    root = write(tmp_path / "sound", config, tensors)
    assert codes(root, quick=True)[0] == []
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    tensors[name] = random_tensor(name, "F32", (31, 1))
    assert codes(write(tmp_path / "out", config, tensors), quick=True)[0] == ["scale"]


# -- what the config declares -----------------------------------------------------------------------------------------


def quantized(root: Path, form: Format, kind: str = "qwen3_5_moe", **over: Any) -> Path:
    """An output of `quantize`, without its record."""
    config, tensors = tiny(kind, **WIDE, **over)
    source = write(root / "source", config, tensors)
    scheme = Scheme(grid=Grid(group_size=32, scale_grid="bf16"), format=form)
    run(plan_quantize(Checkpoint.open(source), scheme, None, ViewOptions()), root / form)
    (root / form / "shardxform.json").unlink()
    return root / form


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One multimodal output of every format; never changed."""
    root = tmp_path_factory.mktemp("declared")
    forms: tuple[Format, ...] = ("auto-round", "compressed-tensors", "gptq")
    return {form: quantized(root / form, form) for form in forms}


def targets(*names: str) -> Callable[[Config], object]:
    return lambda q: q["config_groups"]["group_0"].update(targets=list(names))


def ignoring(*names: str) -> Callable[[Config], object]:
    return lambda q: q.update(ignore=list(names))


def removed(key: str, *parts: str) -> Callable[[Config], object]:
    """Leave entries out whose text has one of `parts`."""

    def change(q: Config) -> None:
        left = [name for name in q[key] if not any(part in name for part in parts)]
        q[key] = {name: q[key][name] for name in left} if isinstance(q[key], dict) else left

    return change


WIDE_ENTRY = {"bits": 16, "data_type": "float"}
CHANGES: list[tuple[str, Callable[[Config], object], set[str], str]] = [
    ("compressed-tensors", targets("re:.*q_proj"), {"undeclared"}, "clients drop it"),
    ("compressed-tensors", targets("Conv2d"), {"undeclared"}, "experts"),
    ("compressed-tensors", removed("ignore", "lm_head"), {"not-quantized"}, "leave it random"),
    ("compressed-tensors", removed("ignore", "visual"), {"not-quantized"}, "declares it quantized"),
    ("compressed-tensors", removed("ignore", "mtp"), {"not-quantized"}, "(compressed-tensors)"),
    ("compressed-tensors", ignoring("re:.*"), {"undeclared"}, "16-bit (compressed-tensors)"),
    ("compressed-tensors", ignoring("lm_head", "model.language_model"), {"not-quantized"}, "linear_attn"),
    ("gptq", lambda q: q.update(lm_head=True), {"warning quantization-clients"}, "some clients do not read"),
    ("gptq", lambda q: (q.update(lm_head=True), removed("dynamic", "lm_head")(q)), {"not-quantized"}, "random"),
    ("gptq", lambda q: q.update(modules_in_block_to_quantize=[["self_attn.q_proj"]]), {"undeclared"}, "drop it"),
    ("gptq", lambda q: q["dynamic"].update({"-:.*q_proj": {}}), {"undeclared"}, "self_attn.q_proj"),
    ("gptq", removed("dynamic", "mtp"), {"not-quantized"}, "MTP layer 0"),
    ("auto-round", lambda q: q["extra_config"].update({".*k_proj": WIDE_ENTRY}), {"undeclared"}, "k_proj"),
    ("auto-round", lambda q: q["extra_config"].update({"lm_head": {"bits": 4}}), {"not-quantized"}, "lm_head"),
    ("auto-round", removed("extra_config", "in_proj_a"), {"not-quantized"}, "linear_attn.in_proj_a"),
    ("auto-round", lambda q: q.update(quant_method="awq"), {"not-quantized", "quantization-config"}, "16 bits"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_what_the_config_declares_is_held_against_what_is_stored(
    number: int, outputs: dict[str, Path], writable: Callable[[Path], Path]
) -> None:
    form, change, found, said = CHANGES[number]
    out = writable(outputs[form])
    assert codes(out, quick=True) == ([], [])
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    report = verify(out, quick=True)
    listed = {p.code for p in report.problems} | {f"warning {p.code}" for p in report.warnings}
    assert found <= listed <= found | {"warning quantization-clients"}, (report.problems, report.warnings)
    assert any(said in p.message or said in p.where for p in (*report.problems, *report.warnings))


def test_fp8_lists_that_leave_out_what_is_stored_plain_are_held_against_it(tmp_path: Path) -> None:
    config, tensors = fp8("qwen3_moe")
    plain = "model.layers.1.self_attn.o_proj"
    tensors[f"{plain}.weight"] = random_tensor("o", "BF16", tensors[f"{plain}.weight"].shape)
    del tensors[f"{plain}.weight_scale_inv"]
    report = verify(write(tmp_path / "a", config, tensors), quick=True)
    assert [(p.code, p.where) for p in report.problems] == [("not-quantized", f"{plain}.weight")]
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", plain]
    assert codes(write(tmp_path / "b", config, tensors), quick=True) == ([], [])
    config["quantization_config"]["modules_to_not_convert"] = [plain]  # transformers then converts the head, vLLM not
    assert codes(write(tmp_path / "c", config, tensors), quick=True) == ([], ["quantization-clients"])
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", plain, "model.layers.0.self_attn.q_proj"]
    assert codes(write(tmp_path / "d", config, tensors), quick=True)[0] == ["undeclared"]


# -- a tied head ------------------------------------------------------------------------------------------------------


def tied(head: str, kind: str = "qwen3_5_moe_text") -> tuple[Config, Tensors]:
    """A checkpoint with a tied head: stored as a `copy`, with `other` values, differing in `one` byte, or `none`."""
    config, tensors = tiny(kind, tie_word_embeddings=True, vocab_size=128, **WIDE)
    (name,) = names_of(tensors, "embed_tokens")
    data = bytearray(tensors[name].data)
    if head == "one":
        data[777] ^= 1
    stored = (
        random_tensor("h", "BF16", tensors[name].shape)
        if head == "other"
        else Raw("BF16", tensors[name].shape, bytes(data))
    )
    return config, tensors if head == "none" else {**tensors, "lm_head.weight": stored}


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_5_moe_text"])
@pytest.mark.parametrize(("head", "told"), [("none", False), ("copy", False), ("other", True), ("one", True)])
def test_a_tied_head_that_differs_is_said_by_plan_and_verify(head: str, told: bool, kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", *tied(head, kind))
    assert codes(source) == ([], ["tied-head"] if told else [])
    notes = plan_prune(Checkpoint.open(source), None).notes
    if head != "one":  # which a look at a few places may miss
        assert codes(source, quick=True) == codes(source)
        assert any("lm_head.weight is stored and differs" in note for note in notes) == told


def test_a_tied_head_is_run_as_transformers_runs_it(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from shardxform.forward.skeleton import Skeleton
    from shardxform.forward.weights import Precision, Weights

    for head in ("copy", "other"):
        config, tensors = tied(head)
        root = write(tmp_path / head, config, tensors)
        theirs: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        with Weights(Checkpoint.open(root), Precision(torch.device("cpu"), torch.float32)) as weights:
            ours = weights.tensor(Skeleton(weights).head_ref.name)
        assert torch.equal(ours, theirs.lm_head.weight)


@pytest.mark.parametrize("form", ["auto-round", "gptq"])
def test_a_tied_head_is_not_quantized(form: Format, tmp_path: Path) -> None:
    config, tensors = tied("copy")
    source = write(tmp_path / "source", config, tensors)
    scheme = Scheme(grid=Grid(group_size=32, scale_grid="bf16"), format=form, quantize=("lm_head",))
    with pytest.raises(SchemeError, match=r"selects lm_head, but config\.json ties it to the embeddings"):
        plan_quantize(Checkpoint.open(source), scheme)
    untied = write(tmp_path / "untied", {**config, "tie_word_embeddings": False}, tensors)
    run(plan_quantize(Checkpoint.open(untied), scheme), tmp_path / "out")
    assert codes(tmp_path / "out", quick=True) == ([], [])
    assert "lm_head.qweight" in Checkpoint.open(tmp_path / "out").tensors
    changed = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**changed, "tie_word_embeddings": True}))
    (tmp_path / "out" / "shardxform.json").unlink()
    assert codes(tmp_path / "out", quick=True)[0] == ["quantized"]


# -- one opinion ------------------------------------------------------------------------------------------------------

EXTRAS = (
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.rotary_emb.original_inv_freq",
)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe_text"])
def test_known_extras_are_copied_in_silence(kind: str, tmp_path: Path) -> None:
    config, tensors = tiny(kind)
    tensors |= {name: random_tensor(name, "F32", (4,)) for name in EXTRAS}
    source = write(tmp_path / "source", config, tensors)
    plan = plan_prune(Checkpoint.open(source), None)
    refuse_unsound(plan)
    run(plan, tmp_path / "out")
    assert plan.notes == ()
    assert codes(tmp_path / "out", source=source) == ([], [])
    assert Checkpoint.open(tmp_path / "out").tensors.keys() == tensors.keys()


def test_unknown_tensors_are_copied_reported_and_a_warning(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    for name in ("model.adapter.weight", "model.layers.0.self_attn.sinks", "model.layers.0.self_attn.k_scale"):
        tensors[name] = random_tensor(name, "BF16", (3,))
    source = write(tmp_path / "source", config, tensors)
    keep = Manifest(keep=dict.fromkeys(range(3), (0, 1, 4, 5)))
    plan = plan_prune(Checkpoint.open(source), keep)
    refuse_unsound(plan)
    run(plan, tmp_path / "out")
    assert plan.notes[0].startswith("3 tensors unknown to family qwen3_moe are copied as they are: ")
    assert codes(tmp_path / "out", source=source) == ([], ["unknown"] * 3)
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "-q"]).exit_code == 0


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.gate_up_proj_bias",
        "model.layers.1.mlp.experts.2.up_proj.weight_scale_3",
        "model.layers.1.mlp.experts.2.up_proj.bias",
        "model.layers.1.mlp.gate.bias",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.router.scale",
        "model.layers.1.mlp.moe_statics.weight",
        "model.experts_scale",
        "model.layers.1.self_attn.q_proj.weight_scale_3",
        "model.layers.1.self_attn.q_proj.weight.absmax",
        "model.layers.1.self_attn.q_proj_scale",
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_what_looks_like_a_part_of_experts_is_refused_and_unsound(name: str, pruned: bool, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    tensors[name] = random_tensor(name, "BF16", (6,))
    source = write(tmp_path / "source", config, tensors)
    keep = Manifest(keep=dict.fromkeys(range(3), (0, 1, 4, 5))) if pruned else None
    with pytest.raises(PlanError, match="unknown to family qwen3_moe, and looks "):
        plan_prune(Checkpoint.open(source), keep)
    assert "stray" in codes(source, quick=True)[0]


def drop(name: str) -> Callable[[Config, Tensors], object]:
    return lambda _, tensors: tensors.pop(name)


UNSOUND: list[tuple[str, Callable[[Config, Tensors], object], str]] = [
    ("qwen3_5_moe_text", lambda c, _: c.update(dtype="float16"), "dtype is float16"),
    ("qwen3_moe", lambda c, _: c.update(rms_norm_eps="1e-6"), "rms_norm_eps"),
    ("qwen3_moe", drop("model.norm.weight"), "missing"),
    (
        "qwen3_moe",
        lambda _, t: t.update({"model.layers.1.self_attn.q_proj.weight_scale_2": bf16(np.zeros(1))}),
        "BF16",
    ),
    ("qwen3_moe", lambda _, t: t.update({"lm_head.weight": bf16(np.zeros((47, 16)))}), "shape [47, 16]"),
    ("qwen3_moe", lambda _, t: t.update({"model.layers.7.norm.weight": bf16(np.zeros(4))}), "beyond the 3 layers"),
    (
        "qwen3_moe",
        lambda _, t: t.update({"model.layers.0.self_attn.q_proj.bias": bf16(np.zeros(32))}),
        "no such tensor",
    ),
    ("deepseek_v3", lambda c, _: c.update(topk_group=5), "topk_group is 5"),
    ("qwen3_5_moe_text", lambda _, t: t.update({"model.visual.x": bf16(np.zeros(4))}), "vision tower under"),
]


@pytest.mark.parametrize("number", range(len(UNSOUND)))
@pytest.mark.parametrize("command", ["prune", "quantize"])
def test_what_verify_will_not_call_sound_is_not_written(number: int, command: str, tmp_path: Path) -> None:
    kind, change, said = UNSOUND[number]
    config, tensors = tiny(kind, **({} if kind == "deepseek_v3" else WIDE if "5" in kind else {}))
    change(config, tensors)
    source = write(tmp_path / "source", config, tensors)
    assert not verify(source, quick=True).sound
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({str(layer): [0, 1, 4, 5] for layer in layout_of(config, tensors).moe_layers}))
    options = ["--manifest", str(keep)] if command == "prune" else ["--group-size", "-1"]
    for dry in ([], ["--dry-run"]):
        result = CliRunner().invoke(main, [command, str(source), str(tmp_path / "out"), *options, *dry, "-q"])
        assert result.exit_code == 1, result.output
        assert not (tmp_path / "out").exists()
    if "nothing to quantize" not in result.output:
        assert said in result.output


def table_of(tensors: Mapping[str, Any]) -> dict[str, TensorRef]:
    """A table of specs: no bytes."""
    return {name: TensorRef(TensorSpec(name, raw.dtype, tuple(raw.shape)), ()) for name, raw in tensors.items()}


def experts_in_fp8(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """The same with routed experts in FP8, in blocks of 16."""
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        found[name] = ref
        if ".experts." in name:
            found[name] = TensorRef(TensorSpec(name, "F8_E4M3", ref.spec.shape), ())
            blocks = tuple(-(-size // 16) for size in ref.spec.shape)
            found[f"{name}_scale_inv"] = TensorRef(TensorSpec(f"{name}_scale_inv", "F32", blocks), ())
    return found


DECLARED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("declared", [None, DECLARED, {**DECLARED, "modules_to_not_convert": ["experts.3.up_proj"]}])
def test_the_first_of_experts_that_are_alike_tells_whether_there_is_a_problem(
    kind: str, declared: dict[str, Any] | None
) -> None:
    """With any one tensor missing, of another type or shape, or of an expert beyond the last, as a look at all does."""
    config, tensors = tiny(kind, experts="per-expert")
    whole = table_of(tensors)
    if declared:
        others = [name.removesuffix(".weight") for name in whole if ".experts." not in name]
        config = {**config, "quantization_config": {**declared, "modules_to_not_convert": others}}
        config["quantization_config"]["modules_to_not_convert"] += declared.get("modules_to_not_convert", [])
        whole = experts_in_fp8(whole)
    told_apart = bool(declared and declared.get("modules_to_not_convert"))
    assert (firsts_planned(config, [ref.spec for ref in whole.values()]) is None) == told_apart
    asked_anew = 0
    for name in ["", *picked(list(whole), 8)]:
        for damage in ("missing", "dtype", "shape", "beyond") if name else ("none",):
            table = dict(whole)
            ref = table.pop(name) if name else None
            if ref and damage == "dtype":
                table[name] = TensorRef(TensorSpec(name, "I64", ref.spec.shape), ())
            elif ref and damage == "shape":
                table[name] = TensorRef(TensorSpec(name, ref.spec.dtype, (*ref.spec.shape[:-1], 48)), ())
            elif ref and damage == "beyond":
                other = re.sub(r"experts\.\d+", "experts.99", name)
                table[other] = ref.renamed(other)
            checkpoint = Checkpoint(Path("x"), config, table, ())
            first, every = Findings(), Findings()
            left = firsts_planned(config, [ref.spec for ref in table.values()])
            sampled = checkpoint if left is None else replace(checkpoint, tensors={s.name: table[s.name] for s in left})
            check_structure(sampled, frozenset(), first, sampled=left is not None)
            check_structure(checkpoint, frozenset(), every)
            assert bool(first.problems) == bool(every.problems), (name, damage, first.problems, every.problems)
            asked_anew += bool(first.problems)
    assert asked_anew > 20
