"""Verification of a model in GGUF: its files, its record, its experts, and its equality with the source.

What must be there is what `plan.slabs` takes of a source in GGUF, or what `verification.gguf` drafts of safetensors.
`data` compares the tensors' bytes, whatever their blocks, and looks through those that are plain floats.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardxform.ask.experts import Pruned
from shardxform.ask.manifest import FORMAT, VERSION, Manifest
from shardxform.base.gguf import KeyValue
from shardxform.base.progress import Progress, peak_rss_bytes
from shardxform.base.tensors import uncollected
from shardxform.checkpoint.gguf import GgufModel, open_gguf
from shardxform.checkpoint.history import put_together, refuse_way, steps_since
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.checkpoint.table import WORK, Checkpoint, find_gguf
from shardxform.errors import CheckpointError, ManifestError, ShardxformError
from shardxform.model.layout import layout_of
from shardxform.plan.plan import source_inputs
from shardxform.plan.slabs import PrunedGguf, pruned_gguf, pruned_of_slabs
from shardxform.runtimes.gguf.slabs import Slabs, slabs_of
from shardxform.verification.findings import Findings, VerifyReport
from shardxform.verification.gguf_names import check_names
from shardxform.verification.source import Options

if TYPE_CHECKING:
    from shardxform.verification.gguf import Made

__all__ = ["verify_gguf"]

_FIGURES: Final = ("bytes_scanned", "bytes_compared", "tensors_compared", "tensors_differing", "tensors_digested")
_KINDS: Final = {"shards": "other files", "values": "other values"}


def verify_gguf(
    out: Path,
    *,
    source: GgufModel | Checkpoint | None = None,
    given: Options | None = None,
    quick: bool = False,
    written: bool = False,
    jobs: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
    independent: bool = False,
) -> VerifyReport:
    """Check the model in GGUF at `out`, and hold it against `source` if that is given.

    Args:
        out: a file, or a folder of one model; a defect of it is reported, never raised.
        source: what it was made from: another model in GGUF that was pruned, or a checkpoint of safetensors.
        given: what the caller says of its making; from shardxform.json where None.
        quick: read heads and small files only.
        written: although `quick`, hold every tensor against the digest that was taken when it was written.
        jobs: threads that read data.
        on_progress: called after every few dozen MB.
        independent: compare with `source` a second time; see `verification.independent_gguf`.

    Raises:
        CheckpointError: there is no GGUF at `out`, or the source is the output, or cannot be read; or `independent`
            without a source here.
        ManifestError: the manifest given is malformed, or does not fit the source.
        FamilyError, PlanError, SchemeError: the source cannot be pruned, or written as GGUF.

    """
    started, findings = time.monotonic(), Findings()
    if independent and (source is None or (source.table if isinstance(source, GgufModel) else source).remote):
        raise CheckpointError(f"{out}: an independent check reads the source itself, and needs it on this machine")
    if independent and isinstance(source, Checkpoint):
        refuse_way(source, read_record((out if out.is_dir() else out.parent) / PROVENANCE))
    seen = _look(out, source, given or Options(), findings)
    figures: Mapping[str, Any] = dict.fromkeys(_FIGURES, 0)
    compared: frozenset[str] = frozenset()
    if seen.model and (not quick or written):
        figures, compared = _check_data(seen, source, findings, jobs, on_progress, only_written=quick)
    tensors = seen.model.table.tensors if seen.model else {}
    rederived = None
    if independent and seen.model and source:
        rederived = _rederive(seen.model, source, given or Options(), findings)
    return VerifyReport(
        out=out,
        source=source.where if source else None,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        tensors=len(tensors),
        experts=_experts(seen.slabs) if seen.slabs else 0,
        unfinished=seen.unfinished,
        **{"tensors_derived": 0, "rounding": None, **figures},
        values_compared=len(compared),
        values_near=0,
        values_left=seen.left(compared),
        rederived=rederived,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _rederive(model: GgufModel, source: GgufModel | Checkpoint, given: Options, findings: Findings) -> int:
    """Compare by code of its own; gives the number of tensors, or of weights."""
    from shardxform.verification import independent_gguf as own

    files = [model.table.root / shard.name for shard in model.table.shards]
    if isinstance(source, Checkpoint):
        from shardxform.plan.gguf import as_weights

        told = {"text_only": given.text_only, "mtp": given.mtp}
        weights = as_weights(source)
        lists = given.lists(layout_of(weights.config, weights.tensors))
        return own.check_gguf_of_weights(files, source.root, findings, lists, **told)
    sources = [source.table.root / shard.name for shard in source.table.shards]
    lists = given.lists(pruned_of_slabs(slabs_of(source.metadata, source.table.tensors, source.where)))
    return own.check_gguf_independently(files, sources, findings, lists)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What heads and small files show; `wanted` is by the source, `digests` by the record."""

    model: GgufModel | None = None
    slabs: Slabs | None = None
    wanted: PrunedGguf | Made | None = None
    digests: Mapping[str, str] | None = None
    unfinished: bool = False

    @property
    def made(self) -> Made | None:
        """What it must hold of a checkpoint of safetensors."""
        return None if self.wanted is None or isinstance(self.wanted, PrunedGguf) else self.wanted

    def left(self, compared: frozenset[str]) -> dict[str, int]:
        """How many tensors were not compared, by the reason."""
        if not self.wanted or not self.model:
            return {}
        why: Mapping[str, str] = self.made.left if self.made else {}
        names = (name for name in self.model.table.tensors if name not in compared)
        return dict(Counter(why.get(name, "unknown") for name in names).most_common())


