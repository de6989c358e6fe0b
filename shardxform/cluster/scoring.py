"""Scoring split over the machines of a Ray cluster: every part of the windows a run of its own, their sums added up.

    WORK/split.json             what is scored, and how the windows were cut when the work began
    WORK/part-0003/             the work directory of a part, see `forward.work`
    WORK/part-0003.saliency     what a part gave

Parts end where batches do, so every batch is computed as on one machine, to the bit. Only the order in which float64
sums are added is another: counts and peaks are the same, sums to their last digits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import re
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardxform.base import computing, interrupts
from shardxform.base.file_system import FileSystem, write_new
from shardxform.base.interrupts import Completions
from shardxform.base.progress import Progress
from shardxform.base.strict_json import JsonError, dumps, parse_object
from shardxform.base.tensors import show_size
from shardxform.calibration.options import Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.cluster.pool import precision_of, refuse_remote
from shardxform.cluster.session import Needs, Session
from shardxform.cluster.worker import refuse_other_source, refuse_other_version, reporting
from shardxform.errors import ExecutionError, Interrupted, OutputError, ResumeError
from shardxform.experts import Saliency
from shardxform.experts.scoring import ScoreOptions, remove_work, run_facts, score, score_inputs
from shardxform.forward.passes import BATCH_TOKENS, estimate
from shardxform.forward.work import refuse_inside, refuse_other_work

__all__ = ["remove_split", "score_part", "score_split"]

_FORMAT: Final = "shardxform.split"
_SPLIT: Final = "split.json"
_LOCK: Final = "lock"
_OURS: Final = re.compile(r"split\.json(\.tmp)?|lock|part-\d{4}(\.saliency)?|\.shardxform-[0-9a-f]{16}\.tmp")
_LOCK_WAIT: Final = 150.0  # seconds; network file systems hold the lock of a machine that died for a while
_LOOK: Final = 2.0  # seconds between looks at what the parts have done


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPart:
    """What a worker is to score.

    Attributes:
        source: what; its root is absolute.
        windows: of this part.
        work: directory of the part, absolute.
        mark: of the inputs of the whole, as WORK/split.json has it.
        device, dtype: of the computation, as torch names them.

    """

    source: Checkpoint
    windows: Windows
    work: Path
    mark: str
    device: str
    dtype: str

    @property
    def result(self) -> Path:
        """Where the driver saves what the part gave."""
        return self.work.with_name(f"{self.work.name}.saliency")

    @property
    def tokens(self) -> int:
        """Valid tokens of the windows."""
        return self.windows.ids_NT.size


# -- on a worker ------------------------------------------------------------------------------------------------------


@reporting
def score_part(wanted: Mapping[str, str], part: bytes) -> bytes:
    """Score a part, or go on where a worker that died stopped; the bytes of its saliency file.

    Raises:
        ExecutionError: another version, source or work directory than the driver's.
        ShardxformError: see `scoring.score`.

    """
    refuse_other_version(wanted)
    given: WindowPart = pickle.loads(part)  # noqa: S301 - the driver's own
    if _mark(_split(given.work.parent).get("inputs", {})) != given.mark:
        raise ExecutionError(f"{given.work.parent}: not there; it must lie on a file system that all machines share")
    planned = {shard.name: [shard.nbytes, shard.header_sha256] for shard in given.source.shards}
    refuse_other_source(given.source.root, planned, planned)
    options = ScoreOptions(precision=precision_of(given.device, given.dtype), work=given.work)
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            return score(given.source, given.windows, options).to_bytes()
        except OutputError as e:
            if not isinstance(e.__cause__, BlockingIOError) or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK)


# -- on the driver ----------------------------------------------------------------------------------------------------


def score_split(source: Checkpoint, windows: Windows, options: ScoreOptions, address: str) -> Saliency:
    """Score as `scoring.score` does, on the cluster at `address`, in as many parts as it has slots when it begins.

    Raises:
        ExecutionError: no cluster there, or none with a machine that is large enough; what befell a worker.
        Interrupted: every finished block of every part is durable; the same call goes on.
        ShardxformError: see `scoring.score`.

    """
    refuse_remote(source.where, source.remote)
    refuse_inside(options.work, [source.root])
    taken = estimate({"scored": source}, windows, options.precision, options.work)
    needs = Needs(memory=taken["peak_memory_bytes"], gpus=int(options.precision.device.type != "cpu"))
    if taken["work_bytes"] > taken["free_disk_bytes"] and not options.work.exists():
        raise OutputError(
            f"{options.work}: hidden states need {show_size(taken['work_bytes'])}, but only"
            f" {show_size(taken['free_disk_bytes'])} are free"
        )
    with Session(address) as session:
        session.open()
        session.refuse_too_large(needs)
        with _entered(options.work):
            parts = _parts(source, windows, options, session.slots(needs))
            found = _Split(session, options, parts, taken["blocks"]).run(needs)
    total = functools.reduce(Saliency.added, found)
    return replace(total, runs=(run_facts(windows, score_inputs(source, windows, options)),))


def remove_split(source: Checkpoint, windows: Windows, options: ScoreOptions) -> None:
    """Remove what `score_split` left when its result is safe; what is of others stays."""
    if _split(options.work).get("inputs") != score_inputs(source, windows, options):
        return
    fs = FileSystem()
    with _entered(options.work):
        for part in _parts(source, windows, options, 1):
            _remove_work(part, options)
            fs.remove_if_there(part.result)
        for name in (_SPLIT, _LOCK):
            fs.remove_if_there(options.work / name)
    with contextlib.suppress(OSError):
        fs.rmdir(options.work)


def _remove_work(part: WindowPart, options: ScoreOptions) -> None:
    remove_work(part.source, part.windows, ScoreOptions(precision=options.precision, work=part.work))


class _Split:
    """One run over the parts that are not done."""

    def __init__(self, session: Session, options: ScoreOptions, parts: list[WindowPart], blocks: int) -> None:
        self._session, self._options, self._parts, self._blocks = session, options, parts, blocks
        self._looked = 0.0

    def run(self, needs: Needs) -> list[Saliency]:
        wanted = computing.shared(str(self._options.precision.device))
        todo = [part for part in self._parts if not part.result.exists()]
        under_way: Completions[bytes, WindowPart] = Completions()
        with interrupts.deferred():
            try:
                for part in todo:
                    ref = self._session.submit(score_part, needs, wanted, pickle.dumps(part))
                    under_way.add(self._session.future(ref), part)
                while under_way.pending:
                    finished = under_way.next()
                    interrupts.check()
                    self._save(finished, under_way.pending)
                    self._tell()
            except BaseException as e:
                self._session.stop()
                self._save([f for f in under_way.pending if f.done() and not f.exception()], under_way.pending)
                if isinstance(e, KeyboardInterrupt):
                    raise Interrupted(
                        f"stopped: finished blocks of all parts are safe in {self._options.work};"
                        " run the same command again to go on"
                    ) from e
                raise
        return [Saliency.load(part.result) for part in self._parts]

    def _save(self, finished: Collection[Future[bytes]], pending: dict[Future[bytes], WindowPart]) -> None:
        for future in finished:
            part = pending.pop(future)
            write_new(part.result, future.result())
            _remove_work(part, self._options)

    def _tell(self) -> None:
        """Count blocks by the records that the parts keep."""
        if not self._options.on_progress or time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        total = self._blocks * sum(part.tokens for part in self._parts)
        done = sum(part.tokens * _blocks_done(part, self._blocks) for part in self._parts)
        self._options.on_progress(Progress(done, total, 0, "tokens"))


def _blocks_done(part: WindowPart, blocks: int) -> int:
    if part.result.exists():
        return blocks
    try:
        steps = parse_object((part.work / "progress.json").read_bytes())["steps"]
    except (OSError, JsonError, KeyError):
        return 0
    return sum(name.startswith("block ") for name in steps)


def _mark(inputs: Mapping[str, object]) -> str:
    return hashlib.sha256(dumps(inputs).encode()).hexdigest()


def _split(work: Path) -> dict[str, Any]:
    """The record of a split; empty where there is none."""
    try:
        record = parse_object((work / _SPLIT).read_bytes())
    except (OSError, JsonError):
        return {}
    return record if record.get("format") == _FORMAT else {}


def _parts(source: Checkpoint, windows: Windows, options: ScoreOptions, slots: int) -> list[WindowPart]:
    """Cut the windows, or find how they were cut when the work began."""
    inputs, record = score_inputs(source, windows, options), _split(options.work)
    if not record:
        record = {"format": _FORMAT, "inputs": inputs, "parts": [[r.start, r.stop] for r in _cut(windows, slots)]}
        FileSystem().write_atomic(options.work / _SPLIT, dumps(record).encode(), options.work)
    refuse_other_work(options.work, record.get("inputs"), inputs)
    root, work = (Path(os.path.abspath(path)) for path in (source.root, options.work))
    return [
        WindowPart(
            source=replace(source, root=root),
            windows=_slice(windows, start, stop),
            work=work / f"part-{number:04d}",
            mark=_mark(inputs),
            device=str(options.precision.device),
            dtype=str(options.precision.dtype).removeprefix("torch."),
        )
        for number, (start, stop) in enumerate(_bounds(record.get("parts"), options.work, len(windows.ids_NT)))
    ]


def _bounds(found: object, work: Path, count: int) -> list[tuple[int, int]]:
    """How the windows were cut, as the record has it.

    Raises:
        ResumeError: the record does not cut all windows, each once: somebody changed it.

    """
    at, bounds, parts = 0, [], found if isinstance(found, list) else []
    for part in parts:
        if not (isinstance(part, list) and len(part) == 2 and part[0] == at and type(part[1]) is int and part[1] > at):
            break
        bounds.append((at, part[1]))
        at = part[1]
    if at != count or len(bounds) != len(parts):
        raise ResumeError(f"{work / _SPLIT}: expected parts that cut {count} windows, found others; remove {work}")
    return bounds


def _cut(windows: Windows, parts: int) -> Iterator[range]:
    """Cut the windows into at most `parts` runs of whole batches, as even as they can be."""
    count, length = windows.ids_NT.shape
    size = max(1, BATCH_TOKENS // length)
    batches = -(-count // size)
    parts = max(1, min(parts, batches))
    for number in range(parts):
        first, last = (size * (batches * k // parts) for k in (number, number + 1))
        yield range(first, min(last, count))


def _slice(windows: Windows, start: int, stop: int) -> Windows:
    mark = hashlib.sha256(f"{windows.fingerprint} {start}:{stop}".encode()).hexdigest()
    return replace(windows, ids_NT=windows.ids_NT[start:stop], fingerprint=mark, notes=(), rows=())


@contextlib.contextmanager
def _entered(work: Path) -> Iterator[None]:
    """Make or enter the work directory and hold its lock.

    Raises:
        OutputError: something stands there that this did not make, or another process works in it.

    """
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise OutputError(f"{work}: expected a work directory or nothing, found something else")
    for entry in os.scandir(work) if work.is_dir() else ():
        if entry.name == "progress.json":
            raise ResumeError(f"{work}: holds unfinished work of a run without `ray`; go on without it, or remove it")
        if not _OURS.fullmatch(entry.name):
            raise OutputError(f"{entry.path}: not shardxform's; move it away, or name another work directory")
    fs = FileSystem()
    with contextlib.ExitStack() as stack:
        try:
            fs.mkdir(work)
            stack.enter_context(fs.locked(work / _LOCK))
        except BlockingIOError as e:
            raise OutputError(f"{work}: another process works here") from e
        except OSError as e:
            raise OutputError(f"{e.filename or work}: {e.strerror or e}") from e
        yield
