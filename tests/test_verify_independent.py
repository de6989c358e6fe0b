"""The second opinion: it agrees with sound outputs of every kind, and finds what is wrong with others by itself."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import header_bytes, read_checkpoint, tiny, write_checkpoint
from click.testing import CliRunner
from strategies import picked
from test_quantize import KIND_SIZES
from test_verify_quantized import SIDECARS, convert, edit_json
from test_verify_systematic import CORRUPTIONS, claim_tuned, tuned

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError
from shardxform.execution.runner import run
from shardxform.formats import matrices
from shardxform.formats.scheme import Grid, Scheme
from shardxform.model.layout import layout_of
from shardxform.plan import view
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification import (
    Problem,
    definitions,
    independent,
    independent_channels,
    independent_weights,
    verify,
)
from shardxform.verification.findings import Findings
from shardxform.verification.independent import CODE, check_independently

FORMATS = ("auto-round", "gptq", "compressed-tensors")
KINDS = tuple(sorted(KIND_SIZES))


def make(root: Path, kind: str, experts: str | None = None, **over: Any) -> Path:
    config, tensors = tiny(kind, **{**KIND_SIZES[kind], **over}, experts=experts)
    return write_checkpoint(root, tensors, config, shards=2, files=SIDECARS)


def manifest_of(root: Path, first: int = 0) -> Manifest:
    """Other experts in every layer, four of each, as many of each router group; MTP layers too."""
    checkpoint = Checkpoint.open(root)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    size, each = layout.num_experts // layout.groups, 4 // layout.groups

    def ids(layer: int) -> tuple[int, ...]:
        starts = range(0, layout.num_experts, size)
        return tuple(sorted(start + (first + layer + step) % size for start in starts for step in range(each)))

    lists = [ids(layer) for layer in range(layout.num_layers + layout.mtp_layers)]
    return Manifest(
        keep={layer: lists[layer] for layer in layout.moe_layers},
        mtp_keep={at: lists[layout.num_layers + at] for at in range(layout.mtp_layers)},
    )


def found(out: Path, source: Path, **given: Any) -> list[Problem]:
    """What it says, alone."""
    findings = Findings()
    assert check_independently(out, source, findings, **given) > 20
    assert not findings.warnings
    assert {p.code for p in findings.problems} <= {CODE}
    return findings.problems


def quantize(source: Path, out: Path, scheme: Scheme, manifest: Manifest | None, **options: Any) -> Path:
    run(plan_quantize(Checkpoint.open(source), scheme, manifest, ViewOptions(max_shard_bytes=10**6, **options)), out)
    return out


# -- what it is made of --------------------------------------------------------------------------------------------


def test_it_shares_no_code_with_what_it_judges() -> None:
    named: set[str] = set()
    for module in (independent, independent_channels, independent_weights, definitions):
        nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
        named |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {name for name in named if name.startswith("shardxform")}
    home = "shardxform.verification"
    others = {f"{home}.{name}" for name in ("findings", "definitions", "independent_channels", "independent_weights")}
    assert ours == {"shardxform.errors", *others}
    assert {name.split(".")[0] for name in named - ours} <= {*sys.stdlib_module_names, "numpy"}


# -- sound outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_outputs_of_every_family(kind: str, experts: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, experts)
    manifest = manifest_of(source)
    multimodal = "text_config" in json.loads((source / "config.json").read_text())
    for number, text_only in enumerate((False, True) if multimodal else (False,)):
        for mtp in ("keep", "drop") if manifest.mtp_keep else ("auto",):
            out = tmp_path / f"{number}-{mtp}"
            options = ViewOptions(text_only=text_only, mtp=mtp)  # type: ignore[arg-type]
            run(plan_prune(Checkpoint.open(source), manifest, options), out)
            assert found(out, source) == []
            (out / "shardxform.json").unlink()
            kept = {"keep": {str(k): list(v) for k, v in manifest.keep.items()}}
            kept["mtp_keep"] = {str(k): list(v) for k, v in manifest.mtp_keep.items()}
            assert found(out, source, manifest=kept, text_only=text_only, mtp=mtp) == []
            assert found(out, source, text_only=text_only, mtp=mtp)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("kind", picked(KINDS, 2))
def test_quantized_and_converted_outputs_of_every_family(kind: str, format_: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, "fused" if format_ == "gptq" else None)
    bits: Any = 8 if format_ == "gptq" else 4
    scheme = Scheme(grid=Grid(bits=bits, group_size=32), format=format_)
    out = quantize(source, tmp_path / "out", scheme, manifest_of(source), text_only=kind == "qwen3_5_moe")
    assert found(out, source) == []
    target = "compressed-tensors" if format_ != "compressed-tensors" else "gptq"
    for to in (target, "bf16"):
        converted = convert(out, tmp_path / to, format=to)
        assert found(converted, out) == []
        assert found(converted, source) == []
    if kind == "deepseek_v3":  # which needs two experts of each of its two groups
        return
    fewer = Manifest(keep=dict.fromkeys(manifest_of(source).keep, (1, 2)))
    run(plan_prune(Checkpoint.open(out), fewer, ViewOptions(mtp="drop")), tmp_path / "fewer")
    assert found(tmp_path / "fewer", out) == []


@pytest.mark.parametrize(
    "grid",
    [
        *(
            Grid(bits=b, group_size=size, scale_grid=grid)
            for b, size, grid in product((4, 8), (64, -1), ("fp16", "bf16"))
        ),
        Grid(group_size=32, search=True),
    ],
    ids=str,
)
def test_grids_and_spellings(grid: Grid, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_5_moe_text", "per-expert", hidden_size=128, moe_intermediate_size=64)
    scheme = Scheme(grid=grid, format="gptq", expert_names="fused-indexed", g_idx=True)
    out = quantize(source, tmp_path / "out", scheme, manifest_of(source))
    assert found(out, source) == []
    (out / "shardxform.json").unlink()
    manifest = {"keep": {str(k): list(v) for k, v in manifest_of(source).keep.items()}}
    assert found(out, source, manifest=manifest) == []


def test_tuned_outputs(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe", "per-expert")
    out = quantize(source, tmp_path / "out", Scheme(grid=Grid(group_size=32)), None)
    tuned(out, source, 0, 0.5 + 1 / 400)
    claim_tuned(out)
    assert found(out, source) == []
    tuned(out, source, 0, 0.6)
    assert "is no rounding" not in found(out, source)[0].message
    assert "from the weight, expected at most 1.0" in found(out, source)[0].message


@pytest.mark.parametrize(("iters", "offset"), [(1, 0.99), (2, 0.75), (3, 0.66)])
def test_few_steps_may_take_half_of_the_codes_beyond_a_step(iters: int, offset: float, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe", "per-expert")
    out = quantize(source, tmp_path / "out", Scheme(grid=Grid(group_size=32)), None)
    tuned(out, source, 0, offset, (1.0,))
    claim_tuned(out, iters)
    assert found(out, source) == []


def test_healed_outputs_may_be_anything_that_is_like_the_source(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe", "per-expert")
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), tmp_path / "out")
    edit_json(tmp_path / "out" / "shardxform.json", lambda r: r["inputs"].update(recipe={"heal": {"what": "moe"}}))
    tensors = read_checkpoint(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rng = np.random.default_rng(0)

    def rewritten(names: dict[str, str]) -> list[Problem]:
        changed = {}
        for name, raw in tensors.items():
            values = tensors[names.get(name, name)].float32()
            values = (values * rng.uniform(0.5, 1.5, values.shape)).astype("<f4")
            bits = (values.view("<u4") >> 16).astype("<u2") if raw.dtype == "BF16" and ".layers." in name else None
            changed[name] = raw if bits is None else (raw.dtype, raw.shape, bits.tobytes())
        for path in (tmp_path / "out").glob("*.safetensors*"):
            path.unlink()
        write_checkpoint(tmp_path / "out", changed, config, shards=1)
        return found(tmp_path / "out", source)

    assert rewritten({}) == []
    up, gate = (f"model.layers.1.mlp.experts.2.{p}_proj.weight" for p in ("up", "gate"))
    problems = rewritten({up: gate, gate: up})
    assert {p.where for p in problems} == {up, gate}
    assert all("times the source's size, expected below 1" in p.message for p in problems)


def test_healed_weights_may_be_as_far_as_the_steps_of_the_record(tmp_path: Path) -> None:
    """Weights of the other sign are twice their size away: within ten steps of a half, not of a hundredth."""
    source, out = make(tmp_path / "source", "qwen3_moe", "per-expert"), tmp_path / "out"
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), out)
    turned = {name: other_sign(raw) if ".layers." in name else raw for name, raw in read_checkpoint(out).items()}
    rewrite(out, turned)
    for lr, problems in ((0.5, 0), (0.01, sum(".layers." in name for name in turned))):
        told = {"what": "all", "lr": lr, "iters": 10}
        edit_json(out / "shardxform.json", lambda r, told=told: claim_healed(r, {"what": "all", "iters": 10}, told))
        assert len(found(out, source)) == problems


def test_what_others_were_merged_into_may_be_as_large_as_they_are(tmp_path: Path) -> None:
    """An expert that was hardly there is a mean of such that were not: 40 times its size away."""
    source, out = make(tmp_path / "source", "qwen3_moe", "per-expert"), tmp_path / "out"
    manifest, tensors = manifest_of(source), read_checkpoint(source)
    kept, gone = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (manifest.keep[1][0], 0))
    assert 0 not in manifest.keep[1]
    tensors[kept] = times(tensors[kept], 0.025)
    rewrite(source, tensors)
    run(plan_prune(Checkpoint.open(source), manifest), out)
    written, name = read_checkpoint(out), kept.replace(f"experts.{manifest.keep[1][0]}.", "experts.0.")
    told = {"what": None, "lr": 0.0, "iters": 0, "merged": 1.0}
    for factor, problems in ((1.0, []), (8.0, [name])):
        rewrite(out, {**written, name: times(tensors[gone], factor)})
        recipe = {"what": "experts", "iters": 0, "merge": True}
        edit_json(out / "shardxform.json", lambda r, recipe=recipe: claim_healed(r, recipe, told))
        assert [p.where for p in found(out, source)] == problems


def times(raw: Any, factor: float) -> Any:
    bits = ((raw.float32() * factor).astype("<f4").view("<u4") >> 16).astype("<u2")
    return (raw.dtype, raw.shape, bits.tobytes()) if raw.dtype == "BF16" else raw


def other_sign(raw: Any) -> Any:
    return times(raw, -1)


def claim_healed(record: dict[str, Any], heal: dict[str, Any], told: dict[str, Any]) -> None:
    """The record of an output all of whose blocks were healed alike."""
    record["inputs"]["recipe"] = {"heal": heal}
    record["facts"]["blocks"] = [{"layer": layer, "healed": told} for layer in range(4)]


# -- unsound ones --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A source and an output in each format; never changed."""
    root = tmp_path_factory.mktemp("pair")
    source = make(root / "source", "qwen3_moe", "per-expert", hidden_size=128, moe_intermediate_size=128)
    schemes = {f: Scheme(grid=Grid(group_size=32), format=f) for f in FORMATS}
    return source, {f: quantize(source, root / f, s, None) for f, s in schemes.items()}


