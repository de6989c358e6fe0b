"""Verification against the source: what must be there is the view of the source that prune or quantize wrote.

Tables, config and sidecars are compared here; `data` compares the tensors' bytes, and rounded weights with theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, cast

from shardxform.checkpoint import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, ManifestError, SchemeError
from shardxform.heal_plan import healed_names
from shardxform.layout import COMPANIONS, Layout, layout_of
from shardxform.manifest import FORMAT, VERSION, Manifest
from shardxform.modules import modules_of
from shardxform.outdir import PROVENANCE
from shardxform.plan import source_inputs
from shardxform.quantize.stored import Stored, read_stored
from shardxform.recipe import HEALED
from shardxform.tensors import TensorRef
from shardxform.verification.files import file_bytes, is_document
from shardxform.verification.findings import Findings, Item
from shardxform.verification.parts import Pair, Rule, pair_of
from shardxform.view import MtpMode, View, pruned_view

__all__ = [
    "Options",
    "Wanted",
    "apart_from_healed",
    "compare_tables",
    "packed_source",
    "rebuild",
    "record_for",
    "wanted_of",
]

_MODES: Final = ("auto", "keep", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the output was made with; None where it is to be taken from shardxform.json, or the default."""

    manifest: Manifest | str | os.PathLike[str] | None = None
    text_only: bool | None = None
    mtp: MtpMode | None = None


def packed_source(source: Checkpoint, out: Checkpoint | None, stored: Stored | None) -> Stored | None:
    """A quantized source whose weights OUT holds in another form, as `convert` writes it; None for any other.

    Raises:
        CheckpointError: the source is not stored as its config says.

    """
    declared = source.config.get("quantization_config")
    if declared is None or out is None:
        return None
    try:
        packed = read_stored(source)
    except SchemeError:
        return None  # a form that is not understood can only have been copied
    if "quantization_config" not in out.config:
        return packed
    form, other = ((s.scheme.format, s.spellings, s.scheme.g_idx) if s else None for s in (packed, stored))
    return packed if stored and form != other else None


