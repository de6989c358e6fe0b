"""The upload of an output: refused early, verified, hashed, sent, committed at once, and compared with what arrived.

Large files are sent first, several at a time, and become part of the repository with one commit at the end: at no
moment does the hub show half a checkpoint, and a file that is there when the same command runs again is not sent again.
Memory is bounded by a buffer per file under way, and by the small files, which go with the commit.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardxform import __version__
from shardxform.base import interrupts
from shardxform.base.progress import OnProgress, Progress, peak_rss_bytes
from shardxform.checkpoint.table import INDEX
from shardxform.errors import OutputError, PlanError, RemoteError
from shardxform.publish.contents import Contents, Digests, PublishedFile, is_repo_name, sha256_of_all
from shardxform.verification import VerifyReport, verify

if TYPE_CHECKING:
    from shardxform.publish.hub import Add, Hub, HubFile

__all__ = ["Destination", "Pushed", "Watch", "push", "verified"]

_AT_ONCE: Final = 4  # files under way
_EVERY: Final = 1 << 20  # bytes between two words of progress
_LOOK: Final = 0.2  # seconds

Stage = Callable[[str], AbstractContextManager[OnProgress | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where an output goes.

    Attributes:
        repo: owner/name.
        branch: of the repository.
        create: whether a repository or branch that is not there is made.
        private: whether a repository that is made is private; an existing public one is refused.
        replace: whether shards and index that are not of this output are removed from the branch.
        message: of the commit.
        source: what the output was made from; verification compares with it where it is given.

    """

    repo: str
    branch: str = "main"
    create: bool = False
    private: bool = False
    replace: bool = False
    message: str = f"Upload by shardxform {__version__}"
    source: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a push is watched: `stage` gives the progress of what is entered, `tell` gets what is worth a line."""

    stage: Stage = lambda _: contextlib.nullcontext()
    tell: Callable[[str], None] = lambda _: None
    client_bars: bool = False  # let the client draw its own where only it knows how far it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What came of it.

    Attributes:
        url, commit: where everything stands now.
        created: whether the repository was made.
        files, nbytes: of the output, all of them compared with what the hub has.
        sent_bytes: of the files that were uploaded by this run, as far as that can be known.
        removed: files of an earlier checkpoint.
        seconds: with verification and hashing.

    """

    url: str
    commit: str
    created: bool
    files: int
    nbytes: int
    sent_bytes: int
    removed: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int


