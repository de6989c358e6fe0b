"""Doing a plan: the loop over its steps. Knows nothing of experts or rounding; resumes by itself.

Steps run on threads, in any order. A step's bytes are made durable before the journal names it, and config.json is
written when every step is in the journal: killed at any instant, the same call goes on and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from shardxform.base import interrupts
from shardxform.base.digests import FACT, Taken, digest_chunks
from shardxform.base.file_system import FileSystem, OpenTarget
from shardxform.base.interrupts import Completions
from shardxform.base.progress import Progress, peak_rss_bytes
from shardxform.base.tensors import show_size
from shardxform.checkpoint.identity import changed_values, names_of
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.errors import ExecutionError, Interrupted, OutputError, ResumeError
from shardxform.execution.journal import Journal, measured, recorded
from shardxform.execution.output import (
    JOURNAL,
    PARTIAL,
    PLAN,
    WORK,
    Output,
    damage,
    difference,
    holds,
    made_by_others,
    refuse_obstacles,
    refuse_other_plan,
    removable,
    state_of,
)
from shardxform.execution.steps import Facts, OpenTargets, executor, written_by
from shardxform.plan.plan import Plan, Step, step_tokens

__all__ = ["Report", "RunOptions", "StepPool", "StepTuner", "adopt", "run"]


# -- options -----------------------------------------------------------------------------------------------------------
# What a run is asked for and what it tells: values, and what it may be handed: a tuner, and a pool for its steps.


class StepTuner(Protocol):
    """What tunes blocks; see `tuning.session.Tuner`."""

    @property
    def work_bytes(self) -> int:
        """Disk that it needs beside the shards."""
        ...

    def can_start(self, step: Any, work: Path) -> bool:  # noqa: ANN401
        """Whether the states that `step` needs are there."""
        ...

    def tune(
        self,
        step: Any,  # noqa: ANN401
        work: Path,
        target: OpenTarget,
        fs: FileSystem,
        on_work: Callable[[int], None],
        stopped: Callable[[], None],
    ) -> dict[str, Any]:
        """Tune a block and write its parts."""
        ...


class StepPool(Protocol):
    """Where steps are done when that is not on threads of this process; see `cluster.pool.RayPool`."""

    @property
    def work_bytes(self) -> int:
        """Disk that it needs beside the shards."""
        ...

    def begin(self, output: Output) -> None:
        """Get ready for the steps of an output, or refuse: nothing is written yet."""
        ...

    @property
    def ahead(self) -> int:
        """Steps that it wants at once."""
        ...

    def submit(self, step: Step) -> Future[Mapping[str, Any]]:
        """Have a step done: a future of its facts, which comes true when its bytes are durable."""
        ...

    def stop(self) -> None:
        """Give up what was submitted; every future comes true soon, or fails."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Settings that change speed, safety checks and how much is done now, never a byte of the output.

    Attributes:
        jobs: steps in flight at once.
        device: where weights are rounded: `cpu`, or a torch device; the bits are the same.
        force: start over an output of shardxform's own that was made from other inputs.
        tuner: carries out the steps that tune a block, which are done one after the other, last.
        blocks: decoder blocks to tune now; None for all. Others may be tuned elsewhere.
        pool: where steps are done, those that tune included; `jobs`, `device` and `tuner` are then not looked at.
        parts: unfinished outputs of the same plan, whose steps are taken over before anything else is done.
        on_progress: called from the loop after every chunk.

    """

    jobs: int = 2
    device: str = "cpu"
    force: bool = False
    tuner: StepTuner | None = None
    blocks: range | None = None
    pool: StepPool | None = None
    parts: tuple[Path, ...] = ()
    on_progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did.

    Attributes:
        already_done: the output stood there complete, and nothing was written.
        left: steps that this run was not asked for and nobody has done yet; the output is complete when there are none.
        made_by_others: what else computed an output that was there than would compute it now; empty where nothing did.
        facts: what the steps found worth recording, such as modules whose weights are all zero; of an output that was
            there, what its record says.
        measured: by blocks, their time and memory in whichever run did them; nothing where all was there.

    """

    out: Path
    already_done: bool
    written_bytes: int
    resumed_bytes: int
    seconds: float
    peak_rss_bytes: int
    left: int = 0
    made_by_others: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[Mapping[str, Any], ...] = ()


# -- merging -----------------------------------------------------------------------------------------------------------
# Taking over steps that another run of the same plan has done in a directory of its own.
#
# The part is only read: its record must name the same plan, its journal says which steps are done, and their bytes
# are copied to the same places. Both may be unfinished; the part may be on another disk.


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
    for chunk, digest, noted in zip_longest(chunks, found, facts.get(FACT, [])):
        if digest != noted or chunk is None:
            name = f"tensor '{chunk.tensor}'" if chunk else "a step"
            raise OutputError(f"{part}: {name} is not as it was written: its digest differs; tune that part again")


