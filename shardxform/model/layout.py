"""What a family says about one checkpoint: the place of every tensor.

`layout_of` matches names against the family's templates, the list that `expected` enumerates. Names only, no bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, NamedTuple, cast

from shardxform.base.tensors import BITS, TensorRef, TensorSpec, uncollected
from shardxform.errors import FamilyError, PlanError
from shardxform.model.families import family_of
from shardxform.model.families.base import COUNT_KEYS, Config, Family, Scope, Template, Wrapper

__all__ = [
    "COMPANIONS",
    "MAX_LAYERS",
    "SCALES",
    "TELLING",
    "Layout",
    "Place",
    "count_paths",
    "is_quantized",
    "is_shape",
    "layout_of",
    "read_count",
    "refuse_longer",
    "refuse_two_spellings",
    "value_at",
    "variants_found",
]

MAX_LAYERS: Final = 10_000
_MAX_EXPERTS: Final = 10_000_000  # in all layers: a hundred times the largest model, and still enumerable
_SELECTED: Final = 2048  # positions, where a config does not say: the default of transformers' classes
_MOST_FOUND: Final = 1_000_000  # places that are kept for the next time


Rows = Literal["rows", "blocks", "none", "inside"]

COMPANIONS: Final[Mapping[str, Rows]] = {
    "activation_scale": "none",
    "biases": "inside",
    "g_idx": "none",
    "input_global_scale": "none",
    "input_scale": "none",
    "qscale_act": "none",
    "qscale_weight": "blocks",
    "qweight": "inside",
    "qzeros": "inside",
    "scale": "blocks",
    "scales": "inside",
    "weight_g_idx": "none",
    "weight_global_scale": "none",
    "weight_packed": "rows",
    "weight_scale": "blocks",
    "weight_scale_2": "none",
    "weight_scale_inv": "blocks",
    "weight_shape": "inside",
    "weight_zero_point": "inside",
    "_activation_scale": "rows",
    "_blocks": "rows",
    "_scale": "rows",
    "_scale_inv": "rows",
    "_scales": "rows",
}
"""Last name parts that stand for, or beside, a quantized `weight`, and share its place; and what its axis 0 counts.

Those that begin with `_` are the end of a last part, beside stacks of experts: `gate_up_proj_blocks`.

`rows`: the rows of the weight. `blocks`: blocks of them, of one row, some, or all. `none`: not the rows. `inside`: the
rows are counted on another axis, packed into words, or said by the values, so that taking some out needs the data.
"""

SCALES: Final = ("weight_scale_inv", "weight_scale")
"""What scales of FP8 weights are called."""


_OF_STACKS: Final = tuple(name for name in COMPANIONS if name.startswith("_"))
TELLING: Final = COMPANIONS.keys() - {"scale"}
"""Companions that only quantized weights have: a router may have a scale too."""

_QUANTIZED: Final = frozenset({dtype for dtype in BITS if BITS[dtype] <= 8 and dtype != "BOOL"} | {"U32"})


def is_quantized(spec: TensorSpec) -> bool:
    """Whether a tensor is of a quantized weight, by its name or by a dtype that no other tensor has."""
    return spec.name.rpartition(".")[2] in TELLING or spec.dtype in _QUANTIZED


class Place(NamedTuple):
    """Where a tensor belongs.

    Attributes:
        template: the family's entry.
        scope: part of the model.
        layer: decoder block, MTP layer (counted from 0) or None in root and vision.
        expert: id of the routed expert for per-expert tensors.
        expert_at: index of that id among the name's dot-separated parts.
        companion: last name part when it replaces or accompanies `weight` (`qweight`, `weight_scale_inv`), or empty.

    """

    template: Template
    scope: Scope
    layer: int | None = None
    expert: int | None = None
    expert_at: int = -1
    companion: str = ""

    @property
    def role(self) -> str:
        """What the tensor's size is counted under; everything of an MTP layer counts as `mtp`."""
        return "mtp" if self.scope == "mtp" else self.template.role


