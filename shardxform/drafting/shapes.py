"""Which sum of products of config keys a dimension is, found from its values in several models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

__all__ = ["solve"]

_FACTORS: Final = (1, 2, 3, 4)
_MOST_TERMS: Final = 3
_MOST_OF_THREE: Final = 600  # products from which sums of three are made

Values = tuple[int, ...]


def solve(values: Values, variables: Sequence[Mapping[str, int]]) -> str | None:
    """The simplest expression that is `values[i]` where symbols are `variables[i]`; None where there is none.

    Symbols stand in an expression in the order in which the variables are given.
    """
    if len(set(values)) == 1:
        return str(values[0])
    names = [name for name in variables[0] if all(name in each for each in variables)]
    products = dict(_products(names, values, variables))
    for terms in range(1, _MOST_TERMS + 1):
        if found := _sum_of(terms, values, products):
            return "+".join(sorted(found, key=lambda term: (term[0] != "E", -len(term), term)))
    return None


def _sum_of(terms: int, values: Values, products: Mapping[Values, str]) -> list[str] | None:
    if terms == 1:
        return [products[values]] if values in products else None
    if terms == _MOST_TERMS and len(products) > _MOST_OF_THREE:
        return None
    for numbers, text in products.items():
        rest = tuple(value - number for value, number in zip(values, numbers, strict=True))
        if min(rest) > 0 and (other := _sum_of(terms - 1, rest, products)):
            return [text, *other]
    return None


def _products(
    names: Sequence[str], values: Values, variables: Sequence[Mapping[str, int]]
) -> Iterator[tuple[Values, str]]:
    """Products that are no larger than the values, the simplest last, so that it is the one that is kept."""
    for size in (3, 2, 1):
        for term in reversed(list(itertools.combinations(names, size))):
            plain = tuple(math.prod(each[name] for name in term) for each in variables)
            for factor in reversed(_FACTORS):
                numbers = tuple(factor * number for number in plain)
                if all(number <= value for number, value in zip(numbers, values, strict=True)):
                    yield numbers, "*".join((*([str(factor)] if factor > 1 else []), *term))
