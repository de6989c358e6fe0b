"""The tensors that must be in a checkpoint, with their shapes, as its family and config say.

`expected` enumerates the templates that `layout_of` matches names against, so what pruning slices and what verification
demands cannot differ. Names and shapes only, no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from shardxform.errors import FamilyError
from shardxform.model.families.base import Config, Scope, Symbol, Template
from shardxform.model.layout import MAX_LAYERS, Layout, Place, read_count

__all__ = ["Expected", "expected"]


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that must (or, when `optional`, may) be there. `shape` is None where the family leaves it open."""

    place: Place
    shape: tuple[int, ...] | None
    optional: bool


def expected(layout: Layout, variants: Mapping[tuple[Scope, int], str]) -> Iterator[tuple[str, Expected]]:
    """Every tensor that the family's templates give for this config, in template order.

    Args:
        layout: of the checkpoint.
        variants: `fused` or `per-expert` for each block, as `variants_found` gives it; the family's own
            where absent.

    """
    family, text = layout.family, layout.text
    sizes = _Sizes(family.symbols, text, layout.num_experts)
    decoder = layout.wrapper.prefix
    for template in family.root:
        if family.holds(template.when, text, -1):
            yield template.name.format(decoder=decoder), _expect(Place(template, "root"), sizes)
    for layer in range(layout.num_layers):
        prefix = f"{decoder}layers.{layer}."
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

    def shape(self, expression: str) -> tuple[int, ...] | None:
        if expression == "?":
            return None
        return tuple(
            sum(math.prod(self._value(factor) for factor in term.split("*")) for term in dimension.split("+"))
            for dimension in expression.split(",")
        )

    def _value(self, factor: str) -> int:
        if factor.isdigit():
            return int(factor)
        if factor == "E":
            return self.num_experts
        symbol = self.symbols[factor]
        try:
            value = symbol(self.config) if callable(symbol) else self.config[symbol]
        except KeyError as e:
            raise FamilyError(f"config.json: missing {e.args[0]!r}, which the family needs for its shapes") from e
        except (ArithmeticError, TypeError, ValueError) as e:
            raise FamilyError(f"config.json: {e}") from e
        if type(value) is not int or value < 0:
            raise FamilyError(f"config.json: expected a size for {factor}, found {value!r}")
        return value


def _expect(place: Place, sizes: _Sizes) -> Expected:
    return Expected(place, sizes.shape(place.template.shape), place.template.optional)


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
    for template in templates:
        if template.variant not in ("", variant) or not layout.family.holds(template.when, layout.text, like):
            continue
        if not template.numbered:
            yield prefix + template.name, _expect(Place(template, scope, layer), sizes)
            continue
        at = (prefix + template.name).split(".").index("{e}")
        shape = sizes.shape(template.shape)
        for expert in range(layout.num_experts):
            name = prefix + template.name.replace("{e}", str(expert))
            yield name, Expected(Place(template, scope, layer, expert, at), shape, template.optional)


def _expected_mtp(
    layout: Layout, variants: Mapping[tuple[Scope, int], str], sizes: _Sizes
) -> Iterator[tuple[str, Expected]]:
    mtp = layout.family.mtp
    assert mtp is not None
    for template in mtp.root:
        yield template.name, _expect(Place(template, "mtp"), sizes)
    for layer in range(layout.mtp_layers):
        number = layout.num_layers + layer if mtp.follows_blocks else layer
        prefix = mtp.prefix.replace("{decoder}", layout.wrapper.prefix).replace("{l}", str(number))
        variant = variants.get(("mtp", layer), "per-expert")
        templates = (*layout.family.block, *mtp.layer)
        yield from _block(layout, templates, "mtp", layer, mtp.like(layout.text), prefix, variant, sizes)


def _expected_vision(layout: Layout) -> Iterator[tuple[str, Expected]]:
    family = layout.family
    config = layout.config.get("vision_config")
    if not isinstance(config, Mapping):
        raise FamilyError(f"config.json: {layout.wrapper.architecture} needs an object 'vision_config'")
    sizes = _Sizes(family.vision_symbols, config, layout.num_experts)
    depth = read_count(config, family.vision_depth_key, "vision_config.")
    if depth > MAX_LAYERS:
        raise FamilyError(f"config.json: vision_config.{family.vision_depth_key}: {depth} is absurd")
    for template in family.vision:
        for block in range(depth if "{b}" in template.name else 1):
            yield template.name.replace("{b}", str(block)), _expect(Place(template, "vision"), sizes)
