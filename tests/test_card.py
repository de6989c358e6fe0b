"""`card`: every figure is that of the files, its command makes the output again, and nobody's file is lost."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from build import read_checkpoint, text_of
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import manifest_of
from test_quantize import make
from texts import few

from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.cli.card import card_command
from shardxform.errors import ManifestError, OutputError, PlanError, ShardxformError
from shardxform.publish.card import MARK, CardOptions, gather, render, write_card
from shardxform.publish.card.facts import Data, EvaluationFacts, Origin
from shardxform.publish.card.markdown import code, fence
from shardxform.publish.card.origin import front_matter_of, origin_of
from shardxform.publish.card.rendering import front_matter

ROOT = Path(__file__).resolve().parents[1]
KEEP = ROOT / "manifests" / "small-moe-keep8.json"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
EVALUATION = {
    "perplexity": 36.2561,
    "perplexity_standard_error": 1.25,
    "dtype": "bfloat16",
    "windows": 32,
    "tokens": 8192,
    "data": {"data": "heldout.jsonl", "samples": 32, "seqlen": 256, "sha256": "ab"},
    "against": {
        "perplexity": 27.4551,
        "perplexity_ratio_standard_error": 0.0111,
        "kl": 0.262763,
        "kl_standard_error": 0.009813,
        "top1_agreement": 0.7361,
        "top1_standard_error": 0.0042,
        "dtype": "bfloat16",
        "block_errors": [0.11, 0.22, None, 0.44],
    },
}
OLD = ("perplexity", "kl", "kl_standard_error", "top1_agreement", "block_errors")  # without errors of the others
CARD = """---
language:
- en
license: other
license_name: "tongyi qianwen"
license_link: https://hub.example/Qwen/Qwen3.5-35B-A3B/blob/main/LICENSE
base_model: Qwen/Qwen3.5-35B-A3B-Base
---
# Qwen
"""


def shardxform(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def card(*args: object) -> str:
    result = CliRunner().invoke(card_command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/small-moe pruned to half and quantized; read-only."""
    out = tmp_path_factory.mktemp("card") / "small-moe-8-W4A16"
    shardxform("quantize", ROOT / "examples" / "small-moe", out, "-m", KEEP, "-q")
    return out


@pytest.fixture
def out(quantized: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(quantized, tmp_path / quantized.name))


def evaluation(
    folder: Path, value: Any = EVALUATION, name: str = "eval.json", of: Path | None = None, against: Path | None = None
) -> Path:
    """An evaluation as a file; with `of`, one of that checkpoint, and with `against`, held against that one."""
    path = folder / name
    if of:
        value = {**value, "identity": identify(Checkpoint.open(of)).described()}
    if against:
        of_reference = {"identity": identify(Checkpoint.open(against)).described()}
        value = {**value, "against": {**value["against"], **of_reference}}
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def change_record(out: Path, change: Any) -> None:
    record = json.loads((out / "shardxform.json").read_text())
    change(record)
    (out / "shardxform.json").write_text(json.dumps(record))


# -- figures ----------------------------------------------------------------------------------------------------------


def elements(root: Path) -> tuple[int, int]:
    """Parameters of a 16-bit checkpoint outside MTP and vision, and those of them in routed experts."""
    total = routed = 0
    for name, tensor in read_checkpoint(root).items():
        if name.startswith(("mtp.", "model.visual.")):
            continue
        size = 1
        for dim in tensor.shape:
            size *= dim
        total += size
        routed += size if ".experts." in name else 0
    return total, routed


def test_the_figures_are_those_of_the_files(quantized: Path, tmp_path: Path) -> None:
    source = ROOT / "examples" / "small-moe"
    shardxform("prune", source, tmp_path / "pruned", "-m", KEEP, "-q")
    facts = gather(quantized, CardOptions(manifest=KEEP))
    for root, side in ((source, "before"), (tmp_path / "pruned", "after")):
        total, routed = elements(root)
        experts = text_of(json.loads((root / "config.json").read_text()))["num_experts"]
        assert getattr(facts.experts, side) == experts
        assert getattr(facts.parameters, side) == total
        assert getattr(facts.active, side) == total - routed + routed // experts * 4
    sizes = [sum(len(tensor.data) for tensor in read_checkpoint(root).values()) for root in (source, quantized)]
    assert [facts.nbytes.before, facts.nbytes.after] == sizes
    assert facts.pruning is not None
    assert facts.quantization is not None
    assert (facts.pruning.criterion, facts.pruning.tokens, facts.pruning.data[0].name) == ("reap", 32768, "calib.jsonl")
    assert (facts.quantization.bits, facts.quantization.group_size, facts.quantization.method) == (4, 128, "rtn")


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("format_", ["auto-round", "gptq", "compressed-tensors"])
def test_a_quantized_output_has_the_parameters_of_the_pruned_one(kind: str, format_: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps(manifest_of(source).to_dict()))
    shardxform("prune", source, tmp_path / "p", "-m", keep, "-q")
    shardxform("quantize", source, tmp_path / "q", "-m", keep, "--group-size", 32, "--format", format_, "-q")
    pruned, packed = gather(tmp_path / "p"), gather(tmp_path / "q")
    assert pruned.quantization is None
    for what in ("experts", "parameters", "active"):
        assert getattr(pruned, what) == getattr(packed, what)
    plain = gather_whole(source, tmp_path / "whole")
    assert plain.pruning is None
    assert plain.parameters.after == pruned.parameters.before
    assert plain.active.after == pruned.active.before