def _shard(output: Output, part: Path, number: int) -> Path:
    shard = output.plan.shards[number]
    for path in (part / (shard.name + PARTIAL), part / shard.name):
        if holds(path, shard):
            return path
    raise OutputError(f"{part / shard.name}: missing or damaged, though its steps are recorded as done")


# -- runner ------------------------------------------------------------------------------------------------------------


def run(
    plan: Plan, out: str | os.PathLike[str], options: RunOptions | None = None, fs: FileSystem | None = None
) -> Report:
    """Execute `plan` into the directory `out`, or go on where an earlier run of the same plan stopped.

    Raises:
        OutputError: `out` is foreign, locked, overlaps the source, or the disk is too small.
        ResumeError: `out` holds work made from other inputs.
        ExecutionError: the source changed or failed under way, or an I/O error.
        Interrupted: KeyboardInterrupt, or a signal, see `interrupts`; every finished step is durable, and the same call
            goes on.

    """
    options = options or RunOptions()
    output = Output(Path(out), plan, fs or FileSystem())
    started = time.monotonic()
    with _named_errors(output):
        try:
            loop = _run(output, options)
        except ResumeError:
            if not options.force:
                raise
            _start_over(output)
            loop = _run(output, options, started_over=True)
    return Report(
        out=output.root,
        already_done=loop is None,
        written_bytes=loop.written if loop else 0,
        resumed_bytes=loop.resumed if loop else 0,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        left=loop.left if loop else 0,
        made_by_others="" if loop else made_by_others(state_of(output.root, plan), plan),
        facts=recorded(loop.facts) if loop else _recorded_facts(output),
        measured=measured(loop.facts) if loop else (),
    )


def _recorded_facts(output: Output) -> Mapping[str, Any]:
    """What the steps of a finished output found."""
    record = read_record(output.root / PROVENANCE)
    return record.facts if record else {}


def _run(output: Output, options: RunOptions, started_over: bool = False) -> _Loop | None:
    """Execute or go on; None when the output is finished already.

    What was started over still has the record of what was removed: it is ours, and about to be replaced.
    """
    state = state_of(output.root, output.plan)
    if not started_over:
        refuse_other_plan(output.root, output.plan, state)
    if state.name == "finished":
        _check_finished(output)
        if output.work.exists():  # killed between the commit and the end
            with output.locked():
                output.clean()
        return None
    refuse_obstacles(output.root, output.plan)
    output.plan.refuse_other_values()
    beside = options.pool or options.tuner
    output.refuse_too_little_space(output.plan.work_bytes + (beside.work_bytes if beside else 0))
    if options.pool:
        options.pool.begin(output)
    elif options.device != "cpu" and not options.tuner:  # refuse a device that is not there before anything is written
        executor(output.plan.steps[-1], options.device)
    with output.locked():
        # Again, now that nobody else can change it: another run may just have ended here.
        state = state_of(output.root, output.plan)
        if not started_over:
            refuse_other_plan(output.root, output.plan, state)
        if state.name == "finished":
            output.clean()
            return None
        loop = _Loop(output, options)
        loop.execute()
    return loop


def _start_over(output: Output) -> None:
    """Remove what an earlier run of ours left, finished or not."""
    state = state_of(output.root, output.plan)
    if state.name == "new":
        return
    files = removable(output.root, state)
    with output.locked():
        output.discard(state, files)


