"""`shardxform push`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import click

from shardxform.base.progress import OnProgress
from shardxform.cli.console import count, gb, print_json, progress, rows, tell
from shardxform.cli.options import json_option, out_argument
from shardxform.publish import Contents, Destination, Pushed, Watch, contents_of, is_repo_name, push, verified

__all__ = ["command"]

_MOST_FILES: Final = 20  # shown one by one; --json has all


class _RepoName(click.ParamType[str]):
    name = "repository"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ANN401
        if not is_repo_name(str(value)):
            self.fail(f"expected a repository of the hub, owner/name, found {value!r}", param, ctx)
        return str(value)


def _text(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("expected a text, found none", param=param)
    return value


@click.command("push")
@out_argument
@click.argument("repo", metavar="OWNER/NAME", type=_RepoName())
@click.option("--create", is_flag=True, help="Make the repository, or the branch, if there is none.")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is public.")
@click.option(
    "--revision", "branch", metavar="BRANCH", default="main", show_default=True, callback=_text, help="Where to."
)
@click.option("--message", metavar="TEXT", callback=_text, help="Of the commit.  [default: names this program]")
@click.option("--replace", is_flag=True, help="Remove shards and index of another checkpoint that stands there.")
@click.option(
    "--source",
    metavar="SRC",
    type=click.Path(path_type=Path),
    help="The checkpoint that OUT was made from: compare every tensor with it before.",
)
@click.option("--dry-run", is_flag=True, help="List the files and check headers; nothing is asked of the hub.")
@json_option
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
def command(
    out: Path,
    repo: str,
    create: bool,
    private: bool,
    branch: str,
    message: str | None,
    replace: bool,
    source: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish the output OUT as OWNER/NAME on the hub, through huggingface_hub and the token it finds (HF_TOKEN).

    Refuses what `verify` finds unsound. Uploads the files that belong to the checkpoint, its card and licence, and
    makes them visible in one commit; then compares every size and hash with what the hub has. Interrupted, the same
    command goes on: files that arrived are not sent again.
    """
    contents = contents_of(out)
    facts = {"repo": repo, "branch": branch, "private": private}
    said = {} if message is None else {"message": message}
    target = Destination(
        repo=repo, branch=branch, create=create, private=private, replace=replace, source=source, **said
    )
    if dry_run:
        verified(out, _watch(quiet).stage, source=source, quick=True)
        if as_json:
            print_json({**_facts(contents), **facts})
        else:
            click.echo(f"push {out} -> {repo}  (dry run: nothing is uploaded)")
            rows(_lines(contents))
        return
    if not quiet:
        tell(f"push {out} -> {repo}")
        rows(_lines(contents), file=sys.stderr)
        if not any(item.name == "README.md" for item in contents.items):
            tell(f"note: there is no model card; shardxform card {out} --write makes one")
    pushed = push(contents, target, _watch(quiet))
    if as_json:
        print_json({**_facts(contents), **facts, "report": _report(pushed)})
    else:
        _say_done(pushed)


def _watch(quiet: bool) -> Watch:
    stage: Callable[[str], AbstractContextManager[OnProgress | None]] = lambda label: progress(label, quiet)  # noqa: E731
    on_terminal = not quiet and sys.stderr is not None and sys.stderr.isatty()
    return Watch(stage=stage, tell=tell, client_bars=on_terminal)


def _lines(contents: Contents) -> Iterator[tuple[str, str]]:
    yield "files", f"{len(contents.items)}, {gb(contents.nbytes)}"
    shards = contents.shards
    if shards:
        yield "shards", f"{len(shards)}, {gb(sum(s.nbytes for s in shards))}, from {shards[0].name}"
    others = [item for item in contents.items if not item.is_shard]
    for item in others[:_MOST_FILES]:
        yield "", f"{item.name}, {gb(item.nbytes)}"
    if len(others) > _MOST_FILES:
        yield "", f"and {len(others) - _MOST_FILES} more"
    if contents.left_out:
        yield "left out", ", ".join(contents.left_out)


def _facts(contents: Contents) -> dict[str, Any]:
    return {
        "out": str(contents.root),
        "bytes": contents.nbytes,
        "files": {item.name: item.nbytes for item in contents.items},
        "left_out": list(contents.left_out),
    }


def _report(pushed: Pushed) -> dict[str, Any]:
    return {
        "url": pushed.url,
        "commit": pushed.commit,
        "created": pushed.created,
        "sent_bytes": pushed.sent_bytes,
        "removed": list(pushed.removed),
        "seconds": round(pushed.seconds, 3),
        "peak_rss_bytes": pushed.peak_rss_bytes,
    }


def _say_done(pushed: Pushed) -> None:
    click.echo(f"{pushed.url}: {'made, ' * pushed.created}complete, every size and hash compared")
    removed = [("removed", ", ".join(pushed.removed))] if pushed.removed else []
    sent = f"{gb(pushed.sent_bytes)} of them sent" if pushed.sent_bytes else "all of them there already"
    rows(
        [
            ("commit", pushed.commit),
            ("files", f"{count(pushed.files, 'file')}, {gb(pushed.nbytes)}, {sent}"),
            *removed,
            ("time", f"{pushed.seconds:.1f} s"),
            ("memory", f"{gb(pushed.peak_rss_bytes)} peak"),
        ]
    )
