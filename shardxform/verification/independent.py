"""A second opinion: what an output must hold, derived again from source and manifest, and held against what it holds.

The other comparisons ask the code that planned the output what must be in it, and share its mistakes. Nothing here
does: headers are read, experts renumbered, halves cut, integers unpacked and weights rounded in plain numpy, from the
formats' definitions. It knows what the families call experts, routers and MTP layers, and four formats (auto-round and
gptq, compressed-tensors' pack-quantized, MLX's affine of symmetric weights), reads local files only, and takes a run of
rows of one tensor into memory.

Every checkpoint is seen as its weights one by one: fused experts as a gate, an up and a down projection for each
expert, quantized ones as the weights that they stand for. Names are those that the output must have.
"""

# O: rows of a weight, I: its columns, G: groups of a row, R: a run of rows.

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.errors import CheckpointError
from shardxform.verification.definitions import (
    Beside,
    Experts,
    Moved,
    PackedWeight,
    nearest_bf16,
    nearest_half,
    rounded_to_grid,
)
from shardxform.verification.findings import Findings
from shardxform.verification.independent_channels import Channels
from shardxform.verification.independent_weights import (
    ACROSS,
    EXPERT,
    FAULTS,
    HOME,
    are_values,
    in_quarters,
    json_object,
    weights_apart,
    why,
)

__all__ = ["CODE", "WantedWeights", "check_independently", "too_far", "wanted_weights"]

CODE: Final = "independent"
"""Of every problem found here."""

