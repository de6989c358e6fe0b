"""What llama.cpp's importance matrices say of experts: how many tokens each saw, and the energy inside it.

`llama-imatrix` adds up, for every matrix, the squares of what enters it, column by column, and counts the tokens; for
stacked experts it does so expert by expert. What enters the down projection is the activation a inside the expert, so
its sum is the criterion `energy`, and its count `frequency`. There is no router weight in the file, and so no `reap`.

Source: tools/imatrix/imatrix.cpp of llama.cpp, the form in GGUF. The older `.dat` holds means, without the counts.
"""

# E: experts, I: columns of a down projection, O: rows of one, R: a run of these.

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shardxform import __version__
from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem
from shardxform.base.progress import OnProgress, Progress
from shardxform.checkpoint.gguf import GgufModel, open_gguf
from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, PlanError
from shardxform.execution.transcoding import reading
from shardxform.experts.statistics import ExpertStats, Saliency
from shardxform.experts.weighing import experts_of, model_facts
from shardxform.formats.encoding import DECODE_TILE, Opener, row_tiles
from shardxform.formats.matrices import Matrix
from shardxform.model.layout import layout_of
from shardxform.runtimes.gguf.architecture import vocabulary
from shardxform.runtimes.gguf.slabs import slabs_of

__all__ = ["UNKNOWN", "Imatrix", "import_imatrix", "open_imatrix"]

UNKNOWN: Final = (
    "the file does not say which model it was made with: its layers, experts and widths are those of the checkpoint,"
    " to whose values the scores are bound from here on"
)
"""What cannot be known of any importance matrix."""

_DOWN: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.ffn_down_exps\.weight\.(in_sum2|counts)")
_ROUTER: Final = "blk.{}.ffn_gate_inp.weight.counts"
_MOST_EXACT: Final = 1 << 24  # counts are float32: beyond it they stand still
_LEGACY: Final = 64  # bytes of a longest name, about, that a file of the older form begins with


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """An importance matrix in GGUF.

    Attributes:
        file: its tensors, and where they are.
        datasets: names of the text that it was made on.
        chunks, chunk_size: of that text, in tokens.

    """

    file: GgufModel
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    @property
    def where(self) -> str:
        """Its path."""
        return self.file.where

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks whose experts it tells of."""
        found = (_DOWN.fullmatch(name) for name in self.file.table.tensors)
        return tuple(sorted({int(match[1]) for match in found if match}))

    def stats(self, layer: int, experts: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens that reached every expert of a block, int64 [E], and the sums of squares, float64 [E, I].

        Raises:
            CheckpointError: they are not there, are no counts or no sums, or are of another number of experts.

        """
        stem = f"blk.{layer}.ffn_down_exps.weight"
        sums_EI, counts_E = (self._array(f"{stem}.{kind}", experts) for kind in ("in_sum2", "counts"))
        if counts_E.shape[1] != 1 or not np.array_equal(counts_E, np.rint(counts_E)) or counts_E.max() >= _MOST_EXACT:
            raise CheckpointError(
                f"{self.where}: tensor '{stem}.counts': expected one count below 2**24 for each expert"
            )
        return counts_E[:, 0].astype(np.int64), sums_EI.astype(np.float64)

    def tokens(self, layer: int) -> int | None:
        """Tokens that reached a block's router; None where the file does not say."""
        name = _ROUTER.format(layer)
        return int(self._array(name, 1).ravel()[0]) if name in self.file.table.tensors else None

    def _array(self, name: str, rows: int) -> NDArray[np.float32]:
        """A tensor as float32 [rows, columns], finite and not negative."""
        ref = self.file.table.tensors.get(name)
        if ref is None:
            raise CheckpointError(
                f"{self.where}: no tensor '{name}': an importance matrix without this block's experts"
            )
        spec = ref.spec
        if (
            spec.dtype != "F32"
            or spec.elements % rows
            or (rows > 1 and (len(spec.shape) < 2 or spec.shape[-2] != rows))
        ):
            raise CheckpointError(
                f"{self.where}: tensor '{name}' is {spec.dtype} {list(spec.shape)}; expected F32 of {rows} experts"
            )
        array = np.fromfile(Path(self.where), "<f4", spec.elements, offset=ref.ranges[0].offset).reshape(rows, -1)
        if not np.isfinite(array).all() or (array < 0).any():
            raise CheckpointError(f"{self.where}: tensor '{name}': expected finite numbers of at least 0")
        return array


def open_imatrix(path: Path) -> Imatrix:
    """Open an importance matrix.

    Raises:
        CheckpointError: none in GGUF, or one of the older form, which has lost the counts.

    """
    _refuse_legacy(path)
    file = open_gguf(path)
    kind = file.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        found = f"general.type is {kind.value!r}" if kind else "no general.type"
        raise CheckpointError(f"{path}: expected an importance matrix, found none: {found}")
    named = file.metadata.get("imatrix.datasets")
    names = named.value if named and named.items == "STRING" else []
    found_layers = Imatrix(
        file=file,
        datasets=tuple(map(str, names)) if isinstance(names, list) else (str(names),),
        chunks=_count(file, "imatrix.chunk_count"),
        chunk_size=_count(file, "imatrix.chunk_size"),
    )
    if not found_layers.layers:
        raise CheckpointError(f"{path}: tells of no experts: no tensor blk.N.ffn_down_exps.weight.in_sum2")
    return found_layers