@pytest.mark.parametrize("how", CORRUPTIONS)
@pytest.mark.parametrize("format_", FORMATS)
def test_it_finds_every_corruption_alone(
    how: str, format_: str, pair: tuple[Path, dict[str, Path]], writable: Callable[[Path], Path]
) -> None:
    source, outputs = pair
    out = writable(outputs[format_])
    CORRUPTIONS[how](out)
    plain = found(out, source)
    claim_tuned(out)
    as_tuned = found(out, source)
    (out / "shardxform.json").unlink()
    for problems in (plain, as_tuned, found(out, source)):
        assert problems
        if how != "every_code":
            assert all(p.where.startswith("model.layers.1.mlp.") for p in problems)


def other_lists(source: Path, out: Path) -> None:
    """Made by another manifest than the one recorded: each id one higher."""
    recorded = {str(k): list(v) for k, v in manifest_of(source).keep.items()}
    run(plan_prune(Checkpoint.open(source), manifest_of(source, first=1)), out)
    edit_json(out / "shardxform.json", lambda r: r["inputs"]["manifest"].update(keep=recorded))


def renumbered(source: Path, out: Path) -> None:
    """Experts in another order, the router as it must be."""
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), out)
    tensors = read_checkpoint(out)
    swapped = {".experts.0.": ".experts.1.", ".experts.1.": ".experts.0."}

    def other(name: str) -> str:
        return next((name.replace(old, new) for old, new in swapped.items() if old in name), name)

    changed = {other(name): raw for name, raw in tensors.items()}
    rewrite(out, changed)


