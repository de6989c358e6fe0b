"""A second opinion on a model in GGUF: held against its source by the `gguf` package's own reader and decoder.

Nothing here is shared with what prunes or writes. Of a model in GGUF that was pruned, names tell which tensors count
experts, the package which bytes are an expert's, and the manifest what stays. Of one that was made of safetensors,
`independent` gives the weights, and names come from the package's map; what llama.cpp's converter does to rows and
values is written down here once more, in plain numpy. Files on this machine only; an expert, or a run of rows, is in
memory at a time, and a whole matrix where rows or columns change places.
"""

# O: rows of a weight, I: its columns, R: a run of rows.

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.errors import CheckpointError
from shardxform.runtimes.gguf.architecture import vocabulary
from shardxform.verification.definitions import PackedWeight, floats, nearest_bf16, nearest_half, rounded_to_grid
from shardxform.verification.findings import Findings
from shardxform.verification.gguf_changes import changes
from shardxform.verification.independent import CODE as _CODE
from shardxform.verification.independent import WantedWeights, too_far, wanted_weights
from shardxform.verification.independent_weights import FAULTS, json_object, why

__all__ = ["check_gguf_independently", "check_gguf_of_weights"]

_OF_EXPERTS: Final = re.compile(
    r"blk\.(\d+)\.(?:ffn_(?:gate|up|down|gate_up)_exps\..+|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:_vl)?(?:\..+)?)"
)
_PIECE: Final = 1 << 24  # elements at a time
_SPLIT: Final = "split."

Lists = Mapping[str, Sequence[int]]


def check_gguf_independently(
    files: Sequence[Path], sources: Sequence[Path], findings: Findings, manifest: Mapping[str, Lists] | None = None
) -> int:
    """Hold every tensor and key of a model against its source and a manifest.

    Args:
        files: of the model.
        sources: files of what was pruned.
        findings: added to; problems only.
        manifest: `keep` and `mtp_keep`, lists of ids by layer; None for what shardxform.json beside the files says.

    Returns:
        the number of tensors that were compared.

    Raises:
        CheckpointError: the source cannot be read by the package, or there is no such package.

    """
    reader = vocabulary().GGUFReader
    try:
        theirs = [reader(path) for path in sources]
    except FAULTS as e:
        raise CheckpointError(f"{sources[0]}: the gguf package cannot read it: {why(e)}") from e
    try:
        ours = [reader(path) for path in files]
        kept = manifest or json_object(files[0].parent / "shardxform.json")["inputs"]["manifest"]
        if kept.get("width"):
            raise ValueError("width: channels are not taken out of a GGUF file")
        layers, arch = _layers_of(theirs)
        differing = list(_differing(_tensors(ours), _tensors(theirs), kept, layers))
        differing += _other_keys(_keys(ours), _keys(theirs), arch, kept["keep"])
    except FAULTS as e:
        findings.problem(_CODE, ".", f"cannot be compared: {why(e)}")
        return 0
    for name, text in differing:
        findings.problem(_CODE, name, text)
    return len(_tensors(ours))


def _tensors(readers: Sequence[Any]) -> dict[str, Any]:
    return {tensor.name: tensor for reader in readers for tensor in reader.tensors}


def _keys(readers: Sequence[Any]) -> dict[str, Any]:
    """What all files say, less what the package makes up, and which of several files each is."""
    found = {name: field for reader in readers for name, field in reader.fields.items()}
    return {name: field for name, field in found.items() if not name.startswith(("GGUF.", _SPLIT))}


