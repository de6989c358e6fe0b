"""Opening a checkpoint wherever it is: a directory here, or a repository of the hub by config, index and headers alone.

A revision is resolved to a commit once, and all that follows is of that commit. Of a shard the header is fetched, with
one request as a rule; whole shards that the hub client has in its cache are read from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from shardxform.base import interrupts, tensors
from shardxform.base.gguf import GgufHead, read_head
from shardxform.base.interrupts import Completions
from shardxform.base.strict_json import JsonError, parse_object
from shardxform.checkpoint.gguf import GgufModel, assemble, read_split
from shardxform.checkpoint.remote.reading import Downloads, Transfer
from shardxform.checkpoint.remote.repository import SCHEME, Remote, RepoName, parse_source
from shardxform.checkpoint.table import (
    CONFIG,
    GGUF_SUFFIX,
    IN_GGUF,
    INDEX,
    QUANTIZATION,
    Checkpoint,
    Folder,
    Head,
    Shard,
    first_file,
    scan,
)
from shardxform.errors import CheckpointError, RemoteError

__all__ = ["asks_hub", "open_checkpoint", "open_gguf_file"]

_LEAST_HEAD: Final = 1 << 12
_FIRST_HEAD: Final = 1 << 16  # where no index says how many tensors there are
_MOST_HEAD: Final = 1 << 23
_ENTRY: Final = 110  # bytes of a header's entry beside the name of its tensor, at most as a rule
_SMALL: Final = 64 << 20


def open_checkpoint(source: str | os.PathLike[str] | RepoName, downloads: Downloads | None = None) -> Checkpoint:
    """Open a directory, or `owner/name[@revision]` or `hf://owner/name[@revision]` of the hub.

    Args:
        source: what to open; a directory of that name wins.
        downloads: what fetches tensor data later; one with the usual settings where None.

    Raises:
        CheckpointError: the checkpoint is malformed.
        RemoteError: the hub has no such repository or revision, gives no access, or cannot be reached.

    """
    found = source if isinstance(source, RepoName) else parse_source(os.fspath(source))
    if isinstance(found, Path):
        return Checkpoint.open(found)
    if found.file:
        raise CheckpointError(f"{found}: {IN_GGUF}")
    remote = _remote(found, downloads or Downloads(Transfer()))
    checkpoint, errors = scan(remote.folder, _RepositoryFiles(remote))
    if errors or checkpoint is None:
        where = f"{remote.folder}{os.sep}"
        raise CheckpointError(str(errors[0]).replace(where, f"{remote}/").replace(str(remote.folder), str(remote)))
    return replace(checkpoint, remote=remote)


def open_gguf_file(source: RepoName, downloads: Downloads | None = None) -> GgufModel:
    """Open a model in GGUF by a file of a repository, which is listed, and the heads of whose files are fetched.

    Raises:
        CheckpointError: a file is malformed, or they do not belong together.
        RemoteError: the hub has no such repository, revision or file, gives no access, or cannot be reached.

    """
    if not asks_hub():
        raise RemoteError(f"{source}: files in GGUF are read from the hub, which is not asked here, or from a folder")
    from shardxform.checkpoint.remote.client import list_repository, snapshot_folder

    commit, files = list_repository(source)
    folder, _, name = source.file.rpartition("/")
    found = {path.rpartition("/")[2]: file for path, file in files.items() if path.rpartition("/")[0] == folder}
    name = first_file(name)
    if name not in found:
        listed = ", ".join(sorted(path for path in files if path.endswith(GGUF_SUFFIX))[:4])
        raise RemoteError(f"{source}: no such file at commit {commit[:12]}; in GGUF there are: {listed or 'none'}")
    root = snapshot_folder(source, commit) / folder
    gguf = {each: file for each, file in found.items() if each.endswith(GGUF_SUFFIX)}
    streamed = frozenset(each for each, file in gguf.items() if not _is_whole(root / each, file.nbytes))
    remote = Remote(
        repo=source.repo,
        commit=commit,
        folder=root,
        files=gguf,
        streamed=streamed,
        downloads=downloads or Downloads(Transfer()),
    )
    return assemble(root / name, lambda each: _fetch_gguf(remote, each), gguf, remote)


def _fetch_gguf(remote: Remote, name: str) -> tuple[GgufHead, Shard]:
    """The head of a file in GGUF, fetched as far as need be."""
    if name not in remote.files:
        raise CheckpointError(f"{remote}: no file {name}, which the model is split into too")
    if name not in remote.streamed:
        head, shard = read_split(remote.folder / name)
        return head, replace(shard, mtime_ns=0)
    data, nbytes = bytearray(), remote.files[name].nbytes

    def beginning(stop: int) -> bytes:
        if stop > len(data):
            remote.downloads.client.fetch(remote, name, len(data), stop, data.extend)
        return bytes(data[:stop])

    head, digest = read_head(beginning, nbytes, remote.named(name))
    return head, Shard(name, nbytes, head.data_start, digest, 0, head.entries)


def asks_hub() -> bool:
    """Whether a repository would be looked for on the hub: its client is installed, and not told to stay offline."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return False
    return not constants.HF_HUB_OFFLINE


def _remote(name: RepoName, downloads: Downloads) -> Remote:
    """Resolve a revision; offline to what the hub client has in its cache."""
    try:
        from huggingface_hub import constants
    except ImportError as e:
        raise RemoteError(
            f"{name}: {_absent(name)}a repository of the hub needs huggingface_hub 1.0 or later:"
            " pip install 'shardxform[hub]'"
        ) from e
    return _cached(name, downloads) if constants.HF_HUB_OFFLINE else _listed(name, downloads)


