"""How options are declared: a group of them by the fields of a frozen dataclass, and the kinds of values they have.

A command is a function that `command` turns into click's: every parameter whose type is a group gives it the options of
that group, and is handed the object that they make. A field of a group may be a group again. `--help` shows the options
under the headings of their groups. A kind of value says what of it is refused, and what a shell completes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, field, fields
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from shardxform.base.tensors import parse_size
from shardxform.checkpoint.remote.repository import RepoName, parse_source
from shardxform.errors import SchemeError, ShardxformError

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
    "Flags",
    "Healed",
    "Source",
    "command",
    "given",
    "option",
    "refuse_idle",
]

Source = Path | RepoName

_DIGITS: Final = 10
_UNITS: Final = (3600, 60, 1)
_FIRST: Final = "Used first"


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


# -- how groups become options ----------------------------------------------------------------------------------------


class Flags:
    """A group of options: its subclasses are frozen dataclasses whose fields are made by `option`."""

    heading: ClassVar[str] = "Options"

    def __init_subclass__(cls, heading: str = "") -> None:
        """Show the options of a group under `heading`; where that is not given, under that of the group it extends."""
        if heading:
            cls.heading = heading


def option(text: str, *spellings: str, default: object = None, first: bool = False, **settings: Any) -> Any:  # noqa: ANN401
    """Make the field of a group that an option gives.

    Args:
        text: help.
        spellings: of the option; `--name-of-the-field` unless one of them begins with two dashes.
        default: value where the option is not given.
        first: whether people use it first, so that it stands at the top of the help.
        settings: further arguments of `click.option`; the kind of value follows from the field's type without them.

    """
    return field(default=default, metadata={"text": text, "spellings": spellings, "first": first, "settings": settings})


class _Option(click.Option):
    """An option that knows under which heading it is shown."""

    heading: str = Flags.heading


class _Command(click.Command):
    """A command whose help shows options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        last = Flags.heading
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "heading", last)  # --help stands with the last ones
            last = last if heading == _FIRST else heading
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(heading, []).append(record)
        for heading in sorted(sections, key=lambda heading: heading != _FIRST):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function: parameters that are groups of options bring their options along."""

    def make(function: Callable[..., None]) -> click.Command:
        groups = {key: hint for key, hint in get_type_hints(function).items() if _is_group(hint)}
        options = [each for group in groups.values() for each in _options(group)]
        grouped = {each.name for each in options}

        @wraps(function)
        def run(**values: object) -> None:
            others = {key: value for key, value in values.items() if key not in grouped}
            function(**others, **{key: _made(group, values) for key, group in groups.items()})

        made = click.command(name, cls=_Command)(run)
        made.params += options
        return made

    return make


def _is_group(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Flags)


def _made(group: type[Flags], values: Mapping[str, object]) -> Flags:
    """A group with the values of its options."""
    hints = get_type_hints(group)
    names = [each.name for each in _fields(group)]
    return group(**{name: _made(hints[name], values) if _is_group(hints[name]) else values[name] for name in names})


def _fields(group: type[Flags]) -> list[Field[Any]]:
    """Fields of a group, its own before those that it shares with others."""
    shared = {name for base in group.__mro__[1:-1] for name in base.__annotations__}
    return sorted(fields(cast(Any, group)), key=lambda each: each.name in shared)


def _options(group: type[Flags]) -> Iterator[_Option]:
    hints = get_type_hints(group)
    for each in _fields(group):
        if _is_group(hints[each.name]):
            yield from _options(hints[each.name])
            continue
        settings = {**_kind(hints[each.name]), **each.metadata["settings"]}
        if not settings.get("required"):  # a default would do for it
            settings["default"] = each.default
        if isinstance(settings["type"], click.IntRange):
            settings.setdefault("metavar", "N")
        if each.default not in (None, False, ()):
            settings.setdefault("show_default", True)
        made = _Option([each.name, *_spellings(each)], help=each.metadata["text"], **settings)
        made.heading = _FIRST if each.metadata["first"] else group.heading
        yield made


def _spellings(each: Field[object]) -> tuple[str, ...]:
    found: tuple[str, ...] = each.metadata["spellings"]
    if any(spelling.startswith("--") for spelling in found):
        return found
    return (f"--{each.name.replace('_', '-')}", *found)


def _kind(hint: object) -> dict[str, Any]:
    """Arguments of `click.option` that follow from the type of a field."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(each for each in get_args(hint) if each is not NoneType)
    if hint is bool:
        return {"is_flag": True, "type": bool}
    if get_origin(hint) is tuple:
        return {"multiple": True, **_kind(get_args(hint)[0])}
    if get_origin(hint) is Literal:
        return {"type": click.Choice(list(get_args(hint)))}
    return {"type": PATH if hint is Path else hint}


def given(group: Flags, *names: str) -> Iterator[str]:
    """Spellings of the options of a group, or of those fields of it that are named, that were given."""
    for each in _fields(type(group)):
        value = getattr(group, each.name)
        if (not names or each.name in names) and not (value is None or value is False or value in ((), each.default)):
            yield _spellings(each)[0].partition("/")[0]


def refuse_idle(group: Flags, *names: str, wanted: str) -> None:
    """Refuse options of a group, or those named, that would do nothing: a misunderstanding.

    Raises:
        SchemeError: says what the first of them is for, which is `wanted`.

    """
    for spelling in given(group, *names):
        raise SchemeError(f"{spelling} is for {wanted}")
