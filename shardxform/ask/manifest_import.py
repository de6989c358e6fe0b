"""Keep manifests of other tools, and the record of an output, told apart by their content and read into one shape.

Pure: parsed JSON in, `Content` out, or a `ManifestError` that names the place. What needs the checkpoint is checked
by `Manifest.check` afterwards; here it serves two ends only: to number MTP layers, and to complement a list of pruned
experts.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from shardxform.checkpoint.record import FORMAT as RECORD_FORMAT
from shardxform.errors import ManifestError
from shardxform.model.layout import Layout
from shardxform.runtimes.gguf.slabs import Slabs

__all__ = [
    "FORMS",
    "MAX_ID",
    "Content",
    "Form",
    "ImportInput",
    "Pruned",
    "form_of",
    "pruned_of",
    "read_ids",
    "read_layers",
    "show",
    "under",
]

MAX_ID: Final = 10**9
"""Beyond any layer or expert number; a larger one is a typo, and absurdly many digits would not even print."""

_LAYER: Final = re.compile(r"0|[1-9][0-9]{0,8}")
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


def pruned_of(of: Layout | Slabs | Pruned) -> Pruned:
    """What a manifest for a checkpoint of this layout speaks of."""
    if isinstance(of, Pruned):
        return of
    if isinstance(of, Slabs):
        return _of_slabs(of)
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


def _of_slabs(slabs: Slabs) -> Pruned:
    return Pruned(
        model_type=slabs.arch,
        is_called=slabs.is_called,
        num_layers=slabs.num_layers,
        num_experts=slabs.num_experts,
        moe_layers=slabs.moe_layers,
        mtp_layers=slabs.nextn,
        mtp_moe_layers=slabs.mtp_layers,
        mtp_follows=True,
        top_k=slabs.top_k,
        top_k_key=f"{slabs.arch}.expert_used_count",
        groups=slabs.groups,
        group_key=f"{slabs.arch}.expert_group_count",
        top_groups=slabs.top_groups,
        top_group_key=f"{slabs.arch}.expert_group_used_count",
    )


@dataclass(frozen=True, slots=True)
class ImportInput:
    """What an importer is given.

    Attributes:
        value: the parsed JSON object.
        where: file name for messages.
        layout: what the checkpoint has, or None when there is none at hand.
        sort: put ids in ascending order instead of refusing them.

    """

    value: Mapping[str, Any]
    where: str
    layout: Pruned | None
    sort: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a manifest says, whatever its form; the fields are those of `Manifest`."""

    keep: Mapping[int, Ids]
    mtp_keep: Mapping[int, Ids] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    criterion: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Form:
    """One form: its name, how it is recognised, how it is read."""

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[ImportInput], Content]


def form_of(value: Mapping[str, object]) -> Form | None:
    """The form other than ours that `value` has, or None; what names a format is in that, or in none."""
    if value.get("format", RECORD_FORMAT) != RECORD_FORMAT:
        return None
    return next((form for form in FORMS if form.fits(value)), None)


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
        _number(expert, f"{place}[{at}]", "expert id")
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
    layers = _object(value, place)
    return {_layer(key, place): read_ids(ids, under(place, key), sort=sort) for key, ids in layers.items()}