@uncollected()
def _look(out: Path, source: GgufModel | Checkpoint | None, given: Options, findings: Findings) -> _Seen:
    """Everything that needs no tensor data."""
    from shardxform.verification.files import check_digests, check_record

    root = out if out.is_dir() else out.parent
    if (root / WORK).is_dir() and out.is_dir():
        findings.problem("unfinished", ".", "left by an unfinished run; run the same command again to go on")
        return _Seen(unfinished=True)
    record = check_record(root, findings)
    try:
        first = find_gguf(out)
        if first is None:
            raise CheckpointError(f"{out}: no model in GGUF")
        model = open_gguf(first)
    except CheckpointError as e:
        findings.problem("shard", ".", str(e))
        return _Seen()
    if isinstance(source, GgufModel) and _first_of(source) == _first_of(model):
        raise CheckpointError(f"{out}: expected the model that it was made from as source, found itself")
    digests = check_digests(record, model.table, findings)
    slabs = _experts_of(model, findings)
    check_names(model, findings)
    if source is None:
        return _Seen(model=model, slabs=slabs, digests=digests)
    wanted: PrunedGguf | Made | None
    if isinstance(source, Checkpoint):
        from shardxform.verification.gguf import made_of  # which makes it once more

        wanted = made_of(source, record, given, findings)
    else:
        inputs = record.get("inputs")
        wanted = _wanted(source, given.manifest, inputs if isinstance(inputs, Mapping) else {}, findings)
    if wanted:
        _compare(wanted, model, findings)
    return _Seen(model=model, slabs=slabs, wanted=wanted, digests=digests)


def _first_of(model: GgufModel) -> Path:
    return model.table.root.resolve() / model.name


def _experts_of(model: GgufModel, findings: Findings) -> Slabs | None:
    """Where its experts lie; a model without experts has none, which is no problem."""
    if not any(key.endswith(".expert_count") for key in model.metadata):
        return None
    try:
        return slabs_of(model.metadata, model.table.tensors, model.where)
    except ShardxformError as e:
        findings.problem("experts", ".", str(e).removeprefix(f"{model.where}: "))
        return None


def _experts(slabs: Slabs) -> int:
    return slabs.num_experts * (len(slabs.moe_layers) + len(slabs.mtp_layers))


# -- against the source -----------------------------------------------------------------------------------------------


def _wanted(
    source: GgufModel,
    given: Manifest | str | os.PathLike[str] | None,
    inputs: Mapping[str, object],
    findings: Findings,
) -> PrunedGguf | None:
    """What the output must hold; None when what OUT records does not lead to it."""
    of = pruned_of_slabs(slabs_of(source.metadata, source.table.tensors, source.where))
    if len(steps := steps_since(source.table, inputs, None)) > 1:
        put_together(source.table, steps)
    _check_origin(source, inputs, findings)
    if given is not None:
        manifest = given if isinstance(given, Manifest) else Manifest.load(given, of)
    elif inputs.get("manifest"):
        found = _recorded(inputs["manifest"], of, findings)
        if found is None:
            return None
        manifest = found
    else:
        findings.problem("source-manifest", PROVENANCE, "no manifest is recorded, and none was given")
        return None
    return pruned_gguf(source, manifest)


