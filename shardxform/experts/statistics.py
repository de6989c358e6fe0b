"""What calibration data says about every expert: sums over the tokens routed to it, added up, and as a file.

A `Saliency` that exists is well-formed: every layer has all experts, all numbers are finite and not negative, and an
expert that no token reached has zeros. Scores and choices are made of it by `choosing`; nothing here runs a model.

The file is a safetensors file with one JSON record in its metadata: the same bytes for the same content, since its
tensors are in the reference writer's order, and one metadata key, because the reference writer orders several at
random. Reading takes nothing on trust.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.ask.experts import show
from shardxform.base.file_system import write_new
from shardxform.base.strict_json import JsonError, dumps, parse_object
from shardxform.base.tensors import LENGTH_BYTES, Entry, TensorSpec, data_start, decode, layout
from shardxform.checkpoint.identity import Identity
from shardxform.errors import CheckpointError, PlanError

__all__ = [
    "CHANNELS",
    "FIELDS",
    "KEY",
    "VERSION",
    "Arrays",
    "ExpertStats",
    "Saliency",
    "decode_saliency",
    "difference_of_models",
    "encode_saliency",
    "read_saliency",
]

KEY: Final = "shardxform.saliency"
VERSION: Final = 2
_VERSIONS: Final = (1, VERSION)  # what the first wrote is read as well: it knew fewer statistics
MAX_BYTES: Final = 1 << 30  # 100 layers of 512 experts are 2 MB, and a thousand times that with channels
FIELDS: Final = {
    "count": "I64",
    "reap": "F64",
    "ean": "F64",
    "gate": "F64",
    "peak": "F64",
    "square": "F64",
    "energy": "F64",
    "output": "F64",
    "spread": "F64",
}
"""Statistic -> dtype, as the tensors are named; each has shape [E]. A file holds some, of every layer the same."""

CHANNELS: Final = "channels"
"""Name of the one that has a number for every channel, F32 [E, I]."""

_DTYPES: Final = {**FIELDS, CHANNELS: "F32"}

_OF_WEIGHTS: Final = "spread"  # needs no tokens

_NUMPY: Final = {"I64": "<i8", "F64": "<f8", "F32": "<f4"}
_NAME: Final = re.compile(rf"(layers|mtp_layers)\.(0|[1-9][0-9]{{0,5}})\.({'|'.join(_DTYPES)})")
_RECORD: Final = ("version", "model", "tokens", "runs")

Arrays = dict[str, dict[int, dict[str, NDArray[Any]]]]
"""`layers` or `mtp_layers` -> layer -> statistic -> array of E elements."""


def read_saliency(path: str | os.PathLike[str]) -> bytes:
    """Bytes of a file that can be a saliency file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or is larger than any saliency file.

    """
    where = os.fspath(path)
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{where}: expected a saliency file, found something that is no file")
        if info.st_size > MAX_BYTES:
            raise CheckpointError(f"{where}: {info.st_size} bytes; a saliency file has at most {MAX_BYTES}")
        return Path(path).read_bytes()
    except OSError as e:
        raise CheckpointError(f"{where}: {e.strerror or e}") from e


def encode_saliency(arrays: Arrays, record: Mapping[str, object]) -> bytes:
    """The file that holds `arrays` and `record`, whose `version` is added here.

    Raises:
        CheckpointError: the record is not plain JSON.

    """
    tensors = {
        f"{scope}.{layer}.{field}": array
        for scope, layers in arrays.items()
        for layer, stats in layers.items()
        for field, array in stats.items()
    }
    specs = [TensorSpec(name, _DTYPES[name.rsplit(".", 1)[1]], array.shape) for name, array in tensors.items()]
    entries = layout(specs)
    data = [tensors[entry.spec.name].astype(_NUMPY[entry.spec.dtype]).tobytes() for entry in entries]
    return b"".join([_header(entries, {"version": VERSION, **record}), *data])


def _header(entries: Iterable[Entry], record: Mapping[str, object]) -> bytes:
    """`encode` of headers with our record instead of the format of a model's shard."""
    try:
        top: dict[str, Any] = {"__metadata__": {KEY: dumps(record)}}
        for entry in entries:
            spec = entry.spec
            top[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (entry.begin, entry.end)}
        text = dumps(top).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as e:  # NaN, half a surrogate pair, what has no JSON form
        raise CheckpointError(f"saliency: expected runs and model of plain JSON values, found {e}") from e
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def decode_saliency(data: bytes, where: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays (read-only) and record of a file's bytes; `where` is its name for messages.

    Raises:
        CheckpointError: no safetensors file, none of ours, or tensors of other names, dtypes or ranks.

    """
    start = data_start(data[:LENGTH_BYTES], len(data), where)
    text = data[LENGTH_BYTES:start]
    entries = decode(text, len(data) - start, where)
    record = _record(text, where)
    arrays: Arrays = {"layers": {}, "mtp_layers": {}}
    for entry in entries:
        scope, layer, field = _place(entry.spec, where)
        size = math.prod(entry.spec.shape)
        array = np.frombuffer(data, _NUMPY[entry.spec.dtype], size, offset=start + entry.begin)
        arrays[scope].setdefault(layer, {})[field] = array.reshape(entry.spec.shape)
    _check_complete(arrays, where)
    return arrays, record


def _record(text: bytes, where: str) -> dict[str, Any]:
    metadata = parse_object(text).get("__metadata__", {})  # `decode` has found it a map of strings
    if set(metadata) != {KEY}:
        found = show(sorted(metadata)) if metadata else "none"
        raise CheckpointError(f"{where}: not a saliency file: expected the metadata key '{KEY}', found {found}")
    try:
        record = parse_object(metadata[KEY].encode("utf-8"))
    except JsonError as e:
        raise CheckpointError(f"{where}: metadata '{KEY}' is {e}") from e
    version = record.pop("version", None)
    if type(version) is not int or version not in _VERSIONS:
        raise CheckpointError(f"{where}: version: expected one to {VERSION}, found {show(version)}")
    if set(record) != set(_RECORD[1:]):
        raise CheckpointError(f"{where}: expected the record {', '.join(_RECORD)}, found {show(sorted(record))}")
    return record


def _place(spec: TensorSpec, where: str) -> tuple[str, int, str]:
    match = _NAME.fullmatch(spec.name)
    if match is None:
        raise CheckpointError(f"{where}: tensor {show(spec.name)}: expected a name such as 'layers.3.reap'")
    scope, layer, field = match.groups()
    if spec.dtype != _DTYPES[field] or len(spec.shape) != (2 if field == CHANNELS else 1):
        shape = "[experts, channels]" if field == CHANNELS else "[experts]"
        raise CheckpointError(
            f"{where}: tensor '{spec.name}': expected {_DTYPES[field]} {shape}, found {spec.dtype}"
            f" {show(list(spec.shape))}"
        )
    return scope, int(layer), field


def _check_complete(arrays: Arrays, where: str) -> None:
    """Every layer has the statistics that any layer has."""
    every = {field for layers in arrays.values() for stats in layers.values() for field in stats}
    for scope, layers in arrays.items():
        for layer, stats in layers.items():
            if missing := [field for field in _DTYPES if field in every and field not in stats]:
                raise CheckpointError(f"{where}: tensor '{scope}.{layer}.{missing[0]}' is missing")


# -- statistics --------------------------------------------------------------------------------------------------------


_COUNTS: Final = ("num_layers", "num_experts", "num_experts_per_tok", "num_groups")
_TEXTS: Final = ("model_type", "source_fingerprint")
_MAX_COUNT: Final = 10**6  # beyond any number of layers or experts
_MAX_TEXT: Final = 200  # characters
_MAX_TOKENS: Final = 1 << 53  # counts beyond it are no longer exact as float64
_MAX_CHANNEL: Final = 1e36  # as float32
_MAX_SUM: Final = 1e290  # leaves room to add up what is added up here without an overflow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertStats:
    """One MoE layer, over the tokens that the router sent to each of its E experts; None for what is not known.

    Attributes:
        count_E: tokens routed to the expert.
        reap_E: sum of g * ||e||_2: router weight times the norm of the expert's output.
        ean_E: sum of ||e||_2.
        gate_E: sum of g, the router's weight of the expert after top-k.
        peak_E: largest |activation| of the expert's output, over tokens and channels; 0 when never reached.
        square_E: sum of ||e||_2^2.
        energy_E: sum of ||a||_2^2, a being what enters the expert's down projection.
        output_E: sum of a_i^2 times the squared norm of the down projection's column i, over all i: an estimate of
            `square_E`, which it would be if the a_i were not correlated.
        spread_E: root mean square over mean absolute value of the expert's weights, whatever the tokens.
        channels_EI: sum of (g a)^2 of each channel, times the squared norm of its column of the down projection.

    """

    count_E: NDArray[np.int64] | None = None
    reap_E: NDArray[np.float64] | None = None
    ean_E: NDArray[np.float64] | None = None
    gate_E: NDArray[np.float64] | None = None
    peak_E: NDArray[np.float64] | None = None
    square_E: NDArray[np.float64] | None = None
    energy_E: NDArray[np.float64] | None = None
    output_E: NDArray[np.float64] | None = None
    spread_E: NDArray[np.float64] | None = None
    channels_EI: NDArray[np.float32] | None = None

    @classmethod
    def alike(cls, experts: int, channels: int = 0) -> ExpertStats:
        """All that is known of so many experts, which no token reached; with so many channels each, if any."""
        zeros_E = np.zeros(experts)
        return cls(
            count_E=np.zeros(experts, np.int64),
            reap_E=zeros_E,
            ean_E=zeros_E,
            gate_E=zeros_E,
            peak_E=zeros_E,
            square_E=zeros_E,
            energy_E=zeros_E,
            channels_EI=np.zeros((experts, channels), np.float32) if channels else None,
        )

    @property
    def size(self) -> int:
        """Number of experts."""
        return len(next(iter(self.arrays().values())))

    @property
    def unreached(self) -> NDArray[np.bool_]:
        """Which experts no token reached, bool [E]; none where tokens are not counted."""
        return np.zeros(self.size, bool) if self.count_E is None else self.count_E == 0

    def of(self, name: str) -> NDArray[Any]:
        """The statistic of that name, int64 [E] of a count and else float64 [E].

        Raises:
            PlanError: it is not known.

        """
        found = self.arrays().get(name)
        if found is None:
            raise PlanError(f"the saliency holds no '{name}', only {', '.join(self.arrays())}")
        return found

    def added(self, other: ExpertStats) -> ExpertStats:
        """Over the tokens of both, what both know: sums of the sums, the larger of the peaks.

        Raises:
            PlanError: the two have another number of experts, or know nothing that adds up.

        """
        if self.size != other.size:
            raise PlanError(f"expected statistics of {self.size} experts, found {other.size}")
        one, two = self.arrays(), other.arrays()
        both = {name: (one[name], two[name]) for name in one if name in two and name != _OF_WEIGHTS}
        if not both:
            raise PlanError("the two saliencies know no statistic in common that adds up")
        return ExpertStats(
            **{
                f"{name}_{'EI' if name == CHANNELS else 'E'}": np.maximum(*each)
                if name == "peak"
                else each[0] + each[1]
                for name, each in both.items()
            }
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Statistic -> array, as the tensors of a file are named, of those that are known."""
        found = {**{name: getattr(self, f"{name}_E") for name in FIELDS}, CHANNELS: self.channels_EI}
        return {name: array for name, array in found.items() if array is not None}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Saliency:
    """Statistics of every MoE layer of one checkpoint.

    Attributes:
        model: what was scored: `model_type`, `num_layers`, `num_experts`, `num_experts_per_tok`, `num_groups` (of the
            router, 1 if it has none), `source_fingerprint`, `identity` (see `identity.Identity`); may hold more.
        layers: decoder block -> statistics.
        mtp_layers: MTP layer, counted from 0 -> statistics.
        tokens: calibration tokens that every layer has seen.
        runs: provenance of each scoring run that was added up.
        where: file name for messages; no part of the value.

    Raises:
        CheckpointError: the numbers contradict each other, or are not finite.

    """

    model: Mapping[str, Any]
    layers: Mapping[int, ExpertStats]
    mtp_layers: Mapping[int, ExpertStats]
    tokens: int
    runs: tuple[Mapping[str, Any], ...]
    where: str = field(default="saliency", compare=False)

    def __post_init__(self) -> None:
        for name in ("layers", "mtp_layers"):
            layers = getattr(self, name)
            object.__setattr__(self, name, {layer: layers[layer] for layer in sorted(layers)})
        object.__setattr__(self, "runs", tuple(self.runs))
        _check_facts(self)
        for place, stats in _each(self):
            _check_stats(self, stats, place)

    @property
    def num_experts(self) -> int:
        """Experts of every layer."""
        return int(self.model["num_experts"])

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the statistics that it holds, of every layer the same."""
        return tuple(next(iter(self.layers.values())).arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Saliency:
        """Read a saliency file.

        Raises:
            CheckpointError: it cannot be read, is none of ours, or is malformed.

        """
        where = os.fspath(path)
        arrays, record = decode_saliency(read_saliency(path), where)
        if not isinstance(record["runs"], list):
            raise CheckpointError(f"{where}: runs: expected a list, found {show(record['runs'])}")
        return cls(
            model=record["model"],
            layers=_stats(arrays["layers"]),
            mtp_layers=_stats(arrays["mtp_layers"]),
            tokens=record["tokens"],
            runs=tuple(record["runs"]),
            where=where,
        )

    def to_bytes(self) -> bytes:
        """The saliency file; the same content gives the same bytes.

        Raises:
            CheckpointError: model or runs hold what is not plain JSON.

        """
        arrays: Arrays = {
            scope: {layer: stats.arrays() for layer, stats in layers.items()}
            for scope, layers in (("layers", self.layers), ("mtp_layers", self.mtp_layers))
        }
        record = {"model": dict(self.model), "tokens": self.tokens, "runs": [dict(run) for run in self.runs]}
        return encode_saliency(arrays, record)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the saliency file, durably and in one step; nothing happens when it is there already.

        Raises:
            OutputError: another file is there, or it cannot be written.

        """
        write_new(Path(path), self.to_bytes())

    def added(self, other: Saliency) -> Saliency:
        """Statistics over the calibration data of both.

        Raises:
            PlanError: they are of different checkpoints; names the first difference.
            CheckpointError: the sums are beyond what a file may hold.

        """
        _check_same(self, other)
        return Saliency(
            model=self.model,
            layers={layer: stats.added(other.layers[layer]) for layer, stats in self.layers.items()},
            mtp_layers={layer: stats.added(other.mtp_layers[layer]) for layer, stats in self.mtp_layers.items()},
            tokens=self.tokens + other.tokens,
            runs=(*self.runs, *other.runs),
        )


def _stats(layers: Mapping[int, Mapping[str, NDArray[Any]]]) -> dict[int, ExpertStats]:
    return {
        layer: ExpertStats(
            channels_EI=arrays.get(CHANNELS), **{f"{name}_E": array for name, array in arrays.items() if name in FIELDS}
        )
        for layer, arrays in layers.items()
    }


def _each(saliency: Saliency) -> Iterator[tuple[str, ExpertStats]]:
    """Every layer with its place in the file."""
    for scope, layers in (("layers", saliency.layers), ("mtp_layers", saliency.mtp_layers)):
        for layer, stats in layers.items():
            yield f"{scope}.{layer}", stats


def _check_facts(saliency: Saliency) -> None:
    where, model = saliency.where, saliency.model
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{where}: model: expected an object, found {show(model)}")
    for key in _COUNTS:
        if type(model.get(key)) is not int or not 1 <= model[key] <= _MAX_COUNT:
            raise CheckpointError(f"{where}: model.{key}: expected a count, found {show(model.get(key))}")
    for key in _TEXTS:
        text = model.get(key)
        if not isinstance(text, str) or not text.isprintable() or len(text) > _MAX_TEXT:  # they are shown as they are
            raise CheckpointError(f"{where}: model.{key}: expected a short text, found {show(text)}")
    if model["num_experts"] % model["num_groups"] or model["num_experts_per_tok"] > model["num_experts"]:
        raise CheckpointError(
            f"{where}: model: {model['num_experts']} experts in {model['num_groups']} router groups,"
            f" {model['num_experts_per_tok']} per token: they do not fit together"
        )
    if type(saliency.tokens) is not int or not 0 <= saliency.tokens <= _MAX_TOKENS:
        raise CheckpointError(f"{where}: tokens: expected a count, found {show(saliency.tokens)}")
    for at, run in enumerate(saliency.runs):
        if not isinstance(run, Mapping):
            raise CheckpointError(f"{where}: runs[{at}]: expected an object, found {show(run)}")
    _check_layers(saliency)


def _check_layers(saliency: Saliency) -> None:
    count = saliency.model["num_layers"]
    if not saliency.layers or not saliency.known:
        raise CheckpointError(f"{saliency.where}: expected statistics of at least one layer, found none")
    for scope, layers, limit in (("layers", saliency.layers, count), ("mtp_layers", saliency.mtp_layers, _MAX_COUNT)):
        for layer in layers:
            if type(layer) is not int or not 0 <= layer < limit:
                raise CheckpointError(f"{saliency.where}: {scope}.{layer}: expected layers 0..{limit - 1}")


def _check_stats(saliency: Saliency, stats: ExpertStats, place: str) -> None:
    experts, tokens = saliency.num_experts, saliency.tokens
    top_k = saliency.model["num_experts_per_tok"]
    if missing := [name for name in saliency.known if name not in stats.arrays()]:
        raise CheckpointError(f"{saliency.where}: {place}.{missing[0]}: expected it, as other layers have it")
    for name, array in stats.arrays().items():
        at = f"{saliency.where}: {place}.{name}"
        dtype = np.dtype(_NUMPY[_DTYPES[name]])
        shape = (experts, *(array.shape[1:2] if name == CHANNELS and isinstance(array, np.ndarray) else ()))
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else show(array)
            raise CheckpointError(f"{at}: expected {dtype} {list(shape)}, found {found}")
        most = _MAX_CHANNEL if name == CHANNELS else tokens if name == "count" else _MAX_SUM
        _check_numbers(array.reshape(-1), most, at)
        if name == CHANNELS:
            continue
        counted = stats.count_E is not None and name not in ("count", _OF_WEIGHTS)
        if counted and (ghosts := np.flatnonzero((stats.count_E == 0) & (array != 0))).size:
            raise CheckpointError(f"{at}[{ghosts[0]}]: {array[ghosts[0]]}, but no token reached the expert")
    if stats.count_E is None:
        return
    total = int(stats.count_E.sum(dtype=object))
    if total > tokens * top_k:
        raise CheckpointError(
            f"{saliency.where}: {place}.count: {total} routed in all, but {tokens} tokens go to {top_k} experts each"
        )


def _check_numbers(array: NDArray[np.float64] | NDArray[np.int64], limit: float, at: str) -> None:
    bad = np.flatnonzero(~((array >= 0) & (array <= limit)))  # NaN fails both
    if bad.size:
        raise CheckpointError(f"{at}[{bad[0]}]: expected a number from 0 to {limit}, found {array[bad[0]]}")


def difference_of_models(
    one: Mapping[str, object], other: Mapping[str, object], names: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Say in what two models that were scored differ, values included; empty where they are one.

    Args:
        one: `Saliency.model`, or that of a manifest.
        other: another one.
        names: shard -> tensors of the other one, by which other values are named.

    """
    identities = Identity.from_dict(one.get("identity")), Identity.from_dict(other.get("identity"))
    known = identities[0] is not None and identities[1] is not None
    keys = (*_TEXTS[:1], *_COUNTS, *_TEXTS[1:])
    for key in (*keys, *sorted({*one, *other} - {*keys, "identity"})):
        if one.get(key) != other.get(key) and not (known and key == "source_fingerprint"):
            return f"model.{key}: {show(other.get(key))}, not {show(one.get(key))}"
    if identities[0] is None or identities[1] is None:
        return ""
    if where := identities[0].difference(identities[1], names):
        return f"model.identity: {where}"
    if not identities[0].is_comparable(identities[1]):
        return "model.identity: read in other ways, from the hub and from a folder, so that values cannot be compared"
    return ""


def _check_same(one: Saliency, other: Saliency) -> None:
    """Refuse to add what was measured on different checkpoints, or with different tokenizers."""
    if where := difference_of_models(one.model, other.model):
        raise PlanError(f"{other.where}: {where}, as {one.where} has it; only runs over the same checkpoint add up")
    tokenizers = {str(run["tokenizer"]) for run in (*one.runs, *other.runs) if "tokenizer" in run}
    if len(tokenizers) > 1:
        raise PlanError(f"{other.where}: another tokenizer than {one.where}; only runs over the same text's ids add up")
    for scope in ("layers", "mtp_layers"):
        if odd := sorted(set(getattr(one, scope)) ^ set(getattr(other, scope))):
            lacks = one.where if odd[0] in getattr(other, scope) else other.where
            raise PlanError(f"{lacks}: {scope}.{odd[0]}: missing here, but the other file has it")