def _layers_of(readers: Sequence[Any]) -> tuple[int, str]:
    """Blocks that are no nextn, and the architecture."""
    keys = _keys(readers)
    arch = str(keys["general.architecture"].contents())
    nextn = keys.get(f"{arch}.nextn_predict_layers")
    return int(keys[f"{arch}.block_count"].contents()) - (int(nextn.contents()) if nextn else 0), arch


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], kept: Mapping[str, Lists], layers: int
) -> Iterator[tuple[str, str]]:
    """Tensors that are not what they must be, and how."""
    for name in theirs.keys() ^ ours.keys():
        yield name, "missing: the source has it" if name in theirs else "nothing in the source gives it"
    for name in theirs.keys() & ours.keys():
        one, other, match = ours[name], theirs[name], _OF_EXPERTS.fullmatch(name)
        ids: Sequence[int] = range(len(other.data))
        if match:
            number = int(match[1])
            lists = kept["keep"] if number < layers else kept["mtp_keep"]
            ids = lists[str(number if number < layers else number - layers)]
        mine, its = (each.data[0] if match and _in_a_row(each.data) else each.data for each in (one, other))
        found, wanted = list(mine.shape), [len(ids), *its.shape[1:]]
        if (one.tensor_type, found) != (other.tensor_type, wanted):
            yield name, f"{one.tensor_type.name} {found}, expected {other.tensor_type.name} {wanted}"
            continue
        bad = next((new for new, old in enumerate(ids) if not _same(mine[new], its[old])), None)
        if bad is not None:
            yield name, f"{'expert' if match else 'row'} {bad} is not {ids[bad]} of the source"


def _in_a_row(data: NDArray[Any]) -> bool:
    """Whether a value of each expert stands in the one row that there is, as ERNIE's."""
    return data.ndim == 2 and len(data) == 1 and data.shape[1] > 1


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether two arrays hold the same bytes."""
    mine, its = (np.atleast_1d(each).reshape(-1) for each in (one, other))
    parts = (slice(at, at + _PIECE) for at in range(0, max(len(mine), 1), _PIECE))
    return all(mine[part].tobytes() == its[part].tobytes() for part in parts)


def _other_keys(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], arch: str, keep: Lists
) -> Iterator[tuple[str, str]]:
    """Keys that say something else than the source's; the number of experts must be that of the lists."""
    for key in theirs.keys() | ours.keys():
        values = [each[key].contents() if key in each else None for each in (ours, theirs)]
        if key == f"{arch}.expert_count":
            values[1] = len(next(iter(keep.values())))
        if repr(values[0]) != repr(values[1]):
            yield key, f"{str(values[0])[:60]}, expected {str(values[1])[:60]}"


# -- of safetensors ---------------------------------------------------------------------------------------------------


def check_gguf_of_weights(
    files: Sequence[Path],
    source: Path,
    findings: Findings,
    manifest: Mapping[str, object] | None = None,
    **given: object,
) -> int:
    """Hold every tensor of a model in GGUF against the checkpoint in safetensors that it was made of.

    Args:
        files: of the model.
        source: the checkpoint.
        findings: added to; problems only.
        manifest: as in `check_gguf_independently`.
        given: `text_only` and `mtp`, likewise where not None.

    Returns:
        the number of weights that were compared.

    Raises:
        CheckpointError: the source cannot be read, or there is no `gguf` package.

    """
    package, path = vocabulary(), files[0].parent / "shardxform.json"
    try:
        record = json_object(path) if path.exists() else {}
        readers = [package.GGUFReader(each) for each in files]
        wanted = wanted_weights(source, record, manifest, given)
        file = _File.of(readers, package)
        compared = sum(file.compare(name, weight, wanted) for name, weight in wanted.named.items())
        file.problems += file.uncovered()
        file.problems += file.wrong_counts(wanted)
    except FAULTS as e:
        findings.problem(_CODE, ".", f"cannot be compared: {why(e)}")
        return 0
    for name, text in file.problems:
        findings.problem(_CODE, name, text)
    return compared


Values = NDArray[np.float32]

_SPELLED: Final = (
    ("experts.e_score_correction_bias", "gate.e_score_correction.bias"),
    ("e_score_correction_bias", "e_score_correction.bias"),
    ("linear_attn.dt_bias", "linear_attn.dt_proj.bias"),
    ("self_attn.attention_sink_bias", "self_attn.sinks.weight"),
    ("self_attn.sinks", "self_attn.sinks.weight"),
    ("layer_scalar", "layer_scalar.weight"),
    ("mixer.dt_bias", "mixer.dt.bias"),
    ("mamba.dt_bias", "mamba.dt_proj.bias"),
    ("self_attn.dt_bias", "self_attn.dt_proj.bias"),
)
"""Last parts of names, and how the package's map has them."""