def push(contents: Contents, target: Destination, watch: Watch | None = None) -> Pushed:
    """Publish an output; the same call goes on where one that was interrupted stopped.

    Raises:
        PlanError: huggingface_hub is not installed, or the name is none.
        OutputError: verification finds the output unsound.
        RemoteError: the hub refuses, cannot be reached, or has other bytes in the end.
        KeyboardInterrupt: on request; the same call goes on.

    """
    started, watch = time.monotonic(), watch or Watch()
    if not is_repo_name(target.repo):
        raise PlanError(f"{target.repo!r}: expected a repository of the hub, owner/name")
    client = _client()
    xet = client.uses_xet()
    hub: Hub = client.Hub(repo=target.repo, branch=target.branch, tell=watch.tell)
    with client.silenced(watch.client_bars and xet, hub.stop):
        there = _refuse_early(hub, contents, target)
        for warning in verified(contents.root, watch.stage, source=target.source).warnings:
            watch.tell(f"note: {'' if warning.where == '.' else f'{warning.where}: '}{warning.message}")
        with watch.stage("hash") as on_progress:
            digests = sha256_of_all(contents.items, on_progress)
        _prepare(hub, target, there)
        stale = _stale(contents, there.files)
        sent = _publish(_Job(hub=hub, contents=contents, digests=digests, stale=stale, xet=xet), there, target, watch)
        commit = _checked(hub, contents, digests, stale)
    return Pushed(
        url=hub.url,
        commit=commit,
        created=not there.repo,
        files=len(contents.items),
        nbytes=contents.nbytes,
        sent_bytes=sent,
        removed=tuple(stale),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is to be there in the end, and who brings it there."""

    hub: Hub
    contents: Contents
    digests: Digests
    stale: Sequence[str]
    xet: bool

    def arrived(self) -> bool:
        """Whether all of it is on the branch."""
        files = self.hub.stored(self.hub.branch)
        whole = all(_holds(files, item, self.digests) for item in self.contents.items)
        return whole and not any(name in files for name in self.stale)


def _publish(job: _Job, there: _There, target: Destination, watch: Watch) -> int:
    """Send what is not there and commit it; give the bytes that were sent."""
    todo = [item for item in job.contents.items if not _holds(there.files, item, job.digests)]
    if not todo and not job.stale:
        return 0
    total = sum(item.nbytes for item in todo)
    with contextlib.nullcontext() if watch.client_bars and job.xet else watch.stage("push") as on_progress:
        sender = _Sender(hub=job.hub, on_progress=on_progress, total=total, xet=job.xet)
        adds = [_client().Add(item, job.digests[item.name], sender.read, job.hub.stop) for item in todo]
        sender.send(adds)
    job.hub.commit(adds, job.stale, target.message, job.arrived)
    return sender.sent_bytes


def verified(out: Path, stage: Stage, *, source: Path | None = None, quick: bool = False) -> VerifyReport:
    """Verify an output before it is published.

    Args:
        out: the output.
        stage: gives the progress of it.
        source: what it was made from, to compare with; None looks at the output alone.
        quick: no tensor data.

    Raises:
        OutputError: it is not sound; names the first problem.
        CheckpointError, ManifestError, FamilyError, PlanError: the source cannot be read, or OUT is not made from it.

    """
    with contextlib.nullcontext() if quick else stage("verify") as on_progress:
        report = verify(out, source=source, on_progress=on_progress, quick=quick)
    if not report.sound:
        first, more = report.problems[0], len(report.problems) - 1
        others = f" (and {more} more)" if more else ""
        raise OutputError(
            f"{out}: not sound, so not uploaded: {first.where}: {first.message}{others}\n"
            f"  all of it: shardxform verify {out}{f' `source` {source}' if source else ''}"
        )
    return report


def _client() -> Any:  # noqa: ANN401
    try:
        from shardxform.publish import hub
    except ImportError as e:
        raise PlanError("push needs huggingface_hub: pip install 'shardxform[hub]'") from e
    return hub


@dataclass(frozen=True, slots=True, kw_only=True)
class _There:
    """What the hub had in the beginning."""

    repo: bool
    branch: bool
    files: Mapping[str, HubFile]


def _refuse_early(hub: Hub, contents: Contents, target: Destination) -> _There:
    """Refuse what can be refused before an hour of work; nothing is changed."""
    user, owners = hub.user()
    private = hub.is_private()
    if private is None:
        owner = target.repo.split("/")[0]
        if not target.create:
            raise RemoteError(f"{target.repo}: no such repository, or none that the token sees; `create` makes it")
        if owner not in owners:
            raise RemoteError(f"{target.repo}: the token is {user}'s, who may not create repositories of {owner}")
        return _There(repo=False, branch=False, files={})
    if target.private and not private:
        raise RemoteError(f"{target.repo}: is public, and `private` makes only new repositories private; not uploaded")
    head = hub.head()
    if head is None:
        if not target.create:
            raise RemoteError(f"{target.repo}: no branch {target.branch!r}; `create` makes it")
        files = hub.stored("main")  # what the branch is made from
    else:
        hub.refuse_reader()
        files = hub.stored(head)
    _refuse_stale(_stale(contents, files), target)
    return _There(repo=True, branch=head is not None, files=files)


def _prepare(hub: Hub, target: Destination, there: _There) -> None:
    """Make repository and branch where they are missing."""
    if not there.repo:
        hub.create(target.private)
    if not there.branch and hub.head() is None:
        hub.create_branch()


def _stale(contents: Contents, files: Mapping[str, HubFile]) -> list[str]:
    """Shards and index on the hub that are not of this output, and that clients would load with it.

    A file in GGUF is loaded by its name, beside whatever others.
    """
    ours = {item.name for item in contents.items}
    if not any(name.endswith(".safetensors") for name in ours):
        return []
    return [
        name
        for name in sorted(files)
        if name not in ours and (name == INDEX or (name.endswith(".safetensors") and "/" not in name))
    ]


def _refuse_stale(stale: Sequence[str], target: Destination) -> None:
    if stale and not target.replace:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise RemoteError(
            f"{target.repo}: has {stale[0]}{more}, of another checkpoint, which clients would load too;"
            " `replace` removes such files, `branch` names another branch"
        )


def _holds(files: Mapping[str, HubFile], item: PublishedFile, digests: Digests) -> bool:
    stored = files.get(item.name)
    return stored is not None and stored.is_same(item, digests[item.name])


def _checked(hub: Hub, contents: Contents, digests: Digests, stale: Sequence[str]) -> str:
    """Compare sizes and hashes of all files with what the hub says of the branch; give the commit."""
    commit = hub.head()
    if commit is None:
        raise RemoteError(f"{hub.repo}: the branch {hub.branch!r} is gone")
    files = hub.stored(commit)
    for item in contents.items:
        if not _holds(files, item, digests):
            found = f"{files[item.name].nbytes:,} other bytes" if item.name in files else "no such file"
            raise RemoteError(
                f"{hub.repo}/{item.name}: expected the {item.nbytes:,} bytes of {item.path}, found {found};"
                " run the same command again"
            )
    if left := [name for name in stale if name in files]:
        raise RemoteError(f"{hub.repo}/{left[0]}: expected it removed, found it there; run the same command again")
    return commit


@dataclass(slots=True, kw_only=True)
class _Sender:
    """Files under way on threads, and how far they are together."""

    hub: Hub
    on_progress: OnProgress | None
    total: int
    xet: bool
    sent_bytes: int = 0
    _done: dict[str, int] = field(default_factory=dict)
    _resumed: int = 0
    _told: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, adds: Sequence[Add]) -> None:
        """Send all; the first failure stops the others."""
        try:
            if self.xet:  # sends from several threads itself, and is stopped where it was called
                for add in adds:
                    self._send(add)
            else:
                self._send_at_once(adds)
        except BaseException:
            self.hub.stop.set()
            raise
        finally:
            with self._lock:  # nothing more is said: small files are read again for the commit, others may end late
                self.on_progress = None

    def _send_at_once(self, adds: Sequence[Add]) -> None:
        """Send from threads that nobody waits for: when one fails, the others end at their next piece."""
        waiting: queue.SimpleQueue[Add] = queue.SimpleQueue()
        results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def result() -> BaseException | None:
            while True:
                with contextlib.suppress(queue.Empty):
                    return results.get(timeout=_LOOK)
                interrupts.check()

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not self.hub.stop.is_set():
                    results.put(error := self._tried(waiting.get_nowait()))
                    if error is not None:
                        self.hub.stop.set()

        for add in adds:
            waiting.put(add)
        with interrupts.deferred():
            for _ in range(min(_AT_ONCE, len(adds))):
                threading.Thread(target=work, daemon=True).start()
            for _ in adds:
                if (error := result()) is not None:
                    raise error

    def _tried(self, add: Add) -> BaseException | None:
        try:
            self._send(add)
        except BaseException as e:
            return e
        return None

    def read(self, name: str, position: int) -> None:
        """Take down how far a file has been read; a transfer begun anew starts over."""
        with self._lock:
            self._done[name] = position
            self._tell()

    def _send(self, add: Add) -> None:
        self.hub.send(add)
        item = add.item
        with self._lock:
            if item.is_shard and not self.xet and not self._done.get(item.name):  # the hub had it already
                self._resumed += item.nbytes
            else:
                self.sent_bytes += item.nbytes
            self._done[item.name] = item.nbytes
            self._tell()

    def _tell(self) -> None:
        done = sum(self._done.values())
        if self.on_progress and (done == self.total or not self._told <= done < self._told + _EVERY):
            self._told = done
            self.on_progress(Progress(done, self.total, self._resumed))
