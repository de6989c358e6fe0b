"""Verification of a checkpoint: its structure, its numbers, and its equality with the source it was made from.

Clients load many defective checkpoints without a word and serve garbage; so everything that can be known is looked
at, and everything found is listed. Reads only; memory is bounded by a few buffers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardxform.ask.manifest import Manifest
from shardxform.base.file_system import not_a_directory
from shardxform.base.progress import Progress, peak_rss_bytes
from shardxform.base.tensors import uncollected
from shardxform.checkpoint.history import refuse_way
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.checkpoint.table import Checkpoint, stopped
from shardxform.errors import CheckpointError, SchemeError, UnknownFamilyError
from shardxform.formats.config_names import QUANTIZATION
from shardxform.model.families import HOMES, family_origin
from shardxform.model.tied_head import tied_notes
from shardxform.plan.view import MtpMode
from shardxform.runtimes import as_family
from shardxform.verification.findings import Findings, Problem, Rounding, VerifyReport, WeightError
from shardxform.verification.structure import Structure, check_mlx, check_structure

if TYPE_CHECKING:
    from shardxform.verification.judged import StoredWeight
    from shardxform.verification.source import Options
    from shardxform.verification.wanted import Wanted

__all__ = ["DEFAULT_JOBS", "Problem", "Rounding", "VerifyReport", "WeightError", "verify"]

DEFAULT_JOBS: Final = min(4, os.cpu_count() or 1)


def verify(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Checkpoint | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    quick: bool = False,
    written: bool = False,
    jobs: int = DEFAULT_JOBS,
    on_progress: Callable[[Progress], None] | None = None,
    text_only: bool | None = None,
    mtp: MtpMode | None = None,
    tolerance: int | None = None,
    independent: bool = False,
) -> VerifyReport:
    """Check the checkpoint `out`, and hold it against `source` if that is given.

    Args:
        out: the checkpoint to check; a defect of it is reported, never raised.
        source: what it was made from, a directory or an open checkpoint. Every tensor, the config and the sidecars must
            follow from it.
        manifest: the keep manifest that it was made with; from OUT's shardxform.json where None.
        quick: read headers and small files only, no tensor data but a few bytes of an output head that is tied and
            stored all the same.
        written: although `quick`, hold every tensor against the digest that was taken when it was written.
        jobs: threads that read data.
        on_progress: called after every few dozen MB.
        text_only: made without the vision tower; from shardxform.json where None.
        mtp: as given to `pruned_view`; from shardxform.json where None.
        tolerance: codes that a quantized weight may be from the nearest; where None, 0 if shardxform.json says that
            weights were rounded to nearest, and 1 if they were tuned or it says nothing.
        independent: derive the output from `source` a second time, by code that shares nothing with what wrote it; see
            `verification.independent`.

    Raises:
        CheckpointError: `out` is no directory, the source cannot be read, or `independent` without a source here.
        ManifestError: the manifest given is malformed, or does not fit the source.
        FamilyError, PlanError: the source cannot be pruned.

    """
    started = time.monotonic()
    root, findings = Path(out), Findings()
    if _is_gguf(root):
        asked = {"manifest": manifest, "text_only": text_only, "mtp": mtp, "tolerance": tolerance}
        settings = {"quick": quick, "written": written, "jobs": jobs, "on_progress": on_progress}
        return _verify_gguf(root, source, asked, settings, independent=independent)
    if not root.is_dir():
        raise CheckpointError(f"{root}: {not_a_directory(root)}")
    origin = source if isinstance(source, Checkpoint) or source is None else Checkpoint.open(source)
    origin = as_family(origin) if origin else None
    if origin and os.path.realpath(origin.root) == os.path.realpath(root):
        raise CheckpointError(f"{root}: expected the checkpoint that it was made from as source, found itself")
    if independent and (origin is None or origin.remote):
        raise CheckpointError(f"{root}: an independent check reads the source itself, and needs it on this machine")
    if independent and origin:
        refuse_way(origin, read_record(root / PROVENANCE))
    from shardxform.verification.source import Options  # what compares is loaded with it

    given = Options(manifest=manifest, text_only=text_only, mtp=mtp, tolerance=tolerance)
    if why := stopped(root):
        findings.problem("unfinished", ".", why)
        seen = _Seen(unfinished=True)
    else:
        seen = _look(root, origin, given, findings)
    figures: Mapping[str, Any] = {**dict.fromkeys((*_FIGURES, "values_near"), 0), "rounding": None}
    compared: frozenset[str] = frozenset()
    if seen.checkpoint and seen.structure:
        for note in tied_notes(seen.checkpoint, seen.structure.layout, whole=not quick):
            findings.warn("tied-head", seen.structure.layout.head, note)
    if seen.checkpoint and (not quick or written):
        figures, compared = _check_data(seen.checkpoint, seen, findings, jobs, on_progress, only_written=quick)
    rederived = _rederive(root, origin, given, findings) if independent and origin and seen.checkpoint else None
    members = _members(seen)
    return VerifyReport(
        out=root,
        source=origin.where if origin else None,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        tensors=len(members),
        experts=seen.structure.experts if seen.structure else 0,
        unfinished=seen.unfinished,
        **figures,
        values_compared=sum(compared.issuperset(names) for names in members.values()),
        values_left=seen.left(compared, members),
        rederived=rederived,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _members(seen: _Seen) -> Mapping[str, Sequence[str]]:
    """By the name of every tensor of OUT, what its family calls the parts of it; but for MLX's stacks itself."""
    if seen.shards is None or QUANTIZATION not in seen.shards.config:
        return {name: (name,) for name in seen.shards.tensors} if seen.shards else {}
    from shardxform.runtimes.mlx import members_of

    return members_of(seen.shards)