def gather_whole(source: Path, out: Path) -> Any:
    shardxform("prune", source, out, "--mtp", "drop", "-q")
    return gather(out)


def test_what_is_not_known_is_left_out(out: Path) -> None:
    change_record(out, lambda record: record["summary"].pop("chosen"))
    text = render(gather(out))
    assert "reap" not in text
    assert "license" not in text
    assert "base_model" not in text
    assert "## Evaluation" not in text
    assert "Nothing was measured" in text
    assert not re.search(r"\bNone\b|\bnan\b|TODO|: $", text, re.MULTILINE)


def test_the_card_has_the_evaluation(quantized: Path, tmp_path: Path) -> None:
    other = {**EVALUATION, "perplexity": None, "perplexity_standard_error": None, "against": None}
    other["data"] = {"data": "wiki"}
    paths = [evaluation(tmp_path, of=quantized), evaluation(tmp_path, other, "other.json", quantized)]
    text = render(gather(quantized, CardOptions(evaluations=paths)))
    figures = "36.256 ± 1.250 | 27.455 | 1.3206 ± 0.0111 | 0.2628 ± 0.0098 | 73.6% ± 0.4%"
    assert f"| `heldout.jsonl` | 8,192 | 32 | {figures} |" in text
    assert "| `wiki` | 8,192 | 32 |  |  |  |  |  |" in text
    assert "± is a standard error over windows" in text
    assert "computed in bfloat16, whose own rounding is in the figures" in text
    assert "| 1 | 22.00% |" in text
    assert "| 2 |  |" in text
    assert "Only the figures above were measured" in text


def test_an_evaluation_of_an_earlier_version_has_fewer_errors(quantized: Path, tmp_path: Path) -> None:
    old = {key: value for key, value in EVALUATION.items() if key not in ("dtype", "perplexity_standard_error")}
    reference = {key: value for key, value in EVALUATION["against"].items() if key in OLD}  # type: ignore[attr-defined]
    path = evaluation(tmp_path, {**old, "against": reference}, of=quantized)
    text = render(gather(quantized, CardOptions(evaluations=[path])))
    assert "| 36.256 | 27.455 | 1.3206 | 0.2628 ± 0.0098 | 73.6% |" in text
    assert "computed in" not in text
    bad = evaluation(tmp_path, {**EVALUATION, "perplexity_standard_error": -1.0})
    with pytest.raises(PlanError, match="perplexity_standard_error: expected no negative number"):
        gather(quantized, CardOptions(evaluations=[bad]))


def test_the_card_says_whose_windows_judged(quantized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(quantized, tmp_path / "out"))
    told = {True: "on windows of the calibration text that were not tuned on", False: "which flatters"}
    for held_out in (True, False, None):
        block = {"layer": 0, "rtn_error": 2e-3, "tuned_error": 1e-3, "experts_never_reached": []}
        block["ratio_standard_error"] = 0.021
        judged = {} if held_out is None else {"judged_on": {"windows": 8, "tokens": 4088, "held_out": held_out}}
        change_record(out, lambda record, block={**block, **judged}: record.update(facts={"blocks": [block]}))
        text = render(gather(out))
        assert "Squared error of each block's output" in text
        assert "| 2.000e-03 | 1.000e-03 | 50.0% ± 2.1% |" in text
        assert {apart for apart, words in told.items() if words in text} == ({held_out} - {None})


def test_calibration_text_that_was_also_evaluated_on_is_said(quantized: Path, tmp_path: Path) -> None:
    content = json.loads(KEEP.read_text())["provenance"]["runs"][0]["sha256"]
    for digest, told in ((content, True), ("other", False)):
        data = {**EVALUATION["data"], "data": "calib.jsonl", "sha256": digest}  # type: ignore[dict-item]
        path = evaluation(tmp_path, {**EVALUATION, "data": data}, of=quantized)
        text = render(gather(quantized, CardOptions(manifest=KEEP, evaluations=[path])))
        assert ("its figures flatter" in text) is told


