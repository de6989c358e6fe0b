"""Verification of a checkpoint: its structure, its numbers, and its equality with the source it was made from.

Clients load many defective checkpoints without a word and serve garbage; so everything that can be known is looked
at, and everything found is listed. Reads only; memory is bounded by a few buffers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shardxform.checkpoint import Checkpoint
from shardxform.errors import CheckpointError
from shardxform.manifest import Manifest
from shardxform.run import Progress, peak_rss_bytes
from shardxform.verification.files import check_files, check_record, check_sidecars, read_checkpoint
from shardxform.verification.findings import Findings, Problem
from shardxform.verification.source import Options, Wanted, compare_tables, rebuild, wanted_of
from shardxform.verification.structure import check_structure
from shardxform.view import MtpMode

__all__ = ["Problem", "VerifyReport", "verify"]

_DEFAULT_JOBS: Final = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What verification found.

    Attributes:
        problems: everything that is wrong; empty when the checkpoint is sound.
        warnings: what a person should look at.
        tensors, experts: how many there are, routed experts over all layers.
        bytes_scanned: of float tensors, looked through for NaN, infinities and zeros.
        bytes_compared, tensors_compared, tensors_differing: against the source.

    """

    out: Path
    source: Path | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    tensors: int
    experts: int
    bytes_scanned: int
    bytes_compared: int
    tensors_compared: int
    tensors_differing: int
    seconds: float
    peak_rss_bytes: int

    @property
    def sound(self) -> bool:
        """Whether there is no problem; warnings do not count."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        paths = {"out": str(self.out), "source": str(self.source) if self.source else None}
        return {"sound": self.sound, **asdict(self), **paths}


def verify(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    quick: bool = False,
    jobs: int = _DEFAULT_JOBS,
    on_progress: Callable[[Progress], None] | None = None,
    text_only: bool | None = None,
    mtp: MtpMode | None = None,
) -> VerifyReport:
    """Check the checkpoint `out`, and hold it against `source` if that is given.

    Args:
        out: the checkpoint to check; a defect of it is reported, never raised.
        source: what it was made from. Every tensor, the config and the sidecars must follow from it.
        manifest: the keep manifest that it was made with; from OUT's shardxform.json where None.
        quick: read headers and small files only, no tensor data.
        jobs: threads that read data.
        on_progress: called after every few dozen MB.
        text_only: made without the vision tower; from shardxform.json where None.
        mtp: as given to `pruned_view`; from shardxform.json where None.

    Raises:
        CheckpointError: `out` is no directory, or the source cannot be read.
        ManifestError: the manifest given is malformed, or does not fit the source.
        FamilyError, PlanError: the source cannot be pruned.

    """
    started = time.monotonic()
    root, findings = Path(out), Findings()
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory")
    origin = Checkpoint.open(source) if source is not None else None
    checkpoint, lost = read_checkpoint(root, findings)
    check_files(root, checkpoint, findings)
    inputs = check_record(root, findings)
    structure = check_structure(checkpoint, lost, findings) if checkpoint else None
    if checkpoint:
        check_sidecars(checkpoint, structure.layout.wrapper if structure else None, findings)
    wanted: Wanted | None = None
    if origin:
        view = rebuild(origin, checkpoint, Options(manifest=manifest, text_only=text_only, mtp=mtp), inputs, findings)
        if view and checkpoint:
            wanted = wanted_of(view, checkpoint, findings)
            compare_tables(wanted, checkpoint, lost, findings)
    figures: dict[str, int] = dict.fromkeys(_FIGURES, 0)
    if checkpoint and not quick:
        from shardxform.verification.data import Comparison, check_data  # numpy: only where numbers are read

        comparison = Comparison(wanted.view.checkpoint.root, wanted.tensors) if wanted else None
        layout = structure.layout if structure else None
        figures = asdict(check_data(checkpoint, layout, comparison, findings, jobs=jobs, on_progress=on_progress))
    return VerifyReport(
        out=root,
        source=origin.root if origin else None,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        tensors=len(checkpoint.tensors) if checkpoint else 0,
        experts=structure.experts if structure else 0,
        **figures,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


_FIGURES: Final = ("bytes_scanned", "bytes_compared", "tensors_compared", "tensors_differing")
