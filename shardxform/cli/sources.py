"""SRC on the command line, a folder here or a repository of the hub, and the options of how a repository is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from shardxform.checkpoint.remote.repository import SCHEME, RepoName, is_ambiguous, parse_source
from shardxform.checkpoint.table import CONFIG, Checkpoint, stopped
from shardxform.cli.console import tell
from shardxform.cli.options import SIZE
from shardxform.errors import CheckpointError, ShardxformError

__all__ = ["SOURCE", "Source", "connections_option", "open_given", "source_argument", "transfer_options"]

Source = Path | RepoName
_CONNECTIONS: Final = 4
_CACHE_BYTES: Final = 10 * 10**9


class _Source(click.ParamType[Source]):
    """A folder, or `owner/name[@revision]` with or without `hf://` before it."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Source:  # noqa: ANN401
        text = str(value)
        if not text:
            self.fail("expected a path or owner/name, found an empty one", param, ctx)
        try:
            return parse_source(text)
        except ShardxformError as e:
            self.fail(str(e), param, ctx)

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Have the shell complete names of folders; of the hub's repositories nothing is known here."""
        return [CompletionItem(incomplete, type="dir")]


SOURCE: Final = _Source()
source_argument = click.argument("source", metavar="SRC", type=SOURCE)
connections_option = click.option(
    "--connections",
    type=click.IntRange(1, 64),
    help=f"Requests at a time to the hub, where SRC is there.  [default: {_CONNECTIONS}]",
)
_cache_option = click.option(
    "--cache-limit",
    type=SIZE,
    help="Most disk that what was fetched of the hub takes while the model is run; what is only copied or rounded "
    "takes none.  [default: 10GB]",
)


def open_given(sources: Sequence[Source], given: dict[str, Any], folder: Path) -> list[Checkpoint]:
    """Open what was named on the command line; takes the options of how it is read out of `given`.

    Args:
        sources: folders and repositories.
        given: options; `connections` and, of commands that run a model, `cache_limit`.
        folder: a place on the disk that is to hold what was fetched and not yet read.

    Raises:
        CheckpointError, RemoteError: see `opening.open_checkpoint`.

    """
    connections, cache = given.pop("connections", None), given.pop("cache_limit", None)
    if all(isinstance(source, Path) for source in sources):
        for option, value in (("--connections", connections), ("--cache-limit", cache)):
            if value is not None:
                raise click.UsageError(f"{option} is for repositories of the hub, but {sources[0]} is a folder")
        return [_open_folder(source) for source in sources if isinstance(source, Path)]
    from shardxform.checkpoint.opening import asks_hub, open_checkpoint
    from shardxform.checkpoint.remote.reading import LEAST_CACHE_BYTES, Downloads, Transfer

    if cache is not None and cache < LEAST_CACHE_BYTES:
        raise click.UsageError(f"--cache-limit: expected at least {LEAST_CACHE_BYTES:,} bytes, found {cache:,}")
    transfer = Transfer(
        connections=connections or _CONNECTIONS, cache_bytes=cache or _CACHE_BYTES, folder=_existing(folder)
    )
    downloads = Downloads(transfer)
    for source in sources:
        if isinstance(source, RepoName) and source.as_path and asks_hub():
            tell(f"note: no folder {source.repo} here; asking the hub")
    return [_open_folder(s) if isinstance(s, Path) else open_checkpoint(s, downloads) for s in sources]


def transfer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a repository is read by a command that runs a model."""
    return connections_option(_cache_option(function))


def _open_folder(path: Path) -> Checkpoint:
    """Open a folder; one that is no checkpoint, but is called as a repository could be, hides that repository."""
    try:
        return Checkpoint.open(path)
    except CheckpointError as e:
        if not is_ambiguous(str(path)) or (path / CONFIG).exists() or stopped(path):
            raise
        raise CheckpointError(f"{e}; for the repository of the hub of that name, write {SCHEME}{path}") from e


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