def _is_gguf(root: Path) -> bool:
    """Whether it is GGUF, whole or not."""
    from shardxform.checkpoint.table import find_gguf

    try:
        return find_gguf(root) is not None
    except CheckpointError:
        return True


def _verify_gguf(
    root: Path,
    source: str | os.PathLike[str] | Checkpoint | None,
    asked: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    independent: bool,
) -> VerifyReport:
    from shardxform.checkpoint.gguf import GgufModel, open_gguf
    from shardxform.checkpoint.table import find_gguf
    from shardxform.verification.slabs import verify_gguf
    from shardxform.verification.source import Options

    origin: GgufModel | Checkpoint | None
    if source is None or isinstance(source, Checkpoint):
        origin = source
    else:
        first = find_gguf(Path(source))
        origin = open_gguf(first) if first else Checkpoint.open(source)
    return verify_gguf(root, source=origin, given=Options(**asked), independent=independent, **settings)


def _rederive(root: Path, origin: Checkpoint, given: Options, findings: Findings) -> int:
    """Compare by code of its own; gives the number of weights."""
    from shardxform.model.layout import layout_of
    from shardxform.verification.independent import check_independently

    lists = given.lists(layout_of(origin.config, origin.tensors)) if given.manifest is not None else None
    options = {"text_only": given.text_only, "mtp": given.mtp}
    return check_independently(root, origin.root, findings, lists, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What headers and small files show: OUT as far as it could be read, and what it must hold.

    `shards` has the tensors as they lie there, `checkpoint` as the family calls them. `wanted` is by the source,
    `digests` by the record.
    """

    checkpoint: Checkpoint | None = None
    shards: Checkpoint | None = None
    structure: Structure | None = None
    wanted: Wanted | None = None
    unfinished: bool = False
    digests: Mapping[str, str] | None = None

    def left(self, compared: frozenset[str], members: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """How many tensors were not compared, by the reason; of a stack of experts, that of the first that was not."""
        if not self.wanted or not self.checkpoint:
            return {}
        apart = ([name for name in names if name not in compared] for names in members.values())
        names = (names[0] for names in apart if names)
        return dict(Counter(self.wanted.left.get(name, "unknown") for name in names).most_common())


@uncollected()
def _look(root: Path, origin: Checkpoint | None, given: Options, findings: Findings) -> _Seen:
    """Everything that needs no tensor data."""
    from shardxform.verification.files import check_digests, check_files, check_record, check_sidecars, read_checkpoint
    from shardxform.verification.parts import rule_of
    from shardxform.verification.source import compare_tables, rebuild
    from shardxform.verification.wanted import known_of, wanted_of

    checkpoint, lost = read_checkpoint(root, findings)
    check_files(root, checkpoint, findings)
    record = check_record(root, findings)
    if checkpoint is None:
        if origin:
            rebuild(origin, None, given, known_of(origin, None, None, record), findings)
        return _Seen()
    _check_family(root, checkpoint, record, findings)
    digests = check_digests(record, checkpoint, findings)
    check_mlx(checkpoint, findings)
    shards, checkpoint = checkpoint, as_family(checkpoint)
    structure = check_structure(checkpoint, lost, findings)
    check_sidecars(checkpoint, structure.layout.wrapper if structure else None, findings)
    if origin is None:
        return _Seen(checkpoint=checkpoint, shards=shards, structure=structure, digests=digests)
    known = known_of(origin, checkpoint if structure else None, structure.stored if structure else None, record)
    wanted: Wanted | None = None
    if view := rebuild(origin, checkpoint, given, known, findings):
        wanted = wanted_of(view, checkpoint, known, findings)
        if known.stored and wanted.pairs:
            rule = rule_of(known.stored, known.record, given.tolerance, findings, known.packed)
            wanted = replace(wanted, rule=rule)
        compare_tables(wanted, checkpoint, lost, findings)
    return _Seen(checkpoint=checkpoint, shards=shards, structure=structure, wanted=wanted, digests=digests)


def _check_family(root: Path, checkpoint: Checkpoint, record: Mapping[str, object], findings: Findings) -> None:
    """Ask for a family from outside that the record names, and say that what is known by now is another text of it.

    Raises:
        UnknownFamilyError: names the file.

    """
    inputs = record.get("inputs")
    named = inputs.get("family") if isinstance(inputs, Mapping) else None
    if not isinstance(named, dict) or not named:
        return
    origin = next(iter(named))
    found = family_origin(checkpoint.config).get("family", {})
    known = checkpoint.config.get("model_type") in HOMES
    if not found and not known:
        raise UnknownFamilyError(f"{root}: made with the family of {origin}, which is not built in")
    if found != named and not known:
        findings.warn("family", PROVENANCE, f"made with another text of {origin} than that of {next(iter(found))}")


_FIGURES: Final = (
    "bytes_scanned",
    "bytes_compared",
    "tensors_compared",
    "tensors_differing",
    "tensors_derived",
    "tensors_digested",
)


def _stored_weights(checkpoint: Checkpoint) -> Iterator[StoredWeight]:
    """Weights in small floats or integers that are read by rules; none where the config does not say how."""
    from shardxform.formats.decoding import scan_decoded
    from shardxform.verification.judged import stored_weights

    with contextlib.suppress(SchemeError):
        yield from stored_weights(scan_decoded(checkpoint)[0].tensors.values())


def _check_data(
    checkpoint: Checkpoint,
    seen: _Seen,
    findings: Findings,
    jobs: int,
    on_progress: Callable[[Progress], None] | None,
    *,
    only_written: bool,
) -> tuple[dict[str, Any], frozenset[str]]:
    """Everything that needs tensor data, and with it numpy; figures of the report, and the tensors compared."""
    from shardxform.verification.data import Against, check_data
    from shardxform.verification.rounding import report_tallies

    structure, wanted = seen.structure, seen.wanted
    layout, stored = (structure.layout, structure.stored) if structure else (None, None)
    rule = wanted.rule if wanted else None
    comparison = None
    if wanted and not only_written:
        source = wanted.view.checkpoint
        shapes = {name: wanted.tensors[name].spec for name in wanted.derived}
        comparison = Against(
            root=source.root,
            tensors=wanted.same_bytes,
            derived=wanted.derived,
            shapes=shapes,
            pairs=wanted.pairs,
            rule=rule,
            healed=wanted.healed,
            remote=source.remote,
        )
    figures = check_data(
        checkpoint,
        layout,
        comparison,
        findings,
        stored=stored,
        shards=seen.shards,
        digests=seen.digests,
        weights=() if stored or only_written else _stored_weights(checkpoint),
        only_written=only_written,
        jobs=jobs,
        on_progress=on_progress,
    )
    rounding = report_tallies(figures.tallies, rule, findings) if rule and comparison else None
    told = {key: getattr(figures, key) for key in _FIGURES}
    return {**told, "values_near": len(figures.near), "rounding": rounding}, figures.compared