def other_router(source: Path, out: Path) -> None:
    """A router, or a bias, sliced by the list of another layer."""
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), out)
    tensors, old = read_checkpoint(out), read_checkpoint(source)
    name = next(n for n in tensors if n.endswith(("mlp.gate.e_score_correction_bias", "layers.1.mlp.gate.weight")))
    layer = int(name.split("layers.")[1].split(".")[0])
    raw = old[name]
    ids = list(manifest_of(source).keep[layer])
    array = raw.array()[[(each + 1) % len(raw.array()) for each in ids]]
    rewrite(out, {**tensors, name: (raw.dtype, array.shape, array.tobytes())})


def rewrite(out: Path, tensors: dict[str, Any]) -> None:
    config = json.loads((out / "config.json").read_text())
    for path in out.glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(out, tensors, config, shards=1)


@pytest.mark.parametrize("how", [other_lists, renumbered, other_router])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_it_finds_wrong_lists_and_numbers(how: Callable[[Path, Path], None], kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, "per-expert")
    how(source, tmp_path / "out")
    problems = found(tmp_path / "out", source)
    assert problems
    text = "bits" if how is not other_lists else ""
    assert all(text in p.message and "expected" in p.message for p in problems)


def test_it_finds_what_is_missing_beside_or_miscounted(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), tmp_path / "out")
    tensors = read_checkpoint(tmp_path / "out")
    gone = "model.layers.1.input_layernorm.weight"
    rewrite(tmp_path / "out", {("model.extra" if name == gone else name): raw for name, raw in tensors.items()})
    edit_json(tmp_path / "out" / "config.json", lambda c: c.update(num_experts=5))
    told = {p.where: p.message for p in found(tmp_path / "out", source)}
    assert told.keys() == {gone, "model.extra", "config.json"}
    assert told["config.json"] == "num_experts is 5, but layers keep [4]"