_MTP_NAMES: Final = {
    "mtp.fc.weight": "eh_proj.weight",
    "mtp.norm.weight": "shared_head.norm.weight",
    "mtp.pre_fc_norm_embedding.weight": "enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "hnorm.weight",
}
_EXPERT: Final = re.compile(
    r"(?:model|backbone)\.layers\.(\d+)\.(?:\w+\.)?experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)(?:\.([01]))?\.(weight|bias)"
)
_PARTS: Final = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_OWN: Final = {
    "router.per_expert_scale": "ffn_down_exps.scale",
    "router.scale": "ffn_gate_inp.scale",
    "self_attn.g_proj.weight": "attn_gate.weight",
}
"""Last parts of names that the package's map has not, and what they are called."""
_LAYER: Final = re.compile(r"(?:model|backbone)\.layers\.(\d+)\.")
_NO_WEIGHTS: Final = (
    *("mm_projector.", "model.embed_vision.", "model.vision_tower.", "model.visual.", "multi_modal_projector."),
    *("audio_tower.", "code2wav.", "talker.", "vision_model.", "vision_tower.", "visual."),
)
_CHANNELS: Final = ("expert_feed_forward_length", "feed_forward_length")  # of experts: the first that is there
_MADE: Final = ("rope_freqs.weight",)  # of nothing that is stored
_FAR: Final = {"Q4_0": 0.16, "Q4_1": 0.14, "Q5_0": 0.08, "Q5_1": 0.07, "Q8_0": 0.02, "Q4_K": 0.14, "Q5_K": 0.07}
_FARTHER: Final = {"Q6_K": 0.04, "IQ4_NL": 0.15, "MXFP4": 0.2}
_FARTHEST: Final = {**_FAR, **_FARTHER}
"""Root mean square of the error that a type may leave, as a part of the weight's, where it is rounded by ggml."""


