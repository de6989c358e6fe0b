"""The command lines that make an output again, rebuilt from what its record says was asked for.

Options at their defaults are left out. The experts to keep are read from the record itself, which is published with
the output. Given the same source and data, the commands end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardxform.ask.recipe import BATCH_SIZE, HEAL_ITERS, ITERS
from shardxform.checkpoint.record import PROVENANCE
from shardxform.plan.prune import DEFAULT_SHARD_BYTES
from shardxform.publish.card.record import flag, number, section, text, texts, whole

__all__ = ["commands"]

Args = tuple[str, ...]
_SAMPLES: Final = 128
_SEQLEN: Final = 2048
_SEED: Final = 42


def commands(inputs: Mapping[str, Any], source: str, out: str) -> tuple[Args, ...]:
    """Command lines in the order in which to run them; none where the record does not say enough.

    Args:
        inputs: of the record.
        source: name of the source.
        out: name of the output.

    """
    command = text(inputs, "command")
    if command in ("prune", "quantize"):
        return (_planned(command, inputs, (source, out)),)
    if command != "convert":
        return ()
    origin = section(inputs, "origin")
    tuned = text(section(origin, "scheme"), "method") != "rtn"
    if tuned and not section(origin, "recipe"):  # earlier records of converted outputs have none
        return (("shardxform", "convert", source, out, *_target(inputs)),)
    between = f"{out}-before"
    first = _planned("quantize", origin, (source, between))
    return (first, ("shardxform", "convert", between, out, *_target(inputs)))


def _planned(command: str, inputs: Mapping[str, Any], places: tuple[str, str]) -> Args:
    keep = ("--manifest", PROVENANCE) if section(inputs, "manifest", "keep") else ()
    return ("shardxform", command, *places, *keep, *_scheme(inputs), *_recipe(inputs), *_view(inputs))


def _view(inputs: Mapping[str, Any]) -> Iterator[str]:
    options = section(inputs, "options")
    if flag(options, "text_only"):
        yield "--text-only"
    yield from _unless("--mtp", text(options, "mtp"), "auto")
    yield from _unless("--max-shard-size", whole(options, "max_shard_bytes"), DEFAULT_SHARD_BYTES)


def _scheme(inputs: Mapping[str, Any]) -> Iterator[str]:
    scheme = section(inputs, "scheme")
    grid = section(scheme, "grid")
    tuned = text(scheme, "method") == "auto-round"
    yield from _unless("--scheme", f"W{whole(grid, 'bits') or 4}A16", "W4A16")
    yield from _unless("--group-size", grid.get("group_size", 128), 128)
    yield from _unless("--method", text(scheme, "method"), "rtn")
    if scheme and flag(grid, "search") != tuned:
        yield "--search" if flag(grid, "search") else "--no-search"
    yield from _unless("--scale-grid", text(grid, "scale_grid"), "bf16")
    yield from _names(scheme)
    for option, key in (("--keep-16bit", "keep_16bit"), ("--also-quantize", "quantize")):
        for pattern in texts(scheme, key):
            yield from (option, pattern)


def _names(scheme: Mapping[str, Any]) -> Iterator[str]:
    """How the parts of a module are spelled."""
    yield from _unless("--format", text(scheme, "format"), "auto-round")
    yield from _spelling(scheme)


def _spelling(value: Mapping[str, Any]) -> Iterator[str]:
    yield from _unless("--expert-names", text(value, "expert_names"), "split")
    if flag(value, "g_idx"):
        yield "--g-idx"


def _recipe(inputs: Mapping[str, Any]) -> Iterator[str]:
    recipe = section(inputs, "recipe")
    data = section(recipe, "data")
    yield from _unless("--data", text(data, "data"), "")
    yield from _unless("--samples", whole(data, "samples_asked"), _SAMPLES)
    yield from _unless("--seqlen", whole(recipe, "seqlen"), _SEQLEN)
    if data.get("pack") is False:
        yield "--no-pack"
    if flag(data, "chat_template"):
        yield "--chat-template"
    yield from _unless("--text-key", text(data, "text_key"), "text")
    yield from _unless("--text-sources", ",".join(texts(data, "sources")), "")
    yield from _heal(section(recipe, "heal"))
    yield from _unless("--iters", whole(recipe, "iters") or ITERS, ITERS)  # 0 where it was healed only
    yield from _unless("--batch-size", whole(recipe, "batch_size"), BATCH_SIZE)
    yield from _unless("--seed", whole(recipe, "seed"), _SEED)
    yield from _unless("--inputs", text(recipe, "inputs"), "quantized")
    yield from _unless("--device", text(recipe, "device"), "cpu")
    yield from _unless("--dtype", text(recipe, "dtype"), "")  # what `auto` means depends on the machine


def _heal(heal: Mapping[str, Any]) -> Iterator[str]:
    yield from _unless("--heal", text(heal, "what"), "")
    yield from _unless("--heal-iters", whole(heal, "iters"), HEAL_ITERS)
    yield from _unless("--heal-lr", number(heal, "lr"), None)


def _target(inputs: Mapping[str, Any]) -> Iterator[str]:
    target = section(inputs, "target")
    yield from ("--to", text(target, "format"))
    yield from _spelling(target)
    options = section(inputs, "options")
    yield from _unless("--max-shard-size", whole(options, "max_shard_bytes"), DEFAULT_SHARD_BYTES)


def _unless(option: str, value: object, default: object) -> Iterator[str]:
    """An option and its value, unless it is the default or was not recorded."""
    if value not in (None, "", default):
        yield from (option, str(value))
