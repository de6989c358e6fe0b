"""The keep manifest: which experts every MoE layer keeps, and why.

A `Manifest` that exists is well-formed: ascending ids, each once. Whether it fits a checkpoint is a second question,
which `check` answers from names and config alone. Forms of other tools are read by `manifest_import`.
"""

from __future__ import annotations

import copy
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from shardxform.ask.experts import MAX_ID, Pruned, pruned_of, read_ids, read_layers, show
from shardxform.base.file_system import read_given
from shardxform.base.strict_json import Fields, JsonError, parse_object
from shardxform.checkpoint.identity import Identity, names_of
from shardxform.checkpoint.record import FORMAT as RECORD_FORMAT
from shardxform.checkpoint.table import Shard
from shardxform.errors import ManifestError
from shardxform.model.layout import Layout

if TYPE_CHECKING:
    from shardxform.ask.width import Width

__all__ = ["FORMAT", "VERSION", "Manifest", "chosen_by", "keep_all", "manifest_text", "mtp_moe_layers"]

FORMAT: Final = "shardxform.keep"
VERSION: Final = 1
_KEYS: Final = ("format", "version", "model", "criterion", "ratio", "provenance", "keep", "mtp_keep", "width")
_MAX_BYTES: Final = 64 << 20  # a manifest of 100 layers of 512 experts is 300 kB; this is a shard given by mistake
_OF_SOURCE: Final = ("identity", "source_fingerprint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Which experts stay.

    Attributes:
        keep: decoder block -> ids of the experts kept, ascending, in the source's numbering: `keep[new] = old`.
        mtp_keep: MTP layer, counted from 0 -> the same.
        model: what the manifest was made for: `model_type`, `num_layers`, `num_experts`, and whatever else.
        criterion: name of the saliency that the choice was made by.
        ratio: share of the experts that was asked to be removed; for the record only.
        provenance: data, seed, tool and the like; for the record only.
        width: channels that every expert that stays keeps; None for all.
        where: file name for messages; no part of the value.

    """

    keep: Mapping[int, tuple[int, ...]]
    mtp_keep: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    criterion: str = ""
    ratio: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    width: Width | None = None
    where: str = field(default="manifest", compare=False)

    def __post_init__(self) -> None:
        for name in ("keep", "mtp_keep"):
            object.__setattr__(self, name, _layers(getattr(self, name), f"{self.where}: {name}"))
        for name in ("model", "provenance"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise ManifestError(f"{self.where}: {name}: expected an object, found {show(value)}")
            object.__setattr__(self, name, dict(value))
        if not self.keep:
            raise ManifestError(f"{self.where}: keep: empty, expected an entry for every layer that has experts")
        _check_facts(self)
        if self.width:
            self.width.refuse_other(self.keep, self.mtp_keep, self.where)

    def __hash__(self) -> int:
        return hash((tuple(self.keep.items()), tuple(self.mtp_keep.items())))

    @property
    def num_kept(self) -> int:
        """Experts kept per layer."""
        return len(next(iter(self.keep.values())))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layout: Layout | Pruned | None = None,
        *,
        sort: bool = False,
        step: int | None = None,
    ) -> Manifest:
        """Read a manifest file; see `from_dict`.

        Raises:
            ManifestError: as `from_dict`, or the file cannot be read.

        """
        where = os.fspath(path)
        try:
            data = read_given(path, _MAX_BYTES)
            if len(data) > _MAX_BYTES:
                raise ManifestError(f"{where}: more than {_MAX_BYTES} bytes, which is no keep manifest")
            value = parse_object(data)
        except OSError as e:
            raise ManifestError(f"{where}: {e.strerror}") from e
        except JsonError as e:
            raise ManifestError(f"{where}: {e}") from e
        return cls.from_dict(value, where=where, layout=layout, sort=sort, step=step)

    @classmethod
    def from_dict(
        cls,
        value: object,
        *,
        where: str = "manifest",
        layout: Layout | Pruned | None = None,
        sort: bool = False,
        step: int | None = None,
    ) -> Manifest:
        """Take parsed JSON in our form or in a foreign one, told apart by content.

        Args:
            value: the JSON object.
            where: file name for messages.
            layout: of the checkpoint. With it the manifest is also checked against the checkpoint.
            sort: put ids in ascending order instead of refusing them.
            step: of the record of an output that came about in several, which of them, from 1 on.

        Raises:
            ManifestError: unknown form, malformed, or (with `layout`) no fit for the checkpoint.

        """
        if not isinstance(value, Mapping):
            raise ManifestError(f"{where}: expected an object, found {show(value)}")
        if step is not None and value.get("format") != RECORD_FORMAT:
            raise ManifestError(f"{where}: `step` {step}: only the record of an output has steps")
        if value.get("format") == FORMAT:
            manifest = _from_ours(cls, value, where, sort)
        else:
            manifest = _from_others(cls, value, where, pruned_of(layout) if layout else None, sort, step)
        if layout is None:
            _check_counts(manifest)
            _check_range(manifest, manifest.model.get("num_experts", MAX_ID))
        else:
            manifest.check(layout)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Our form, ready for JSON; what is empty is left out."""
        out: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for name in ("model", "criterion", "ratio", "provenance"):
            value = getattr(self, name)
            if value is not None and value != "" and value != {}:
                out[name] = copy.deepcopy(value)
        for name, layers in (("keep", self.keep), ("mtp_keep", self.mtp_keep)):
            if layers:
                out[name] = {str(layer): list(ids) for layer, ids in layers.items()}
        if self.width:
            out["width"] = self.width.to_dict()
        return out

    def check(self, layout: Layout | Pruned) -> None:
        """Everything that needs the checkpoint, the most telling error first.

        Raises:
            ManifestError: made for another model, layers missing or without experts, counts that no config can
                state, too few experts for the router, ids out of range, router groups cut unequally.

        """
        of = pruned_of(layout)
        _check_model(self, of)
        _check_layers(f"{self.where}: keep", self.keep, of)
        if self.mtp_keep:
            _check_mtp_layers(f"{self.where}: mtp_keep", self.mtp_keep, of)
        _check_counts(self)
        if self.num_kept < of.top_k:
            raise ManifestError(
                f"{self.where}: keep: {self.num_kept} experts per layer, but the router picks {of.top_k} per token"
                f" ({of.top_k_key})"
            )
        _check_range(self, of.num_experts)
        if of.sets:
            _check_sets(self, of)
        elif of.groups > 1:
            _check_groups(self, of)

    def refuse_other_source(self, identity: Callable[[], Identity], shards: Sequence[Shard]) -> None:
        """Refuse a manifest that says it was chosen on another checkpoint, or on other values; most say nothing of it.

        Args:
            identity: gives that of the checkpoint at hand; it is asked for only where it is compared.
            shards: of the checkpoint.

        Raises:
            ManifestError: names the first difference.

        """
        chosen = Identity.from_dict(self.model.get("identity"))
        where = chosen.difference(identity(), names_of(shards)) if chosen else ""
        if where:
            raise ManifestError(
                f"{self.where}: chosen on another checkpoint: {where}; score and select on this one, or give"
                " `any_source` to prune by it all the same"
            )

    def of_any_source(self) -> Manifest:
        """The same choice without a word on the checkpoint that it was made on."""
        return replace(self, model={key: value for key, value in self.model.items() if key not in _OF_SOURCE})


_RUNS: Final = 16
_LAYERS: Final = 1000
_TOLD: Final = 200  # characters of a name


def chosen_by(manifest: Manifest | None) -> dict[str, Any]:
    """What a manifest says of why its experts stay, as outputs record it under `chosen`; nothing where it says nothing.

    Only what a card shows, and no more of it than a card can: provenance may hold anything.
    """
    if manifest is None:
        return {}
    told = Fields(manifest.provenance)
    layers = told.section("layers")
    figures = {key: found for key in ("saliency_kept", "never_reached_kept") if (found := _figures(layers.get(key)))}
    chosen = {
        "criterion": manifest.criterion if manifest.criterion.isprintable() else "",
        "tokens": told.whole("tokens"),
        "runs": [run for each in told.sections("runs")[:_RUNS] if (run := _run(each))],
        "layers": figures,
    }
    chosen = {key: value for key, value in chosen.items() if value}
    return {"chosen": chosen} if chosen else {}


def _run(run: Fields) -> dict[str, Any]:
    """The text that experts were scored on; nothing without a name."""
    names = {key: run.text(key)[:_TOLD] for key in ("data", "sha256", "revision") if run.text(key)}
    counts = {key: run.whole(key) for key in ("samples", "seqlen", "tokens") if run.whole(key) is not None}
    sources = [each[:_TOLD] for each in run.texts("sources")[:_TOLD]]
    return {**names, **counts, **({"sources": sources} if sources else {})} if "data" in names else {}


def _figures(values: object) -> list[int | float]:
    """A figure for each layer; none where one of them is no number, or there are more than models have layers."""
    listed = values if isinstance(values, list) and len(values) <= _LAYERS else []
    fields = [Fields({"": each}).number("") for each in listed]
    return [] if None in fields else listed


def keep_all(layout: Layout) -> Manifest:
    """Every expert of every MoE layer, and of every MTP layer that has tensors.

    Raises:
        ManifestError: no layer has experts.

    """
    every = tuple(range(layout.num_experts))
    return Manifest(
        keep=dict.fromkeys(layout.moe_layers, every),
        mtp_keep=dict.fromkeys(mtp_moe_layers(layout), every),
        model={
            "model_type": layout.wrapper.model_type,
            "num_layers": layout.num_layers,
            "num_experts": layout.num_experts,
        },
        where="keep all",
    )


def _from_others(
    cls: type[Manifest], value: Mapping[str, Any], where: str, layout: Pruned | None, sort: bool, step: int | None
) -> Manifest:
    from shardxform.ask.manifest_import import FORMS, ImportInput, form_of  # most manifests are ours

    form = form_of(value)
    if form is not None:
        content = form.read(ImportInput(value, where, layout, sort, step))
        # Later messages speak of keep["12"], which a foreign file does not have: say why.
        return cls(
            keep=content.keep,
            mtp_keep=content.mtp_keep,
            model=content.model,
            criterion=content.criterion,
            provenance={**content.provenance, "imported_from": form.name},
            width=content.width,
            where=f"{where} ({form.name} form)",
        )
    if "format" not in value and "keep" not in value:
        forms = ", ".join(form.name for form in FORMS)
        raise ManifestError(
            f'{where}: expected a keep manifest, {{"format": "{FORMAT}", "version": {VERSION}, "keep": {{"0": [ids]}}}}'
            f" or one of {forms}; found {show(list(value))}"
        )
    found = f"found {show(value['format'])}" if "format" in value else "but it is missing"
    raise ManifestError(f'{where}: format: expected "{FORMAT}", {found}')


def _from_ours(cls: type[Manifest], value: Mapping[str, Any], where: str, sort: bool) -> Manifest:
    for key in value:
        if key not in _KEYS:
            raise ManifestError(f"{where}: unknown key {show(key)}; the keys are {', '.join(_KEYS)}")
    version = value.get("version")
    if type(version) is not int or version != VERSION:
        found = f"found {show(version)}" if "version" in value else "but it is missing"
        raise ManifestError(f"{where}: version: expected {VERSION}, {found}")
    if "keep" not in value:
        raise ManifestError(f"{where}: keep: missing")
    width: Width | None = None
    if "width" in value:
        from shardxform.ask.width import Width  # most keep all channels

        width = Width.from_dict(value["width"], f"{where}: width")
        sort = False  # its bitmaps are in the order of the ids
    return cls(
        keep=read_layers(value["keep"], f"{where}: keep", sort=sort),
        mtp_keep=read_layers(value.get("mtp_keep", {}), f"{where}: mtp_keep", sort=sort),
        model=value.get("model", {}),
        criterion=value.get("criterion", ""),
        ratio=value.get("ratio"),
        provenance=value.get("provenance", {}),
        width=width,
        where=where,
    )


def _layers(layers: Mapping[int, object], place: str) -> dict[int, tuple[int, ...]]:
    for layer in layers:
        if type(layer) is not int or layer < 0:
            raise ManifestError(f"{place}: expected layer numbers, found {show(layer)}")
    return {layer: read_ids(layers[layer], f'{place}["{layer}"]') for layer in sorted(layers)}


def _check_facts(manifest: Manifest) -> None:
    """The types of what is said about the model and the choice."""
    where, model, ratio = manifest.where, manifest.model, manifest.ratio
    for key in ("num_layers", "num_experts"):
        count = model.get(key, 1)
        if type(count) is not int or not 1 <= count < MAX_ID:
            raise ManifestError(f"{where}: model.{key}: expected a count, found {show(count)}")
    for name, text in (("model.model_type", model.get("model_type", "")), ("criterion", manifest.criterion)):
        if not isinstance(text, str):
            raise ManifestError(f"{where}: {name}: expected a text, found {show(text)}")
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:  # NaN fails it too
        raise ManifestError(f"{where}: ratio: expected a number from 0 to 1, found {show(ratio)}")


def _check_model(manifest: Manifest, of: Pruned) -> None:
    where, model = manifest.where, manifest.model
    if (name := model.get("model_type")) is not None and not of.is_called(name):
        raise ManifestError(f"{where}: model.model_type: made for {show(name)}, this checkpoint is '{of.model_type}'")
    for key, found, unit in (
        ("num_layers", of.num_layers, "layers"),
        ("num_experts", of.num_experts, "experts per layer"),
    ):
        if (made_for := model.get(key)) is not None and made_for != found:
            raise ManifestError(f"{where}: model.{key}: made for {made_for} {unit}, this checkpoint has {found}")


def _check_layers(place: str, layers: Mapping[int, object], of: Pruned) -> None:
    have = f"the model has experts in layers {_spans(of.moe_layers)}"
    if missing := [layer for layer in of.moe_layers if layer not in layers]:
        raise ManifestError(f"{place}: no entry for layer{'s' * (len(missing) > 1)} {_spans(missing)}; {have}")
    moe = set(of.moe_layers)
    for layer in layers:
        if layer in moe:
            continue
        if layer < of.num_layers:
            raise ManifestError(f'{place}["{layer}"]: layer {layer} is dense, it has no experts; {have}')
        hint = ""
        if of.mtp_follows and layer - of.num_layers < of.mtp_layers:
            hint = f'; the MTP layer of that number belongs in mtp_keep["{layer - of.num_layers}"]'
        raise ManifestError(f'{place}["{layer}"]: there is no layer {layer}; {have}{hint}')


def _check_mtp_layers(place: str, layers: Mapping[int, object], of: Pruned) -> None:
    there = of.mtp_moe_layers
    if not there:
        raise ManifestError(f"{place}: this checkpoint has no MTP layer with experts")
    have = f"the model has experts in MTP layers {_spans(there)}"
    if missing := [layer for layer in there if layer not in layers]:
        raise ManifestError(f"{place}: no entry for MTP layer{'s' * (len(missing) > 1)} {_spans(missing)}; {have}")
    for layer in layers:
        if layer not in there:
            raise ManifestError(f'{place}["{layer}"]: there is no MTP layer {layer}; {have}')


def _check_counts(manifest: Manifest) -> None:
    first = next(iter(manifest.keep))
    for place, label, ids in _entries(manifest):
        if len(ids) != manifest.num_kept:
            raise ManifestError(
                f"{place}: {label} keeps {len(ids)} experts, but layer {first} keeps {manifest.num_kept};"
                " config.json has one expert count for all layers"
            )


def _check_range(manifest: Manifest, num_experts: int) -> None:
    for place, label, ids in _entries(manifest):
        if ids[-1] >= num_experts:  # ascending, so the last is the largest
            at = bisect_left(ids, num_experts)
            raise ManifestError(f"{place}[{at}]: expert {ids[at]}, but {label} has experts 0..{num_experts - 1}")


def _check_groups(manifest: Manifest, of: Pruned) -> None:
    groups, key = of.groups, of.group_key
    size = of.num_experts // groups
    for place, _, ids in _entries(manifest):
        counts = [0] * groups
        for expert in ids:
            counts[expert // size] += 1
        for group, count in enumerate(counts):
            if count != counts[0]:
                span = f"{group * size}..{group * size + size - 1}"
                raise ManifestError(
                    f"{place}: keeps {count} experts of router group {group} ({span}), but {counts[0]} of group 0;"
                    f" each of the {groups} groups ({key}) must keep equally many"
                )
    _check_group_size(manifest, of, manifest.num_kept // groups)


def _check_sets(manifest: Manifest, of: Pruned) -> None:
    """Of every set of experts as many stay, and no fewer than its router picks."""
    size = of.num_experts // len(of.sets)
    spans = ", ".join(f"{at * size}..{(at + 1) * size - 1} {name}" for at, name in enumerate(of.sets))
    for place, label, ids in _entries(manifest):
        counts = [sum(expert // size == at for expert in ids) for at in range(len(of.sets))]
        if len(set(counts)) > 1:
            kept = " and ".join(f"{count} {name}" for count, name in zip(counts, of.sets, strict=True))
            raise ManifestError(
                f"{place}: keeps {kept} experts; {label} has {len(of.sets)} sets of them in one numbering ({spans}),"
                " and config.json one count for all: name as many of each"
            )
        if counts[0] < of.top_k:
            raise ManifestError(
                f"{place}: keeps {counts[0]} experts of each set, but its router picks {of.top_k} per token"
                f" ({of.top_k_key})"
            )


def _check_group_size(manifest: Manifest, of: Pruned, kept: int) -> None:
    place = f"{manifest.where}: keep"
    if kept < 2:  # a group's score is the sum of its two best experts
        raise ManifestError(f"{place}: {kept} expert per router group, but the router needs two to score a group")
    picked = of.top_groups
    if type(picked) is int and of.top_k > picked * kept:
        raise ManifestError(
            f"{place}: {kept} experts per router group, but the router picks {of.top_k} per token"
            f" from {picked} groups ({of.top_group_key}); keep at least {-(-of.top_k // max(picked, 1))} per group"
        )


def _entries(manifest: Manifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Place, name and ids of every layer, decoder blocks first."""
    for key, label, layers in (("keep", "layer", manifest.keep), ("mtp_keep", "MTP layer", manifest.mtp_keep)):
        for layer, ids in layers.items():
            yield f'{manifest.where}: {key}["{layer}"]', f"{label} {layer}", ids


def mtp_moe_layers(layout: Layout) -> tuple[int, ...]:
    """MTP layers with a tensor that counts experts; the config's count says nothing, since tools drop `mtp.*`."""
    return pruned_of(layout).mtp_moe_layers


def _spans(numbers: Iterable[int], limit: int = 8) -> str:
    """Ascending numbers as `0..39` or `3, 7, 9..12`, cut short after `limit` spans."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in islice(spans, limit))
    return (text or "(none)") + (", ..." if len(spans) > limit else "")


# -- as text ------------------------------------------------------------------------------------------------------


_INDENT: Final = "  "


def manifest_text(manifest: Manifest) -> str:
    """The manifest in our own form, keys in the order of `Manifest.to_dict`, with a newline at the end."""
    return _render(manifest.to_dict(), "") + "\n"


def _render(value: object, indent: str) -> str:
    """`value` as JSON whose lines after the first are indented by `indent`."""
    if isinstance(value, Mapping) and value:
        return _block(
            "{}", [f"{_plain(key)}: {_render(item, indent + _INDENT)}" for key, item in value.items()], indent
        )
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return _block("[]", [_render(item, indent + _INDENT) for item in value], indent)
    return _plain(value)


def _block(brackets: str, lines: list[str], indent: str) -> str:
    inner = indent + _INDENT
    return f"{brackets[0]}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{brackets[1]}"


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