@dataclass(slots=True)
class _File:
    """A model in GGUF, what of its rows was compared, and what was wrong."""

    arch: str
    tensors: Mapping[str, Any]
    keys: Mapping[str, Any]
    maps: Sequence[Any]
    decode: Callable[[Any, Any], Values]
    done: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, readers: Sequence[Any], package: Any) -> _File:  # noqa: ANN401
        """See what readers hold of one model."""
        keys = _keys(readers)
        arch = str(keys["general.architecture"].contents())
        blocks = int(keys[f"{arch}.block_count"].contents())
        of, known = package.MODEL_ARCH, {name: kind for kind, name in package.MODEL_ARCH_NAMES.items()}
        kinds = (known.get(arch, of.DEEPSEEK2), of.GLM_DSA, of.GLM4_MOE)  # the first where the package lags behind
        maps = [package.get_tensor_name_map(each, blocks) for each in kinds]
        return cls(arch, _tensors(readers), keys, maps, package.quants.dequantize)

    def counts(self, key: str) -> int:
        """A count of the architecture's; 0 where there is none."""
        found = self.keys.get(f"{self.arch}.{key}")
        return int(found.contents()) if found else 0

    def wrong_counts(self, wanted: WantedWeights) -> Iterator[tuple[str, str]]:
        """Numbers of experts, and of their channels, that are not those of what stays."""
        if self.counts("expert_count") != wanted.experts:
            yield f"{self.arch}.expert_count", f"{self.counts('expert_count')}, but {wanted.experts} stay"
        key = next((key for key in _CHANNELS if f"{self.arch}.{key}" in self.keys), _CHANNELS[0])
        if wanted.channels is not None and self.counts(key) != wanted.channels:
            yield f"{self.arch}.{key}", f"{self.counts(key)}, but experts keep {wanted.channels} channels"

    @property
    def layers(self) -> int:
        """Decoder blocks that are no nextn."""
        return self.counts("block_count") - self.counts("nextn_predict_layers")

    # -- places -------------------------------------------------------------------------------------------------------

    def compare(self, stored: str, weight: PackedWeight, wanted: WantedWeights) -> bool:
        """Hold a weight against what the file has of it; tell whether it has a place there."""
        name = self._released(stored, wanted.config)
        if not name:
            return False
        if match := _EXPERT.fullmatch(name):
            self._expert(match, weight, wanted)
            return True
        for part, change in changes(self.arch, name, _text(wanted.config)):
            place = self._place(part)
            if place not in self.tensors and f"{place}.bias" in self.tensors:  # as some architectures call it
                place = f"{place}.bias"
            if place is None or place not in self.tensors:
                self.problems.append((place or part, f"missing: the source's {weight.name} gives it"))
                continue
            self._rows(place, self.done.get(place, 0), weight, change, wanted)
        return True

    def _released(self, name: str, config: Mapping[str, Any]) -> str:
        """A name as releases of the text model have it; nothing for what a file has no place for."""
        for before, after in (("model.language_model.", "model."), ("language_model.model.", "model.")):
            name = f"{after}{name.removeprefix(before)}" if name.startswith(before) else name
        name = name.removeprefix("language_model.").removeprefix("thinker.")
        if name.startswith(_NO_WEIGHTS) or name.endswith("inv_freq"):
            return ""
        if name.startswith("mtp.") and not self.counts("nextn_predict_layers"):
            return ""
        if name.startswith("mtp."):
            name = name.replace("mtp.layers.0.", f"model.layers.{self.layers}.")
            name = f"model.layers.{self.layers}.{_MTP_NAMES[name]}" if name in _MTP_NAMES else name
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= self.counts("block_count"):
            return ""  # MTP layers, which are left out
        tied = bool(config.get("tie_word_embeddings", _text(config).get("tie_word_embeddings")))
        return "" if name == "lm_head.weight" and tied and "output.weight" not in self.tensors else name

    def _place(self, name: str) -> str | None:
        """What the package's maps call a tensor."""
        for ending, spelled in _SPELLED:
            name = name.removesuffix(ending) + spelled if name.endswith(ending) else name
        for ending, own in _OWN.items():
            if name.endswith(ending):
                return f"{name.removesuffix(ending).replace('model.layers.', 'blk.')}{own}"
        if name.startswith("blk."):
            return name
        return next(filter(None, (each.get_name(name, (".weight", ".bias", ".scale")) for each in self.maps)), None)

    def _expert(self, match: re.Match[str], weight: PackedWeight, wanted: WantedWeights) -> None:
        """Rows of an expert in the stack of all."""
        block, expert, projection, half, last = match.groups()
        part, count = _PARTS[projection], weight.shape[0]
        place, share, first = f"blk.{block}.ffn_{part}_exps.{last}", count, 0
        if part != "down" and (both := f"blk.{block}.ffn_gate_up_exps.{last}") in self.tensors:
            place, share, first = both, 2 * count, count * (part == "up")
        if place not in self.tensors:
            self.problems.append((place, f"missing: the source's {weight.name} gives it"))
            return
        if half is not None:
            tensor = self.tensors[place]
            share = int(tensor.shape[1 if last == "weight" else 0])
            first = share - count if half == "1" else 0
        self._rows(place, int(expert) * share + first, weight, None, wanted)

    # -- values -------------------------------------------------------------------------------------------------------

    def _rows(
        self,
        place: str,
        first: int,
        weight: PackedWeight,
        change: Callable[[Values], Values] | None,
        wanted: WantedWeights,
    ) -> None:
        """Compare rows from `first` on of a tensor: run by run, or all where they change places."""
        tensor, seen = self.tensors[place], _Seen(weight, wanted)
        for start, stop in weight.runs() if change is None else ((0, weight.size[0]),):
            exact = seen.rounded(tensor.tensor_type.name, start, stop)
            values = weight.values(start, stop) if exact is None else exact
            expected = values if change is None else change(values)
            rows = _rows_of(tensor, expected.shape[1])
            data = rows[first : first + len(expected)]
            if len(data) < len(expected):
                self.problems.append((place, f"{len(rows)} rows, too few for the source's {weight.name}"))
                return
            found = np.asarray(self.decode(data, tensor.tensor_type), np.float32).reshape(expected.shape)
            seen.add(tensor.tensor_type.name, data, found, expected, rounded=exact is not None)
            first += len(expected)
            self.done[place] = self.done.get(place, 0) + len(expected)
        if text := seen.text():
            self.problems.append((place, f"{text}, of the source's {weight.name}"))

    def uncovered(self) -> list[tuple[str, str]]:
        """Tensors with rows that no weight of the source gives."""
        out = []
        for name, tensor in self.tensors.items():
            done, rows = self.done.get(name, 0), int(np.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else 1
            if name not in _MADE and done not in (rows, int(np.prod(tensor.shape))):
                out.append((name, f"the source gives {done} of its {rows} rows"))
        return out


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _rows_of(tensor: Any, columns: int) -> NDArray[Any]:  # noqa: ANN401
    """Its data, row by row; each value by itself where the weight is a vector."""
    data = np.asarray(tensor.data)
    if columns == 1 and data.dtype in (np.float32, np.float16):
        return data.reshape(-1, 1)
    return data.reshape(-1, data.shape[-1])


@dataclass(slots=True)
class _Seen:
    """What rows of one weight showed."""

    weight: PackedWeight
    wanted: WantedWeights
    square: float = 0.0
    energy: float = 0.0
    bad: int = 0
    first: str = ""
    bound: float = 0.0

    def rounded(self, kind: str, start: int, stop: int) -> Values | None:
        """Values that rounding to nearest gives, where the record says that weights were rounded so."""
        if kind not in ("Q4_0", "Q8_0") or self.wanted.exact is None or self.weight.moved:
            return None
        if self.wanted.stays(self.weight):
            return None
        codes, scale = rounded_to_grid(self.weight.values(start, stop), self.wanted.exact)
        return np.asarray(codes.astype(np.float32) * scale)

    def add(self, kind: str, data: NDArray[Any], found: Values, expected: Values, *, rounded: bool) -> None:
        """Compare rows: to the bit where these follow from the source, else by how far they may be."""
        self.square += float(np.square(found.astype(np.float64) - expected).sum())
        self.energy += float(np.square(expected, dtype=np.float64).sum())
        if self.weight.moved:
            return
        if rounded or self.wanted.stays(self.weight) or kind in ("F32", "F16", "BF16"):
            self._note(~np.isclose(found, _as(kind, expected), rtol=1e-6 if kind == "F32" else 0, atol=0))
        elif self.wanted.offset and kind in ("Q4_0", "Q8_0"):
            end, scale = (8 if kind == "Q4_0" else 128), _scales(data, kind)
            steps = np.where(scale == 0, np.float32(1), scale)
            off = found / steps - np.clip(expected / steps, -end, end - 1)
            self._note(~(np.abs(off) <= 0.5 + self.wanted.offset + end * 2.0**-22))
        else:
            self.bound = _FARTHEST.get(kind, 1.0)

    def _note(self, wrong: NDArray[np.bool_]) -> None:
        if wrong.any() and not self.first:
            row, column = np.argwhere(wrong)[0]
            self.first = f"the first at row {row} of a run, column {column}"
        self.bad += int(wrong.sum())

    def text(self) -> str:
        """Say what is wrong; empty where nothing is."""
        if self.bad:
            return f"{self.bad} values are not what they must be, {self.first}"
        if self.weight.moved:
            return too_far(self.weight, self.square**0.5, self.energy**0.5)
        distance = (self.square / self.energy) ** 0.5 if self.energy else self.square
        if not self.bound or distance < self.bound:  # which a distance that is no number is not
            return ""
        return f"its distance is {distance:.2f} times the size, expected below {self.bound}"


def _scales(data: NDArray[Any], kind: str) -> Values:
    """The scale of every value of rows of blocks: a float16 before the codes of 32."""
    blocks = data.reshape(len(data), -1, 18 if kind == "Q4_0" else 34)
    bits = np.ascontiguousarray(blocks[..., :2]).view("<u2")[..., 0]
    return np.repeat(floats(bits, "F16"), 32, axis=1)


def _as(kind: str, values: Values) -> Values:
    """Values in a type."""
    if kind == "BF16":
        return floats(nearest_bf16(values), "BF16")
    return floats(nearest_half(values), "F16") if kind == "F16" else values