def _recorded(recorded: object, of: Pruned, findings: Findings) -> Manifest | None:
    try:
        if not isinstance(recorded, Mapping):
            raise ManifestError("manifest: expected an object")
        value = {"format": FORMAT, "version": VERSION, **recorded}
        return Manifest.from_dict(value, where="its manifest", layout=of)
    except ManifestError as e:
        findings.problem("source-manifest", PROVENANCE, f"does not fit the source: {e}")
        return None


def _check_origin(source: GgufModel, inputs: Mapping[str, object], findings: Findings) -> None:
    """Warn when the output records another source: its bytes may still be equal, the comparison tells."""
    recorded = inputs.get("source")
    if not isinstance(recorded, Mapping):
        return
    actual = source_inputs(source.table, {})
    for key, what in _KINDS.items():
        if recorded.get(key) != actual[key]:
            findings.warn("other-source", PROVENANCE, f"made from a source with {what} than {source.where}")
            return


def _compare(wanted: PrunedGguf | Made, model: GgufModel, findings: Findings) -> None:
    """Compare names, dtypes, shapes and keys."""
    found = model.table.tensors
    for name, ref in wanted.tensors.items():
        if name not in found:
            findings.problem("source-missing", name, "missing, the source has it")
        elif found[name].spec != ref.spec:
            one, other = ((spec.dtype, list(spec.shape)) for spec in (found[name].spec, ref.spec))
            findings.problem("source-shape", name, f"{one[0]} {one[1]}, but {other[0]} {other[1]} by the source")
    for name in found.keys() - wanted.tensors.keys():
        findings.problem("source-extra", name, "the source gives no such tensor")
    keys = {each.key: each for head in wanted.metadata for each in head}
    there = {each.key: each for head in model.heads for each in head.metadata}
    for key in (key for key in [*keys, *(there.keys() - keys.keys())] if not key.startswith("split.")):
        if keys.get(key) != there.get(key):
            text = f"{key}: {_brief(there.get(key))}, but {_brief(keys.get(key))} by the source"
            findings.problem("source-key", model.name, text)


def _brief(each: KeyValue | None) -> str:
    if each is None:
        return "absent"
    if each.kind == "ARRAY":
        return f"an array of {each.count} {each.items}"
    text = repr(each.value)
    return f"{each.kind} {text if len(text) <= 60 else text[:57] + '...'}"


def _check_data(
    seen: _Seen,
    source: GgufModel | Checkpoint | None,
    findings: Findings,
    jobs: int,
    on_progress: Callable[[Progress], None] | None,
    *,
    only_written: bool,
) -> tuple[dict[str, Any], frozenset[str]]:
    """Everything that needs tensor data, and with it numpy; figures of the report, and the tensors compared."""
    from shardxform.verification.data import Against, check_data

    assert seen.model is not None
    against: Against | None = None
    if seen.made and isinstance(source, Checkpoint):
        against = Against(source.root, seen.made.same_bytes, remote=source.remote)
    elif isinstance(source, GgufModel) and isinstance(seen.wanted, PrunedGguf):
        against = Against(source.table.root, seen.wanted.tensors, remote=source.table.remote)
    figures = check_data(
        seen.model.table,
        None,
        against,
        findings,
        digests=seen.digests,
        only_written=only_written,
        jobs=jobs,
        on_progress=on_progress,
    )
    told: dict[str, Any] = {key: getattr(figures, key) for key in _FIGURES}
    if only_written:
        return told, figures.compared
    from shardxform.verification.gguf import check_blocks

    more = check_blocks(seen.model, seen.made, findings, jobs=jobs, on_progress=on_progress)
    for key in ("bytes_scanned", "bytes_compared", "tensors_compared", "tensors_differing"):
        told[key] += getattr(more, key)
    told |= {"tensors_derived": more.tensors_compared, "rounding": more.rounding}
    return told, figures.compared | more.compared