def test_blocks_are_listed_as_the_record_has_them(out: Path) -> None:
    blocks = [
        {"layer": 1, "rtn_error": 0.5, "tuned_error": 0.125, "experts_never_reached": [3, 4], "seconds": 1.0},
        {"layer": 0, "rtn_error": 2e-3, "tuned_error": 1e-3, "experts_never_reached": []},
        {"layer": 2, "rounded_to_nearest": "loss not finite"},
        {"layer": "x"},
        7,
    ]
    change_record(out, lambda record: record["facts"].update(blocks=blocks))
    text = render(gather(out))
    rows = re.findall(r"^\| \d \|.*", text, re.MULTILINE)
    assert rows == [
        "| 0 | 2.000e-03 | 1.000e-03 | 50.0% | 0 |",
        "| 1 | 5.000e-01 | 1.250e-01 | 25.0% | 2 |",
        "| 2 |  | rounded to nearest |  |  |",
    ]
    assert "rounded to nearest: 2." in text


# -- the command ------------------------------------------------------------------------------------------------------

VERBS = (
    ("prune", ("-m", "KEEP")),
    ("prune", ("--text-only", "--max-shard-size", "90kB")),
    ("prune", ("--mtp", "drop", "-m", "KEEP")),
    ("quantize", ("--group-size", "32")),
    ("quantize", ("-m", "KEEP", "--group-size", "-1", "--format", "gptq", "--g-idx", "--text-only")),
    ("quantize", ("--scheme", "W8A16", "--group-size", "32", "--format", "compressed-tensors", "--mtp", "drop")),
    ("quantize", ("--group-size", "32", "--search", "--scale-grid", "fp16", "--expert-names", "fused-indexed")),
    ("quantize", ("--group-size", "32", "--keep-16bit", "*.layers.0.mlp.experts.*", "--also-quantize", "lm_head")),
)


def again(out: Path, source: Path) -> list[Result]:
    """Run the commands that OUT's card gives, with the names in their places."""
    places = {"SRC": str(source), out.name: str(out), "shardxform.json": str(out / "shardxform.json")}
    places |= {f"{out.name}-step-{number}": f"{out}-step-{number}" for number in range(1, 9)}
    places |= {f"keep-{number}.json": f"{out}-keep-{number}.json" for number in range(1, 9)}
    return [shardxform(*(places.get(arg, arg) for arg in args[1:])) for args in gather(out).commands]


@pytest.mark.parametrize(("verb", "options"), VERBS)
def test_the_command_on_the_card_makes_the_output_again(verb: str, options: tuple[str, ...], tmp_path: Path) -> None:
    source, keep, out = make(tmp_path / "source"), tmp_path / "keep.json", tmp_path / "out"
    keep.write_text(json.dumps(manifest_of(source, mtp=True).to_dict()))
    given = [str(keep) if option == "KEEP" else option for option in options]
    shardxform(verb, source, out, *given, "-q")
    (result,) = again(out, source)
    assert "already complete, made from the same inputs" in result.output


@pytest.mark.parametrize("target", [("bf16",), ("gptq", "--g-idx"), ("auto-round", "--expert-names", "fused-indexed")])
def test_the_commands_of_a_converted_output_make_it_again(target: tuple[str, ...], tmp_path: Path) -> None:
    source, keep, out = make(tmp_path / "source"), tmp_path / "keep.json", tmp_path / "out"
    keep.write_text(json.dumps(manifest_of(source).to_dict()))
    shardxform("quantize", source, f"{out}-step-1", "-m", keep, "--group-size", 32, "-q")
    shardxform("convert", f"{out}-step-1", out, "--to", *target, "-q")
    results = again(out, source)
    assert len(results) == 2
    assert all("already complete, made from the same inputs" in result.output for result in results)
    facts = gather(out)
    assert facts.nbytes.before == Checkpoint.open(source).nbytes
    assert facts.experts.before == gather(Path(f"{out}-step-1")).experts.before
    assert (facts.quantization is None) is (target == ("bf16",))
    assert facts.pruning is not None