def _number(value: object, place: str, what: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_ID:  # bool is a subclass of int
        raise ManifestError(f"{place}: expected {'an' if what[0] in 'aeiou' else 'a'} {what}, found {show(value)}")
    return value


def _layer(key: object, place: str) -> int:
    if isinstance(key, str) and _LAYER.fullmatch(key):
        return int(key)
    raise ManifestError(f'{under(place, key)}: expected a layer number as key, such as "12"')


def _object(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{place}: expected an object, found {show(value)}")
    return value


def _version(source: ImportInput, expected: object) -> None:
    found = source.value.get("version", expected)
    if type(found) is not type(expected) or found != expected:
        raise ManifestError(f"{source.where}: version: expected {expected!r} in this form, found {show(found)}")


def _notes(source: ImportInput, *used: str) -> dict[str, Any]:
    """The rest at the top, as provenance: plain values as they are; `not_imported` names what is larger."""
    rest = {key: value for key, value in source.value.items() if key not in used and value is not None}
    plain = {key: value for key, value in rest.items() if isinstance(value, (str, int)) or _finite(value)}
    left = [key for key in rest if key not in plain]
    return {**plain, "not_imported": left} if left else plain


def _finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _split_mtp(layers: Mapping[int, Ids], layout: Pruned | None) -> tuple[dict[int, Ids], dict[int, Ids]]:
    """Decoder blocks, and the MTP layers where a family counts them on after the blocks."""
    keep, mtp_keep = {}, {}
    for layer, ids in layers.items():
        number = _mtp_number(layer, layout)
        if number is None:
            keep[layer] = ids
        else:
            mtp_keep[number] = ids
    return keep, mtp_keep


def _mtp_number(layer: int, layout: Pruned | None) -> int | None:
    if layout is None or not layout.mtp_follows:
        return None
    number = layer - layout.num_layers
    return number if 0 <= number < layout.mtp_layers else None


def _read_dorijan(source: ImportInput) -> Content:
    value = source.value
    keep, mtp_keep = _split_mtp(read_layers(value["keep"], f"{source.where}: keep", sort=source.sort), source.layout)
    count = value.get("n_expert")
    criterion = value.get("metric", "")
    if not isinstance(criterion, str):
        raise ManifestError(f"{source.where}: metric: expected a text, found {show(criterion)}")
    return Content(
        keep=keep,
        mtp_keep=mtp_keep,
        model={} if count is None else {"num_experts": _number(count, f"{source.where}: n_expert", "number")},
        criterion=criterion,
        provenance=_notes(source, "keep", "n_expert", "metric"),
    )


def _read_omlx(source: ImportInput) -> Content:
    layers = read_layers(source.value, f"{source.where}: ", sort=source.sort)
    keep, mtp_keep = _split_mtp(layers, source.layout)
    return Content(keep=keep, mtp_keep=mtp_keep)


def _read_0xsero(source: ImportInput) -> Content:
    lists = {}
    for key, entry in source.value.items():
        layer = _layer(key, f"{source.where}: ")
        place = under(f"{source.where}: ", key)
        ids = read_ids(_object(entry, place).get("kept"), f"{place}.kept", sort=source.sort)
        count = entry.get("keep", len(ids))
        if type(count) is not int or count != len(ids):
            raise ManifestError(f"{place}.keep: {show(count)}, but kept lists {len(ids)} experts")
        lists[layer] = ids
    keep, mtp_keep = _split_mtp(lists, source.layout)
    return Content(keep=keep, mtp_keep=mtp_keep)


def _read_modules(source: ImportInput) -> Content:
    nested = "retained_experts" in source.value
    place = f"{source.where}: retained_experts" if nested else f"{source.where}: "
    keep: dict[int, Ids] = {}
    mtp_keep: dict[int, Ids] = {}
    for path, ids in _object(source.value["retained_experts"] if nested else source.value, place).items():
        number, in_mtp = _layer_of_path(path, place, source.layout)
        target = mtp_keep if in_mtp else keep
        if number in target:
            raise ManifestError(f"{under(place, path)}: a second module of {'MTP ' * in_mtp}layer {number}")
        target[number] = read_ids(ids, under(place, path), sort=source.sort)
    notes = _notes(source, "retained_experts") if nested else {}
    return Content(keep=keep, mtp_keep=mtp_keep, provenance=notes)


def _path_layer(path: object) -> int | None:
    parts = path.split(".") if isinstance(path, str) else []
    return next((int(part) for name, part in pairwise(parts) if name == "layers" and _LAYER.fullmatch(part)), None)


def _layer_of_path(path: str, place: str, layout: Pruned | None) -> tuple[int, bool]:
    """Layer number within its scope, and whether that scope is the MTP layers."""
    layer = _path_layer(path)
    if layer is None:
        raise ManifestError(f"{under(place, path)}: expected a module path with 'layers.<number>'")
    if "mtp" in path.split("."):
        return layer, True
    number = _mtp_number(layer, layout)
    return (layer, False) if number is None else (number, True)


def _pairs(value: object, place: str) -> dict[int, dict[int, int]]:
    """Layer -> expert -> position, from a list of `[layer, expert]` or `{"layer": , "expert": }`."""
    if not isinstance(value, (list, tuple)):
        raise ManifestError(f"{place}: expected a list, found {show(value)}")
    out: dict[int, dict[int, int]] = {}
    for at, item in enumerate(value):
        pair = [item.get("layer"), item.get("expert")] if isinstance(item, Mapping) else item
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ManifestError(f"{place}[{at}]: expected a layer and an expert, found {show(item)}")
        layer = _number(pair[0], f"{place}[{at}]", "layer number")
        expert = _number(pair[1], f"{place}[{at}]", "expert id")
        if out.setdefault(layer, {}).setdefault(expert, at) != at:
            raise ManifestError(f"{place}[{at}]: expert {expert} of layer {layer} is listed twice")
    return out


def _read_vllm(source: ImportInput) -> Content:
    _version(source, 1)
    place, layout = f"{source.where}: pruned_experts", source.layout
    if layout is None:
        raise ManifestError(
            f"{place}: a vLLM profile lists the experts to remove; reading it needs the checkpoint, to know how many"
            " there are"
        )
    pruned = _pairs(source.value["pruned_experts"], place)
    for layer, experts in pruned.items():
        _check_pruned(layer, experts, place, layout)
    every = range(layout.num_experts)
    layers = sorted({*layout.moe_layers, *pruned})  # a decoder block that the profile spares keeps all it has
    kept = {layer: tuple(e for e in every if e not in pruned.get(layer, ())) for layer in layers}
    for layer, ids in kept.items():
        if not ids:
            raise ManifestError(f"{place}: layer {layer} would lose all its {layout.num_experts} experts")
    keep, mtp_keep = _split_mtp(kept, layout)
    return Content(keep=keep, mtp_keep=mtp_keep, provenance=_notes(source, "version", "pruned_experts"))


def _check_pruned(layer: int, experts: Mapping[int, int], place: str, layout: Pruned) -> None:
    if layer not in layout.moe_layers and _mtp_number(layer, layout) is None:
        at = next(iter(experts.values()))
        raise ManifestError(f"{place}[{at}]: layer {layer} has no experts in this checkpoint")
    for expert, at in experts.items():
        if expert >= layout.num_experts:
            raise ManifestError(
                f"{place}[{at}]: expert {expert}, but layer {layer} has experts 0..{layout.num_experts - 1}"
            )


def _read_reap_mlx(source: ImportInput) -> Content:
    _version(source, "1.0")
    kept = _pairs(source.value["kept"], f"{source.where}: kept")
    pruned = _pairs(source.value.get("pruned", []), f"{source.where}: pruned")
    for layer, experts in pruned.items():
        for expert, at in experts.items():
            if expert in kept.get(layer, ()):
                place = f"{source.where}: pruned[{at}]"
                raise ManifestError(f"{place}: expert {expert} of layer {layer} is also kept[{kept[layer][expert]}]")
    keep, mtp_keep = _split_mtp({layer: tuple(sorted(experts)) for layer, experts in kept.items()}, source.layout)
    return Content(keep=keep, mtp_keep=mtp_keep, provenance=_notes(source, "version", "kept", "pruned"))


def _read_record(source: ImportInput) -> Content:
    inputs = _object(source.value.get("inputs"), f"{source.where}: inputs")
    place = f"{source.where}: inputs"
    if isinstance(inputs.get("origin"), Mapping):  # of a converted output: what was done before
        inputs, place = inputs["origin"], f"{place}.origin"
    lists = inputs.get("manifest")
    if not isinstance(lists, Mapping) or not lists.get("keep"):
        raise ManifestError(f"{place}.manifest: no keep lists; this output was not pruned")
    keep, mtp_keep = (
        read_layers(lists.get(key, {}), f"{place}.manifest.{key}", sort=source.sort) for key in ("keep", "mtp_keep")
    )
    return Content(keep=keep, mtp_keep=mtp_keep)


def _numbered(value: Mapping[str, object]) -> Iterator[object]:
    """What stands under keys that are layer numbers."""
    return (entry for key, entry in value.items() if isinstance(key, str) and _LAYER.fullmatch(key))


FORMS: Final = (
    Form(
        "shardxform.json",
        lambda v: v.get("format") == RECORD_FORMAT,
        _read_record,
    ),
    Form("vLLM profile", lambda v: "pruned_experts" in v, _read_vllm),
    Form("reap-mlx", lambda v: isinstance(v.get("kept"), list), _read_reap_mlx),
    Form(
        "Dorijan10",
        lambda v: "keep" in v and ("n_expert" in v or "metric" in v),
        _read_dorijan,
    ),
    Form(
        "llm-compressor",
        lambda v: "retained_experts" in v or any(_path_layer(key) is not None for key in v),
        _read_modules,
    ),
    Form("0xSero", lambda v: any(isinstance(e, Mapping) for e in _numbered(v)), _read_0xsero),
    Form("oMLX", lambda v: any(True for _ in _numbered(v)), _read_omlx),
)
"""All forms but that of a keep manifest, in the order in which they are tried."""
