"""A view whose experts have fewer channels: rows of gate and up projection, columns of the down projection.

Shared experts, which clients take for so many times as wide as a routed one, stay as they are: config.json then counts
more of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from shardxform.ask.width import Width
from shardxform.base.tensors import FLOATS, TensorRef
from shardxform.errors import ManifestError, PlanError
from shardxform.formats.encoding import Encoded, Storage
from shardxform.formats.picking import Picked
from shardxform.formats.plain import Plain
from shardxform.model.families.base import Template
from shardxform.model.layout import Layout, Place, layout_of, value_at

__all__ = ["narrowed", "told_of", "width_key"]

_SYMBOL = "I"  # of the families' shapes: channels of a routed expert


def width_key(layout: Layout) -> tuple[str, ...]:
    """Path in config.json of the number of channels of every routed expert.

    Raises:
        PlanError: the family's experts cannot be narrowed, or the number is not theirs alone.

    """
    family, experts = layout.family, layout.family.experts
    if experts.transposed or experts.bias or experts.gate == "interleaved":
        raise PlanError(
            f"`width`: experts of family {family.name} lie otherwise than channel by channel, or have biases"
        )
    key = family.symbols.get(_SYMBOL)
    if not isinstance(key, str) or _SYMBOL in family.layer_symbols:
        raise PlanError(f"`width`: config.json of family {family.name} has no one number for the width of experts")
    _counts(layout)
    return _path(layout, key)


def _path(layout: Layout, key: str) -> tuple[str, ...]:
    home = tuple(layout.wrapper.text_key.split(".")) if layout.wrapper.text_key else ()
    return (*home, *key.split("."))


def _counts(layout: Layout) -> list[str]:
    """Keys of config.json that say how many times as wide as a routed expert the shared ones are; most have none.

    Raises:
        PlanError: something else than experts is as wide as a routed one.

    """
    family, found, follows = layout.family, dict[str, None](), _following(layout)
    for template in _templates(layout):
        if template.is_expert_weight:
            continue
        for size in template.shape.split(","):
            symbols = re.split(r"[+*]", size)
            if follows.intersection(symbols):
                key = family.symbols[_SYMBOL]
                raise PlanError(
                    f"`width`: '{template.name}' of family {family.name} is as wide as {key} says, where config.json"
                    " has no number of its own for it"
                )
            if _SYMBOL not in symbols:
                continue
            others = [symbol for symbol in size.split("*") if symbol != _SYMBOL]
            count = family.symbols.get(others[0]) if len(others) == 1 else None
            if template.role != "shared experts" or not isinstance(count, str):
                key = family.symbols[_SYMBOL]
                raise PlanError(f"`width`: {key} of family {family.name} is also the width of '{template.name}'")
            found[count] = None
    return list(found)


def _following(layout: Layout) -> set[str]:
    """Symbols of other sizes that are worked out of the width of experts, as this config has it."""
    key = layout.family.symbols[_SYMBOL]
    found = value_at(layout.text, str(key))
    if type(found) is not int or "." in str(key):
        return set()
    other = {**layout.text, str(key): found + 1}
    return {
        name
        for name, symbol in layout.family.symbols.items()
        if callable(symbol) and _value(symbol, layout.text) != _value(symbol, other)
    }


def _value(symbol: Callable[[Mapping[str, Any]], int], config: Mapping[str, Any]) -> object:
    """A size; None where the config does not lead to one, which is told where shapes are looked at."""
    with suppress(ArithmeticError, LookupError, TypeError, ValueError):
        return symbol(config)
    return None


def _changes(layout: Layout, width: Width) -> dict[tuple[str, ...], int]:
    """Numbers of config.json after narrowing, by their paths.

    Raises:
        PlanError: see `width_key`; or shared experts that are no whole number of times as wide as a routed one then.

    """
    changes = {width_key(layout): width.channels}
    for key in _counts(layout):
        path = _path(layout, key)
        count = value_at(layout.config, ".".join(path))
        if not count:
            continue
        whole = count * width.of
        if whole % width.channels:
            raise PlanError(
                f"`width`: expected one that divides {whole:,}, since shared experts of family {layout.family.name}"
                f" stay so wide and {key} says how many times as wide as a routed one that is, found {width.channels:,}"
            )
        changes[path] = whole // width.channels
    return changes


def _templates(layout: Layout) -> Iterator[Template]:
    family = layout.family
    yield from (*family.root, *family.block)
    if family.mtp:
        yield from (*family.mtp.root, *family.mtp.layer)


def narrowed(
    tensors: Mapping[str, TensorRef], config: Mapping[str, object], width: Width
) -> tuple[dict[str, TensorRef], dict[tuple[str, ...], int]]:
    """Take channels out of every routed expert.

    Args:
        tensors: of the view, with the experts that stay.
        config: of the view.
        width: which channels stay.

    Returns:
        the table, and what config.json then says, by path: how many channels there are, and how many shared experts.

    Raises:
        ManifestError: it was made for experts of another width.
        PlanError: see `width_key`; or weights that are not stored as plain numbers, or shared experts that are no whole
            number of times as wide as a routed one then.

    """
    layout = layout_of(config, tensors)
    changes = _changes(layout, width)
    out: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        place = layout.places.get(name)
        out[name] = _narrow(ref, place, width, layout) if place and place.template.is_expert_weight else ref
    return out, changes


def told_of(changes: Mapping[tuple[str, ...], int], width: Width) -> Iterator[str]:
    """Say in words what `narrowed` did."""
    yield f"every expert keeps {width.channels:,} of its {width.of:,} channels"
    for path, count in [*changes.items()][1:]:
        yield f"shared experts keep all of theirs: {path[-1]} is {count:,} from now on"


def _narrow(ref: TensorRef, place: Place, width: Width, layout: Layout) -> TensorRef:
    """One tensor of experts with the channels that stay."""
    if place.companion or isinstance(ref, Encoded) or ref.spec.dtype not in FLOATS:
        raise PlanError(f"`width`: tensor '{ref.name}' is quantized; narrow the 16-bit checkpoint")
    layers = width.mtp_kept if place.scope == "mtp" else width.kept
    assert place.layer is not None
    bitmaps = layers[place.layer]
    inner = layout.family.experts.inner
    if place.template.variant == "fused":
        held = layout.family.experts.held(_last(place.template.name))
        pieces, blocks, slabs = bitmaps, len(held), list(ref.slabs())
    else:
        assert place.expert is not None
        held = (_last(place.template.name),)
        pieces, blocks, slabs = (bitmaps[place.expert],), 1, [ref]
    rows = held[0] in inner
    axis = 0 if rows else 1
    shape = list(slabs[0].spec.shape)
    if shape[axis] != blocks * width.of:
        raise ManifestError(
            f"width.of: made for experts of {width.of} channels, but '{ref.name}' has {shape[axis] // blocks}"
        )
    whole = (shape[0], shape[1])
    shape[axis] = blocks * width.channels
    plain, picked = Plain(ref.spec.dtype), (shape[0], shape[1])
    how: Literal["rows", "columns"] = "rows" if rows else "columns"
    sources = tuple(
        Storage(Picked(plain, whole, kept, how, blocks if rows else 1), (("values", slab),), picked)
        for kept, slab in zip(pieces, slabs, strict=True)
    )
    return Encoded(ref.spec.of_shape((*ref.spec.shape[:-2], *picked)), (), sources)


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