@dataclass(frozen=True, slots=True)
class Layout:
    """One checkpoint seen through its family.

    Attributes:
        family, wrapper: what config.json says it is.
        config: the whole config.json.
        text: the part that describes the decoder.
        num_layers, num_experts, top_k: of the decoder; experts per MoE layer, experts per token.
        groups: router groups, or sets of experts; of each as many experts stay (1 when the router has none).
        moe_layers: decoder blocks that have routed experts, ascending.
        mtp_layers: number of MTP layers that the config declares.
        mtp_blocks: blocks that each of them is made of.
        has_mtp, has_vision: whether any tensor of an MTP layer, of a vision tower is there.
        places: every tensor whose name the family knows.
        unknown: names the family does not know, in source order.
        harmless: names of tensors that are no part of the model, and that no client minds.
        sampled: whether `places` has, of routed experts one by one, the first alone; see `expected.first_of_alike`.

    """

    family: Family
    wrapper: Wrapper
    config: Config
    text: Config
    num_layers: int
    num_experts: int
    top_k: int
    groups: int
    moe_layers: tuple[int, ...]
    mtp_layers: int
    has_mtp: bool
    has_vision: bool
    places: Mapping[str, Place]
    unknown: tuple[str, ...]
    harmless: tuple[str, ...] = ()
    mtp_blocks: int = 1
    sampled: bool = False

    @property
    def blocks(self) -> str:
        """What every name of a decoder block begins with."""
        return f"{self.wrapper.prefix}{self.family.decoder.blocks}."

    @property
    def in_set(self) -> int:
        """Experts of one set; of all where there is one."""
        return self.num_experts // max(len(self.family.sets), 1)

    def counted(self, template: Template) -> int:
        """Experts that `E` stands for in the shape of a template."""
        return self.in_set if template.sets else self.num_experts

    @property
    def embeddings(self) -> str:
        """Name of the token embeddings."""
        return f"{self.wrapper.prefix}{self.family.decoder.embeddings}.weight"

    @property
    def norm(self) -> str:
        """Name of the final norm, less its parameters."""
        return f"{self.wrapper.prefix}{self.family.decoder.norm}"

    @property
    def head(self) -> str:
        """Name of the output head, whether it is stored or tied to the embeddings."""
        return f"{self.wrapper.head}.weight"

    @property
    def mtp_prefixes(self) -> tuple[str, ...]:
        """What every name of an MTP layer that the config declares begins with, known to the family or not."""
        mtp = self.family.mtp
        if mtp is None:
            return ()
        if not mtp.follows_blocks:
            names = (mtp.prefix, *(each.name for each in mtp.root if "{l}" in each.name))
            full = (self.wrapper.full(name).partition("{l}")[0].removesuffix("layers.") for name in names)
            return tuple(dict.fromkeys(full))
        return self._mtp_prefixes(range(self.num_layers, self.num_layers + self.mtp_layers * self.mtp_blocks))

    def undeclared_mtp_prefixes(self) -> tuple[str, ...]:
        """Give what names of layers beyond those of the config begin with, where the family has MTP layers there."""
        mtp = self.family.mtp
        if mtp is None or not mtp.follows_blocks:
            return ()
        blocks, end = self.blocks, self.num_layers + self.mtp_layers * self.mtp_blocks
        beyond = {name[len(blocks) :].partition(".")[0] for name in self.unknown if name.startswith(blocks)}
        return self._mtp_prefixes(sorted(int(number) for number in beyond if _is_id(number) and int(number) >= end))

    def _mtp_prefixes(self, numbers: Iterable[int]) -> tuple[str, ...]:
        assert self.family.mtp is not None
        prefix = self.family.mtp.prefix
        return tuple(self.wrapper.full(prefix).replace("{l}", str(number)) for number in numbers)


