"""What a keep manifest speaks of: layers and their experts, as JSON has them and as a checkpoint has them."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shardxform.errors import ManifestError
from shardxform.model.layout import Layout

__all__ = [
    "LAYER",
    "MAX_ID",
    "Ids",
    "Pruned",
    "layer_number",
    "object_at",
    "pruned_of",
    "read_ids",
    "read_layers",
    "show",
    "under",
    "whole_number",
]

MAX_ID: Final = 10**9
"""Beyond any layer or expert number; a larger one is a typo, and absurdly many digits would not even print."""

LAYER: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = 60
_SHORT.maxlevel = 2

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a manifest speaks of: the experts of a checkpoint, whatever it is stored in.

    Attributes:
        model_type: what the checkpoint calls its kind of model.
        is_called: whether a manifest that was made for it may call it so.
        num_layers: decoder blocks, without MTP layers.
        num_experts: of every layer that has some.
        moe_layers: decoder blocks with experts.
        mtp_layers: how many the model has.
        mtp_moe_layers: those with experts in the checkpoint, counted from 0.
        mtp_follows: whether MTP layers are counted on after the decoder blocks.
        top_k, top_k_key: experts that the router picks for a token, and the key that says so.
        groups, group_key: of the router; 1 where it has none.
        sets: names of sets of experts in one numbering, as many in each; empty where there is one.
        top_groups: groups that it picks for a token, as the checkpoint says under `top_group_key`.

    """

    model_type: str
    is_called: Callable[[str], bool] = field(compare=False)
    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]
    mtp_layers: int
    mtp_moe_layers: tuple[int, ...]
    mtp_follows: bool
    top_k: int
    top_k_key: str
    groups: int
    group_key: str
    top_groups: object
    top_group_key: str
    sets: tuple[str, ...] = ()


def pruned_of(of: Layout | Pruned) -> Pruned:
    """What a manifest for a checkpoint of this layout speaks of."""
    if isinstance(of, Pruned):
        return of
    family = of.family
    mtp = {p.layer for p in of.places.values() if p.scope == "mtp" and p.layer is not None and p.template.pruned}
    return Pruned(
        model_type=of.wrapper.model_type,
        is_called=frozenset({family.name, *(wrapper.model_type for wrapper in family.wrappers)}).__contains__,
        num_layers=of.num_layers,
        num_experts=of.num_experts,
        moe_layers=tuple(of.moe_layers),
        mtp_layers=of.mtp_layers,
        mtp_moe_layers=tuple(sorted(mtp)),
        mtp_follows=bool(family.mtp and family.mtp.follows_blocks),
        top_k=of.top_k,
        top_k_key=family.top_k_key,
        groups=of.groups,
        group_key=family.group_key,
        top_groups=of.text.get("topk_group"),
        top_group_key="topk_group",
        sets=family.sets,
    )


def show(value: object) -> str:
    """`value` for a message: one line, and short whatever it is."""
    try:
        return _SHORT.repr(value).replace("\n", " ")
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def under(place: str, key: object) -> str:
    """`place["key"]`, as the reader would write it."""
    if not isinstance(key, str):
        return f"{place}[{show(key)}]"
    return f"{place}[{json.dumps(key if len(key) <= 100 else key[:100] + '...')}]"


def read_ids(value: object, place: str, *, sort: bool = False) -> Ids:
    """A list of expert ids: not empty, whole numbers from 0, each once, ascending unless `sort` makes them so."""
    if not isinstance(value, (list, tuple)):
        raise ManifestError(f"{place}: expected a list of expert ids, found {show(value)}")
    if not value:
        raise ManifestError(f"{place}: empty, expected at least one expert id")
    seen: set[int] = set()
    for at, expert in enumerate(value):
        whole_number(expert, f"{place}[{at}]", "expert id")
        if expert in seen:
            raise ManifestError(f"{place}[{at}]: expert {expert} is listed twice")
        seen.add(expert)
    if sort:
        return tuple(sorted(value))
    for at in range(1, len(value)):
        if value[at] < value[at - 1]:
            raise ManifestError(
                f"{place}[{at}]: expert {value[at]} after {value[at - 1]}, but ids must be ascending; `sort` sorts them"
            )
    return tuple(value)


def read_layers(value: object, place: str, *, sort: bool = False) -> dict[int, Ids]:
    """An object of layer number -> expert ids."""
    layers = object_at(value, place)
    return {layer_number(key, place): read_ids(ids, under(place, key), sort=sort) for key, ids in layers.items()}


def object_at(value: object, place: str) -> Mapping[str, Any]:
    """`value` if it is a JSON object.

    Raises:
        ManifestError: it is none.

    """
    if not isinstance(value, Mapping):
        raise ManifestError(f"{place}: expected an object, found {show(value)}")
    return value


def whole_number(value: object, place: str, what: str) -> int:
    """`value` if it is a count or an id; `what` says which.

    Raises:
        ManifestError: it is none.

    """
    if type(value) is not int or not 0 <= value < MAX_ID:  # bool is a subclass of int
        raise ManifestError(f"{place}: expected {'an' if what[0] in 'aeiou' else 'a'} {what}, found {show(value)}")
    return value


def layer_number(key: object, place: str) -> int:
    """The layer that the key of an object names.

    Raises:
        ManifestError: it names none.

    """
    if isinstance(key, str) and LAYER.fullmatch(key):
        return int(key)
    raise ManifestError(f'{under(place, key)}: expected a layer number as key, such as "12"')