_ROUTER: Final = re.compile(
    rf".*\.{HOME}\.(?:(?:(?:gate|router|experts)\.)?(?:e_score_correction_bias|expert_bias|router_bias)"
    r"|(?:gate|router)\.(?:(?:layer\.|proj\.|gate\.|wg\.|classifier\.)?(?:weight|bias)|per_expert_scale))"
)
_OF_SET: Final = re.compile(r".*\.mlp\.gate\.weight(_1)?")  # [H, E], of the first set of experts and of the second
_SETS: Final = {"ernie4_5_moe_vl": 2, "ernie4_5_vl_moe": 2}
"""Types whose experts are in several sets, one numbered after the other; configs count those of one."""
_SEVERAL: Final = re.compile(r".*\.ffn\.experts\.mlp\.(?:w1|v1|w2)")  # [E * I, H]
_IDS: Final = re.compile(r".*\.ffn\.gate\.tid2eid")
_LAYER: Final = re.compile(
    r"(mtp\.|model\.mtp\.|(?:thinker\.)?model\.(?:language_model\.)?|language_model\.model\.(?:mtp\.)?"
    r"|transformer\.|backbone\.|)(?:layers\.|blocks\.|(?<=^mtp\.))(\d+)\."
)
_MTP: Final = ("mtp.", "model.mtp.", "model.mtp_", "language_model.model.mtp.")
_OF_TEXT: Final = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""What names begin with in multimodal checkpoints, and in those of the text alone."""
_VISION: Final = (
    "model.visual.",
    "model.vision_tower.",
    "model.embed_vision.",
    "vision_model.",
    "vision_tower.",
    "mm_projector.",
    "multi_modal_projector.",
    "patch_merge_mlp.",
)
_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MTP_COUNTS: Final = ("mtp_num_hidden_layers", "num_mtp_modules", "num_nextn_predict_layers")
_IN_TURNS: Final = ("gpt_oss",)  # types in whose stacks rows of gate and up projection take turns
_FEWEST_STEPS: Final = 50  # of tuning, where nobody says
_LARGEST_STEP: Final = 0.16  # of healing, where none was asked for
_LAST: Final = ("down_proj", "w2")  # projections that have a root mean square of their own in healing


def check_independently(
    out: Path, source: Path, findings: Findings, manifest: Mapping[str, object] | None = None, **given: object
) -> int:
    """Hold every tensor of `out` against what `source` and the manifest give.

    Args:
        out: an output.
        source: what it was made from.
        findings: added to; problems only, under `CODE`.
        manifest: with `keep` and `mtp_keep`, lists of ids by layer; None for what shardxform.json of `out` says.
        given: `text_only` and `mtp`, likewise where not None.

    Returns:
        the number of weights that were compared.

    Raises:
        CheckpointError: the source cannot be read.

    """
    decode = are_values(source, out)
    try:
        theirs, config = weights_apart(source, decode=decode)
    except FAULTS as e:
        raise CheckpointError(f"{source}: the independent check cannot read it: {why(e)}") from e
    try:
        ours, made = weights_apart(out, decode=decode)
        record = json_object(out / "shardxform.json") if (out / "shardxform.json").exists() else {}
        if (made.get("quantization") and not config.get("quantization")) or _was_of_mlx(record):
            given = {**given, "mtp": "drop"}  # which MLX has no use for
        if config.get("model_type") in _IN_TURNS and bool(config.get("quantization")) != bool(made.get("quantization")):
            theirs, ours = (dict(in_quarters(of, told)) for of, told in ((theirs, config), (ours, made)))
        how = _How.of(config, record, manifest, given, theirs, direct=_is_made_of(record, source))
        wanted = dict(how.wanted(theirs))
    except FAULTS as e:
        findings.problem(CODE, ".", f"cannot be derived: {why(e)}")
        return 0
    _check_names(wanted, ours, findings)
    try:
        _check_counts(how, made, any(map(how.is_mtp, theirs)), findings)
        for text in how.channels.wrong_counts(_text_of(config), _text_of(made), theirs) if how.channels else ():
            findings.problem(CODE, "config.json", text)
    except FAULTS as e:
        findings.problem(CODE, "config.json", f"cannot be compared: {why(e)}")
    both = [name for name in wanted if name in ours]
    for name in both:
        if text := how.difference(wanted[name], ours[name]):
            findings.problem(CODE, ours[name].name, f"{'' if ours[name].name == name else f'{name}: '}{text}")
    return len(both)


@dataclass(frozen=True, slots=True)
class WantedWeights:
    """What an output must hold of its source, weight by weight, whatever its container.

    Attributes:
        named: by names of one by one, experts under the numbers that they have in the output; where rows of gate and
            up projection take turns in a stack, `gate_proj.0` is what its upper half has of gate.
        config: of the source.
        experts: how many there are in a layer of the output.
        exact: grid that weights were rounded to nearest on, without a search; None where that is not known.
        offset: most that was added to a weight, in steps, before it was rounded.
        channels: that experts keep; None where they keep all.
        still: bits of integers that stay as they are; 0 where none do, None where all do.

    """

    named: Mapping[str, PackedWeight]
    config: Mapping[str, Any]
    experts: int
    exact: Mapping[str, Any] | None
    offset: float
    channels: int | None = None
    still: int | None = None

    def stays(self, weight: PackedWeight) -> bool:
        """Whether a weight of the source is of integers, and every one of them is in the output."""
        return weight.scales is not None and self.still in (None, weight.bits)


def wanted_weights(
    source: Path, record: Mapping[str, Any], manifest: Mapping[str, object] | None, given: Mapping[str, object]
) -> WantedWeights:
    """Derive what an output must hold.

    Args:
        source: a checkpoint.
        record: shardxform.json of the output, or empty.
        manifest: as in `check_independently`.
        given: likewise.

    Raises:
        CheckpointError: the source cannot be read.
        ValueError, KeyError, TypeError, AttributeError: what was asked for makes no sense, or is not derived here.

    """
    try:
        theirs, config = weights_apart(source, decode=True)
        if config.get("model_type") in _IN_TURNS:
            theirs = dict(in_quarters(theirs, config))
    except FAULTS as e:
        raise CheckpointError(f"{source}: the independent check cannot read it: {why(e)}") from e
    if _was_of_mlx(record):
        given = {**given, "mtp": "drop"}
    how = _How.of(config, record, manifest, given, theirs, direct=_is_made_of(record, source))
    kept = len(next(iter(how.keep.values()))) if how.keep else how.experts
    channels = how.channels.count if how.channels else None
    inputs = record.get("inputs", {})
    grid = ((inputs.get("scheme") or {}).get("grid") or {}) if how.quantizes else {}
    rounds = how.requantizes or ((inputs.get("options") or {}).get("gguf") or {}).get("kind")
    still = 0 if rounds else grid.get("bits")
    return WantedWeights(dict(how.wanted(theirs)), config, kept, how.exact, how.offset, channels, still)


# -- names and numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _How:
    """How the output was made.

    Attributes:
        keep, mtp_keep: ids kept by layer; None where all are.
        experts, sets: in a layer of the source, all of them; and how many sets they are in.
        layers: decoder blocks; a block of a higher number is an MTP layer.
        mtp_blocks: blocks of an MTP layer.
        text_only, drops_mtp: whether the vision tower, and the MTP layers, are left out.
        exact: grid of our record, where weights were rounded to nearest without a search; else None.
        offset: most that was added to a weight, in steps, before it was rounded.
        heals: how far weights were healed; None where they were not.
        dequantized: whether weights were quantized, and then written in 16 bits.
        quantizes, requantizes: whether `quantize` wrote it; whether it rounded again integers of the same grid.
        channels: that experts keep; None where they keep all.

    """

    keep: Mapping[str, list[int]] | None
    mtp_keep: Mapping[str, list[int]]
    experts: int
    sets: int
    layers: int
    mtp_blocks: int
    text_only: bool
    drops_mtp: bool
    exact: Mapping[str, Any] | None
    offset: float
    heals: _Heals | None
    dequantized: bool
    quantizes: bool = False
    requantizes: bool = False
    channels: Channels | None = None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
        manifest: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        names: Iterable[str] = (),
        *,
        direct: bool = False,
    ) -> _How:
        """Read a record, and what goes before it; `names` are the source's, of which OUT was made if `direct`."""
        inputs = record.get("inputs", {})
        converted = inputs.get("command") == "convert"
        if converted:
            inputs = {} if direct or "quantization_config" in config else _before(inputs)
        manifest, options = manifest or inputs.get("manifest") or {}, inputs.get("options", {})
        scheme, recipe = inputs.get("scheme") or {}, inputs.get("recipe") or {}
        channels = Channels.read(manifest)
        if channels and config.get("model_type") in _IN_TURNS:
            raise ValueError(
                f"width: rows of gate and up projection take turns in {config['model_type']}, which is not derived"
            )
        keep, text = manifest.get("keep"), _text_of(config)
        sets = _SETS.get(str(config.get("model_type")), 1)
        experts = next(_counts_of(config))[1] * sets
        prunes = keep is not None and any(len(ids) < experts for ids in keep.values())
        text_only, mtp = given.get("text_only"), given.get("mtp") or options.get("mtp", "auto")
        how = cls(
            keep=keep if prunes else None,
            mtp_keep=manifest.get("mtp_keep") or {},
            experts=experts,
            sets=sets,
            layers=len(text.get("layers_block_type") or text.get("hybrid_override_pattern") or "")
            or next(text[key] for key in ("num_hidden_layers", "num_layers", "n_layers") if key in text),
            mtp_blocks=len(text.get("mtp_hybrid_override_pattern") or text.get("mtp_layers_block_type") or "1"),
            text_only=bool(options.get("text_only") if text_only is None else text_only),
            drops_mtp=mtp == "drop"
            or (mtp == "auto" and (prunes or channels is not None) and not manifest.get("mtp_keep")),
            exact=_grid_of(scheme) if scheme.get("method") == "rtn" else None,
            offset=_offset(recipe) if scheme.get("method") != "rtn" else 0.0,
            heals=_Heals.of(recipe.get("heal"), record.get("facts") if not converted else None),
            dequantized=converted and not direct and "quantization_config" not in config,
            quantizes=inputs.get("command") == "quantize",
            requantizes=bool(scheme.get("requantize")),
            channels=channels,
        )
        # MTP layers without experts of their own have nothing to lose.
        bound = any(how.is_mtp(name) and (EXPERT.fullmatch(name) or _ROUTER.fullmatch(name)) for name in names)
        return how if bound or mtp == "drop" else replace(how, drops_mtp=False)

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor is of an MTP layer."""
        layer = _LAYER.match(name)
        return name.startswith(_MTP) or bool(layer and layer[1] not in _MTP and int(layer[2]) >= self.layers)

    def wanted(self, weights: Mapping[str, PackedWeight]) -> Iterator[tuple[str, PackedWeight]]:
        """What the output must hold, by its names there."""
        weights = self._narrowed(weights) if self.channels else weights
        moved = self.heals.moved({n: w for n, w in weights.items() if not self.is_mtp(n)}) if self.heals else {}
        for name, weight in weights.items():
            layer, mtp = _LAYER.match(name), self.is_mtp(name)
            if (mtp and self.drops_mtp) or (self.text_only and name.startswith(_VISION)):
                continue
            if new := self._renumbered(name, replace(weight, moved=moved.get(name)), self._ids(layer, mtp)):
                yield self._renamed(new[0]), new[1]

    def _narrowed(self, weights: Mapping[str, PackedWeight]) -> dict[str, PackedWeight]:
        """The same with the channels that stay, of experts that do."""
        assert self.channels is not None
        out, cut = dict(weights), 0
        for name, weight in weights.items():
            match, layer, mtp = EXPERT.fullmatch(name), _LAYER.match(name), self.is_mtp(name)
            if match is None or layer is None or (mtp and self.drops_mtp):
                continue
            old, ids = int(match[2]), self._ids(layer, mtp)
            if ids is None or old in ids:
                new = old if ids is None else ids.index(old)
                out[name] = self.channels.cut(match[3], weight, self._number(layer, mtp), new, mtp=mtp)
                cut += 1
        if not cut:
            raise ValueError("width: the source has no experts one by one whose channels could be taken out")
        return out

    def _number(self, layer: re.Match[str], mtp: bool) -> str:
        """What a manifest calls a layer."""
        if not mtp:
            return layer[2]
        return str((int(layer[2]) - (self.layers if layer[1] not in _MTP else 0)) // self.mtp_blocks)

    def _ids(self, layer: re.Match[str] | None, mtp: bool) -> list[int] | None:
        """Ids kept in a layer; None where all are."""
        if layer is None or self.keep is None:
            return None
        return (self.mtp_keep if mtp else self.keep).get(self._number(layer, mtp))

    def _renumbered(self, name: str, weight: PackedWeight, ids: list[int] | None) -> tuple[str, PackedWeight] | None:
        """A weight under its number in the output, or what stays of a router; None of an expert that goes."""
        if ids is None:
            return name, weight
        if match := EXPERT.fullmatch(name):
            old = int(match[2])
            return (f"{match[1]}.{ids.index(old)}.{match[3]}", weight) if old in ids else None
        if self.sets > 1 and (match := _OF_SET.fullmatch(name)):
            first = self.experts // self.sets if match[1] else 0
            own = tuple(old - first for old in ids if first <= old < first + self.experts // self.sets)
            return name, replace(weight, shape=(weight.shape[0], len(own)), columns=own)
        if _IDS.fullmatch(name):
            return name, replace(weight, ids=tuple(ids))
        if not (_ROUTER.fullmatch(name) or ACROSS.fullmatch(name) or _SEVERAL.fullmatch(name)):
            return name, weight
        each = weight.shape[0] // self.experts if _SEVERAL.fullmatch(name) else 1
        others = (self.experts * each, weight.shape[0] - self.experts * each)  # of no expert: they stay
        rows = (*((old * each, each) for old in ids), *([others] if others[1] else []))
        return name, replace(weight, shape=(sum(number for _, number in rows), *weight.shape[1:]), rows=rows)

    def _renamed(self, name: str) -> str:
        for old, new in _OF_TEXT if self.text_only else ():
            if name.startswith(old):
                return f"{new}{name.removeprefix(old)}"
        return name

    # -- values ---------------------------------------------------------------------------------------------------

    def difference(self, wanted: PackedWeight, found: PackedWeight) -> str:
        """Say how a weight is not what it must be; empty where it is."""
        if wanted.shape != found.shape:
            return f"shape {list(found.shape)}, expected {list(wanted.shape)}"
        try:
            if wanted.moved:
                return _unlike(wanted, found)
            if wanted.scales and found.scales and not self._is_anew(wanted, found):
                return _same_codes(wanted, found)
            if found.scales:
                return self._rounding(wanted, found)
            if wanted.decoded and found.tensor.dtype in ("BF16", "F16"):
                nearest = nearest_bf16 if found.tensor.dtype == "BF16" else nearest_half
                pairs = ((found.bits_of(a, b), nearest(wanted.values(a, b)), a) for a, b in found.runs())
                return _first(found, pairs)
            if not wanted.scales and wanted.tensor.dtype != found.tensor.dtype and not self.dequantized:
                return f"{found.tensor.dtype}, expected {wanted.tensor.dtype}"
            return self._plain(wanted, found)
        except FAULTS as e:
            return f"cannot be compared: {why(e)}"

    def _is_anew(self, wanted: PackedWeight, found: PackedWeight) -> bool:
        """Whether integers of the source were rounded to others."""
        grids = (wanted.bits, wanted.group), (found.bits, found.group)
        return self.requantizes or (self.quantizes and grids[0] != grids[1])

    def _plain(self, wanted: PackedWeight, found: PackedWeight) -> str:
        """The same bits, or where the source's weights are quantized or were on the way, those of their values."""
        if wanted.scales is None and wanted.tensor.dtype == found.tensor.dtype:
            text = _first(found, ((found.bits_of(a, b), wanted.bits_of(a, b), a) for a, b in found.runs()))
            if not text or not self.dequantized:
                return text
        if wanted.scales is None and self.exact is None:
            return _unlike(wanted, found)
        half = found.tensor.dtype == "F16"
        return _first(found, ((found.bits_of(a, b), self._dequantized(wanted, a, b, half), a) for a, b in found.runs()))

    def _dequantized(self, weight: PackedWeight, start: int, stop: int, half: bool) -> NDArray[Any]:
        if weight.scales is None:
            assert self.exact is not None
            codes, scale = rounded_to_grid(weight.values(start, stop), self.exact)
        else:
            codes, scale = weight.codes(start, stop)
        values = codes.astype(np.float32) * scale
        return nearest_half(values) if half else nearest_bf16(values)

    def _rounding(self, wanted: PackedWeight, found: PackedWeight) -> str:
        """Rounded to nearest as the record says, or by no more than offsets allow, and to no side."""
        signed, weights = 0.0, 0
        for start, stop in found.runs():
            values, (codes, scale) = wanted.values(start, stop), found.codes(start, stop)
            if self.exact is not None:
                right, expected = rounded_to_grid(values, self.exact)
                if text := _first(found, [(codes, right, start)]) or _first(found, [(scale, expected, start)], "scale"):
                    return text
                continue
            end = 2 ** (found.bits - 1)
            off = codes - np.clip(values / np.where(scale == 0, np.float32(1), scale), -end, end - 1)
            most = 0.5 + self.offset + 2.0 ** (found.bits - 23)
            if (bad := ~(np.abs(off) <= most)).any():
                row, column = np.argwhere(bad)[0]
                what = f"row {start + row}, column {column}: code {codes[row, column]} is {off[row, column]:+.2f} steps"
                return f"{int(bad.sum())} codes are no rounding, {what} from the weight, expected at most {most:.2f}"
            beyond = (np.abs(off) > 1.001).mean(axis=1)
            if beyond.max() > (most := self._most_beyond(found.size[1])):
                row = int(beyond.argmax())
                text = f"row {start + row}: {beyond[row]:.2f} of its codes are more than a step off"
                return f"{text}, expected at most {most:.2f}"
            signed += float(off.sum())
            weights += off.size
        mean, most = signed / max(weights, 1), 0.25 + 4 / max(found.size[0], 1) ** 0.5
        return f"mean signed error {mean:+.3f} codes, expected at most {most:.3f}" if abs(mean) > most else ""

    def _most_beyond(self, columns: int) -> float:
        """Share of a row's codes that may be more than a step off: half of what codes off by one give, or chance's.

        Offsets at their limit V take a code so far with a probability of V - 1/2. After few steps, in a short row,
        eight standard deviations of that are more than the half.
        """
        share = max(self.offset - 0.5, 0.0)
        return max(share / 2 + 0.25, share + 8 * math.sqrt(share * (1 - share) / max(columns, 1)))