def _refuse_legacy(path: Path) -> None:
    """Refuse the older form: a number of entries, then a short name, its length before it."""
    try:
        with path.open("rb") as file:
            head = file.read(8 + _LEGACY)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from e
    length = int.from_bytes(head[4:8], "little")
    if head[:4] != b"GGUF" and 0 < length <= _LEGACY and head[8 : 8 + length].startswith((b"blk.", b"output.")):
        raise CheckpointError(
            f"{path}: an importance matrix of the older form, which holds means and has lost how many tokens reached"
            " each expert; make one in GGUF: llama-imatrix -o imatrix.gguf"
        )


def _count(file: GgufModel, key: str) -> int:
    found = file.metadata.get(key)
    value = found.value if found and found.kind not in ("STRING", "ARRAY") else 0
    return value if isinstance(value, int) and value > 0 else 0


# -- of a checkpoint --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is asked of a checkpoint: what a `Saliency` says of it, and blocks with experts by scope and number."""

    facts: Mapping[str, Any]
    blocks: Mapping[tuple[str, int], int]


def import_imatrix(
    imatrix: Imatrix, source: Checkpoint | GgufModel, *, weigh: bool = False, on_progress: OnProgress | None = None
) -> Saliency:
    """What an importance matrix says of the experts of a checkpoint, in safetensors or in GGUF.

    MTP layers are told of where the file has them, which llama.cpp does not run as a rule.

    Args:
        imatrix: of the same model, in whatever blocks it was run.
        source: the checkpoint that experts are to be chosen of.
        weigh: read the down projections once too, for the statistic `output`.
        on_progress: called after every matrix that is read.

    Raises:
        CheckpointError: the file does not fit the checkpoint: other layers, experts, widths, experts per token.
        FamilyError, PlanError: the checkpoint has no experts that are known.
        SchemeError: its weights are stored in a way that is not read, and `weigh` is asked for.

    """
    model = _model_of(source)
    experts, top_k = model.facts["num_experts"], model.facts["num_experts_per_tok"]
    if strange := sorted(set(imatrix.layers) - set(model.blocks.values())):
        raise CheckpointError(f"{imatrix.where}: tells of experts in block {strange[0]}, where {source.where} has none")
    norms = _norms_of(source) if weigh else None
    found: dict[str, dict[int, ExpertStats]] = {"layers": {}, "mtp_layers": {}}
    tokens, done = imatrix.chunks * imatrix.chunk_size, 0
    for (scope, layer), block in model.blocks.items():
        if scope == "mtp_layers" and block not in imatrix.layers:
            continue
        count_E, sums_EI = imatrix.stats(block, experts)
        _refuse_other_top_k(imatrix, block, int(count_E.sum()), top_k, source.where)
        tokens = max(tokens, -(-int(count_E.sum()) // top_k))
        output_E = None
        for expert, norms_I, nbytes in norms.of(scope, layer) if norms else ():
            interrupts.check()
            output_E = np.zeros(experts) if output_E is None else output_E
            output_E[expert] = _carried(norms_I, sums_EI[expert], f"{source.where}: {scope} {layer}, expert {expert}")
            done += nbytes
            if on_progress and norms:
                on_progress(Progress(done=done, total=norms.total, resumed=0))
        found[scope][layer] = ExpertStats(count_E=count_E, energy_E=sums_EI.sum(axis=1), output_E=output_E)
    return Saliency(
        model=model.facts,
        layers=found["layers"],
        mtp_layers=found["mtp_layers"],
        tokens=tokens,
        runs=(_run_facts(imatrix),),
        where=imatrix.where,
    )


def _refuse_other_top_k(imatrix: Imatrix, block: int, routed: int, top_k: int, where: str) -> None:
    """Refuse a file whose tokens went to more or fewer experts each than those of the checkpoint do."""
    reached = imatrix.tokens(block)
    if reached and not routed % reached and routed // reached != top_k:
        raise CheckpointError(
            f"{imatrix.where}: block {block}: {routed // reached} experts for each token, but {where} has {top_k}: made"
            " with another model"
        )


def _carried(norms_I: NDArray[np.float64], sums_I: NDArray[np.float64], where: str) -> float:
    """Sum of the squares of what a down projection gives, if what enters it were not correlated."""
    if norms_I.shape != sums_I.shape or not np.isfinite(norms_I).all():
        raise CheckpointError(
            f"{where}: expected a down projection of {len(sums_I)} columns of finite weights, as in the importance"
            f" matrix; found {len(norms_I)}"
        )
    return float(norms_I @ sums_I)


def _run_facts(imatrix: Imatrix) -> dict[str, Any]:
    """Where the numbers are from."""
    digest = hashlib.sha256()
    with Path(imatrix.where).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {
        "tool": f"shardxform {__version__}",
        "imatrix": os.path.basename(imatrix.where),
        "sha256": digest.hexdigest(),
        "datasets": list(imatrix.datasets),
        "chunks": imatrix.chunks,
        "chunk_size": imatrix.chunk_size,
        "unknown": UNKNOWN,
    }


def _model_of(source: Checkpoint | GgufModel) -> _Model:
    if isinstance(source, GgufModel):
        slabs = slabs_of(source.metadata, source.table.tensors, source.where)
        identity = identify(source.table)
        facts = {
            "model_type": slabs.arch,
            "num_layers": slabs.num_layers,
            "num_experts": slabs.num_experts,
            "num_experts_per_tok": slabs.top_k,
            "num_groups": slabs.groups,
            "source_fingerprint": identity.fingerprint,
            "identity": identity.described(),
        }
        moe, mtp, first = slabs.moe_layers, slabs.mtp_layers, slabs.num_layers
    else:
        layout = layout_of(source.config, source.tensors, source.where)
        if not layout.moe_layers:
            raise PlanError(f"{source.where}: no layer has experts; there is nothing to score")
        facts = model_facts(source, layout)
        moe, mtp, first = tuple(layout.moe_layers), tuple(range(layout.mtp_layers)), layout.num_layers
    blocks = {("layers", layer): layer for layer in moe} | {("mtp_layers", layer): first + layer for layer in mtp}
    return _Model(facts=facts, blocks=blocks)


# -- weights ----------------------------------------------------------------------------------------------------------


Norms = Iterator[tuple[int, NDArray[np.float64], int]]
"""Of every expert of a block: its id, the squared norms of the columns of its down projection [I], and bytes read."""


class _Norms(Protocol):
    """Reads down projections as they are asked for; `total` is their size in bytes."""

    total: int

    def of(self, scope: str, layer: int) -> Norms:
        """Read those of one block."""


def _norms_of(source: Checkpoint | GgufModel) -> _Norms:
    return _BlockNorms(source) if isinstance(source, GgufModel) else _MatrixNorms(source)


class _MatrixNorms:
    """Of a checkpoint in safetensors, whatever its weights are stored in."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        layout, matrices = experts_of(source)
        down = layout.family.experts.projections[-1]
        self._matrices: dict[tuple[str, int | None], list[Matrix]] = {}
        for matrix in matrices:
            if matrix.name.rpartition(".")[2] == down:
                scope = "mtp_layers" if matrix.place.scope == "mtp" else "layers"
                self._matrices.setdefault((scope, matrix.place.layer), []).append(matrix)
        self.total = sum(matrix.nbytes for each in self._matrices.values() for matrix in each)

    def of(self, scope: str, layer: int) -> Norms:
        with contextlib.closing(open_source(self._source.root, self._source.remote, FileSystem())) as reader:
            opener = Opener(reading(reader))
            for matrix in self._matrices.get((scope, layer), []):
                assert matrix.expert is not None
                norms_I = np.zeros(matrix.shape[1])
                for storage in matrix.stored:
                    rows = opener.open(storage)
                    for start, stop in row_tiles(rows.count, matrix.shape[1], DECODE_TILE):
                        norms_I += np.square(rows.values(start, stop), dtype=np.float64).sum(axis=0)
                yield matrix.expert, norms_I, matrix.nbytes


class _BlockNorms:
    """Of a model in GGUF, in blocks of any type, which the `gguf` package decodes."""

    def __init__(self, source: GgufModel) -> None:
        self._source, package = source, vocabulary()
        self._decode, self._kinds = package.quants.dequantize, package.GGMLQuantizationType
        self._first = slabs_of(source.metadata, source.table.tensors, source.where).num_layers
        found = (ref for name, ref in source.table.tensors.items() if name.endswith("ffn_down_exps.weight"))
        self.total = sum(ref.nbytes for ref in found)

    def of(self, scope: str, layer: int) -> Norms:
        block = layer + (self._first if scope == "mtp_layers" else 0)
        stack = self._source.table.tensors[f"blk.{block}.ffn_down_exps.weight"]
        kind = self._kinds[stack.spec.dtype]
        with contextlib.closing(open_source(self._source.table.root, None, FileSystem())) as reader:
            read = reading(reader)
            for expert, slab in enumerate(stack.slabs()):
                rows, columns = slab.spec.shape
                norms_I = np.zeros(columns)
                for start, stop in row_tiles(rows, columns, DECODE_TILE):
                    tile = slab.rows(start, stop)
                    data = np.empty((stop - start, tile.nbytes // (stop - start)), np.uint8)
                    read(tile, data)
                    norms_I += np.square(self._decode(data, kind), dtype=np.float64).sum(axis=0)
                yield expert, norms_I, slab.nbytes
