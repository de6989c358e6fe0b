"""One repository of a model hub, through huggingface_hub: what stands there, whether it may be written, and writing it.

Calls that failed for a passing reason (429, 5xx, a broken connection) are made again, later each time; everything else
becomes an error of one line. The endpoint, the token and the offline mode are those that the user set for the client.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import IO, Any, Final, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, utils

from shardxform import __version__
from shardxform.base import interrupts
from shardxform.errors import Interrupted, RemoteError
from shardxform.publish.contents import PublishedFile, git_blob_id

__all__ = ["Add", "Hub", "HubFile", "silenced", "uses_xet"]

T = TypeVar("T")

_TRIES: Final = 6
_LONGEST_WAIT: Final = 60.0  # seconds
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_NETWORK: Final = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # by version of the client


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file as the hub has it: `digest` is the SHA-256 of a large file and the git blob's id of others."""

    nbytes: int
    digest: str
    is_large: bool

    def is_same(self, item: PublishedFile, sha256: str) -> bool:
        """Whether it is this file."""
        if self.nbytes != item.nbytes:
            return False
        return self.digest == (sha256 if self.is_large else git_blob_id(item.path))


class Add(CommitOperationAdd):
    """A file to be uploaded, which tells how far its reading is, and stops when it is told to."""

    def __init__(
        self, item: PublishedFile, sha256: str, on_read: Callable[[str, int], None], stop: threading.Event
    ) -> None:
        super().__init__(item.name, str(item.path))
        self.upload_info.sha256 = bytes.fromhex(sha256)
        self.item, self.on_read, self.stop = item, on_read, stop

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:  # noqa: ARG002
        """Open the file; where it is read to is told, so a transfer begun anew counts once."""
        with self.item.path.open("rb") as file:
            yield _told(file, self)


def _told(file: IO[bytes], add: Add) -> IO[bytes]:
    read = file.read

    def reading(size: int = -1) -> bytes:
        if add.stop.is_set():
            raise Interrupted("stopped; run the same command again to go on")
        data = read(size)
        add.on_read(add.item.name, file.tell())
        return data

    file.read = reading  # type: ignore[method-assign]  # the client itself counts so: a wrapper would have no length
    return file


@dataclass(slots=True, kw_only=True)
class Hub:
    """A repository, or the name for one. Every method asks the hub, and raises RemoteError with what it refused.

    Attributes:
        repo: owner/name.
        branch: where files go.
        tell: says on a line why something takes longer.
        stop: set when the work is to end; no call is made again then.

    """

    repo: str
    branch: str
    tell: Callable[[str], None]
    stop: threading.Event = field(default_factory=threading.Event)
    api: HfApi = field(default_factory=lambda: HfApi(library_name="shardxform", library_version=__version__))

    @property
    def url(self) -> str:
        """Where people see it."""
        where = "" if self.branch == "main" else f"/tree/{self.branch}"
        return f"{self.api.endpoint}/{self.repo}{where}"

    def user(self) -> tuple[str, frozenset[str]]:
        """Name of the token's user, and of everybody in whose name they may have repositories."""
        about = self._asked(self.api.whoami)
        name = str(about.get("name", ""))
        return name, frozenset({name, *(str(org.get("name", "")) for org in about.get("orgs") or ())})

    def is_private(self) -> bool | None:
        """Whether only some see the repository; None when there is none, or none that this token sees."""
        info = self._found(lambda: self.api.model_info(self.repo), errors.RepositoryNotFoundError)
        return None if info is None else bool(info.private)

    def head(self) -> str | None:
        """Commit of the branch; None when there is no such branch."""
        ask = partial(self.api.model_info, self.repo, revision=self.branch)
        info = self._found(ask, errors.RevisionNotFoundError)
        return None if info is None else str(info.sha)

    def stored(self, revision: str) -> dict[str, HubFile]:
        """The files of a commit."""
        tree = self._asked(lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision)))
        return {file.path: _stored(file) for file in tree if hasattr(file, "blob_id")}

    def create(self, private: bool) -> None:
        """Make the repository; without `private`, as its owner makes them by default."""
        try:
            self._asked(lambda: self.api.create_repo(self.repo, private=private or None))
        except RemoteError as e:
            lost = _status(e.__cause__) == 409 and self.is_private() is not None  # made, and the answer never came
            if not lost:
                raise

    def create_branch(self) -> None:
        """Make the branch, from main."""
        self._asked(lambda: self.api.create_branch(self.repo, branch=self.branch, exist_ok=True))

    def refuse_reader(self) -> None:
        """Ask what is asked before every upload, for a file of a few bytes, and upload nothing."""
        ask = CommitOperationAdd("config.json", b"{}")
        self._asked(lambda: self.api.preupload_lfs_files(self.repo, [ask], revision=self.branch))

    def send(self, add: Add) -> None:
        """Upload one file if it is large and not there; what is small goes with the commit."""
        self._asked(
            lambda: self.api.preupload_lfs_files(self.repo, [add], revision=self.branch, free_memory=False),
            f"{self.repo}/{add.item.name}",
        )

    def commit(self, adds: Sequence[Add], stale: Sequence[str], message: str, arrived: Callable[[], bool]) -> None:
        """Make one commit of everything; `arrived` says whether one whose answer got lost was made."""
        operations: list[Any] = [*(CommitOperationDelete(name) for name in stale), *adds]

        def once() -> None:
            if not tried or not arrived():
                tried.append(True)
                self.api.create_commit(self.repo, operations, commit_message=message, revision=self.branch)

        tried: list[bool] = []
        self._asked(once)

    def _found(self, call: Callable[[], T], missing: type[Exception]) -> T | None:
        """What a call gives; None when the hub says with this error that it has no such thing."""
        try:
            return self._asked(call)
        except RemoteError as e:
            if isinstance(e.__cause__, missing) and not isinstance(e.__cause__, errors.GatedRepoError):
                return None
            raise

    def _asked(self, call: Callable[[], T], what: str = "") -> T:
        what = what or self.repo
        for number in range(1, _TRIES + 1):
            try:
                return call()
            except Exception as e:  # of any of the libraries below it, which differ by version
                error = _cause(e)
                if number == _TRIES or self.stop.is_set() or not _is_passing(error):
                    raise _refusal(what, error, self.branch) from e
                wait = _wait(error, number)
                self.tell(f"{what}: {_line(error)}; trying again in {wait:.0f} s ({number + 1} of {_TRIES})")
                interrupts.wait(self.stop, wait)
        raise AssertionError