def test_a_float16_output_is_loaded_as_such(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardxform("quantize", make(tmp_path / "source", "qwen3_moe"), tmp_path / "q", "--group-size", 32, "-q")
    shardxform("convert", tmp_path / "q", out, "--to", "float16", "-q")
    card = render(gather(out))
    assert "with quantized weights turned back into float16" in card
    assert "from_pretrained(path, dtype=torch.float16)" in card
    assert card.count("--dtype float16") == 2
    assert "bfloat16" not in card
    assert "--to fp16" in card


@pytest.mark.oracle
def test_a_tuned_output(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source, out = ROOT / "examples" / "small-moe", tmp_path / "out"
    text = few("calib.jsonl")
    options = ("--samples", 4, "--seqlen", 32, "--iters", 2, "--lr", 0.1, "--batch-size", 2, "--seed", 7)
    options += ("--minmax-lr", 0.05, "--inputs", "fp")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shardxform("quantize", source, out, "--method", "auto-round", "--data", text, *options, "--no-search", "-q")
        args = gather(out).commands[0]
        places = {"SRC": str(source), "out": str(out), "calib.jsonl": str(text)}
        assert "already complete" in shardxform(*(places.get(arg, arg) for arg in args[1:])).output
    finally:
        torch.set_num_threads(before)
    made = gather(out).quantization
    assert made is not None
    assert made.method == "auto-round"
    record = json.loads((out / "shardxform.json").read_text())
    recorded = record["facts"]["blocks"]
    assert [(b.layer, b.rounded, b.tuned) for b in made.blocks] == [
        (b["layer"], b["rtn_error"], b["tuned_error"]) for b in sorted(recorded, key=lambda b: b["layer"])
    ]
    card_text = render(gather(out))
    assert "calibration text: `calib.jsonl`, 4 windows of 32 tokens" in card_text
    assert "steps per block: 2, each of 2 windows" in card_text

    def scales(recipe: dict[str, Any]) -> list[str]:
        """What the command says of the first step of the scales, for a record of this recipe."""
        changed = {**record, "inputs": {**record["inputs"], "recipe": recipe}}
        (out / "shardxform.json").write_text(json.dumps(changed))
        args = gather(out).commands[0]
        return list(args[args.index("--minmax-lr") + 1 :][:1]) if "--minmax-lr" in args else []

    recipe = record["inputs"]["recipe"]
    assert scales(recipe) == ["0.05"]
    assert scales({**recipe, "minmax_lr": 0.025}) == []
    assert scales({name: value for name, value in recipe.items() if name != "minmax_lr"}) == ["0.1"]  # an earlier one


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("command", "options"),
    [("prune", ()), ("quantize", ()), ("quantize", ("--method", "auto-round", "--iters", 2, "--dtype", "float32"))],
)
def test_a_healed_output(command: str, options: tuple[object, ...], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source, out = ROOT / "examples" / "small-moe", tmp_path / "out"
    text = few("calib.jsonl")
    given = ("--samples", 4, "--seqlen", 32, "--heal", "router", "--heal-iters", 2, "--heal-lr", 0.005, *options)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shardxform(command, source, out, "-m", KEEP, "--data", text, "--batch-size", 2, *given, "-q")
        facts = gather(out)
        places = {
            "SRC": str(source),
            "out": str(out),
            "calib.jsonl": str(text),
            "shardxform.json": str(out / "shardxform.json"),
        }
        assert "already complete" in shardxform(*(places.get(arg, arg) for arg in facts.commands[0][1:])).output
    finally:
        torch.set_num_threads(before)
    made = facts.healing
    assert made is not None
    assert (made.what, made.iters, made.batch_size) == ("router", 2, 2)
    recorded = json.loads((out / "shardxform.json").read_text())["facts"]["blocks"]
    assert [(b.layer, b.pruned, b.healed) for b in made.blocks] == [
        (b["layer"], b["healed"]["pruned_error"], b["healed"]["healed_error"]) for b in recorded
    ]
    card_text = render(facts)
    assert "## Healing" in card_text
    assert "It was healed on calibration text" in card_text
    assert "rounded to nearest" not in card_text
    assert card_text.count("steps per block: 2, each of 2 windows") == 1 + bool(options)
    assert made.data is not None
    flattering = EvaluationFacts(data=made.data, windows=1, tokens=1, perplexity=2.0)
    shown = dataclasses.replace(facts, evaluations=(flattering,), pruning=None, quantization=None)
    assert "is both calibration and evaluation text" in render(shown)


def test_a_block_that_was_left_as_pruned_is_said(out: Path) -> None:
    def change(record: Any) -> None:
        record["inputs"]["recipe"] = {"heal": {"what": "auto", "iters": 100, "batch_size": 8}}
        healed = {"pruned_error": 0.5, "healed_error": 0.25, "what": "all", "lr": 0.02}
        left = {"pruned_error": 0.5, "healed_error": 0.5, "what": None, "lr": None}
        record["facts"] = {"blocks": [{"layer": 1, "healed": left}, {"layer": 0, "healed": healed}]}

    change_record(out, change)
    text = render(gather(out))
    assert "| 0 | 5.000e-01 | 2.500e-01 | 50.0% | all |" in text
    assert "| 1 | 5.000e-01 | left as pruned |  |  |" in text


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_moe"])
@pytest.mark.parametrize("format_", ["", "auto-round", "gptq", "compressed-tensors", "fused-indexed"])
def test_how_to_load_follows_the_format_and_the_family(kind: str, format_: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    if format_:
        choice = ("--expert-names", format_) if format_ == "fused-indexed" else ("--format", format_)
        shardxform("quantize", source, tmp_path / "out", "--group-size", 32, *choice, "-q")
    else:
        shardxform("prune", source, tmp_path / "out", "--mtp", "drop", "-q")
    text = render(gather(tmp_path / "out"))
    python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if format_ == "fused-indexed":
        assert "--expert-names split" in text
        assert not python
        return
    ast.parse(python[0])
    assert "dtype=torch.bfloat16" in python[0]
    assert ("AutoModelForImageTextToText" in python[0]) is (kind == "qwen3_5_moe")
    assert ("pipeline_tag: image-text-to-text" in text) is (kind == "qwen3_5_moe")
    assert ("float16 overflows" in text) is (kind == "qwen3_5_moe")
    assert ("AutoRoundConfig" in python[0]) is (format_ == "gptq")
    assert ("sglang.launch_server" in text) is (format_ in ("", "auto-round"))
    assert "vllm serve out --dtype bfloat16 --max-model-len" in text
    assert (f"- {format_}\n" in text) is bool(format_)
    assert ("### llama.cpp and MLX" in text) is (kind == "qwen3_5_moe" and not format_)


NO_MTP, OTHER_TYPE, GARBAGE = "--no-mtp", '"qwen3_5_moe"', "mlx-lm loads this and computes garbage"
ELSEWHERE: Any = [  # family, command, and what its card says for clients that take no spelling of config.json
    ("qwen3_5_moe", ("prune", "--text-only"), {OTHER_TYPE}),
    ("qwen3_5_moe", ("prune", "--mtp", "drop", "--text-only"), {NO_MTP, OTHER_TYPE}),
    ("qwen3_5_moe_text", ("prune", "--mtp", "drop"), {NO_MTP, OTHER_TYPE}),
    ("qwen3_5_moe", ("quantize", "--mtp", "drop", "--format", "compressed-tensors"), {NO_MTP}),
    ("qwen3_5_moe_text", ("quantize", "--mtp", "drop", "--format", "gptq", "--g-idx"), {NO_MTP}),
    ("qwen3_5_moe_text", ("quantize", "--mtp", "drop", "--format", "gptq"), set()),
    ("qwen3_moe", ("quantize", "--scheme", "W8A16", "--format", "compressed-tensors"), set()),
    ("deepseek_v3", ("quantize", "--scheme", "W8A16", "--format", "compressed-tensors"), {GARBAGE}),
    ("deepseek_v3", ("quantize", "--format", "compressed-tensors"), set()),
    ("deepseek_v3", ("prune", "--mtp", "drop"), set()),
]


@pytest.mark.parametrize(("kind", "command", "said"), ELSEWHERE, ids=lambda value: str(sorted(value)))
def test_what_llama_cpp_and_mlx_need_is_said_of_outputs_that_it_concerns(
    kind: str, command: tuple[str, ...], said: set[str], tmp_path: Path
) -> None:
    verb, *options = command
    group = ("--group-size", 32) if verb == "quantize" else ()
    shardxform(verb, make(tmp_path / "source", kind), tmp_path / "out", *group, *options, "-q")
    _, _, rest = render(gather(tmp_path / "out")).partition("### llama.cpp and MLX\n")
    section = rest.partition("\n## ")[0]
    assert {text for text in (NO_MTP, OTHER_TYPE, GARBAGE) if text in section} == said
    assert section.count("\n- ") == len(said)


# -- whose model, under which licence ---------------------------------------------------------------------------------


def test_a_source_card_gives_licence_and_name_but_not_its_own_base() -> None:
    found = origin_of(CARD, "", ours=False)
    assert found == Origin(
        base_model="Qwen/Qwen3.5-35B-A3B",
        license="other",
        license_name="tongyi qianwen",
        license_link="https://hub.example/Qwen/Qwen3.5-35B-A3B/blob/main/LICENSE",
        languages=("en",),
    )
    tuned = CARD.replace("A3B-Base", "A3B")  # a fine-tune that links to the licence of what it was made from
    assert origin_of(tuned, "", ours=False).base_model == ""
    assert origin_of(CARD, "", ours=True).base_model == "Qwen/Qwen3.5-35B-A3B-Base"


@pytest.mark.parametrize(
    ("text", "license_", "link"),
    [
        ("\n   Apache License\n     Version 2.0, January 2004\n", "apache-2.0", ""),
        ("MIT License\n\nCopyright", "mit", ""),
        ("as you like\n", "other", "LICENSE"),
        ("", "", ""),
    ],
)
def test_a_licence_file_says_what_no_card_does(text: str, license_: str, link: str) -> None:
    found = origin_of("# no front matter", text, ours=False)
    assert (found.license, found.license_link) == (license_, link)
    assert origin_of("---\nlicense: mit\n---\n", text, ours=False).license == "mit"


def test_the_card_of_a_card_says_the_same(out: Path) -> None:
    (out / "LICENSE").write_text("Apache License, Version 2.0")
    options = CardOptions(base_model="org/Some-Model.v1", manifest=KEEP)
    first = render(gather(out, options))
    write_card(out, first)
    assert render(gather(out, CardOptions(manifest=KEEP))) == first
    assert "base_model: org/Some-Model.v1\nbase_model_relation: quantized\n" in first
    assert "license: apache-2.0\n" in first
    assert "shardxform quantize org/Some-Model.v1 small-moe-8-W4A16" in first


def test_a_pruned_checkpoint_is_no_quantized_one(tmp_path: Path) -> None:
    shardxform("prune", ROOT / "examples" / "small-moe", tmp_path / "out", "-m", KEEP, "-q")
    text = card(tmp_path / "out", "--base-model", "org/name")
    assert "base_model: org/name" in text
    assert "base_model_relation" not in text
    assert "- pruned\n" in text


def test_the_config_names_the_source_where_it_plausibly_does(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    for name, found in (("org/name", "org/name"), ("/home/me/model", ""), ("../x", ""), (5, ""), ("a/b/c", "")):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shardxform("prune", source, tmp_path / "out", "--mtp", "drop", "-q")
        assert gather(tmp_path / "out").origin.base_model == found


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("---\n:[]'\" #abz/-\r\t\x00é"), max_size=200))
def test_no_card_breaks_the_reader(text: str) -> None:
    for card_text in (text, f"---\n{text}\n---\n", f"---\nlicense:{text}\nlanguage:\n{text}\n---\n"):
        found = origin_of(card_text, text, ours=True)
        assert all("\n" not in str(value) for value in dataclasses.asdict(found).values())
        front_matter_of(card_text)


def test_front_matter_is_yaml_that_means_what_was_meant(quantized: Path) -> None:
    yaml = pytest.importorskip("yaml")
    origin = Origin(
        base_model="1e3/0x10", license="mit", license_name="on: off #x", license_link="LICENSE", languages=("no", "en")
    )
    facts = dataclasses.replace(gather(quantized, CardOptions(manifest=KEEP)), origin=origin)
    found = yaml.safe_load(front_matter(facts).strip("-"))
    assert found == {
        "language": ["no", "en"],
        "license": "mit",
        "license_name": "on: off #x",
        "license_link": "LICENSE",
        "base_model": "1e3/0x10",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "pruned", "reap", "int4", "auto-round", "shardxform"],
    }


def test_text_from_strangers_stays_text(out: Path, tmp_path: Path) -> None:
    evil = "a`|\n| <script> ```"
    assert re.fullmatch(r"`[^`|\n]+`", code(evil))
    assert fence("x ```` y", "sh").startswith("`````sh\n")

    def change(record: Any) -> None:
        record["inputs"]["scheme"]["keep_16bit"] = ["x\n```\n# heading"]
        record["inputs"]["scheme"]["method"] = {"a": 1}
        record["inputs"]["source"]["shards"] = {"x": ["big", ""]}
        record["summary"] = {"bytes_before": "x", "experts_before": []}

    path = evaluation(tmp_path, {**EVALUATION, "data": {"data": "x | <b>`y`"}}, of=out)
    change_record(out, change)
    text = render(gather(out, CardOptions(evaluations=[path])))
    assert "| `x ' <b>'y'` | 8,192 |" in text
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "# heading" in text
    assert "# heading" not in outside
    assert gather(out).nbytes.before is None
    assert gather(out).experts.before is None


# -- writing ----------------------------------------------------------------------------------------------------------


def test_verify_accepts_an_output_with_a_card(out: Path, tmp_path: Path) -> None:
    plot = tmp_path / "blocks.png"
    plot.write_bytes(PNG)
    assert not (out / "README.md").exists()
    told = card(out, "-m", KEEP, "--picture", plot, "--write")
    assert told == f"{out / 'README.md'}: written\n"
    text = (out / "README.md").read_text()
    assert "![blocks](blocks.png)" in text
    assert (out / "blocks.png").read_bytes() == PNG
    shardxform("verify", out, "--source", ROOT / "examples" / "small-moe", "-q")
    again = shardxform("quantize", ROOT / "examples" / "small-moe", out, "-m", KEEP, "-q")
    assert "already complete" in again.output
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_a_copied_card_is_replaced_and_its_licence_kept(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    (source / "README.md").write_text(CARD)
    shardxform("quantize", source, tmp_path / "out", "--group-size", 32, "-q")
    readme = tmp_path / "out" / "README.md"
    assert readme.read_text() == CARD
    card(tmp_path / "out", "--write")
    first = readme.read_text()
    assert MARK in first.splitlines()
    assert "license: other\n" in first
    assert 'license_name: "tongyi qianwen"\n' in first
    assert "base_model: Qwen/Qwen3.5-35B-A3B\n" in first
    card(tmp_path / "out", "--write")
    assert readme.read_text() == first
    shardxform("verify", tmp_path / "out", "--source", source, "-q")


@pytest.mark.parametrize("content", ["# mine\n", "", f"# about {MARK}, inline\n"])
def test_a_readme_of_somebody_else_is_left_alone(content: str, out: Path) -> None:
    (out / "README.md").write_text(content)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(OutputError, match=r"README\.md: neither the source's nor a card"):
        card(out, "--write")
    assert (out / "README.md").read_text() == content
    assert sorted(path.name for path in out.iterdir()) == before
    card(out)  # printing is always possible


def test_links_are_not_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text(f"{MARK}\n")
    (out / "README.md").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"README\.md"):
        card(out, "--write")
    assert (tmp_path / "victim").read_text() == f"{MARK}\n"


def test_pictures_of_somebody_else_are_left_alone(out: Path, tmp_path: Path) -> None:
    plot, other = tmp_path / "p.png", PNG + b"other"
    plot.write_bytes(PNG)
    (out / "p.png").write_bytes(other)
    with pytest.raises(OutputError, match=r"p\.png: stands in the way"):
        card(out, "--picture", plot, "--write")
    assert (out / "p.png").read_bytes() == other
    assert not (out / "README.md").exists()
    (out / "p.png").unlink()
    card(out, "--picture", plot, "--write")
    plot.write_bytes(other)
    card(out, "--picture", plot, "--write")  # an earlier card's own
    assert (out / "p.png").read_bytes() == other
    card(out, "--picture", out / "p.png", "--write")
    assert (out / "p.png").read_bytes() == other


def test_what_is_no_picture_is_refused(out: Path, tmp_path: Path) -> None:
    for name, data in (("a b.png", PNG), ("x).png", PNG), ("x.jpg", PNG), ("x.png", b"GIF89a")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(OutputError, match=re.escape(name)):
            card(out, "--picture", tmp_path / name)
    (tmp_path / "y.png").write_bytes(PNG)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "y.png").write_bytes(PNG)
    with pytest.raises(OutputError, match="two pictures of this name"):
        card(out, "--picture", tmp_path / "y.png", "--picture", tmp_path / "d" / "y.png")
    with pytest.raises(OutputError, match="No such file"):
        card(out, "--picture", tmp_path / "gone.png")


def test_json_has_the_facts(out: Path) -> None:
    found = json.loads(card(out, "-m", KEEP, "--json"))
    assert found["experts"] == {"before": 16, "after": 8}
    assert found["written"] is None
    assert not (out / "README.md").exists()
    assert json.loads(card(out, "--json", "--write"))["written"] == str(out / "README.md")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_other_inputs_are_refused(out: Path, tmp_path: Path) -> None:
    value = json.loads(KEEP.read_text())
    first, second, *_ = kept = value["keep"]["2"]
    kept[0] = next(e for e in range(second) if e != first)
    (tmp_path / "other.json").write_text(json.dumps(value))
    with pytest.raises(ManifestError, match=r'keep\["2"\]: not what .* was pruned by'):
        gather(out, CardOptions(manifest=tmp_path / "other.json"))
    del value["keep"]["3"]
    kept[0] = first
    value["model"] = {}
    (tmp_path / "short.json").write_text(json.dumps(value))
    with pytest.raises(ManifestError, match="3 layers, but"):
        gather(out, CardOptions(manifest=tmp_path / "short.json"))
    shardxform("quantize", ROOT / "examples" / "small-moe", tmp_path / "whole", "-q")
    with pytest.raises(ManifestError, match="was not pruned by a manifest"):
        gather(tmp_path / "whole", CardOptions(manifest=KEEP))
    for name in ("name", "a/b/c", "../x", "a b/c", "a/b\nc"):
        with pytest.raises(PlanError, match="expected a hub name"):
            gather(out, CardOptions(base_model=name))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("[]", "expected an object"),
        ("{", "not JSON"),
        ({"perplexity": "x"}, "perplexity: expected a number, found 'x'"),
        ({"perplexity": True}, "perplexity: expected a number"),
        ({"perplexity": 10**400}, "perplexity"),
        ({"data": "heldout"}, "data: missing or malformed"),
        ({"windows": 0}, "windows: missing"),
        ({"tokens": -1}, "tokens: missing"),
        ({"against": {"kl": "0"}}, "kl: expected a number"),
        ({"against": {"top1_agreement": 73}}, "a share from 0 to 1"),
        ({"against": {"block_errors": 5}}, "block_errors: expected a list"),
        ({"against": {"block_errors": ["x"]}}, "block_errors: expected a number"),
        ({"fingerprint": "of another"}, "says nothing of the values that it is of"),
        ({}, "identity: missing"),
    ],
)
def test_a_malformed_evaluation_is_refused(change: Any, told: str, out: Path, tmp_path: Path) -> None:
    path = evaluation(tmp_path, {**EVALUATION, **change} if isinstance(change, dict) else change)
    with pytest.raises(PlanError, match=re.escape(told)) as error:
        gather(out, CardOptions(evaluations=[path]))
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 300 + len(str(path))


