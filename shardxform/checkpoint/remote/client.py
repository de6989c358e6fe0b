"""Asking the hub: which commit a revision is, what it holds, whole small files, and byte ranges of large ones.

huggingface_hub does the talking, with whatever endpoint, token, proxy and cache the user has set for it. A range is
fetched to its last byte or refused: broken answers are asked for again from the byte reached, and every answer must be
for the commit, the content and the size that were planned.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from shardxform.base import interrupts
from shardxform.checkpoint.remote.repository import Remote, RemoteFile, RepoName, has_content
from shardxform.errors import RemoteError

__all__ = ["Client", "Listing", "cached_folder", "download", "list_repository", "snapshot_folder"]

T = TypeVar("T")
Listing = tuple[str, dict[str, RemoteFile]]
"""The commit, and what it holds."""

_TRIES: Final = 10  # in a row without progress: about two minutes
_FIRST_TRIES: Final = 3  # of the first request, while the hub's name cannot be resolved: about a second
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 30.0
_LONGEST_ASKED: Final = 900.0  # of a Retry-After
_TIMEOUT: Final = 30.0
_PROGRESS: Final = 1 << 16  # bytes that count as progress
_MISTAKES: Final = 6  # answers in a row about another content or size, after which it is believed
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _Again(Exception):
    """What failed, and may not fail again.

    Attributes:
        pause: seconds that the server asks to wait.
        mistaken: it was an answer, about something else.
        unresolved: the name of the hub has no address, as without a network.

    """

    def __init__(
        self, what: str, pause: float | None = None, *, mistaken: bool = False, unresolved: bool = False
    ) -> None:
        super().__init__(what)
        self.pause = pause
        self.mistaken = mistaken
        self.unresolved = unresolved


class Client:
    """Ranged reads of any number of repositories; used by several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str], str] = {}
        self._tags: dict[str, str] = {}  # place without its signature -> ETag first seen there
        self._quiet_until = 0.0
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether it was stopped."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End all pauses, and begin no other request."""
        self._stopped.set()

    def fetch(self, remote: Remote, name: str, start: int, stop: int, sink: Callable[[memoryview], None]) -> None:
        """Hand bytes `start`..`stop` of a file to `sink`, in order, each exactly once.

        Raises:
            RemoteError: no access, no such file, other content than planned, or no progress for too long.

        """
        tries = _Tries(f"{remote}/{name}")
        at = start
        while at < stop:
            began = at
            try:
                with contextlib.closing(self._answer(remote, remote.files[name], at, stop)) as answer:
                    for data in answer:
                        sink(data)
                        at += len(data)
                if at < stop:
                    raise _Again(f"the answer ended after {at - began:,} of {stop - began:,} bytes")
            except _Again as e:
                if at - began >= _PROGRESS:
                    tries.reset()
                self._pause(tries.next(e), everybody=e.pause is not None)

    def _answer(self, remote: Remote, file: RemoteFile, start: int, stop: int) -> Generator[memoryview, None, None]:
        """Ask once for a range; its bytes, as far as they come."""
        place = self._place(remote, file)
        try:
            with _session().stream("GET", place, headers=_headers(place, start, stop), timeout=_TIMEOUT) as answer:
                self._check(answer, remote, file, start, stop)
                left = stop - start
                for block in answer.iter_raw():
                    yield memoryview(block)[:left]
                    left -= min(len(block), left)
        except (RemoteError, _Again, GeneratorExit):
            raise
        except Exception as e:  # of the HTTP library, which differs by version
            raise _Again(_line(e)) from e

    def _check(self, answer: Any, remote: Remote, file: RemoteFile, start: int, stop: int) -> None:  # noqa: ANN401
        """Hold the head of an answer against what was asked and planned."""
        status, headers = answer.status_code, answer.headers
        if status in (401, 403, 404, 410):  # the signature of the place is out of date, as it is after an hour
            self._forget_place(remote, file)
            raise _Again(f"status {status} from {urlsplit(str(answer.url)).netloc}", 0.0)
        if status == 429 or status >= 500:
            raise _Again(f"status {status}", _retry_after(headers))
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if status != 206 or found is None:
            raise _Again(f"expected a part of the file, found status {status}", mistaken=True)
        first, last, total = (int(number) for number in found.groups())
        if total != file.nbytes:
            self._forget_place(remote, file)
            raise _Again(f"the file has {total:,} bytes, but had {file.nbytes:,} when planned", mistaken=True)
        length = int(headers.get("Content-Length", stop - start))
        if (first, last + 1, length) != (start, stop, stop - start):
            raise _Again(f"asked for bytes {start}-{stop - 1}, got {length} from {first}", mistaken=True)
        self._check_tag(str(answer.url), _bare(headers.get("ETag", "")), remote, file)

    def _check_tag(self, url: str, tag: str, remote: Remote, file: RemoteFile) -> None:
        """Refuse another content: by its SHA-256, or by any other tag than a place had before."""
        place = url.partition("?")[0]
        with self._lock:
            before = self._tags.setdefault(place, tag)
        wanted = file.sha256 if _SHA256.fullmatch(tag) and file.sha256 else before
        if tag != wanted:
            self._forget_place(remote, file)
            raise _Again(f"its content is {tag[:16]}, but was {wanted[:16]} when planned", mistaken=True)

    def _place(self, remote: Remote, file: RemoteFile) -> str:
        """Where a file can be had for a while: what the hub redirects to."""
        key = (str(remote), file.name)
        with self._lock:
            if key in self._places:
                return self._places[key]
        place = _resolve(remote, file)
        with self._lock:
            return self._places.setdefault(key, place)

    def _forget_place(self, remote: Remote, file: RemoteFile) -> None:
        with self._lock:
            self._places.pop((str(remote), file.name), None)

    def _pause(self, seconds: float, *, everybody: bool) -> None:
        """Wait; a pause that the server asks for holds for all threads."""
        with self._lock:
            until = time.monotonic() + seconds
            self._quiet_until = max(self._quiet_until, until) if everybody else self._quiet_until
            until = max(until, self._quiet_until)
        if interrupts.wait(self._stopped, max(until - time.monotonic(), 0)):
            raise RemoteError("stopped")