@contextlib.contextmanager
def silenced(shows_itself: bool, abandoned: threading.Event) -> Iterator[None]:
    """Keep the client's own warnings, and its bars unless wanted, from stderr; put both back at the end.

    Not when work was `abandoned`: its threads, which nobody waits for, may still have warnings to give.
    """
    client: Any = utils  # does not say what it exports
    verbosity, hidden = client.logging.get_verbosity(), client.are_progress_bars_disabled()
    client.logging.set_verbosity_error()
    if not shows_itself:
        client.disable_progress_bars()
    try:
        yield
    finally:
        if not abandoned.is_set():
            client.logging.set_verbosity(verbosity)
            if not hidden and not shows_itself:
                client.enable_progress_bars()


def uses_xet() -> bool:
    """Whether the client uploads in its own chunks, which nothing outside it can count."""
    return find_spec("hf_xet") is not None and not getattr(constants, "HF_HUB_DISABLE_XET", False)


def _stored(file: Any) -> HubFile:  # noqa: ANN401
    large = file.lfs
    return HubFile(nbytes=int(file.size), digest=str(large.sha256 if large else file.blob_id), is_large=bool(large))


def _cause(error: BaseException) -> BaseException:
    """The error that the client put into a RuntimeError of its own."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, (errors.OfflineModeIsEnabled, Interrupted)):
        return False
    if status := _status(error):
        return status in _PASSING
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in _NETWORK


def _wait(error: BaseException, number: int) -> float:
    """Seconds until the next try: what the hub asks for, or twice as long as before."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = str(headers.get("retry-after", ""))
    return min(float(asked) if asked.isascii() and asked.isdigit() else 2.0 ** (number - 1), _LONGEST_WAIT)


def _refusal(what: str, error: BaseException, branch: str) -> Exception:
    if isinstance(error, Interrupted):
        return error
    status = _status(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason = "the client is offline (HF_HUB_OFFLINE); nothing was uploaded"
    elif isinstance(error, errors.LocalTokenNotFoundError):
        reason = "uploading needs a token, and there is none: run `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"no branch {branch!r}; `create` makes it"
    elif status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        reason = "the hub does not know the token: run `hf auth login` again, or set another HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "no such repository, or none that the token sees; `create` makes it"
    elif status == 403:
        reason = f"the token may not write here: {_said(error)}"
    elif status == 409:
        reason = "the name is taken, by something that the token does not see"
    elif not status and _is_passing(error):
        line = _line(error)
        without = "; HF_HUB_DISABLE_XET=1 uploads without it" if "xet" in line.lower() else ""
        reason = f"the hub cannot be reached: {line}{without}"
    else:
        reason = f"the hub gave no answer that can be used: {_line(error)}"
    return RemoteError(f"{what}: {reason}")


def _said(error: BaseException) -> str:
    """What the hub itself gives as the reason."""
    said = getattr(error, "server_message", None) or _line(error)
    return str(said).strip()[:200]


def _line(error: BaseException) -> str:
    if status := _status(error):
        return f"it answers {status}" + (f", {said}" if (said := getattr(error, "server_message", None)) else "")
    return " ".join(str(error).split())[:200] or type(error).__name__