class _Loop:
    """One run: the thread pool, the journal, and the count of bytes."""

    def __init__(self, output: Output, options: RunOptions) -> None:
        self._output = output
        self._fs = output.fs
        self._plan = output.plan
        self._options = options
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._tuning = {i for i, step in enumerate(self._plan.steps) if step_tokens(step)}
        self._tokens = 0
        self._tokens_resumed = 0
        self._at = ""
        self.written = 0
        self.resumed = 0
        self.left = 0
        self.facts: Facts = {}

    def execute(self) -> None:
        """Do what is left to do, and commit when nothing is."""
        output, plan = self._output, self._plan
        output.bind()
        output.bring_sidecars()
        with Journal(self._fs, output.journal, plan.fingerprint, len(plan.steps)) as journal:
            missing = output.missing()
            lost = {i for i in journal.done if any(extent.shard in missing for extent in plan.steps[i].writes)}
            if lost:  # before the shards are made anew: a journal must never speak for bytes that are not there
                journal.forget(lost)
            output.create(missing)
            for part in self._options.parts:
                adopt(output, journal, part)
            self._forget_what_cannot_go_on(journal)
            undone = set(range(len(plan.steps))) - journal.done
            output.reopen({extent.shard for i in undone for extent in plan.steps[i].writes})
            self.resumed = sum(written_by(plan.steps[i]) for i in journal.done)
            self._tokens = self._tokens_resumed = sum(step_tokens(plan.steps[i]) for i in journal.done)
            todo = [i for i in sorted(undone) if self._wanted(i)]
            self._at = self._first_of(todo) if self._tuning & journal.done else ""
            alone: set[int] = set() if self._options.pool else self._tuning
            self._run_steps([i for i in todo if i not in alone], journal, self._options.jobs)
            self._run_steps([i for i in todo if i in alone], journal, 1)
            self.left = len(plan.steps) - len(journal.done)
            self.facts = _merged(journal.facts[i] for i in sorted(journal.facts))
            if self.left:
                return
            digests = plan.chunks.digests(journal.facts, plan.steps)
        _refuse_source_changed_meanwhile(plan)
        output.publish()
        output.commit(recorded(self.facts), digests)

    def _wanted(self, number: int) -> bool:
        """Whether this run is to do a step; what is not tuned goes with the first block."""
        blocks = self._options.blocks
        if blocks is None:
            return True
        step: Any = self._plan.steps[number]
        return step.layer in blocks if number in self._tuning else 0 in blocks

    def _first_of(self, todo: list[int]) -> str:
        """The block that is tuned next."""
        step: Any = next((self._plan.steps[i] for i in todo if i in self._tuning), None)
        return f"block {step.layer}" if step else ""

    def _forget_what_cannot_go_on(self, journal: Journal) -> None:
        """Tune all blocks again when the hidden states that the next one needs are gone."""
        undone = sorted(self._tuning - journal.done)
        tuner = self._options.tuner
        if undone and tuner and not tuner.can_start(self._plan.steps[undone[0]], self._output.states):
            journal.forget(self._tuning & journal.done)

    def _run_steps(self, todo: list[int], journal: Journal, jobs: int) -> None:
        """Run steps on a pool, a few of them queued; journal each batch that completes."""
        under_way: Completions[Facts, int] = Completions()
        pending, queue = under_way.pending, iter(todo)
        # Opened here, so that what is fetched of a repository ahead of a step does not end with the step before.
        with (
            interrupts.deferred(),
            self._output.open_source() as source,
            ThreadPoolExecutor(jobs, thread_name_prefix="step") as threads,
        ):
            pool = self._options.pool or _Threads(threads, jobs, self._step)
            try:
                self._report_progress()
                while True:
                    while len(pending) < pool.ahead and (number := next(queue, None)) is not None:
                        step = self._plan.steps[number]
                        if self._plan.remote and not step_tokens(step):
                            source.will_need(step.reads)
                        under_way.add(pool.submit(step), number)
                    if not pending:
                        return
                    finished = under_way.next()
                    interrupts.check()
                    self._journal(finished, pending, journal)
                    self._report_progress()
            except BaseException as e:
                self._stop.set()
                source.stop()
                pool.stop()
                under_way.wait()
                self._journal([f for f in pending if not f.cancelled() and not f.exception()], pending, journal)
                if isinstance(e, KeyboardInterrupt):
                    raise Interrupted(self._how_to_go_on(journal)) from e
                raise

    def _journal(
        self, finished: Collection[Future[Facts]], pending: dict[Future[Facts], int], journal: Journal
    ) -> None:
        for future in finished:
            if future.exception():
                error = future.exception()
                del pending[future]
                assert error is not None
                raise error
        if not finished:
            return
        done = {pending.pop(future): future.result() for future in finished}
        journal.record(done)
        if self._options.pool:  # what it does is not seen until it is done
            self._count(sum(written_by(self._plan.steps[number]) for number in done))
            self._count_tokens(sum(step_tokens(self._plan.steps[number]) for number in done))

    def _step(self, step: Step) -> Facts:
        """Do one step and make its bytes durable."""
        self._refuse_if_stopped()
        taken: Taken = {}
        with self._output.open_source() as source, OpenTargets(self._output.partial, self._fs) as files:
            if step_tokens(step):
                facts = self._tune(step, files)
            else:
                do = executor(step, self._options.device, taken)
                facts = do((source, files.target), self._fs, self._count, self._refuse_if_stopped)
            digests = digest_chunks(self._plan.chunks.of(step.writes), self._output.partial, self._fs, taken=taken)
            files.sync(step.writes)
        return {**facts, FACT: digests}

    def _tune(self, step: Step, files: OpenTargets) -> Facts:
        tuner = self._options.tuner
        if tuner is None:
            raise ExecutionError("the plan tunes blocks, but the run has no tuner: give RunOptions(tuner=...)")
        self._fs.mkdir(self._output.states)
        before, share = self._tokens, step_tokens(step)

        def count(tokens: int) -> None:
            """Never more than the step's share, which is a guess where held-out windows decide how much is done."""
            self._count_tokens(min(tokens, before + share - self._tokens))

        facts = tuner.tune(step, self._output.states, files.target, self._fs, count, self._refuse_if_stopped)
        count(share)  # the rest of it
        self._count(written_by(step))
        return facts

    def _count_tokens(self, count: int) -> None:
        with self._lock:
            self._tokens += count

    def _refuse_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _count(self, count: int) -> None:
        with self._lock:
            self.written += count

    def _report_progress(self) -> None:
        if not self._options.on_progress:
            return
        if self._tuning:  # by far the most work, and not in proportion to bytes
            wanted = sum(step_tokens(s) for i, s in enumerate(self._plan.steps) if self._wanted(i))
            self._options.on_progress(Progress(self._tokens, wanted, self._tokens_resumed, "tokens", self._at))
        else:
            done = self.written + self.resumed
            self._options.on_progress(Progress(done, self._plan.data_bytes, self.resumed))

    def _how_to_go_on(self, journal: Journal) -> str:
        done = sum(written_by(self._plan.steps[i]) for i in journal.done)
        return (
            f"stopped: {show_size(done)} of {show_size(self._plan.data_bytes)} are safe in {self._output.root};"
            " run the same command again to go on"
        )