class _Tries:
    """Counts tries without progress, and says how long to wait for the next.

    Nothing was reached yet before the `first` request: a name without an address is then no interruption.
    """

    def __init__(self, where: str, *, first: bool = False) -> None:
        self._where = where
        self._first = first
        self._failed = self._mistaken = 0

    def reset(self) -> None:
        """There was progress."""
        self._failed = self._mistaken = 0

    def next(self, failure: _Again) -> float:
        """Seconds to wait.

        Raises:
            RemoteError: it is enough.

        """
        self._failed += 1
        self._mistaken = self._mistaken + 1 if failure.mistaken else 0
        if self._mistaken >= _MISTAKES:
            raise RemoteError(f"{self._where}: {failure}")
        if self._first and failure.unresolved and self._failed >= _FIRST_TRIES:
            raise RemoteError(f"{self._where}: the hub cannot be asked: {failure}; is there a network?")
        if self._failed >= _TRIES:
            raise RemoteError(
                f"{self._where}: {failure}, after {self._failed} tries without progress; run the same command again"
                " to go on"
            )
        if failure.pause is not None and failure.pause > _LONGEST_ASKED:
            raise RemoteError(f"{self._where}: {failure}: the hub asks to wait {failure.pause:,.0f} s; go on then")
        usual = min(_FIRST_PAUSE * 2 ** (self._failed - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1)  # noqa: S311
        return usual if failure.pause is None else max(failure.pause, usual if self._failed > 1 else 0)


# -- the hub's own calls -------------------------------------------------------------------------------------------


def list_repository(name: RepoName) -> Listing:
    """Resolve a revision to a commit, and list what it holds.

    Raises:
        RemoteError: no such repository or revision, no access, no network.

    """
    from huggingface_hub import HfApi

    def ask() -> Any:  # noqa: ANN401
        return HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=_TIMEOUT)

    try:
        info = _patiently(str(name), ask, first=True)
    except RemoteError as e:
        if not name.as_path:
            raise
        raise RemoteError(f"{name}: no such folder here; {str(e).removeprefix(f'{name}: ')}") from e
    files = {str(found.rfilename): _file_of(found) for found in info.siblings or ()}
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise RemoteError(f"{name}: expected the id of a commit, found {info.sha!r}")
    return str(info.sha), files


def download(remote: Remote, name: str) -> None:
    """Bring a whole file to the hub client's cache, with the content that the hub's hash says.

    Raises:
        RemoteError: the hub does not give it.

    """
    from huggingface_hub import hf_hub_download

    def get() -> None:
        path = Path(hf_hub_download(remote.repo, name, revision=remote.commit))
        if not has_content(path, remote.files[name]):
            path.resolve().unlink()  # so that it is asked for again, rather than taken from the cache
            path.unlink(missing_ok=True)
            raise _Again("its content is not what the hub's hash says", mistaken=True)

    bars: Any = importlib.import_module("huggingface_hub.utils")
    shown = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()  # stderr has progress of its own, or none
    try:
        _patiently(f"{remote}/{name}", get)
    finally:
        if shown:
            bars.enable_progress_bars()


