"""Tensors that count experts in every way there is, against numpy: which dimension, several rows each, rows of others,
values that are ids, one tensor for all layers, stacks of gate and up projection apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from build import Raw, random_tensors, raw, read_checkpoint, write_checkpoint
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shardxform.ask.manifest import Manifest
from shardxform.base.tensors import ByteRange, Remade, TensorRef, TensorSpec
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError, ShardxformError
from shardxform.execution.runner import RunOptions, run
from shardxform.formats.matrices import matrices_of
from shardxform.formats.remaking import remade_rows
from shardxform.model import families
from shardxform.model.families.base import ExpertLayout, Family, Slicing, Template, Wrapper, experts
from shardxform.model.layout import layout_of
from shardxform.plan.inspection import count_parameters
from shardxform.plan.plan import Remake
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions
from shardxform.verification import verify

_LAYOUT = ExpertLayout(stack_home="moe", stacks=("gate_proj", "up_proj", "down_proj"), gate="separate")
FAMILY = Family(
    name="sliced_every_way",
    wrappers=(Wrapper("SlicedForCausalLM", "sliced_every_way", None, "model."),),
    count_keys=("num_experts",),
    root=(
        Template("{decoder}shared.weight", "E,H", "router"),
        Template("{decoder}of_layer.{l}.bias", "E", "router"),
    ),
    block=(
        Template("gate.weight", "H,E", "router"),
        Template("gate.bias", "1,E", "router"),
        Template("gate.two", "2,E", "router"),
        Template("gate.middle", "2,E,H", "router"),
        Template("classifier.weight", "E+Z,H", "router"),
        Template("classifier.bias", "E+Z", "router"),
        Template("gate.columns", "H,E+Z", "router"),
        Template("mlp.w1", "E*I,H", "routed experts"),
        Template("mlp.w2", "H,E*I", "routed experts"),
        Template("tid2eid", "V,K", "router", ids=True),
        *experts(layout=_LAYOUT),
    ),
    symbols={"H": "hidden_size", "I": "intermediate_size", "K": "num_experts_per_tok", "V": "vocab_size", "Z": "zeros"},
    experts=_LAYOUT,
)


@pytest.fixture(autouse=True, scope="module")
def known() -> Iterator[None]:
    module = ModuleType("shardxform.model.families.sliced_every_way")
    module.FAMILY = FAMILY  # type: ignore[attr-defined]
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(families, "HOMES", {**families.HOMES, "sliced_every_way": "sliced_every_way"})
    yield
    patch.undo()


def source_of(c: dict[str, Any], root: Path, dtype: str = "F32") -> Checkpoint:
    e, h, i, z = c["num_experts"], c["hidden_size"], c["intermediate_size"], c["zeros"]
    shapes: dict[str, tuple[int, ...]] = {"model.shared.weight": (e, h)}
    tables: dict[str, Raw] = {}
    generator = np.random.default_rng(e * 100 + h)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"model.of_layer.{layer}.bias": (e,),
            at + "gate.weight": (h, e),
            at + "gate.bias": (1, e),
            at + "gate.two": (2, e),
            at + "gate.middle": (2, e, h),
            at + "classifier.weight": (e + z, h),
            at + "classifier.bias": (e + z,),
            at + "gate.columns": (h, e + z),
            at + "mlp.w1": (e * i, h),
            at + "mlp.w2": (h, e * i),
            at + "moe.gate_proj.weight": (e, i, h),
            at + "moe.up_proj.weight": (e, i, h),
            at + "moe.down_proj.weight": (e, h, i),
        }
        rows = [generator.permutation(e)[: c["num_experts_per_tok"]] for _ in range(c["vocab_size"])]
        tables[at + "tid2eid"] = raw(np.array(rows, np.int64))
    config = {"model_type": "sliced_every_way", "architectures": ["SlicedForCausalLM"], **c}
    return Checkpoint.open(write_checkpoint(root, {**random_tensors(shapes, dtype=dtype), **tables}, config, shards=2))


def value(tensors: dict[str, Raw], name: str) -> np.ndarray:
    """Bits of a tensor."""
    code = {"I64": "<i8", "F32": "<u4", "BF16": "<u2"}[tensors[name].dtype]
    return np.frombuffer(tensors[name].data, code).reshape(tensors[name].shape)


def renumbered(table: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    """One id after the other, by the rule: the next by number that stays and that the row does not have yet."""
    out = np.full_like(table, -1)
    for row, ids in enumerate(table):
        has = {int(each) for each in ids if each in keep}
        for slot, each in enumerate(ids):
            found = int(each)
            if found not in keep:
                found = next(e for step in range(1, 200) if (e := (each + step) % 100) in keep and e not in has)
                has.add(found)
            out[row, slot] = keep.index(found)
    return out


CONFIG = {
    "num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2, "hidden_size": 8, "intermediate_size": 3,
    "vocab_size": 20, "zeros": 2,
}  # fmt: skip
KEEP = (0, 3, 4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[int, tuple[int, ...]], str]:
    e = draw(st.integers(2, 9))
    kept = draw(st.integers(1, e))
    keep = {layer: tuple(sorted(draw(st.permutations(range(e)))[:kept])) for layer in range(draw(st.integers(1, 2)))}
    c = {
        "num_hidden_layers": len(keep),
        "num_experts": e,
        "num_experts_per_tok": draw(st.integers(1, kept)),
        "hidden_size": draw(st.sampled_from([4, 6, 66, 130])),
        "intermediate_size": draw(st.integers(1, 3)) * 2,
        "vocab_size": draw(st.integers(1, 40)),
        "zeros": draw(st.integers(0, 3)),
    }
    return c, keep, draw(st.sampled_from(["F32", "BF16"]))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_a_pruned_output_is_what_numpy_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], dict[int, tuple[int, ...]], str]
) -> None:
    c, keep, dtype = case
    assume(len(set(keep.values())) == 1 or len(keep) == 1)
    root = tmp_path_factory.mktemp("sliced")
    source = source_of(c, root / "in", dtype)
    run(plan_prune(source, Manifest(keep=keep), ViewOptions(max_shard_bytes=3000)), root / "out", RunOptions(jobs=1))
    before, after = read_checkpoint(root / "in"), read_checkpoint(root / "out")
    assert before.keys() == after.keys()
    e, i = c["num_experts"], c["intermediate_size"]
    for name in before:
        old, new = value(before, name), value(after, name)
        layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        ids = np.array(keep[layer])
        several = np.concatenate([np.arange(each * i, each * i + i) for each in ids])
        others = np.concatenate([ids, np.arange(e, e + c["zeros"])])
        index: Any = {
            "gate.weight": (slice(None), ids), "gate.bias": (slice(None), ids), "gate.two": (slice(None), ids),
            "gate.middle": (slice(None), ids), "classifier.weight": others, "classifier.bias": others,
            "gate.columns": (slice(None), others), "mlp.w1": several, "mlp.w2": (slice(None), several),
        }.get(".".join(name.split(".")[3:]), ids)  # fmt: skip
        wanted = renumbered(old, keep[layer]) if name.endswith("tid2eid") and len(ids) < e else old
        np.testing.assert_array_equal(new, wanted if name.endswith("tid2eid") else old[index], name)
    report = verify(root / "out", source=source)
    assert report.problems == ()
    assert report.tensors_differing == 0
    assert Checkpoint.open(root / "out").config["num_experts"] == len(ids)


def test_what_is_worked_out_is_a_step_of_its_own_and_the_same_after_a_kill(tmp_path: Path) -> None:
    source = source_of({**CONFIG, "hidden_size": 80}, tmp_path / "in")
    plan = plan_prune(source, Manifest(keep=dict.fromkeys((0, 1), KEEP)))
    steps = [step for step in plan.steps if isinstance(step, Remake)]
    assert [step.remade.source.name.split(".")[-1] for step in steps].count("tid2eid") == 2
    assert len(steps) == 8  # tid2eid, gate.weight, gate.columns, mlp.w2 of two layers
    assert all(step.peak_bytes < 200 << 20 for step in steps)
    assert plan.fingerprint == plan_prune(source, Manifest(keep=dict.fromkeys((0, 1), KEEP))).fingerprint
    assert any("names experts by token" in note for note in plan.notes)
    for at, jobs in enumerate((1, 3)):
        run(plan, tmp_path / f"out-{at}", RunOptions(jobs=jobs))
    one, other = (read_checkpoint(tmp_path / f"out-{at}") for at in (0, 1))
    assert one == other


def test_defects_in_what_is_worked_out_are_found(tmp_path: Path) -> None:
    source = source_of({**CONFIG, "hidden_size": 80}, tmp_path / "in")
    run(plan_prune(source, Manifest(keep=dict.fromkeys((0, 1), KEEP))), tmp_path / "out", RunOptions(jobs=1))
    good, config = read_checkpoint(tmp_path / "out"), dict(Checkpoint.open(tmp_path / "out").config)
    name = "model.layers.1.tid2eid"
    table = value(good, name).copy()
    table[7, 1] = 5
    bad = write_checkpoint(tmp_path / "bad", {**good, name: raw(table)}, config)
    found = {(problem.code, problem.where) for problem in verify(bad).problems}
    assert [code for code, _ in found] == ["expert-id"]
    table[7] = table[7][::-1]
    table[7, 0] = 0 if value(good, name)[7, 0] else 1
    table[7, 1] = value(good, name)[7, 1]
    bad = write_checkpoint(tmp_path / "other", {**good, name: raw(table)}, config)
    assert verify(bad).problems == ()
    options = {"manifest": Manifest(keep=dict.fromkeys((0, 1), KEEP))}
    assert {p.code for p in verify(bad, source=source, **options).problems} == {"source-bytes"}
    for tensor in ("model.layers.0.gate.weight", "model.layers.0.classifier.bias", "model.layers.0.mlp.w1"):
        values = value(good, tensor).copy()
        values.flat[-1] ^= 1
        changed = Raw(good[tensor].dtype, good[tensor].shape, values.tobytes())
        bad = write_checkpoint(tmp_path / tensor, {**good, tensor: changed}, config)
        problems = verify(bad, source=source, **options).problems
        assert [p.code for p in problems] == ["source-bytes"]
        assert ("expert" in problems[0].message) == ("bias" not in tensor)  # a row that is no expert's
    wider = {**good, "model.layers.0.gate.weight": read_checkpoint(tmp_path / "in")["model.layers.0.gate.weight"]}
    problems = verify(write_checkpoint(tmp_path / "wider", wider, config)).problems
    assert [(p.code, "6 experts, but config.json says 3" in p.message) for p in problems] == [("expert-count", True)]


def test_what_all_layers_share_needs_one_choice(tmp_path: Path) -> None:
    source = source_of(CONFIG, tmp_path / "in")
    with pytest.raises(PlanError, match="every layer keeps the same experts"):
        plan_prune(source, Manifest(keep={0: (0, 1, 2), 1: (0, 1, 3)}))


def test_ids_that_name_no_expert_are_refused(tmp_path: Path) -> None:
    tensors = read_checkpoint(source_of(CONFIG, tmp_path / "in").root)
    table = value(tensors, "model.layers.0.tid2eid").copy()
    table[3, 1] = -1
    config = dict(Checkpoint.open(tmp_path / "in").config)
    bad = Checkpoint.open(write_checkpoint(tmp_path / "bad", {**tensors, "model.layers.0.tid2eid": raw(table)}, config))
    with pytest.raises(ShardxformError, match="row 3 names expert -1, but there are 6"):
        run(plan_prune(bad, Manifest(keep=dict.fromkeys((0, 1), KEEP))), tmp_path / "out", RunOptions(jobs=1))
    floats = {**tensors, "model.layers.0.tid2eid": Raw("F32", (20, 2), bytes(160))}
    bad = Checkpoint.open(write_checkpoint(tmp_path / "floats", floats, config))
    with pytest.raises(PlanError, match="expected rows of experts' ids"):
        plan_prune(bad, Manifest(keep=dict.fromkeys((0, 1), KEEP)))


@given(st.data())
def test_renumbered_rows_name_as_many_experts_as_before(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 12))
    kept = data.draw(st.integers(1, experts))
    keep = tuple(sorted(data.draw(st.permutations(range(experts)))[:kept]))
    columns = data.draw(st.integers(1, kept))
    rows = np.array([data.draw(st.permutations(range(experts)))[:columns] for _ in range(5)], np.int64)
    ref = TensorRef(TensorSpec("t", "I64", rows.shape), (ByteRange("f", 0, rows.nbytes),))
    out = remade_rows(Remade(ref, keep, "ids", experts), rows)
    assert all(len(set(row)) == columns for row in out.tolist())
    assert ((out >= 0) & (out < kept)).all()
    stays = np.isin(rows, keep)
    np.testing.assert_array_equal(np.array(keep)[out[stays]], rows[stays])


def test_stacks_apart_are_matrices_of_each_expert(tmp_path: Path) -> None:
    source = source_of(CONFIG, tmp_path / "in")
    layout = layout_of(source.config, source.tensors)
    found = {each.name: each for each in matrices_of(layout, source.tensors) if each.expert is not None}
    assert len(found) == 2 * 3 * 6
    tensors = read_checkpoint(source.root)
    for part in ("gate_proj", "up_proj", "down_proj"):
        each = found[f"model.layers.1.mlp.experts.4.{part}"]
        (piece,) = each.weight.ranges
        with (source.root / piece.file).open("rb") as file:
            file.seek(piece.offset)
            assert file.read(piece.length) == value(tensors, f"model.layers.1.moe.{part}.weight")[4].tobytes()


def test_parameters_are_counted_apart_from_what_is_no_experts(tmp_path: Path) -> None:
    source = source_of(CONFIG, tmp_path / "in")
    found, fewer = count_parameters(source, None), tmp_path / "out"
    run(plan_prune(source, Manifest(keep=dict.fromkeys((0, 1), KEEP))), fewer, RunOptions(jobs=1))
    count = sum(np.prod(each.shape) for each in read_checkpoint(source.root).values())
    assert found.total(6) == count
    assert found.total(3) == sum(np.prod(each.shape) for each in read_checkpoint(fewer).values())


def test_shapes_that_say_no_rule_are_refused() -> None:
    assert Template("a", "2,E*I,H", "router").slicing == Slicing(1, several=True)
    assert Template("a", "E+Z", "router").slicing == Slicing(0, others=True)
    assert Template("a", "?", "router").slicing is None
    for shape in ("Z+E,H", "I*E", "E,E", "E+E", "E*E"):
        with pytest.raises(ValueError, match="expected E once"):
            _ = Template("a", shape, "router").slicing