@uncollected()
def layout_of(config: Config, names: Iterable[str], where: str = "") -> Layout:
    """Recognise the family of `config` and place every name.

    Args:
        config: the whole config.json.
        names: of tensors.
        where: the checkpoint whose config it is, for messages.

    Raises:
        FamilyError: unknown family, a count missing from the config, or two counts that disagree.

    """
    try:
        return _layout_of(config, names)
    except FamilyError as e:
        raise type(e)(f"{where}/{e}" if where else str(e)) from e


def _layout_of(config: Config, names: Iterable[str]) -> Layout:
    family, wrapper = family_of(config)
    text = _text_config(config, family, wrapper)
    text = {**{ours: text[theirs] for theirs, ours in family.aliases.items() if theirs in text}, **text}
    home = f"{wrapper.text_key}." if wrapper.text_key else ""
    num_layers = _layer_count(family, text, home)
    in_set = _expert_count(config, family, wrapper)
    num_experts = in_set * max(len(family.sets), 1)
    spellings = (family.top_k_key, *family.other_top_k_keys)
    top_k_key = next((key for key in spellings if value_at(text, key) is not None), spellings[0])
    top_k = _read_per_layer(text, top_k_key, home, family)
    if top_k > in_set:
        raise FamilyError(f"config.json: {family.top_k_key} is {top_k}, but there are {in_set} experts")
    if num_layers > MAX_LAYERS or num_layers * num_experts > _MAX_EXPERTS:
        raise FamilyError(f"config.json: {num_layers} layers of {num_experts} experts are absurd")
    groups = (read_count(text, family.group_key, home, default=1) or 1) if family.group_key else len(family.sets) or 1
    if num_experts % groups:
        raise FamilyError(f"config.json: {family.group_key} is {groups}, which does not divide {num_experts} experts")
    mtp = family.mtp
    mtp_layers = read_count(text, mtp.count_key, home, default=0) if mtp else 0
    mtp_blocks = _mtp_blocks(family, text)
    placed = _finder(family, wrapper, num_layers, mtp_layers, mtp_blocks).places(names)
    places = cast("dict[str, Place]", placed)
    if not all(placed.values()):
        places = {name: place for name, place in placed.items() if place}
    if mtp and mtp.uncounted and mtp.count_key not in text:
        numbers = {place.layer for place in places.values() if place.scope == "mtp"}
        mtp_layers = len(numbers - {None})
    scopes = {place.scope for place in places.values()}
    apart = [name for name, place in placed.items() if not place] if len(places) < len(placed) else []
    harmless = tuple(name for name in apart if any(fnmatchcase(name, pattern) for pattern in family.harmless))
    return Layout(
        family=family,
        wrapper=wrapper,
        config=config,
        text=text,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        groups=groups,
        moe_layers=_moe_layers(family, text, num_layers),
        mtp_layers=mtp_layers,
        has_mtp="mtp" in scopes,
        has_vision="vision" in scopes,
        places=places,
        unknown=tuple(name for name in apart if name not in harmless),
        harmless=harmless,
        mtp_blocks=mtp_blocks,
    )


def count_paths(config: Config, family: Family, wrapper: Wrapper) -> list[tuple[str, ...]]:
    """Key paths in config.json that hold the expert count and must follow a pruning.

    Raises:
        FamilyError: a key that counts experts stands where this family does not expect one.

    """
    home = tuple(wrapper.text_key.split(".")) if wrapper.text_key else ()
    others = {tuple(key.split(".")) for key in family.other_counts}
    allowed = {(*home, *key.split(".")) for key in family.count_keys}
    found = [path for path in _walk(config) if path[-1] in COUNT_KEYS and path not in others]
    for path in found:
        if path not in allowed:
            raise FamilyError(f"config.json: {'.'.join(path)} counts experts where {family.name} does not expect it")
    return found


