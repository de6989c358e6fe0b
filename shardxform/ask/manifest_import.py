"""Keep manifests of other tools, and the record of an output, told apart by their content and read into one shape.

Pure: parsed JSON in, `Content` out, or a `ManifestError` that names the place. What needs the checkpoint is checked
by `Manifest.check` afterwards; here it serves two ends only: to number MTP layers, and to complement a list of pruned
experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from shardxform.ask.experts import (
    LAYER,
    Ids,
    Pruned,
    layer_number,
    object_at,
    read_ids,
    read_layers,
    show,
    under,
    whole_number,
)
from shardxform.base.strict_json import Fields
from shardxform.checkpoint.history import HISTORY
from shardxform.checkpoint.record import FORMAT as RECORD_FORMAT
from shardxform.errors import ManifestError

if TYPE_CHECKING:
    from shardxform.ask.width import Width

__all__ = ["FORMS", "Content", "Form", "ImportInput", "form_of"]


@dataclass(frozen=True, slots=True)
class ImportInput:
    """What an importer is given.

    Attributes:
        value: the parsed JSON object.
        where: file name for messages.
        layout: what the checkpoint has, or None when there is none at hand.
        sort: put ids in ascending order instead of refusing them.
        step: of a record, which of the steps that the output came about by; None for the one that prunes.

    """

    value: Mapping[str, Any]
    where: str
    layout: Pruned | None
    sort: bool
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a manifest says, whatever its form; the fields are those of `Manifest`."""

    keep: Mapping[int, Ids]
    mtp_keep: Mapping[int, Ids] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    criterion: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    width: Width | None = None


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
        model={} if count is None else {"num_experts": whole_number(count, f"{source.where}: n_expert", "number")},
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
        layer = layer_number(key, f"{source.where}: ")
        place = under(f"{source.where}: ", key)
        ids = read_ids(object_at(entry, place).get("kept"), f"{place}.kept", sort=source.sort)
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
    for path, ids in object_at(source.value["retained_experts"] if nested else source.value, place).items():
        number, in_mtp = _layer_of_path(path, place, source.layout)
        target = mtp_keep if in_mtp else keep
        if number in target:
            raise ManifestError(f"{under(place, path)}: a second module of {'MTP ' * in_mtp}layer {number}")
        target[number] = read_ids(ids, under(place, path), sort=source.sort)
    notes = _notes(source, "retained_experts") if nested else {}
    return Content(keep=keep, mtp_keep=mtp_keep, provenance=notes)


def _path_layer(path: object) -> int | None:
    parts = path.split(".") if isinstance(path, str) else []
    return next((int(part) for name, part in pairwise(parts) if name == "layers" and LAYER.fullmatch(part)), None)


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
        layer = whole_number(pair[0], f"{place}[{at}]", "layer number")
        expert = whole_number(pair[1], f"{place}[{at}]", "expert id")
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
    """What an output was pruned by; where it came about in several steps that prune, that of the step asked for."""
    pruned = [each for each in _steps(source) if isinstance(each[2], Mapping) and each[2].get("keep")]
    found = [each for each in pruned if source.step in (None, each[0])]
    if not found:
        if source.step:
            raise ManifestError(f"{source.where}: step {source.step}: there is none of that number that prunes")
        place = next(_steps(source))[1]
        raise ManifestError(f"{place}manifest: no keep lists; this output was not pruned")
    if len(found) > 1:
        numbers = " and ".join(str(number) for number, *_ in found)
        raise ManifestError(f"{source.where}: pruned in steps {numbers}, each by its own lists; `step` takes one out")
    ((_, place, lists, chosen),) = found
    width = _width_of(lists, f"{place}manifest.")
    sort = source.sort and width is None
    keep, mtp_keep = (
        read_layers(lists.get(key, {}), f"{place}manifest.{key}", sort=sort) for key in ("keep", "mtp_keep")
    )
    told = Fields(chosen)
    provenance = {key: told.get(key) for key in ("tokens", "runs", "layers") if key in told}
    return Content(keep=keep, mtp_keep=mtp_keep, width=width, criterion=told.text("criterion"), provenance=provenance)


def _steps(source: ImportInput) -> Iterator[tuple[int, str, Any, object]]:
    """Number, place, keep lists and reasons of the steps that an output came about by, itself the last."""
    place = f"{source.where}: inputs"
    inputs = object_at(source.value.get("inputs"), place)
    origin, history = inputs.get("origin"), Fields(inputs.get(HISTORY)).get("steps")
    number = 1
    if isinstance(origin, Mapping):  # of a converted output, by an earlier version
        yield 1, f"{place}.origin.", origin.get("manifest"), {}
        number = 2
    for number, step in enumerate(history if isinstance(history, list) else [], 1):
        told = Fields(step)
        yield (
            number,
            f"{place}.{HISTORY}.steps[{number - 1}].",
            told.get("manifest"),
            told.section("summary").get("chosen"),
        )
    number += isinstance(history, list)
    yield number, f"{place}.", inputs.get("manifest"), Fields(source.value.get("summary")).get("chosen")


def _width_of(value: Mapping[str, object], place: str) -> Width | None:
    """Channels that stay, where an object says so; its bitmaps are in the order of the ids, which is not to change.

    Raises:
        ManifestError: malformed.

    """
    if "width" not in value:
        return None
    from shardxform.ask.width import Width  # most keep all channels

    return Width.from_dict(value["width"], f"{place}width")


def _numbered(value: Mapping[str, object]) -> Iterator[object]:
    """What stands under keys that are layer numbers."""
    return (entry for key, entry in value.items() if isinstance(key, str) and LAYER.fullmatch(key))


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
