"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from shardxform.base.sharding import parse_size
from shardxform.errors import ShardxformError
from shardxform.formats.grid import Grid
from shardxform.formats.scheme import FORMATS, PRESETS, Scheme

__all__ = [
    "SIZE",
    "any_source_option",
    "expert_names_option",
    "g_idx_option",
    "json_option",
    "manifest_option",
    "out_argument",
    "read_scheme",
    "run_options",
    "scheme_options",
    "shard_size_option",
    "source_argument",
    "view_options",
]

_DEFAULT_JOBS: Final = min(4, os.cpu_count() or 1)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ShardxformError as e:
            self.fail(str(e), param, ctx)


SIZE: Final = _Size()


class _NamedPath(click.Path):
    """A path; an empty one, such as an unset variable gives, is not the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        if not str(value):
            self.fail("expected a path, found an empty one", param, ctx)
        return super().convert(value, param, ctx)


_PATH: Final = _NamedPath(path_type=Path)

source_argument = click.argument("source", metavar="SRC", type=_PATH)
out_argument = click.argument("out", metavar="OUT", type=_PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
manifest_option = click.option(
    "--manifest", "-m", metavar="FILE", type=_PATH, help="Experts to keep, in any of the forms that manifests/ lists."
)
any_source_option = click.option(
    "--any-source",
    is_flag=True,
    help="Prune by a manifest that was chosen on another checkpoint, such as the model that SRC was tuned from.",
)


expert_names_option = click.option(
    "--expert-names",
    type=click.Choice(["split", "fused-indexed"]),
    default="split",
    show_default=True,
    help="split: experts.{id}.gate_proj; fused-indexed: experts.gate_up_proj.{id}, which current clients refuse.",
)
g_idx_option = click.option(
    "--g-idx", is_flag=True, help="Also write the identity g_idx, which llama.cpp wants of gptq."
)
shard_size_option = click.option(
    "--max-shard-size",
    type=SIZE,
    default="5GB",
    show_default=True,
    help="Most tensor data in one shard, in decimal units.",
)


def scheme_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that decide which weights are rounded, to what, and how clients find them; see `read_scheme`."""
    for option in (
        click.option(
            "--quantize",
            metavar="PATTERN",
            multiple=True,
            help="Quantize modules that match although they would stay as they are; repeatable.",
        ),
        click.option(
            "--keep-16bit", metavar="PATTERN", multiple=True, help="Leave modules that match as they are; repeatable."
        ),
        g_idx_option,
        expert_names_option,
        click.option(
            "--scale-grid",
            type=click.Choice(["fp16", "bf16"]),
            default="bf16",
            show_default=True,
            help="bf16: scales exact in bfloat16 and float16, so that every client computes the same; fp16: "
            "auto-round's.",
        ),
        click.option(
            "--format",
            type=click.Choice(list(FORMATS)),
            default="auto-round",
            show_default=True,
            help="How clients find the weights.",
        ),
        click.option(
            "--search/--no-search",
            default=None,
            help="Search each group's scale for the least squared weight error; helps at 4 bits, not at 8.  [default: "
            "with auto-round, as its start]",
        ),
        click.option(
            "--group-size",
            type=click.Choice(["128", "64", "32", "-1"]),
            default="128",
            show_default=True,
            help="Input columns that share a scale; -1 for one scale per row.",
        ),
        click.option(
            "--scheme",
            type=click.Choice(list(PRESETS)),
            default="W4A16",
            show_default=True,
            help="Bits of the weights.",
        ),
    ):
        function = option(function)
    return function


def read_scheme(given: dict[str, Any], *, tuned: bool) -> Scheme:
    """Take the options of the scheme out of `given`; `tuned` rounding starts from searched scales by default."""
    search = given.pop("search")
    grid = Grid(
        bits=PRESETS[given.pop("scheme")],
        group_size=int(given.pop("group_size")),
        scale_grid=given.pop("scale_grid"),
        search=tuned if search is None else search,
    )
    names = ("format", "expert_names", "g_idx", "keep_16bit", "quantize")
    return Scheme(grid=grid, **{name: given.pop(name) for name in names})


def view_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that decide which tensors an output holds, and in which shards."""
    for option in (
        shard_size_option,
        click.option(
            "--mtp",
            type=click.Choice(["auto", "keep", "drop"]),
            default="auto",
            show_default=True,
            help="Multi-token-prediction layers: keep prunes them by the manifest's mtp_keep, drop removes them, "
            "auto keeps them when that list is there or nothing is pruned.",
        ),
        click.option("--text-only", is_flag=True, help="Drop the vision tower and write the text-only class."),
    ):
        function = option(function)
    return function


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command that writes has; none of them changes a byte of the output."""
    for option in (
        click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
        json_option,
        click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written."),
        click.option(
            "--force",
            is_flag=True,
            help="Start over in an OUT that shardxform made from other inputs. Never touches files it did not write.",
        ),
        click.option(
            "--jobs",
            "-j",
            type=click.IntRange(1, 64),
            default=_DEFAULT_JOBS,
            show_default=True,
            help="Steps at a time; the bytes are the same.",
        ),
    ):
        function = option(function)
    return function