def snapshot_folder(name: RepoName, commit: str) -> Path:
    """Where the hub client keeps the files of a commit, whether there are any or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")
    return home / "snapshots" / commit


def cached_folder(name: RepoName) -> Path | None:
    """Where the hub client keeps what it has of a revision, whole or in part; None without a config.json."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.repo, "config.json", revision=name.revision)
    return Path(found).parent if isinstance(found, str) else None


def _resolve(remote: Remote, file: RemoteFile) -> str:
    """Ask the hub where a file lies, and hold its answer against what was planned."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(remote.repo, file.name, revision=remote.commit)
    where = f"{remote}/{file.name}"
    found: Any = _asked(where, lambda: get_hf_file_metadata(url, timeout=_TIMEOUT))
    if found.commit_hash not in (None, remote.commit):
        raise _Again(f"the hub answers for commit {found.commit_hash}", mistaken=True)
    if found.size != file.nbytes:
        raise _Again(f"the file has {found.size} bytes, but had {file.nbytes:,} when planned", mistaken=True)
    if _bare(found.etag or "") != file.etag:
        raise _Again(f"its content is {found.etag}, but was {file.etag} when planned", mistaken=True)
    return str(found.location)


def _patiently(what: str, call: Callable[[], T], *, first: bool = False) -> T:
    """Call the hub until it answers."""
    tries = _Tries(what, first=first)
    while True:
        try:
            return _asked(what, call)
        except _Again as e:
            time.sleep(tries.next(e))


def _asked(what: str, call: Callable[[], T]) -> T:
    """Call the hub; what its client raises becomes one line, or is worth another try."""
    from huggingface_hub import errors

    try:
        return call()
    except _Again:
        raise
    except errors.GatedRepoError as e:
        raise RemoteError(f"{what}: gated: ask for access on the hub, and set HF_TOKEN (or hf auth login)") from e
    except errors.RevisionNotFoundError as e:
        raise RemoteError(f"{what}: the repository has no such revision") from e
    except errors.RepositoryNotFoundError as e:
        raise RemoteError(f"{what}: no such repository on the hub, or it is private: set HF_TOKEN") from e
    except errors.OfflineModeIsEnabled as e:
        raise RemoteError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else 0
        if status == 429 or status >= 500:
            raise _Again(f"status {status}", _retry_after(e.response.headers)) from e
        kind = " (is HF_TOKEN right?)" if status in (401, 403) else ""
        raise RemoteError(f"{what}: the hub answers with status {status}{kind}: {_line(e)}") from e
    except errors.LocalEntryNotFoundError as e:
        raise _Again(f"no answer: {_line(e)}") from e
    except errors.HFValidationError as e:
        raise RemoteError(f"{what}: no name of a repository: {_line(e)}") from e
    except Exception as e:  # of the HTTP library, which differs by version
        if isinstance(e, OSError) and e.filename:
            raise RemoteError(f"{what}: {e.filename}: {e.strerror}") from e
        raise _Again(f"no answer: {_line(e)}", unresolved=_is_unresolved(e)) from e


def _is_unresolved(error: BaseException) -> bool:
    """Whether it began with a name that has no address; the libraries in between wrap that, each in its own way."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, socket.gaierror):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def _file_of(found: Any) -> RemoteFile:  # noqa: ANN401
    sha256 = str(found.lfs.sha256) if found.lfs else ""
    return RemoteFile(str(found.rfilename), int(found.size or 0), str(found.blob_id or ""), sha256)


def _session() -> Any:  # noqa: ANN401
    from huggingface_hub import get_session

    return get_session()


def _headers(place: str, start: int, stop: int) -> dict[str, str]:
    """Headers of a request; the token is for the hub's own host alone."""
    from huggingface_hub import constants

    hub: Any = importlib.import_module("huggingface_hub.utils")
    ours = _origin(place) == _origin(constants.ENDPOINT)
    headers: dict[str, str] = hub.build_hf_headers(token=None if ours else False)
    return {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _bare(tag: str) -> str:
    return tag.strip().removeprefix("W/").strip('"')


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