# -- mistakes that the other comparisons share ---------------------------------------------------------------------


def test_it_finds_halves_that_are_cut_wrong_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of modules is what the output is planned by, and what verify asks."""
    right = matrices._unstacked

    def wrong(*args: Any) -> Any:
        for module in right(*args):
            other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            stem, _, last = module.name.rpartition(".")
            yield module._replace(name=f"{stem}.{other.get(last, last)}")

    monkeypatch.setattr(matrices, "_unstacked", wrong)
    source = make(tmp_path / "source", "qwen3_5_moe_text", "fused")
    out = quantize(source, tmp_path / "out", Scheme(grid=Grid(group_size=32)), manifest_of(source))
    assert verify(out, source=source).sound
    report = verify(out, source=source, independent=True)
    assert {p.code for p in report.problems} == {CODE}
    assert {p.where.split(".")[-2] for p in report.problems} == {"gate_proj", "up_proj"}
    assert len(report.problems) == 2 * 4 * 4


def test_it_finds_experts_that_are_numbered_wrong_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source", "qwen3_moe", "per-expert")
    manifest = manifest_of(source, first=1)
    monkeypatch.setattr(view._Builder, "_renumbered", backwards)
    run(plan_prune(Checkpoint.open(source), manifest), tmp_path / "out")
    assert verify(tmp_path / "out", source=source).sound
    report = verify(tmp_path / "out", source=source, independent=True)
    assert {p.code for p in report.problems} == {CODE}
    assert report.rederived


def backwards(self: Any, ref: Any, place: Any) -> Any:
    """Experts numbered from the end, while routers are as they must be."""
    keep = self._keep(place)
    if keep is None or len(keep) == self._layout.num_experts:
        return ref
    if place.expert not in keep:
        return None
    parts = ref.name.split(".")
    parts[place.expert_at] = str(len(keep) - 1 - keep.index(place.expert))
    return ref.renamed(".".join(parts))


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_says_how_much_was_derived(pair: tuple[Path, dict[str, Path]]) -> None:
    source, outputs = pair
    result = CliRunner().invoke(main, ["verify", str(outputs["gptq"]), "--source", str(source), "--independent", "-q"])
    assert result.exit_code == 0, result.output
    assert f"{len(read_checkpoint(source))} weights derived independently; values" in result.output
    for options in (["--independent"], ["--independent", "--source", str(source), "--quick"]):
        result = CliRunner().invoke(main, ["verify", str(outputs["gptq"]), *options])
        assert result.exit_code == 2
        assert "--independent compares values with --source" in result.output
    with pytest.raises(CheckpointError, match="needs it on this machine"):
        verify(outputs["gptq"], independent=True)


def test_lists_of_what_goes_are_read_as_the_plan_reads_them(tmp_path: Path) -> None:
    """A form that needs to know how many experts there are."""
    source = make(tmp_path / "source", "qwen3_moe")
    manifest = manifest_of(source)
    gone = [[layer, each] for layer, ids in manifest.keep.items() for each in set(range(6)) - set(ids)]
    (tmp_path / "gone.json").write_text(json.dumps({"version": 1, "pruned_experts": gone}))
    run(plan_prune(Checkpoint.open(source), manifest), tmp_path / "out")
    report = verify(tmp_path / "out", source=source, manifest=tmp_path / "gone.json", independent=True)
    assert (report.problems, report.rederived) == ((), report.tensors)


@pytest.mark.parametrize("what", ["header", "offsets", "bits", "json"])
def test_what_cannot_be_read_is_said(
    what: str, pair: tuple[Path, dict[str, Path]], writable: Callable[[Path], Path]
) -> None:
    source, outputs = pair
    out = writable(outputs["auto-round"])
    shard = next(out.glob("*.safetensors"))
    if what == "header":
        shard.write_bytes(b"\xff" * 64)
    elif what == "offsets":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "bits":
        edit_json(out / "config.json", lambda c: c["quantization_config"].update(bits=3))
    else:
        (out / "shardxform.json").write_text("[]")
    findings = Findings()
    assert check_independently(out, source, findings) == 0
    (problem,) = findings.problems
    assert (problem.code, problem.where) == (CODE, ".")
    assert problem.message.startswith("cannot be derived: ")
    if what != "json":
        with pytest.raises(CheckpointError, match="cannot read it"):
            check_independently(out=source, source=out, findings=findings)


# -- outputs that make no sense ------------------------------------------------------------------------------------


def _record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        record = json.loads((out / "shardxform.json").read_text())
        change(record)
        (out / "shardxform.json").write_text(json.dumps(record))

    return spoil


def _nested(out: Path) -> None:
    (out / "shardxform.json").write_text('{"inputs": ' + "[" * 10_000 + "]" * 10_000 + "}")


def _shape(shape: Any, which: str) -> Callable[[Path], None]:
    """Of a tensor in a shard of the output, in its header."""

    def spoil(out: Path) -> None:
        path = next(each for each in out.glob("*.safetensors") if which in each.read_bytes()[:100_000].decode("latin1"))
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[next(name for name in header if which in name)]["shape"] = shape
        path.write_bytes(header_bytes(header) + data[8 + length :])

    return spoil


NO_SENSE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no bits": (_record(lambda r: r["inputs"]["scheme"]["grid"].pop("bits")), "no 'bits' where it is expected"),
    "bits": (_record(lambda r: r["inputs"]["scheme"]["grid"].update(bits=10**18)), "weights of 10{18} bits in groups"),
    "group": (_record(lambda r: r["inputs"]["scheme"]["grid"].update(group_size=0)), "in groups of 0"),
    "recipe": (_record(lambda r: r["inputs"].update(recipe=[1])), "makes no sense there"),
    "nested": (_nested, "nested too deeply"),
    "fractions": (_shape([64.0], "input_layernorm"), "makes no sense there"),
}


@pytest.mark.parametrize("kind", NO_SENSE)
def test_what_makes_no_sense_is_reported(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    out = quantize(source, tmp_path / "out", Scheme.preset("W4A16", format="gptq", group_size=32), None)
    spoil, text = NO_SENSE[kind]
    spoil(out)
    findings = Findings()
    check_independently(out, source, findings)
    assert {problem.code for problem in findings.problems} == {CODE}
    assert re.search(text, findings.problems[0].message)
    assert CliRunner().invoke(main, ["verify", str(out), "--source", str(source), "--independent"]).exit_code == 1