def _cached(name: RepoName, downloads: Downloads) -> Remote:
    """What is in the hub client's cache; the hub is not asked."""
    from shardxform.checkpoint.remote.client import cached_folder

    folder = cached_folder(name)
    if folder is None:
        raise RemoteError(f"{name}: {_absent(name)}nothing of it in the cache, and HF_HUB_OFFLINE is set")
    return Remote(
        repo=name.repo, commit=folder.name, folder=folder, files={}, streamed=frozenset(), downloads=downloads
    )


def _absent(name: RepoName) -> str:
    return "no such folder here; " if name.as_path else ""


def _listed(name: RepoName, downloads: Downloads) -> Remote:
    """Ask the hub; config and index are fetched, and shards that are in the cache whole are not streamed."""
    from shardxform.checkpoint.remote.client import list_repository, snapshot_folder

    commit, files = list_repository(name)
    for file in files:
        if file.startswith("/") or ".." in file.split("/") or "\\" in file:
            raise RemoteError(f"{name}: a file is called {file!r}; expected a path inside the repository")
    folder = snapshot_folder(name, commit)
    shards = (file for file in files.values() if file.name.endswith(".safetensors"))
    streamed = frozenset(file.name for file in shards if not _is_whole(folder / file.name, file.nbytes))
    remote = Remote(repo=name.repo, commit=commit, folder=folder, files=files, streamed=streamed, downloads=downloads)
    if {".safetensors", GGUF_SUFFIX} & {os.path.splitext(file)[1] for file in files} == {GGUF_SUFFIX}:
        file = min(file for file in files if file.endswith(GGUF_SUFFIX))
        raise CheckpointError(f"{remote}: {IN_GGUF}; a file of it is named as {SCHEME}{name.repo}/{file}")
    if CONFIG not in files:
        raise CheckpointError(f"{remote}: no {CONFIG}; expected a checkpoint")
    for small in files.keys() & {CONFIG, INDEX, QUANTIZATION}:
        if files[small].nbytes > _SMALL:
            raise CheckpointError(f"{remote}/{small}: more than {_SMALL} bytes")
        remote.fetch(small)
    return remote


def _is_whole(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


class _RepositoryFiles:
    """What a repository holds, for `scan`; all headers are fetched, side by side, when the first is asked for."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._folder = Folder(remote.folder)
        self._heads: dict[str, Callable[[], Head]] = {}

    def names(self) -> Iterable[str]:
        """Name every file; what lies deeper is shown by its folder, but for chat templates."""
        if not self._remote.files:
            return self._folder.names()
        names: dict[str, None] = {}
        for name in self._remote.files:
            top, below, rest = name.partition("/")
            deep = below and (top != "additional_chat_templates" or "/" in rest)
            names[f"{top}/" if deep else name] = None
        return names

    def size(self, name: str) -> int | None:
        """Size in bytes; None of a folder."""
        if not self._remote.files:
            return self._folder.size(name)
        return self._remote.files[name].nbytes if name in self._remote.files else None

    def head(self, name: str) -> Head:
        """A shard's header; a whole shard's is read from the client's cache."""
        if name not in self._remote.streamed:
            if self._remote.files and name not in self._remote.files:
                raise FileNotFoundError(2, "No such file", name)
            return self._whole_head(name)
        if not self._heads:
            self._heads = dict(self._all_heads())
        return self._heads[name]()

    def _whole_head(self, name: str) -> Head:
        try:
            return replace(self._folder.head(name), mtime_ns=0)
        except FileNotFoundError as e:
            raise CheckpointError(f"{self._remote.folder / name}: not in the cache, and HF_HUB_OFFLINE is set") from e

    def _all_heads(self) -> Iterable[tuple[str, Callable[[], Head]]]:
        """Fetch all headers; functions that give one each, or say why not."""
        guesses = self._guesses()
        connections = self._remote.downloads.transfer.connections
        under_way: Completions[Head, str] = Completions()
        with interrupts.deferred(), ThreadPoolExecutor(connections, thread_name_prefix="head") as pool:
            for name, guess in guesses.items():
                under_way.add(pool.submit(_fetch_head, self._remote, name, guess), name)
            try:
                while not all(future.done() for future in under_way.pending):
                    under_way.next()
                    interrupts.check()
            except BaseException:  # Ctrl-C: the threads are not to go on trying
                self._remote.downloads.client.stop()
                raise
        return [(name, future.result) for future, name in under_way.pending.items()]

    def _guesses(self) -> Mapping[str, int]:
        """Bytes that the header of every streamed shard will hardly exceed, from the names of its tensors."""
        index = self._remote.folder / INDEX
        try:
            found = parse_object(index.read_bytes()).get("weight_map") if INDEX in self._remote.files else None
        except (OSError, JsonError):
            found = None
        sizes: dict[str, int] = {}
        for tensor, shard in found.items() if isinstance(found, dict) else ():
            if isinstance(shard, str) and shard in self._remote.streamed:
                sizes[shard] = sizes.get(shard, _LEAST_HEAD) + len(str(tensor)) + _ENTRY
        return sizes or dict.fromkeys(self._remote.streamed, _FIRST_HEAD)


def _fetch_head(remote: Remote, name: str, guess: int) -> Head:
    """Length prefix and header of a shard, with one request if `guess` is enough."""
    nbytes = remote.files[name].nbytes
    data = bytearray()

    def fetch(stop: int) -> None:
        if stop > len(data):
            remote.downloads.client.fetch(remote, name, len(data), stop, data.extend)

    fetch(min(guess, _MOST_HEAD, nbytes))
    start = tensors.data_start(bytes(data[: tensors.LENGTH_BYTES]), nbytes, f"{remote}/{name}")
    fetch(start)
    return Head(bytes(data[:start]), nbytes, 0)
