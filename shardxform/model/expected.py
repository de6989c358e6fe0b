"""The tensors that must be there: every name and shape that a family's templates give for a config."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardxform.base.tensors import TensorSpec
from shardxform.errors import FamilyError
from shardxform.model.families.base import Config, Scope, Symbol, Template
from shardxform.model.layout import COMPANIONS, MAX_LAYERS, Layout, Place, read_count

__all__ = ["Expected", "expected", "first_of_alike"]


class Expected(NamedTuple):
    """A tensor that must (or, when `optional`, may) be there. `shape` is None where the family leaves it open."""

    place: Place
    shape: tuple[int, ...] | None
    optional: bool


def expected(layout: Layout, variants: Mapping[tuple[Scope, int], str]) -> Iterator[tuple[str, Expected]]:
    """Every tensor that the family's templates give for this config, in template order.

    Of routed experts one by one it is all of each block; the first alone for a layout that has no others.

    Args:
        layout: of the checkpoint.
        variants: `fused` or `per-expert` for each block, as `variants_found` gives it; the family's own
            where absent.

    """
    family, text = layout.family, layout.text
    sizes = _Sizes(family.symbols, text, layout.num_experts, family.layer_symbols, family.set_symbols, layout.in_set)
    for template in family.root:
        name = layout.wrapper.full(template.name)
        if "{l}" in name:
            yield from _of_layers(layout, template, name, sizes)
        elif family.holds(template.when, text, -1):
            yield name, _expect(Place(template, "root"), sizes)
    for layer in range(layout.num_layers):
        prefix = f"{layout.blocks}{layer}."
        variant = variants.get(("block", layer), family.spelling)
        yield from _block(layout, family.block, "block", layer, layer, prefix, variant, sizes)
    if family.mtp and layout.mtp_layers:
        yield from _expected_mtp(layout, variants, sizes)
    if layout.wrapper.vision:
        yield from _expected_vision(layout)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Evaluates symbolic shapes against one part of the config."""

    symbols: Mapping[str, Symbol]
    config: Config
    num_experts: int
    layer_symbols: Mapping[str, Callable[[Config, int], int]] = field(default_factory=dict)
    set_symbols: Mapping[str, Callable[[Config, int], int]] = field(default_factory=dict)
    in_set: int = 0

    def shape(self, expression: str, layer: int = -1, of_set: int | None = None) -> tuple[int, ...] | None:
        """Sizes of a tensor of a layer; `of_set` is a set of experts of which it is."""
        if expression == "?":
            return None
        return tuple(
            sum(
                math.prod(self._value(factor, layer, of_set) for factor in term.split("*"))
                for term in dimension.split("+")
            )
            for dimension in expression.split(",")
        )

    def _value(self, factor: str, layer: int, of_set: int | None) -> int:
        if factor.isdigit():
            return int(factor)
        if factor == "E":
            return self.num_experts if of_set is None else self.in_set
        try:
            if factor in self.set_symbols:
                value: object = self.set_symbols[factor](self.config, of_set or 0)
            elif factor in self.layer_symbols:
                value = self.layer_symbols[factor](self.config, layer)
            else:
                symbol = self.symbols[factor]
                value = symbol(self.config) if callable(symbol) else self.config[symbol]
        except KeyError as e:
            raise FamilyError(f"config.json: missing {e.args[0]!r}, which the family needs for its shapes") from e
        except (ArithmeticError, IndexError, TypeError, ValueError) as e:
            raise FamilyError(f"config.json: {e}") from e
        if type(value) is not int or value < 0:
            raise FamilyError(f"config.json: expected a size for {self._keys_of(factor, layer)}, found {value!r}")
        return value

    def _keys_of(self, factor: str, layer: int) -> str:
        """The config keys that a size is worked out of, for people to mend."""
        symbol: object = self.symbols.get(factor)
        if isinstance(symbol, str):
            return symbol
        read = _Read(self.config)
        of_layer, of_all = self.layer_symbols.get(factor), symbol
        with suppress(ArithmeticError, LookupError, TypeError, ValueError):
            of_layer(read, layer) if of_layer else callable(of_all) and of_all(read)
        return ", ".join(read.keys_read) or factor