def _is_made_of(record: Mapping[str, Any], source: Path) -> bool:
    """Whether a record names a source itself, by the heads of its files, and no other that it came from."""
    told = record.get("inputs", {}).get("source", {}).get("shards") or {}
    for name, (nbytes, digest, *_) in told.items():
        path = source / Path(name).name
        if not path.is_file() or path.stat().st_size != nbytes:
            return False
        with path.open("rb") as file:
            length = file.read(8)
            head = length + file.read(min(int.from_bytes(length, "little"), nbytes, 100_000_000))
        if hashlib.sha256(head).hexdigest() != digest:
            return False
    return bool(told)


def _was_of_mlx(record: Mapping[str, Any]) -> bool:
    """Whether what an output was made from had been written for MLX."""
    steps = record.get("inputs", {}).get("history", {}).get("steps", ())
    return any("mlx" in ((step.get(key) or {}).get("format") for key in ("scheme", "target")) for step in steps)


def _before(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inputs of the step that made what was converted; empty where the record does not tell."""
    steps = inputs.get("history", {}).get("steps", ())
    made = [step for step in steps if step.get("command") != "convert"]
    return inputs.get("origin") or (made[-1] if made else {})


@dataclass(frozen=True, slots=True)
class _Heals:
    """How far blocks were healed.

    Attributes:
        reach: by block, as the record has it.
        most: of a block that the record does not tell of.
        merges: whether experts may have been merged into those that stay.

    """

    reach: Mapping[int, float]
    most: float
    merges: bool

    @classmethod
    def of(cls, heal: Mapping[str, Any] | None, facts: Mapping[str, Any] | None) -> _Heals | None:
        """Read how blocks were to be healed, and what became of them."""
        if not heal:
            return None
        usual = max([int(heal.get("iters") or 0), *(heal.get("schedule") or ())])
        most = math.inf if heal.get("seconds") else _reach(heal.get("lr") or _LARGEST_STEP, usual)
        told = {block["layer"]: block["healed"] for block in (facts or {}).get("blocks", ()) if "healed" in block}
        reach = {int(layer): _reach(each["lr"], int(each.get("iters", usual))) for layer, each in told.items()}
        return cls(reach, most, bool(heal.get("merge")))

    def moved(self, weights: Mapping[str, PackedWeight]) -> dict[str, Moved]:
        """By name, how far the weights of blocks were moved."""
        groups: dict[tuple[str, bool, str], dict[str, list[PackedWeight]]] = {}
        for name, weight in weights.items():
            if match := EXPERT.fullmatch(name):
                groups.setdefault(_projections(match), {}).setdefault(match[2], []).append(weight)
        beside = {key: {expert: Beside(each) for expert, each in found.items()} for key, found in groups.items()}
        experts = {key: Experts(list(found.values())) if self.merges else None for key, found in beside.items()}
        out = {}
        for name, weight in weights.items():
            if layer := _LAYER.match(name):
                match = EXPERT.fullmatch(name)
                key = _projections(match) if match else None
                own = beside[key][match[2]] if match and key else Beside([weight])
                out[name] = Moved(self.reach.get(int(layer[2]), self.most), own, experts[key] if key else None)
        return out


def _projections(match: re.Match[str]) -> tuple[str, bool, str]:
    """What an expert's weight has one root mean square with: the same block's inner projections, or outer ones."""
    return match[1], match[3].startswith(_LAST), match[3].rpartition(".")[2]


def _reach(first: float, steps: int) -> float:
    """Sum of steps that fall to zero linearly."""
    return float(first) * (steps + 1) / 2 if steps else 0.0


def _offset(recipe: Mapping[str, Any]) -> float:
    """How far tuning can have moved an offset: `iters` steps, the first `lr`, and never as far as one scale."""
    iters = recipe.get("iters") or _FEWEST_STEPS
    return min(1.0, float(recipe.get("lr") or 1 / iters) * (iters + 1) / 2)


def _grid_of(scheme: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The grid of a record, whatever that says; None where scales were searched for."""
    grid = scheme["grid"]
    bits, group = grid["bits"], grid["group_size"]
    if type(bits) is not int or bits not in (4, 8) or type(group) is not int or (group < 1 and group != -1):
        raise ValueError(f"shardxform.json: weights of {bits!r} bits in groups of {group!r}, expected 4 or 8 bits")
    return None if grid["search"] else grid


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the decoder."""
    inner = next((config[home] for home in ("text_config", "thinker_config") if home in config), None)
    return config if inner is None else _text_of(inner)


def _counts_of(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Keys that count the decoder's experts, and what they say."""
    text = _text_of(config)
    for home in (text, text.get("ffn_config") or {}):
        for key in _COUNTS:
            if key in home:
                yield key, home[key][0] if isinstance(home[key], list) else home[key]


def _same_codes(wanted: PackedWeight, found: PackedWeight) -> str:
    if (wanted.bits, wanted.group) != (found.bits, found.group):
        return f"{found.bits} bits in groups of {found.group}, expected {wanted.bits} in {wanted.group}"
    for start, stop in found.runs():
        for one, other, what in zip(
            found.codes(start, stop), wanted.codes(start, stop), ("code", "scale"), strict=True
        ):
            if text := _first(found, [(one, other, start)], what):
                return text
    return ""


def _unlike(wanted: PackedWeight, found: PackedWeight) -> str:
    """Healed, or rounded with tuning and dequantized: it is nearer to the source's than zero is, or than it can be."""
    distance, size = 0.0, 0.0
    for start, stop in found.runs():
        values = wanted.values(start, stop).astype(np.float64)
        codes, scale = found.codes(start, stop) if found.scales else (found.values(start, stop), np.float32(1))
        distance += float(np.square(codes * scale - values).sum())
        size += float(np.square(values).sum())
    return too_far(wanted, distance**0.5, size**0.5)


def too_far(wanted: PackedWeight, distance: float, size: float) -> str:
    """Say that a weight is farther from the source's, of that size, than healing takes it; empty where it is not."""
    if distance < size:
        return ""
    most = wanted.moved.farthest(size) if wanted.moved else size
    if distance < most or not most:
        return ""
    if not size:
        return f"its distance from the source's, which is zero, is {distance:.4g}, expected below {most:.4g}"
    times, most = distance / size, most / size
    return f"its distance from the source's is {times:.2f} times the source's size, expected below {most:.3g}"


def _first(found: PackedWeight, runs: Any, what: str = "") -> str:  # noqa: ANN401
    """Name the first element that is not what it must be; `runs` gives found, wanted and the first row."""
    what = what or ("code" if found.scales else "bits")
    for ours, theirs, start in runs:
        if ours.shape != theirs.shape:
            return f"{what}s of shape {list(ours.shape)}, expected {list(theirs.shape)}"
        if (differing := ours != theirs).any():
            row, column = np.argwhere(differing)[0]
            text = f"row {start + row}, column {column}: {what} {ours[row, column]}, expected {theirs[row, column]}"
            return (
                f"{text}; {int(differing.sum())} of {differing.size} differ in rows {start} to {start + len(ours) - 1}"
            )
    return ""


# -- the whole ----------------------------------------------------------------------------------------------------


def _check_names(wanted: Mapping[str, PackedWeight], found: Mapping[str, PackedWeight], findings: Findings) -> None:
    for name in wanted.keys() - found.keys():
        findings.problem(CODE, name, f"missing: the source's {wanted[name].name} gives it")
    for name in found.keys() - wanted.keys():
        findings.problem(CODE, found[name].name, f"{name}: nothing in the source gives it")


def _check_counts(how: _How, config: Mapping[str, object], had_mtp: bool, findings: Findings) -> None:
    """The config counts the experts, and the MTP layers, that are there."""
    text = _text_of(config)
    kept = {len(ids) for ids in (*(how.keep or {}).values(), *(how.mtp_keep.values() if how.keep else ()))}
    for key, count in _counts_of(config) if how.keep else ():
        if {count * how.sets} != kept:
            findings.problem(CODE, "config.json", f"{key} is {count}, but layers keep {sorted(kept)}")
    for key in _MTP_COUNTS if how.drops_mtp and had_mtp else ():
        if text.get(key):
            findings.problem(CODE, "config.json", f"{key} is {text[key]}, but the MTP layers are left out")
