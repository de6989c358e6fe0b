"""`shardxform push`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from shardxform.base.progress import OnProgress
from shardxform.cli.console import count, gb, print_json, progress, rows, say, tell
from shardxform.cli.options import DryFlags, FamilyFlags, Flags, command, option, out_argument
from shardxform.publish import Contents, Destination, Pushed, Watch, contents_of, is_repo_name, push, verified

__all__ = ["push_command"]

_MOST_FILES: Final = 20  # shown one by one; --json has all


class _RepoName(click.ParamType[str]):
    name = "repository"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_repo_name(str(value)):
            self.fail(f"expected a repository of the hub, owner/name, found {value!r}", param, ctx)
        return str(value)


def _text(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("expected a text, found none", param=param)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(Flags, heading="The repository"):
    create: bool = option("Make the repository, or the branch, if there is none.", default=False, first=True)
    private: bool = option("Make a new repository private; refuse one that is public.", default=False)
    branch: str = option("Where to.", "--revision", default="main", metavar="BRANCH", callback=_text)
    message: str | None = option("Of the commit.  [default: names this program]", metavar="TEXT", callback=_text)
    replace: bool = option("Remove shards and index of another checkpoint that stands there.", default=False)
    source: Path | None = option(
        "The checkpoint that OUT was made from: compare every tensor with it before.", metavar="SRC"
    )

    def read(self, repo: str) -> Destination:
        """What the library calls it."""
        target = Destination(
            repo=repo,
            branch=self.branch,
            create=self.create,
            private=self.private,
            replace=self.replace,
            source=self.source,
        )
        return target if self.message is None else replace(target, message=self.message)


@command("push")
@out_argument
@click.argument("repo", metavar="OWNER/NAME", type=_RepoName())
def push_command(out: Path, repo: str, how: _Target, family: FamilyFlags, output: DryFlags) -> None:
    """Publish the output OUT as OWNER/NAME on the hub, through huggingface_hub and the token it finds (HF_TOKEN).

    Refuses what `verify` finds unsound. Uploads the files that belong to the checkpoint, its card and licence, and
    makes them visible in one commit; then compares every size and hash with what the hub has. Interrupted, the same
    command goes on: files that arrived are not sent again.
    """
    family.load()
    contents = contents_of(out)
    facts = {"repo": repo, "branch": how.branch, "private": how.private}
    target = how.read(repo)
    if output.dry_run:
        verified(out, _watch(output.quiet).stage, source=how.source, quick=True)
        if output.as_json:
            print_json({**_facts(contents), **facts})
        else:
            say(f"push {out} -> {repo}  (dry run: nothing is uploaded)")
            rows(_lines(contents))
        return
    if not output.quiet:
        tell(f"push {out} -> {repo}")
        rows(_lines(contents), file=sys.stderr)
        if not any(item.name == "README.md" for item in contents.items):
            tell(f"note: there is no model card; shardxform card {out} --write makes one")
    pushed = push(contents, target, _watch(output.quiet))
    if output.as_json:
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
    say(f"{pushed.url}: {'made, ' * pushed.created}complete, every size and hash compared")
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