class _Read(UserDict[str, Any]):
    """A config that notes which of its keys are read."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keys_read: dict[str, None] = {}

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        value = super().__getitem__(key)
        self.keys_read[key] = None
        return value


def _of_layers(layout: Layout, template: Template, name: str, sizes: _Sizes) -> Iterator[tuple[str, Expected]]:
    """A tensor of every decoder block for which its condition holds, though it does not lie there."""
    for layer in range(layout.num_layers):
        if layout.family.holds(template.when, layout.text, layer):
            yield name.replace("{l}", str(layer)), _expect(Place(template, "root", layer), sizes, layer)


def _expect(place: Place, sizes: _Sizes, like: int = -1) -> Expected:
    template = place.template
    return Expected(place, sizes.shape(template.shape, like, next(iter(template.sets), None)), template.optional)


def _block(
    layout: Layout,
    templates: Iterable[Template],
    scope: Scope,
    layer: int,
    like: int,
    prefix: str,
    variant: str,
    sizes: _Sizes,
) -> Iterator[tuple[str, Expected]]:
    held = [each for each in templates if layout.family.holds(each.when, layout.text, like)]
    resaved = {each.instead for each in held if each.instead and _is_there(layout, prefix + each.name)}
    for template in held:
        if template.variant not in ("", variant) or template.name in resaved or template.instead not in ("", *resaved):
            continue
        if not template.numbered:
            yield prefix + template.name, _expect(Place(template, scope, layer), sizes, like)
            continue
        head, _, tail = (prefix + template.name).partition("{e}")
        at, each = head.count("."), layout.in_set
        for first in range(0, layout.num_experts, each):
            shape = sizes.shape(template.shape, like, first // each if layout.family.sets else None)
            for expert in range(first, first + (1 if layout.sampled else each)):
                place = Place(template, scope, layer, expert, at)
                yield f"{head}{expert}{tail}", Expected(place, shape, template.optional)


def _is_there(layout: Layout, name: str) -> bool:
    """Whether a tensor is stored, as it is or quantized."""
    stem = name.removesuffix("weight")
    return name in layout.places or any(f"{stem}{part}" in layout.places for part in COMPANIONS)


def _expected_mtp(
    layout: Layout, variants: Mapping[tuple[Scope, int], str], sizes: _Sizes
) -> Iterator[tuple[str, Expected]]:
    mtp = layout.family.mtp
    assert mtp is not None
    for template in mtp.root:
        name = layout.wrapper.full(template.name)
        if "{l}" not in name:
            yield name, _expect(Place(template, "mtp"), sizes)
    for block in range(layout.mtp_layers * layout.mtp_blocks):
        layer, at = divmod(block, layout.mtp_blocks)
        number = layout.num_layers + block if mtp.follows_blocks else block
        for template in (each for each in mtp.root if "{l}" in each.name):
            name = layout.wrapper.full(template.name).replace("{l}", str(number))
            yield name, _expect(Place(template, "mtp", layer), sizes)
        prefix = layout.wrapper.full(mtp.prefix).replace("{l}", str(number))
        variant = variants.get(("mtp", layer), "per-expert")
        for templates, inner in ((layout.family.block, mtp.inner), (mtp.layer, "")):
            yield from _block(
                layout, templates, "mtp", layer, mtp.like(layout.text) + at, prefix + inner, variant, sizes
            )


def _expected_vision(layout: Layout) -> Iterator[tuple[str, Expected]]:
    family = layout.family
    config = layout.config.get("vision_config")
    if not isinstance(config, Mapping):
        raise FamilyError(f"config.json: {layout.wrapper.architecture} needs an object 'vision_config'")
    sizes = _Sizes(family.vision_symbols, config, layout.num_experts)
    keys = (family.vision_depth_key,) if isinstance(family.vision_depth_key, str) else family.vision_depth_key
    key = next((each for each in keys if each in config), keys[0])
    depth = read_count(config, key, "vision_config.")
    if depth > MAX_LAYERS:
        raise FamilyError(f"config.json: vision_config.{key}: {depth} is absurd")
    for template in family.vision:
        for block in range(depth if "{b}" in template.name else 1):
            yield template.name.replace("{b}", str(block)), _expect(Place(template, "vision"), sizes)


def first_of_alike(layout: Layout, specs: Iterable[TensorSpec]) -> list[TensorSpec] | None:
    """Leave the first of the routed experts in each block, where all of them are there, and are stored alike.

    What is then looked at, of names, dtypes and shapes, is what would be looked at of every expert: a hundredth of
    the tensors.

    Args:
        layout: of the config; of no names, or of any.
        specs: of all tensors, of which no two have one name.

    Returns:
        what is left; None where an expert is missing, is one too many or differs from the others.

    """
    family, home = layout.family, layout.family.numbered_home
    if family.sets or layout.mtp_blocks > 1:  # of which several lie in one layer
        return None
    if not home:
        return list(specs)
    left: list[TensorSpec] = []
    counts: dict[tuple[str, str, str, tuple[int, ...]], int] = {}
    found: set[str] = set()
    for spec in specs:
        name, dtype, shape = spec
        above, _, rest = name.partition(home)
        number, _, last = rest.partition(".")
        if not number.isdigit():
            left.append(spec)
            continue
        kind = above, last, dtype, shape
        counts[kind] = counts.get(kind, 0) + 1
        found.add(number)
        if number == "0":
            left.append(spec)
    every = set(map(str, range(layout.num_experts)))
    return left if found <= every and all(count == len(every) for count in counts.values()) else None