def test_an_evaluation_that_names_this_checkpoint_is_taken(out: Path, tmp_path: Path) -> None:
    path = evaluation(tmp_path, of=out)
    found = gather(out, CardOptions(evaluations=[path])).evaluations[0]
    assert isinstance(found, EvaluationFacts)
    assert found.data == Data(name="heldout.jsonl", samples=32, seqlen=256, content="ab")


def test_a_reference_must_be_what_the_output_was_made_from(out: Path, tmp_path: Path) -> None:
    """The same config and the same headers, and one value that is another: only marks tell."""
    source = ROOT / "examples" / "small-moe"
    taken = evaluation(tmp_path, of=out, against=source)
    text = render(gather(out, CardOptions(evaluations=[taken])))
    assert "The reference is the checkpoint that this one was made from, on the same windows." in text
    unknown = evaluation(tmp_path, name="earlier.json", of=out)
    text = render(gather(out, CardOptions(evaluations=[taken, unknown])))
    assert "this one was held against, whether or not that is its source, on the same" in text
    other = Path(shutil.copytree(source, tmp_path / "other"))
    with max(other.glob("*.safetensors")).open("r+b") as file:
        file.seek(-2, 2)
        last = file.read()
        file.seek(-2, 2)
        file.write(bytes([last[0] ^ 1, last[1]]))
    for reference, told in ((other, "other values in model"), (out, "another config.json")):
        with pytest.raises(PlanError, match=r"eval\.json: its reference is not what .* was made from: ") as error:
            gather(out, CardOptions(evaluations=[evaluation(tmp_path, of=out, against=reference)]))
        assert told in str(error.value)
        assert str(error.value).endswith("; evaluate it again, --against its source")