def refuse_longer(layout: Layout, tokens: int, where: str = "") -> None:
    """Refuse windows of so many tokens that an indexer would choose which of them a token attends to.

    Args:
        layout: of a checkpoint that is to be run.
        tokens: of a window.
        where: the checkpoint, for messages.

    Raises:
        FamilyError: names the key that says how many there may be.

    """
    key = layout.family.selection_key
    most = read_count(layout.text, key, "", default=_SELECTED) if key else tokens
    if tokens > most:
        raise FamilyError(
            f"{f'{where}/' if where else ''}config.json: {key} is {most}, and of longer windows a token attends to a"
            f" selection, which is not run: expected `seqlen` of at most {most}, found {tokens}"
        )


def variants_found(layout: Layout) -> dict[tuple[Scope, int], str]:
    """Which spelling of the routed experts each block uses; the first one met where a block mixes them."""
    out: dict[tuple[Scope, int], str] = {}
    for place in layout.places.values():
        if place.template.variant and place.layer is not None:
            out.setdefault((place.scope, place.layer), place.template.variant)
    return out


def is_shape(spec: TensorSpec, shape: tuple[int, ...] | None) -> bool:
    """Whether a tensor has the shape that its family gives it, or that of a weight with several codes in a number."""
    if shape is None or spec.shape == shape:
        return True
    if spec.dtype == "U32" and shape:  # words of MLX
        return any(spec.shape == (*shape[:-1], shape[-1] * bits // 32) for bits in (4, 8))
    return spec.dtype in ("I8", "U8") and bool(shape) and spec.shape == (*shape[:-1], shape[-1] // 2)


def refuse_two_spellings(layout: Layout, without: tuple[str, ...] = (), mtp_way_out: str = "") -> None:
    """Refuse a block whose experts are there fused and one by one: no client says which of them it takes.

    Args:
        layout: of the checkpoint.
        without: what names begin with that are not looked at.
        mtp_way_out: added to what is said of an MTP layer.

    Raises:
        FamilyError: names a tensor of each spelling.

    """
    seen: dict[tuple[Scope, int | None], dict[str, str]] = {}
    for name, place in layout.places.items():
        if not place.template.variant or name.startswith(without):
            continue
        block = seen.setdefault((place.scope, place.layer), {})
        block.setdefault(place.template.variant, name)
        if len(block) > 1:
            what, way_out = ("MTP layer", mtp_way_out) if place.scope == "mtp" else ("layer", "")
            raise FamilyError(
                f"{what} {place.layer} holds its experts twice, fused ('{block['fused']}') and one by one"
                f" ('{block['per-expert']}'): remove the tensors of one spelling{way_out}"
            )


class _Candidate(NamedTuple):
    """A template that a name may be of, and which of its numbers is the layer, and which the expert; -1 for none.

    `fixed` are those that stand in the template itself, by where they are among the numbers.
    """

    scope: Scope
    template: Template
    layer: int
    expert: int
    fixed: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Node:
    """A part of names that templates have: what may come after it, `_ID` for any id, and templates that end in it."""

    after: dict[str, _Node] = field(default_factory=dict)
    ends: list[_Candidate] = field(default_factory=list)


_ID: Final = "."  # which no part of a name is
_DEEPEST: Final = 64  # parts of names, of which templates have a dozen

_Stem = tuple[_Node | None, tuple[int, ...], tuple[int, ...], int]
"""Of a part of a name: where it leads to, its numbers, where among its parts they are, how many parts there are."""

_NOWHERE: Final[_Stem] = (None, (), (), 0)


class _Finder:
    """Finds the template of a name, which is followed part by part.

    Plans and checks place the same names again and again, and the parts of a weight share all but their last part: what
    was found is kept.
    """

    def __init__(self, family: Family, wrapper: Wrapper, num_layers: int, mtp_layers: int, mtp_blocks: int) -> None:
        self._num_layers = num_layers
        self._mtp_end = num_layers + mtp_layers * mtp_blocks
        self._mtp_blocks = mtp_blocks
        self._towers = family.towers
        self._follows = bool(family.mtp and family.mtp.follows_blocks)
        self._found: dict[str, Place] = {}
        self._home = family.numbered_home or "."
        self._ids: dict[str, int] = {}
        self._of_first: dict[tuple[str, str], Place] = {}
        self._root = _Node()
        self._stems: dict[str, _Stem] = {"": (self._root, (), (), 0)}
        blocks = f"{wrapper.prefix}{family.decoder.blocks}.{{l}}."
        for template in family.root:
            self._add("root", wrapper.full(template.name), template)
        for template in family.block:
            self._add("block", blocks + template.name, template)
        if family.mtp:
            prefix = wrapper.full(family.mtp.prefix)
            for template in family.block:
                self._add("mtp", prefix + family.mtp.inner + template.name, template)
            for template in family.mtp.layer:
                self._add("mtp", prefix + template.name, template)
            for template in family.mtp.root:
                self._add("mtp", wrapper.full(template.name), template)
        if wrapper.vision:
            for template in family.vision:
                self._add("vision", template.name, template)

    def _add(self, scope: Scope, name: str, template: Template) -> None:
        parts = name.split(".")
        numbers = [part for part in parts if part.startswith("{") or _is_id(part)]
        slots = "".join(part.lstrip("{")[0] for part in numbers)
        fixed = tuple((at, int(part)) for at, part in enumerate(numbers) if _is_id(part))
        node = self._root
        for part in parts:
            node = node.after.setdefault(_ID if part.startswith("{") or _is_id(part) else part, _Node())
        node.ends.append(_Candidate(scope, template, slots.find("l"), slots.find("e"), fixed))

    def places(self, names: Iterable[str]) -> dict[str, Place | None]:
        """Place of every name; None for one that the family does not know."""
        if len(self._found) > _MOST_FOUND:
            self._found.clear()
            self._of_first.clear()
            self._stems = {"": self._stems[""]}
        asked = list(names)
        return dict(zip(asked, self._each(asked), strict=True))

    def _each(self, names: Iterable[str]) -> Iterator[Place | None]:
        """Place of each name: most are a routed expert's, which is told by that of another expert's same tensor."""
        home, firsts, ids, found = self._home, self._of_first, self._ids, self._found
        for name in names:
            place = found.get(name)
            if place is None:
                above, _, rest = name.partition(home)
                number, _, last = rest.partition(".")
                first, expert = firsts.get((above, last)), ids.get(number)
                if first is None or expert is None:
                    place = self._find(name) or self._in_tower(name)
                else:
                    template, scope, layer, _, at, companion = first
                    found[name] = place = tuple.__new__(Place, (template, scope, layer, expert, at, companion))
            yield place

    def _remember(self, name: str, place: Place) -> None:
        """Keep a routed expert's place for the same tensor of others."""
        above, home, rest = name.partition(self._home)
        number, _, last = rest.partition(".")
        if number == str(place.expert) and f"{above}{home}".count(".") == place.expert_at:
            self._of_first[above, last] = place
            self._ids[number] = int(number)

    def _in_tower(self, name: str) -> Place | None:
        return next((Place(each, "vision") for each in self._towers if fnmatchcase(name, each.name)), None)

    def _find(self, name: str) -> Place | None:
        above, dot, last = name.rpartition(".")
        node, numbers, digits, _ = self._stems.get(above) or self._stem(above)
        if node is None or (dot and not above):
            return None
        end, companion = node.after.get(last), ""
        if end is None and last[:1].isdigit():
            end, numbers, digits, _ = self._stem(name)
        if end is None and last in COMPANIONS:
            end, companion = node.after.get("weight"), last
        elif end is None and last.endswith(_OF_STACKS):
            companion = max((each for each in _OF_STACKS if last.endswith(each)), key=len)
            end = node.after.get(last.removesuffix(companion))
        place = self._chosen(end.ends, numbers, digits, companion) if end else None
        if place and end:
            self._found[name] = place
            if place.expert is not None and not any(each.fixed for each in end.ends):
                self._remember(name, place)
        return place

    def _chosen(
        self, candidates: Iterable[_Candidate], numbers: tuple[int, ...], digits: tuple[int, ...], companion: str
    ) -> Place | None:
        for scope, template, layer_at, expert_at, fixed in candidates:
            if fixed and any(numbers[at] != number for at, number in fixed):
                continue
            layer = self._layer(scope, numbers[layer_at]) if layer_at >= 0 else None
            if layer == -1:
                continue
            if expert_at < 0:
                return Place(template, scope, layer, None, -1, companion)
            return Place(template, scope, layer, numbers[expert_at], digits[expert_at], companion)
        return None

    def _stem(self, stem: str) -> _Stem:
        """A name less its last part; what is known of one less its own last part is made use of."""
        known = self._stems.get(stem)
        if known is None:
            above, dot, last = stem.rpartition(".")
            deep = stem.count(".") > _DEEPEST
            node, numbers, digits, count = _NOWHERE if deep or (dot and not above) else self._stem(above)
            if node is None:
                known = _NOWHERE
            elif _is_id(last):
                known = node.after.get(_ID), (*numbers, int(last)), (*digits, count), count + 1
            else:
                known = node.after.get(last), numbers, digits, count + 1
            self._stems[stem] = known
        return known

    def _layer(self, scope: Scope, layer: int) -> int:
        """The layer within its scope, or -1 when the number lies outside the scope."""
        if scope in ("root", "block"):
            return layer if layer < self._num_layers else -1
        if scope == "mtp" and self._follows:
            return (layer - self._num_layers) // self._mtp_blocks if self._num_layers <= layer < self._mtp_end else -1
        return layer // self._mtp_blocks if scope == "mtp" else layer


_finder = functools.lru_cache(maxsize=4)(_Finder)


def _is_id(part: str) -> bool:
    """Whether a part of a name is a number, as Python writes it."""
    return part.isdigit() and part.isascii() and (part == "0" or part[0] != "0") and len(part) <= 9


def _text_config(config: Config, family: Family, wrapper: Wrapper) -> Config:
    if wrapper.text_key is None:
        return config
    text = value_at(config, wrapper.text_key)
    if not isinstance(text, Mapping):
        raise FamilyError(f"config.json: {wrapper.architecture} needs an object '{wrapper.text_key}'")
    # A multimodal class ties its head by the top level alone; what the text config says of it is not looked at.
    return {**text, "tie_word_embeddings": config.get("tie_word_embeddings", family.tied_by_default)}


def read_count(config: Config, key: str, home: str, default: int | None = None) -> int:
    """Read a count from the part of config.json called `home`; with a default it may be absent or 0.

    A `key` may lead into objects: `ffn_config.moe_num_experts`.
    """
    value = value_at(config, key)
    return default if value is None and default is not None else _count(value, home + key, 1 if default is None else 0)


def _count(value: object, where: str, least: int = 1) -> int:
    if value is None:
        raise FamilyError(f"config.json: missing {where}")
    if type(value) is not int or not least <= value <= 1_000_000:
        raise FamilyError(f"config.json: {where}: expected a count, found {value!r}")
    return value


def _read_per_layer(config: Config, key: str, home: str, family: Family) -> int:
    """Read a count that may be a list of the same for every layer, in families where it may."""
    value = value_at(config, key)
    if family.listed_counts and isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    return _count(value, home + key)


def value_at(config: Config, key: str) -> Any:  # noqa: ANN401
    """What a key, or keys with dots between them, lead to; None where there is nothing."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _expert_count(config: Config, family: Family, wrapper: Wrapper) -> int:
    paths = count_paths(config, family, wrapper)
    text = _text_config(config, family, wrapper)
    home = f"{wrapper.text_key}." if wrapper.text_key else ""
    if not paths:
        raise FamilyError(f"config.json: missing the expert count, expected {home}{family.count_keys[0]}")
    inside = [".".join(path).removeprefix(home) for path in paths]
    counts = {key: _read_per_layer(text, key, home, family) for key in inside}
    if len(set(counts.values())) > 1:
        raise FamilyError(f"config.json: expert counts disagree: {counts}")
    return next(iter(counts.values()))


def _layer_count(family: Family, text: Config, home: str) -> int:
    if isinstance(family.layers, str):
        return read_count(text, family.layers, home)
    try:
        return read_count({"layers": family.layers(text)}, "layers", home)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise FamilyError(f"config.json: cannot tell how many layers there are: {e}") from e


def _mtp_blocks(family: Family, text: Config) -> int:
    try:
        return max(1, family.mtp.blocks(text)) if family.mtp and family.mtp.blocks else 1
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise FamilyError(f"config.json: cannot tell what its MTP layers are made of: {e}") from e


def _moe_layers(family: Family, text: Config, num_layers: int) -> tuple[int, ...]:
    """Blocks with routed experts; evaluates every condition once, so that a malformed config fails here."""
    try:
        for condition in family.conditions.values():
            for layer in range(-1, num_layers):
                condition(text, layer)
        return tuple(layer for layer in range(num_layers) if family.holds(family.moe, text, layer))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        why = _why_not(e, text, num_layers)
        raise FamilyError(f"config.json: cannot tell what its {num_layers} layers are made of: {why}") from e


def _why_not(error: Exception, text: Config, num_layers: int) -> str:
    """What a condition found wrong with a config, as far as an exception tells."""
    if isinstance(error, IndexError):
        short = [
            (len(value), key) for key, value in text.items() if isinstance(value, list) and len(value) < num_layers
        ]
        return "{1} has {0} entries".format(*max(short)) if short else str(error)
    if isinstance(error, KeyError):
        return f"missing {error.args[0]}"
    return str(error) if isinstance(error, ValueError) else repr(error)


def _walk(config: Mapping[str, object], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, key))


# -- tensors that must not be copied unseen -----------------------------------------------------------------------


_ROUTER: Final = re.compile(r"(^|\.)(gate|moe_gate|moe_statics)(\.|$)|router|correction_bias")
_PART: Final = re.compile(r"scale|zero|g_idx|qweight|packed|absmax|quant|_shape$|_codebook|lora_")
_OF_CACHE: Final = frozenset({"k_scale", "kv_scale", "output_scale", "q_scale", "v_scale"})  # of keys and values


def looks_like(layout: Layout, name: str) -> str:
    """Say what a tensor that the family does not know looks like; empty for nothing that must be understood."""
    vision = layout.family.vision_prefix
    if vision and name.startswith(vision):
        return ""
    if "expert" in name:
        return "a part of experts"
    if _ROUTER.search(name):
        return "a part of a router"
    stem, _, last = name.rpartition(".")
    known = any(f"{each}.weight" in layout.places or each in layout.places for each in _owners(name))
    if last not in _OF_CACHE and _PART.search(last) and (known or _is_quantized(layout, stem)):
        return "a part of a quantized weight"
    return ""


def refuse_strays(layout: Layout, tensors: Mapping[str, TensorRef], but: Collection[str] = ()) -> None:
    """Refuse tensors that must not be copied unseen, but for those whose names begin with one of `but`.

    Raises:
        PlanError: names the first.

    """
    for name in layout.unknown:
        if not name.startswith(tuple(but)) and (what := looks_like(layout, name)):
            shape = list(tensors[name].spec.shape)
            raise PlanError(
                f"tensor '{name}' {shape} is unknown to family {layout.family.name}, and looks like {what}:"
                " it cannot be copied without being understood"
            )


def _owners(name: str) -> list[str]:
    """Names of which this one may be a part, as `q_proj` of `q_proj.weight.absmax` or of `q_proj_scale_inv`."""
    parts = name.split(".")
    joined = name.rsplit("_", 2)
    return [".".join(parts[:-1]), ".".join(parts[:-2]), joined[0], "_".join(joined[:-1])]


def _is_quantized(layout: Layout, stem: str) -> bool:
    """Whether other parts of the same weight are known."""
    return any(f"{stem}.{part}" in layout.places for part in ("qweight", "weight_packed", "weight_scale"))
