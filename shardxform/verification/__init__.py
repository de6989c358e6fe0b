"""Verification of a checkpoint: its structure, its numbers, and its equality with the source it was made from.

Clients load many defective checkpoints without a word and serve garbage; so everything that can be known is looked
at, and everything found is listed. Reads only; memory is bounded by a few buffers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shardxform.checkpoint import Checkpoint
from shardxform.errors import CheckpointError
from shardxform.manifest import Manifest
from shardxform.progress import Progress, peak_rss_bytes
from shardxform.verification.files import check_files, check_record, check_sidecars, read_checkpoint
from shardxform.verification.findings import Findings, Problem
from shardxform.verification.parts import rule_of
from shardxform.verification.report import Rounding, VerifyReport, WeightError
from shardxform.verification.source import (
    Options,
    Wanted,
    apart_from_healed,
    compare_tables,
    packed_source,
    rebuild,
    record_for,
    wanted_of,
)
from shardxform.verification.structure import Structure, check_structure
from shardxform.view import MtpMode

__all__ = ["Problem", "Rounding", "VerifyReport", "WeightError", "verify"]

_DEFAULT_JOBS: Final = min(4, os.cpu_count() or 1)


def verify(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Checkpoint | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    quick: bool = False,
    jobs: int = _DEFAULT_JOBS,
    on_progress: Callable[[Progress], None] | None = None,
    text_only: bool | None = None,
    mtp: MtpMode | None = None,
    tolerance: int | None = None,
) -> VerifyReport:
    """Check the checkpoint `out`, and hold it against `source` if that is given.

    Args:
        out: the checkpoint to check; a defect of it is reported, never raised.
        source: what it was made from, a directory or an open checkpoint. Every tensor, the config and the sidecars must
            follow from it.
        manifest: the keep manifest that it was made with; from OUT's shardxform.json where None.
        quick: read headers and small files only, no tensor data.
        jobs: threads that read data.
        on_progress: called after every few dozen MB.
        text_only: made without the vision tower; from shardxform.json where None.
        mtp: as given to `pruned_view`; from shardxform.json where None.
        tolerance: codes that a quantized weight may be from the nearest; where None, 0 if shardxform.json says that
            weights were rounded to nearest, and 1 if they were tuned or it says nothing.

    Raises:
        CheckpointError: `out` is no directory, or the source cannot be read.
        ManifestError: the manifest given is malformed, or does not fit the source.
        FamilyError, PlanError: the source cannot be pruned.

    """
    started = time.monotonic()
    root, findings = Path(out), Findings()
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory")
    origin = source if isinstance(source, Checkpoint) or source is None else Checkpoint.open(source)
    checkpoint, lost = read_checkpoint(root, findings)
    check_files(root, checkpoint, findings)
    record = check_record(root, findings)
    inputs = record.get("inputs", {})
    if origin:
        inputs = record_for(origin, inputs)
    structure = check_structure(checkpoint, lost, findings) if checkpoint else None
    if checkpoint:
        check_sidecars(checkpoint, structure.layout.wrapper if structure else None, findings)
    wanted: Wanted | None = None
    if origin:
        stored = structure.stored if structure else None
        packed = packed_source(origin, checkpoint, stored) if structure else None
        options = Options(manifest=manifest, text_only=text_only, mtp=mtp)
        view = rebuild(origin, checkpoint, options, inputs, findings, packed)
        if view and checkpoint:
            wanted = wanted_of(view, checkpoint, stored, packed, findings)
            wanted = apart_from_healed(wanted, inputs, record.get("facts"))
            if stored and wanted.pairs:
                wanted = replace(wanted, rule=rule_of(stored, inputs, tolerance, findings, packed))
            compare_tables(wanted, checkpoint, lost, findings)
    figures: Mapping[str, Any] = {**dict.fromkeys(_FIGURES, 0), "rounding": None}
    if checkpoint and not quick:
        figures = _check_data(checkpoint, structure, wanted, findings, jobs, on_progress)
    return VerifyReport(
        out=root,
        source=origin.where if origin else None,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        tensors=len(checkpoint.tensors) if checkpoint else 0,
        experts=structure.experts if structure else 0,
        tensors_healed=len(wanted.healed) if wanted else 0,
        **figures,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


_FIGURES: Final = ("bytes_scanned", "bytes_compared", "tensors_compared", "tensors_differing")


def _check_data(
    checkpoint: Checkpoint,
    structure: Structure | None,
    wanted: Wanted | None,
    findings: Findings,
    jobs: int,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """Everything that needs tensor data, and with it numpy; the figures of the report."""
    from shardxform.verification.data import Comparison, check_data
    from shardxform.verification.rounding import report_tallies

    layout, stored = (structure.layout, structure.stored) if structure else (None, None)
    rule = wanted.rule if wanted else None
    comparison = None
    if wanted:
        source = wanted.view.checkpoint
        comparison = Comparison(source.root, wanted.same_bytes, wanted.pairs, rule, source.remote)
    figures = check_data(checkpoint, layout, comparison, findings, stored=stored, jobs=jobs, on_progress=on_progress)
    rounding = report_tallies(figures.tallies, rule, findings) if rule else None
    return {**{key: getattr(figures, key) for key in _FIGURES}, "rounding": rounding}