def test_a_converted_output_may_be_held_against_either_before_it(out: Path, tmp_path: Path) -> None:
    shardxform("convert", out, tmp_path / "gptq", "--to", "gptq", "-q")
    for number, reference in enumerate((out, ROOT / "examples" / "small-moe")):
        path = evaluation(tmp_path, name=f"{number}.json", of=tmp_path / "gptq", against=reference)
        assert gather(tmp_path / "gptq", CardOptions(evaluations=[path])).evaluations[0].of_source


def test_what_is_no_finished_output_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such directory"):
        gather(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"no shardxform\.json"):
        gather(ROOT / "examples" / "small-moe")
    (out / ".shardxform").mkdir()
    with pytest.raises(OutputError, match="unfinished"):
        gather(out)
    (out / ".shardxform").rmdir()
    with (out / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(OutputError, match=r"model\.safetensors: not as shardxform\.json has it"):
        gather(out)


def test_a_record_of_nonsense_ends_in_one_sentence(out: Path) -> None:
    for value in (None, 5, [], "x", {"a": {"b": []}}):
        for key in ("inputs", "summary", "facts", "files", "shards"):
            change_record(out, lambda record, key=key, value=value: record.update({key: value}))
            result = CliRunner().invoke(card_command, [str(out)])
            if isinstance(result.exception, ShardxformError):
                assert "\n" not in str(result.exception)
            else:
                assert result.exit_code == 0, (key, value, result.exception)
                assert result.stdout.startswith("---\n")
