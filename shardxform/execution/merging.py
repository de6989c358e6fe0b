"""Taking over steps that another run of the same plan has done in a directory of its own.

The part is only read: its record must name the same plan, its journal says which steps are done, and their bytes are
copied to the same places. Both may be unfinished; the part may be on another disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from shardxform.base.digests import FACT, digest_chunks
from shardxform.checkpoint.identity import names_of
from shardxform.checkpoint.record import read_record
from shardxform.errors import OutputError, ResumeError
from shardxform.execution.journal import Journal
from shardxform.execution.output import JOURNAL, PARTIAL, PLAN, WORK, Output, difference, holds
from shardxform.plan.plan import Step

__all__ = ["adopt"]


def adopt(output: Output, journal: Journal, part: Path) -> int:
    """Copy the steps that are done in `part` and not yet here, and record them.

    Returns:
        bytes copied.

    Raises:
        OutputError: `part` is no unfinished output of shardxform's, or a shard of it is missing.
        ResumeError: it was made from other inputs.

    """
    record = read_record(part / WORK / PLAN)
    if record is None:
        raise OutputError(f"{part}: expected unfinished work of shardxform's, as a run with `blocks` leaves it")
    if record.fingerprint != output.plan.fingerprint:
        where = difference(record.inputs, output.plan.inputs, names_of(output.plan.source_shards))
        raise ResumeError(f"{part}: made from other inputs than {output.root}: {where or 'another plan'}")
    copied = 0
    facts = Journal.read(part / WORK / JOURNAL, output.plan.fingerprint, len(output.plan.steps))
    for number in sorted(facts.keys() - journal.done):
        copied += _copy(output, output.plan.steps[number], part)
        _refuse_damaged(output, output.plan.steps[number], facts[number], part)
        journal.record({number: facts[number]})
    return copied


def _copy(output: Output, step: Step, part: Path) -> int:
    """Copy what a step has written, durably."""
    fs, copied = output.fs, 0
    output.reopen({extent.shard for extent in step.writes})
    with contextlib.ExitStack() as stack:
        opened: dict[int, tuple[int, int]] = {}
        for extent in step.writes:
            if extent.shard not in opened:
                source = fs.open(_shard(output, part, extent.shard), os.O_RDONLY)
                stack.callback(os.close, source)
                target = fs.open(output.partial(extent.shard), os.O_RDWR)
                stack.callback(os.close, target)
                opened[extent.shard] = (source, target)
            source, target = opened[extent.shard]
            fs.copy(source, extent.offset, target, extent.offset, extent.length)
            copied += extent.length
        for _, target in opened.values():
            fs.sync(target)
    return copied


def _refuse_damaged(output: Output, step: Step, facts: Mapping[str, Any], part: Path) -> None:
    """Hold what was copied against the digests that were taken when it was written."""
    chunks = output.plan.chunks.of(step.writes)
    found = digest_chunks(chunks, output.partial, output.fs)
    for chunk, digest, recorded in zip_longest(chunks, found, facts.get(FACT, [])):
        if digest != recorded or chunk is None:
            name = f"tensor '{chunk.tensor}'" if chunk else "a step"
            raise OutputError(f"{part}: {name} is not as it was written: its digest differs; tune that part again")


def _shard(output: Output, part: Path, number: int) -> Path:
    shard = output.plan.shards[number]
    for path in (part / (shard.name + PARTIAL), part / shard.name):
        if holds(path, shard):
            return path
    raise OutputError(f"{part / shard.name}: missing or damaged, though its steps are recorded as done")
