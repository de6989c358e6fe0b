"""Kinds of values that options and arguments have: what of them is refused, and what a shell completes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import click
from click.shell_completion import CompletionItem

from shardxform.base.tensors import parse_size
from shardxform.checkpoint.remote.repository import RepoName, parse_source
from shardxform.errors import ShardxformError

__all__ = [
    "ADDRESS",
    "AT_LEAST_1",
    "AT_LEAST_2",
    "BLOCKS",
    "DATA",
    "GGUF_TYPE",
    "NAMES",
    "PATH",
    "SIZE",
    "SOURCE",
    "STEPS",
    "TIME",
    "Healed",
    "Source",
]

Source = Path | RepoName

_DIGITS: Final = 10
_UNITS: Final = (3600, 60, 1)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ShardxformError as e:
            self.fail(str(e), param, ctx)


class _NamedPath(click.Path):
    """A path; an empty one, such as an unset variable gives, is not the current directory."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not str(value):
            self.fail("expected a path, found an empty one", param, ctx)
        return super().convert(value, param, ctx)


class _Source(click.ParamType[Source]):
    """A folder, or `owner/name[@revision]` with or without `hf://` before it."""

    name = "source"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Source:
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


class _Data(click.types.StringParamType):
    """A file, a folder or a data set of the hub, as it is given; the shell completes the former two."""

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Have the shell complete names of files and folders."""
        return [CompletionItem(incomplete, type="file")]


class _Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "names"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:  # noqa: ARG002
        return value if isinstance(value, tuple) else tuple(name.strip() for name in str(value).split(","))


class Healed(click.Choice[str]):
    """What to heal; the value may be left out, so a path that follows the option is taken for it."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take one of the choices, or say where to put the option."""
        if value not in self.choices:
            named = ", ".join(map(str, self.choices))
            self.fail(f"{value!r} is none of {named}: put --heal after SRC and OUT, or write --heal=auto", param, ctx)
        return super().convert(value, param, ctx)


class _GgufType(click.ParamType[str]):
    """What llama-quantize calls types of files; looked up when one is named."""

    name = "type"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return self._choice.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Have the shell complete the names."""
        return self._choice.shell_complete(ctx, param, incomplete)

    @property
    def _choice(self) -> click.Choice[str]:
        from shardxform.runtimes.gguf.mixes import KINDS

        return click.Choice(tuple(KINDS), case_sensitive=False)


class _Blocks(click.ParamType[range]):
    """`0-9` or `7`: decoder blocks, the last one included."""

    name = "blocks"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, _, last = str(value).partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            self.fail(f"expected decoder blocks such as 0-9, found {value!r}", param, ctx)
        return range(int(first), int(last or first) + 1)


class _Steps(click.ParamType[tuple[int, ...]]):
    """`100`, or `120,80,95`: steps of every block, or of each."""

    name = "steps"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isascii() and word.isdecimal() and len(word) < _DIGITS for word in words):
            self.fail(f"expected steps such as 100, or 120,80,95 for blocks, found {value!r}", param, ctx)
        return tuple(map(int, words))


class _Time(click.ParamType[int]):
    """`90s`, `15m`, `2h` or `1h30m`, in seconds."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", str(value).strip(), re.ASCII)
        seconds = sum(int(part or 0) * unit for part, unit in zip(match.groups(), _UNITS, strict=True)) if match else 0
        if not seconds:
            self.fail(f"expected a time such as 90s, 15m, 2h or 1h30m, found {value!r}", param, ctx)
        return seconds


class _Address(click.ParamType[str]):
    """What `--ray` may be followed by; anything else was meant to be an argument."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from shardxform.cluster.session import check_address  # few ask for a cluster

        try:
            return check_address(str(value))
        except ShardxformError as e:
            self.fail(str(e).removeprefix("`ray`: "), param, ctx)


PATH: Final = _NamedPath(path_type=Path)
SOURCE: Final = _Source()
DATA: Final = _Data()
SIZE: Final = _Size()
GGUF_TYPE: Final = _GgufType()
NAMES: Final = _Names()
BLOCKS: Final = _Blocks()
STEPS: Final = _Steps()
TIME: Final = _Time()
ADDRESS: Final = _Address()
AT_LEAST_1: Final = click.IntRange(1)
AT_LEAST_2: Final = click.IntRange(2)
