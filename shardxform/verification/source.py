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

from shardxform.ask.experts import Pruned
from shardxform.ask.manifest import FORMAT, VERSION, Manifest
from shardxform.ask.recipe import HEALED, Heal
from shardxform.checkpoint.record import PROVENANCE
from shardxform.checkpoint.sidecars import is_document
from shardxform.checkpoint.table import CONFIG, Checkpoint
from shardxform.errors import CheckpointError, ManifestError
from shardxform.formats.config_names import declared_in, method_of
from shardxform.formats.decoding import decoded
from shardxform.formats.stored import as_plain
from shardxform.model.layout import Layout, layout_of, value_at
from shardxform.plan.plan import source_inputs
from shardxform.plan.steps import healed_view
from shardxform.plan.view import MtpMode, View, pruned_view
from shardxform.runtimes import mlx
from shardxform.verification.files import file_bytes
from shardxform.verification.findings import Findings, Item
from shardxform.verification.wanted import Known, Wanted, heal_of

__all__ = ["Options", "check_origin", "compare_tables", "given_manifest", "rebuild", "recorded_manifest"]

_MODES: Final = ("auto", "keep", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the output was made with, as the caller says; None is for shardxform.json to say, or the default."""

    manifest: Manifest | str | os.PathLike[str] | None = None
    text_only: bool | None = None
    mtp: MtpMode | None = None
    tolerance: int | None = None

    def lists(self, of: Layout | Pruned) -> dict[str, Any] | None:
        """The manifest as plain lists, whatever its form; None where there is none.

        Raises:
            ManifestError: it is malformed, or does not fit the source.

        """
        if self.manifest is None:
            return None
        manifest = self.manifest if isinstance(self.manifest, Manifest) else Manifest.load(self.manifest, of)
        both = {"keep": manifest.keep, "mtp_keep": manifest.mtp_keep}
        lists = {name: {str(layer): list(ids) for layer, ids in each.items()} for name, each in both.items()}
        return {**lists, **({"width": manifest.width.to_dict()} if manifest.width else {})}


def rebuild(
    source: Checkpoint, out: Checkpoint | None, options: Options, known: Known, findings: Findings
) -> View | None:
    """Give the view of `source` that the output must equal; None when what OUT records does not lead to one.

    Args:
        source: the checkpoint that the output was made from.
        out: the output, as far as it could be read.
        options: given by the caller; they go before the record.
        known: how it was made.
        findings: added to.

    Raises:
        ManifestError: the manifest given is malformed or does not fit the source.
        FamilyError, PlanError: the source cannot be pruned.

    """
    record, packed = known.record, known.packed
    check_origin(source, record, findings)
    if packed:
        source = as_plain(source, packed)
    elif out is not None and _is_decoded(source, out, record):
        source = decoded(source) or source
    layout = layout_of(source.config, source.tensors)
    manifest = given_manifest(options, layout)
    if manifest and record.get("manifest"):
        made_with = recorded_manifest(record["manifest"], layout, Findings())
        told, given = ((each.keep, each.mtp_keep, each.width) for each in (made_with or manifest, manifest))
        if told != given:
            findings.warn("source-manifest", PROVENANCE, "records another manifest than the one given")
    elif record.get("manifest"):
        manifest = recorded_manifest(record["manifest"], layout, findings)
        if manifest is None:
            return None
    recorded = record.get("options")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    text_only, mtp = options.text_only, options.mtp
    if text_only is None:
        text_only = recorded.get("text_only") is True
    if mtp is None and out is not None and _method(out) == "mlx" != _method(source):
        mtp = "drop"
    elif mtp is None:
        mtp = cast(MtpMode, recorded["mtp"]) if recorded.get("mtp") in _MODES else "auto"
    if manifest is None and out is not None and _fewer_experts(out, layout):
        findings.problem("source-manifest", PROVENANCE, "no manifest is recorded, and none was given")
        return None
    return _as_written(pruned_view(source, manifest, text_only=text_only, mtp=mtp), out, record)


def _as_written(view: View, out: Checkpoint | None, record: Mapping[str, object]) -> View:
    """The view as a format has it, or as healing wrote it."""
    if out is not None and _method(out) == "mlx":
        told = mlx.as_read(view.checkpoint.config, view.layout)
        view = replace(view, checkpoint=replace(view.checkpoint, config=told))
    if not _in_16bit(record):
        return view
    what = (heal_of(record) or {}).get("what")
    return healed_view(view, Heal(what=cast(Any, what if what in HEALED else "auto"), encoding="16bit"))[0]


def _in_16bit(record: Mapping[str, object]) -> bool:
    """Whether what was healed of small floats was written in 16 bits."""
    return (heal_of(record) or {}).get("encoding") == "16bit"


def _is_decoded(source: Checkpoint, out: Checkpoint, record: Mapping[str, object]) -> bool:
    """Whether OUT holds other weights than those that are stored in the source."""
    if record.get("command") in ("convert", "quantize"):
        return True
    return _method(out) != _method(source) and not _in_16bit(record)


def _method(checkpoint: Checkpoint) -> object:
    declared = declared_in(checkpoint.config)
    return method_of(declared) if isinstance(declared, Mapping) else None


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


def given_manifest(options: Options, layout: Layout) -> Manifest | None:
    """The manifest that the caller gives; raises `ManifestError` where it does not fit."""
    manifest = options.manifest
    return manifest if manifest is None or isinstance(manifest, Manifest) else Manifest.load(manifest, layout)


def recorded_manifest(recorded: object, layout: Layout, findings: Findings) -> Manifest | None:
    """The manifest of a record; None where it does not fit, which is reported."""
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
    home = value_at(out.config, layout.wrapper.text_key) if layout.wrapper.text_key else out.config
    counts = [value_at(home, key) for key in layout.family.count_keys] if isinstance(home, Mapping) else []
    return any(type(count) is int and count < layout.in_set for count in counts)


def check_origin(source: Checkpoint, record: Mapping[str, object], findings: Findings) -> None:
    """Warn when the output records another source: its bytes may still be equal, the comparison tells."""
    recorded = record.get("source")
    if not isinstance(recorded, Mapping):
        return
    actual = source_inputs(source, {})
    kinds = {"config": "another config.json", "shards": "other shards", "values": "other values"}
    for key, what in kinds.items():
        if key in recorded and key in actual and recorded[key] != actual[key]:
            findings.warn("other-source", PROVENANCE, f"made from a source with {what} than {source.where}")
            if key == "shards":  # which have other values by their nature
                break


def _compare_configs(source: Mapping[str, object], out: Mapping[str, object], findings: Findings) -> None:
    declared = "quantization_config"  # which declares nothing when it is null or empty
    source = {key: value for key, value in source.items() if key != declared or value}
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
    elif expected is not found and (type(expected) is not type(found) or expected != found):  # NaN is not itself
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