def record_for(source: Checkpoint, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a record against `source`: that of a converted output also tells how what was converted had been made."""
    origin, recorded = record.get("origin"), record.get("source")
    direct = isinstance(recorded, Mapping) and recorded.get("config") == source_inputs(source, {})["config"]
    return record if direct or not isinstance(origin, Mapping) else {**record, **origin}


def rebuild(
    source: Checkpoint,
    out: Checkpoint | None,
    options: Options,
    record: Mapping[str, Any],
    findings: Findings,
    packed: Stored | None = None,
) -> View | None:
    """Give the view of `source` that the output must equal; None when what OUT records does not lead to one.

    Args:
        source: the checkpoint that the output was made from.
        out: the output, as far as it could be read.
        options: given by the caller; they go before the record.
        record: `inputs` of shardxform.json, or empty.
        findings: added to.
        packed: see `packed_source`.

    Raises:
        ManifestError: the manifest given is malformed or does not fit the source.
        FamilyError, PlanError: the source cannot be pruned.

    """
    _check_origin(source, record, findings)
    if packed:
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        source = replace(source, tensors={**packed.weights, **packed.plain}, config=config)
    layout = layout_of(source.config, source.tensors)
    manifest = _given_manifest(options, layout)
    if options.manifest is None and record.get("manifest"):
        manifest = _recorded_manifest(record["manifest"], layout, findings)
        if manifest is None:
            return None
    recorded = record.get("options")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    text_only, mtp = options.text_only, options.mtp
    if text_only is None:
        text_only = recorded.get("text_only") is True
    if mtp is None:
        mtp = cast(MtpMode, recorded["mtp"]) if recorded.get("mtp") in _MODES else "auto"
    if manifest is None and out is not None and _fewer_experts(out, layout):
        findings.problem("source-manifest", PROVENANCE, "no manifest is recorded, and none was given (--manifest)")
        return None
    return pruned_view(source, manifest, text_only=text_only, mtp=mtp)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the output must hold.

    Attributes:
        view: of the source.
        tensors: those of the view as they are stored.
        parts: names of the parts of quantized weights.
        pairs: weights with the modules that stand for them.
        rule: how those were rounded.
        healed: tensors, and weights that are quantized, whose values do not follow from the source.

    """

    view: View
    tensors: Mapping[str, TensorRef]
    parts: frozenset[str] = frozenset()
    pairs: tuple[Pair, ...] = ()
    rule: Rule | None = None
    healed: frozenset[str] = frozenset()

    @property
    def same_bytes(self) -> dict[str, TensorRef]:
        """Tensors whose bytes are the source's."""
        return {name: ref for name, ref in self.tensors.items() if name not in self.healed}


def wanted_of(view: View, out: Checkpoint, stored: Stored | None, packed: Stored | None, findings: Findings) -> Wanted:
    """Take weights that `out` holds quantized out of the view's table, and un-fuse experts that it holds one by one."""
    tensors = dict(view.checkpoint.tensors)
    if packed and "quantization_config" not in out.config:
        return _dequantized(view, out, packed, findings)
    if out.config.get("quantization_config") is None or "quantization_config" in view.checkpoint.config:
        return Wanted(view, tensors)
    parts: set[str] = set()
    pairs: list[Pair] = []
    skipped: list[str] = []
    for module in modules_of(view.layout, view.checkpoint.tensors):
        if all(name in out.tensors for name in module.sources):
            continue
        for name in module.sources:
            tensors.pop(name, None)
        name = f"{module.name}.weight"
        found = {part for last in COMPANIONS if (part := f"{module.name}.{last}") in out.tensors}
        if stored and (pair := pair_of(name, module.weight, stored)):
            found |= {ref.name for _, ref in pair.module.parts}
            pairs.extend(_comparable(pair, stored, skipped, findings))
        elif found:
            skipped.append(module.name)
        if found:
            parts |= found
        else:
            tensors[name] = module.weight.renamed(name)
    if skipped:
        more = f", such as {skipped[0]}"
        findings.warn("rounded", ".", f"{len(skipped)} quantized modules are not held against the source{more}")
    if packed:  # what OUT holds in 16 bits has no bytes to compare with
        tensors = {name: ref for name, ref in tensors.items() if name not in packed.weights or name not in out.tensors}
    return Wanted(view, tensors, frozenset(parts), tuple(pairs))


def _dequantized(view: View, out: Checkpoint, packed: Stored, findings: Findings) -> Wanted:
    """A 16-bit output of a quantized source: its weights must be there; their values are not looked at."""
    layout = layout_of(out.config, out.tensors)
    parts: set[str] = set()
    tensors = dict(view.checkpoint.tensors)
    for module in modules_of(layout, out.tensors):
        if f"{module.name}.weight" in packed.weights:
            parts |= set(module.sources)
            tensors.pop(f"{module.name}.weight", None)
    findings.warn("dequantized", ".", f"{len(parts)} dequantized tensors are not held against the quantized source")
    return Wanted(view, tensors, frozenset(parts))


def apart_from_healed(wanted: Wanted, record: Mapping[str, Any], facts: object) -> Wanted:
    """Leave out the values that healing gave, which nothing but the record tells.

    Args:
        wanted: what the output must hold.
        record: `inputs` of shardxform.json, or empty.
        facts: what it says of blocks: how each was healed, if at all. Without it, all that may have been is left out.

    """
    recipe = record.get("recipe")
    heal = recipe.get("heal") if isinstance(recipe, Mapping) else None
    if not isinstance(heal, Mapping):
        return wanted
    widest = next((what for what in HEALED if what == heal.get("what")), "all")
    view, done = wanted.view, dict(_healed_blocks(facts))
    names: dict[str | None, frozenset[str]] = {
        what: frozenset(healed_names(view.layout, view.layout.places, what)) for what in HEALED
    }
    here = {name for name in names[widest] if name in names.get(done.get(view.layout.places[name].layer, widest), ())}
    modules = modules_of(view.layout, view.checkpoint.tensors)
    single = {f"{module.name}.weight" for module in modules if not here.isdisjoint(module.sources)}
    pairs = tuple(pair for pair in wanted.pairs if pair.name not in single)
    left = {pair.name for pair in wanted.pairs} & single
    return replace(wanted, pairs=pairs, healed=frozenset(left | ((here | single) & wanted.tensors.keys())))


def _healed_blocks(facts: object) -> Iterator[tuple[int | None, str | None]]:
    """Layers with what was healed in them, None for those that stayed as they were pruned."""
    blocks = facts.get("blocks") if isinstance(facts, Mapping) else None
    for block in blocks if isinstance(blocks, list) else ():
        healed = block.get("healed") if isinstance(block, Mapping) else None
        if not isinstance(healed, Mapping):
            continue
        what = healed.get("what", "")
        if type(block.get("layer")) is int and (what is None or what in list(HEALED)):
            yield block["layer"], what


def _comparable(pair: Pair, stored: Stored, skipped: list[str], findings: Findings) -> Iterator[Pair]:
    spec, found = pair.weight.spec, stored.weights[pair.name].spec.shape
    if spec.shape != found:
        text = f"stands for a weight of shape {list(found)}, but {list(spec.shape)} by the source"
        findings.problem("source-shape", pair.words, text)
    elif spec.dtype in ("BF16", "F16", "F32") and spec.nbytes:
        yield pair
    else:
        skipped.append(pair.module.name)


def compare_tables(wanted: Wanted, out: Checkpoint, lost: frozenset[str], findings: Findings) -> None:
    """Compare names, dtypes, shapes, config and sidecars; tensors named in an earlier problem are left out."""
    source, places = wanted.view.checkpoint, wanted.view.layout.places
    items: list[Item] = []
    loose: list[tuple[str, str, str]] = []

    def add(code: str, name: str, detail: str) -> None:
        if place := places.get(name):
            items.append(Item(code, name, place, detail))
        else:
            loose.append((code, name, detail))

    for name, ref in wanted.tensors.items():
        found = out.tensors.get(name)
        if found is None:
            if name not in lost and name not in findings.named:
                add("source-missing", name, "missing, the source has it")
        elif found.spec.dtype != ref.spec.dtype:
            add("source-dtype", name, f"{found.spec.dtype}, but {ref.spec.dtype} in the source")
        elif found.spec.shape != ref.spec.shape and name not in findings.named:
            shapes = f"shape {list(found.spec.shape)}, but {list(ref.spec.shape)} by the source"
            add("source-shape", name, shapes)
    for name in out.tensors:
        if name not in wanted.tensors and name not in wanted.parts and name not in findings.named:
            loose.append(("source-extra", name, "the source gives no such tensor"))
    findings.items(items, wanted.view.layout.num_experts)
    for code, name, detail in loose:
        findings.problem(code, name, detail)
    _compare_configs(source.config, out.config, findings)
    _compare_sidecars(source, out, findings)


_ABSENT: Final = object()


def _given_manifest(options: Options, layout: Layout) -> Manifest | None:
    manifest = options.manifest
    return manifest if manifest is None or isinstance(manifest, Manifest) else Manifest.load(manifest, layout)


def _recorded_manifest(recorded: object, layout: Layout, findings: Findings) -> Manifest | None:
    try:
        if not isinstance(recorded, Mapping):
            raise ManifestError("manifest: expected an object")
        value = {"format": FORMAT, "version": VERSION, **recorded}
        return Manifest.from_dict(value, where="its manifest", layout=layout)
    except ManifestError as e:
        findings.problem("source-manifest", PROVENANCE, f"does not fit the source: {e}")
        return None


def _fewer_experts(out: Checkpoint, layout: Layout) -> bool:
    """Whether the output is pruned, by its config; only a plain count is believed."""
    home = out.config.get(layout.wrapper.text_key or "", out.config)
    counts = [home.get(key) for key in layout.family.count_keys] if isinstance(home, Mapping) else []
    return any(type(count) is int and count < layout.num_experts for count in counts)


def _check_origin(source: Checkpoint, record: Mapping[str, Any], findings: Findings) -> None:
    """Warn when the output records another source: its bytes may still be equal, the comparison tells."""
    recorded = record.get("source")
    if not isinstance(recorded, Mapping):
        return
    actual = source_inputs(source, {})
    for key, what in (("config", "another config.json"), ("shards", "other shards")):
        if recorded.get(key) != actual[key]:
            findings.warn("other-source", PROVENANCE, f"made from a source with {what} than {source.where}")


def _compare_configs(source: Mapping[str, Any], out: Mapping[str, Any], findings: Findings) -> None:
    for path, expected, found in _differences(source, out):
        if path != "quantization_config" or expected is not _ABSENT:  # new in an output that was quantized
            text = f"{path}: {_brief(found)}, but {_brief(expected)} by the source"
            findings.problem("source-config", CONFIG, text)


def _differences(expected: object, found: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Every place where two configs differ: its path, what was expected, what was found."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(expected.get(key, _ABSENT), found.get(key, _ABSENT), inner)
    elif type(expected) is not type(found) or expected != found:
        yield path, expected, found


def _compare_sidecars(view: Checkpoint, out: Checkpoint, findings: Findings) -> None:
    for sidecar in view.sidecars:
        name = sidecar.name
        report = findings.warn if is_document(name) else findings.problem
        if not (out.root / name).is_file():
            report("source-sidecar", name, "missing, the source has it")
        elif not _same_file(view.file(name), out.root / name):
            report("source-sidecar", name, "differs from the source's")


def _same_file(expected: Path, found: Path) -> bool:
    try:
        if expected.stat().st_size != found.stat().st_size:
            return False
        pieces = zip_longest(file_bytes(expected), file_bytes(found))
        return all(one == other for one, other in pieces)
    except OSError as e:
        if Path(e.filename or "") == expected:
            raise CheckpointError(f"{expected}: {e.strerror}") from e
        return False


def _brief(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