class _Threads:
    """Threads of this process as a pool of steps: at most two steps a thread are queued.

    With one thread a step begins when the one before is in the journal.
    """

    def __init__(self, threads: ThreadPoolExecutor, jobs: int, do: Callable[[Step], Facts]) -> None:
        self.ahead = 2 * jobs if jobs > 1 else 1
        self._threads, self._do = threads, do

    def submit(self, step: Step) -> Future[Facts]:
        return self._threads.submit(self._do, step)

    def stop(self) -> None:
        """Steps look at the loop's flag."""


class _StoppedError(Exception):
    """A worker saw the stop flag; its step stays undone."""


def _check_finished(output: Output) -> None:
    """Refuse to call an output complete that was damaged since."""
    if damaged := damage(output.root, output.plan):
        raise ResumeError(
            f"{output.root / damaged}: missing or damaged in a finished output; run `shardxform verify`,"
            " or start over with `force`"
        )


def _refuse_source_changed_meanwhile(plan: Plan) -> None:
    """Refuse to commit what was made from a source that changed under way; one that was merely touched is the same."""
    touched = False
    for shard in () if plan.remote else plan.source_shards:  # a commit does not change
        info = (plan.source / shard.name).stat()
        if info.st_size != shard.nbytes:
            raise ExecutionError(f"{plan.source / shard.name}: changed while shardxform was running; nothing committed")
        touched |= info.st_mtime_ns != shard.mtime_ns
    if touched and (where := changed_values(plan.source, plan.source_shards, plan.inputs.get("source"))):
        raise ExecutionError(f"{plan.origin}: changed while shardxform was running: {where}; nothing committed")


def _merged(facts: Iterable[Facts]) -> Facts:
    """Add up counts and join lists, in step order; digests go to the record by themselves."""
    out: dict[str, Any] = {}
    for found in facts:
        for key, value in found.items():
            if key == FACT:
                continue
            if key in out and type(out[key]) is not type(value):
                raise ResumeError(f"the journal's facts disagree on {key!r}; start over with `force`")
            out[key] = out[key] + value if key in out else value
    return out


@contextlib.contextmanager
def _named_errors(output: Output) -> Iterator[None]:
    """Turn what the operating system says into one line that names the place and what to do."""
    try:
        yield
    except ExecutionError as e:
        if not output.journal.exists():
            raise
        raise ExecutionError(
            f"{e}\n{output.root} is unfinished, finished steps are safe: the same command goes on there; from a source"
            " that was mended, start over with `force`"
        ) from e
    except EOFError as e:
        raise ExecutionError(f"{output.plan.origin}: truncated while shardxform was running: {e}") from e
    except OSError as e:
        where = e.filename or output.root
        safe = "; finished steps are safe, run the same command again to go on" if output.journal.exists() else ""
        raise ExecutionError(f"{where}: {e.strerror or e}{safe}") from e
