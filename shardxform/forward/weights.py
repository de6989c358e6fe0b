"""Weights of a checkpoint, a view, or a quantized checkpoint, read one tensor at a time as torch tensors.

Owns the reader of the source's shards. Plain tensors are byte ranges read into memory; quantized ones are words
and scales that become values when asked for, exactly (`scale * (code - zero)` in float32, then the dtype asked for).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem
from shardxform.base.tensors import ByteRange, TensorRef
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, ExecutionError, FamilyError, SchemeError
from shardxform.formats.config_names import declarations
from shardxform.formats.decoded import DecodedRows
from shardxform.formats.decoding import decoded
from shardxform.formats.encoding import DECODE_TILE, Encoded, Opener, Role, Rows, Storage, Turned, ranges_of, row_tiles
from shardxform.formats.packing import IntRows
from shardxform.formats.stored import read_stored
from shardxform.forward.resting import Coded, ExpertValues, Packed, PlainMatrix, Precision, RestingMatrix, RoutedExpert
from shardxform.model.expected import expected
from shardxform.model.families.base import ExpertLayout
from shardxform.model.layout import Layout, Place, layout_of, refuse_two_spellings, variants_found
from shardxform.runtimes import as_family

__all__ = [
    "IMPLEMENTATION",
    "ExpertBank",
    "ExpertValues",
    "Observer",
    "Precision",
    "Routed",
    "RoutedExpert",
    "Weights",
    "activation",
    "attach",
    "detach",
    "experts_module",
    "stack_names",
]

# E: experts, O: output channels, I: input channels, W: words of a row, G: groups of a row.


_BIAS: Final = "_bias"
_BLOCKS_WANTED: Final = 2  # the one that is read, and the next
_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Weights:
    """Reads the tensors of one checkpoint or view; close it, or use it as a context manager.

    Attributes:
        checkpoint: what is read.
        layout: of it; of a quantized checkpoint, as if its weights were plain.
        precision: of the tensors given out.

    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision, fs: FileSystem | None = None) -> None:
        """Look at the headers; no tensor is read yet.

        Raises:
            FamilyError, SchemeError, CheckpointError: a family or a quantization that is not supported.

        """
        self.checkpoint = checkpoint = as_family(checkpoint)
        self.precision = precision
        self._wanted: deque[tuple[ByteRange, ...]] = deque()
        plain = decoded(checkpoint) or checkpoint
        stored = read_stored(plain) if any(declarations(plain.config)) else None
        if stored and stored.contradictions:
            raise SchemeError(f"{checkpoint.where}: {stored.contradictions[0]}; see `shardxform verify`")
        self.layout: Layout = stored.layout if stored else layout_of(plain.config, plain.tensors, plain.where)
        refuse_two_spellings(self.layout)
        self._tensors = {**stored.plain, **stored.weights} if stored else plain.tensors
        self._experts = _expert_table(self.layout, self._tensors)
        self._source = open_source(checkpoint.root, checkpoint.remote, fs or FileSystem(), ahead=True)
        self._opener = Opener(self._fill)
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode")

    # -- tables -------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self._tensors

    def ref(self, name: str) -> TensorRef:
        """Look up a tensor.

        Raises:
            CheckpointError: the checkpoint has none of that name.

        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.checkpoint.where}: tensor '{name}' is missing; the model needs it")
        return self._tensors[name]

    # -- values -------------------------------------------------------------------------------------------------

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values of a tensor, in `dtype` or the dtype of all."""
        ref = self.ref(name)
        precision = self.precision if dtype is None else Precision(self.precision.device, dtype)
        if len(ref.spec.shape) == 2:
            return self._matrix(ref).dense(precision)
        return self._plain(ref).to(precision.device, precision.dtype)

    def at_rest(self, name: str) -> torch.Tensor:
        """A tensor in the dtype it is stored in; a quantized one in the dtype that stands for it."""
        return self._matrix(self.ref(name)).at_rest().to(self.precision.device)

    def head(self, name: str) -> torch.Tensor:
        """An output head in the dtype it is stored in; of integers in the dtype of all."""
        matrix = self._matrix(self.ref(name))
        plain = isinstance(matrix, PlainMatrix)
        return matrix.at_rest().to(self.precision.device) if plain else matrix.dense(self.precision)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Rows `ids` of a 2-D tensor, read alone: the embeddings of the tokens that occur."""
        return self._matrix(self.ref(name).select(ids)).dense(self.precision)

    def expert(self, scope: str, layer: int, expert: int) -> RoutedExpert:
        """Read one routed expert of a decoder block (`block`) or an MTP layer (`mtp`)."""
        table, experts = self._experts[scope, layer], self.layout.family.experts
        stacked = _are_stacked(table, experts)
        parts = experts.stacks if stacked else experts.projections

        def ref(kind: str) -> TensorRef:
            return table[kind][0].index(expert) if stacked else table[kind][expert]

        *gate_up, down = (self._resting(ref(kind)) for kind in parts)
        biases = tuple(self._plain(ref(kind + _BIAS)) for kind in parts if experts.bias)
        return RoutedExpert(tuple(gate_up), down, biases, experts)

    def stored(self, storage: Storage) -> tuple[dict[Role, NDArray[np.uint8]], NDArray[np.float32]]:
        """A matrix as it is stored, less its cut: the bytes of its parts, and the values [O, I] that they stand for."""
        parts: dict[Role, NDArray[np.uint8]] = {}
        with self._telling():
            for role, ref in storage.parts:
                parts[role] = np.empty(ref.nbytes, np.uint8)
                self._fill(ref, parts[role])
            rows = self._opener.open(storage._replace(cut=None))
            return parts, rows.values(0, rows.count)

    def has_experts(self, scope: str, layer: int) -> bool:
        """Whether a block or MTP layer has routed experts here."""
        return (scope, layer) in self._experts

    def check(self, mtp_layers: Collection[int] = ()) -> None:
        """Hold names and shapes of all that the text model reads against config.json, before anything is read.

        Args:
            mtp_layers: those that are going to be run.

        Raises:
            CheckpointError: a tensor is missing or has another shape; names the first.
            FamilyError: the config gives no shapes.

        """
        try:
            for name, item in expected(self.layout, variants_found(self.layout)):
                scope, layer = item.place.scope, item.place.layer
                read = scope in ("root", "block") or (scope == "mtp" and mtp_layers and layer in (None, *mtp_layers))
                if read and not (item.optional and not self.has(name)):
                    self._refuse_other_shape(name, item.shape)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise FamilyError(f"{self.checkpoint.where}: config.json gives no shapes: {e}") from e

    def _refuse_other_shape(self, name: str, wanted: tuple[int, ...] | None) -> None:
        found = self.ref(name).spec.shape
        if wanted is not None and found != wanted:
            raise CheckpointError(
                f"{self.checkpoint.where}: tensor '{name}': shape {list(found)},"
                f" but the model of config.json wants {list(wanted)}"
            )

    # -- the disk -----------------------------------------------------------------------------------------------

    def will_need(self, prefix: str) -> None:
        """Have all tensors whose names begin with `prefix` brought near; a hint, no memory of this process.

        Of a repository, what was asked for two calls ago and not read since is let go of: blocks are read in order.
        """
        tensors = self.checkpoint.tensors.values()
        ranges = _merged(piece for ref in tensors if ref.name.startswith(prefix) for piece in ranges_of(ref))
        self._source.will_need(ranges)
        self._wanted.append(ranges)
        while self.checkpoint.remote and len(self._wanted) > _BLOCKS_WANTED:
            for piece in self._wanted.popleft():
                self._source.done_with(piece)

    def close(self) -> None:
        """Close the shards."""
        self._threads.shutdown()
        self._source.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _matrix(self, ref: TensorRef) -> RestingMatrix:
        interrupts.check()  # a block is many, and some minutes where the disk is slow
        if not isinstance(ref, Encoded):
            return PlainMatrix(self._plain(ref))
        opened = [self._open(source) for source in ref.sources]
        packed = [rows for rows in opened if isinstance(rows, IntRows)]
        if len(packed) < len(opened):
            return PlainMatrix(self._decoded(ref, opened), _DTYPES[ref.spec.dtype])
        words, scales = zip(*(rows.turned(0, rows.count) for rows in packed), strict=True)
        return Packed(_joined(words), _joined(scales), packed[0].grid)

    def _resting(self, ref: TensorRef) -> RestingMatrix:
        """A weight that is decoded again and again: its codes, where decoding them is cheap."""
        if not isinstance(ref, Encoded):
            return self._matrix(ref)
        opened = [self._open(source) for source in ref.sources]
        turned = opened[0] if len(opened) == 1 and isinstance(opened[0], Turned) else None
        with self._telling():
            kept = [
                rows.resting() if isinstance(rows, DecodedRows) else None
                for rows in ([turned.whole] if turned else opened)
            ]
        held = tuple(rows for rows in kept if rows is not None)
        if len(held) < len(kept):
            return self._matrix(ref)
        columns = ref.sources[0].whole[1]
        shape = (sum(rows.count for rows in held), columns)
        return Coded(held, shape, turned.part if turned else None, _DTYPES[ref.spec.dtype], self._fill_values)

    def _decoded(self, ref: Encoded, opened: Sequence[Rows]) -> torch.Tensor:
        """Values of a weight that is stored in another encoding, in the dtype of all."""
        shape = (sum(rows.count for rows in opened), ref.sources[0].shape[1])
        values_OI = torch.empty(shape, dtype=self.precision.dtype)
        self._fill_values(opened, values_OI)
        return values_OI.view(ref.spec.shape)

    def _fill_values(self, opened: Sequence[Rows], out_OI: torch.Tensor) -> None:
        """Decode rows, one below the other, a tile at a time; those in memory on all threads."""
        tiles, first = [], 0
        for rows in opened:
            tiles += [(rows, first + a, a, b) for a, b in row_tiles(rows.count, out_OI.shape[1], DECODE_TILE)]
            first += rows.count
        resting = all(isinstance(rows, DecodedRows) and rows.is_resting for rows in opened)
        with self._telling():
            if resting and len(tiles) > 1 and torch.get_num_threads() > 1:
                deque(self._threads.map(lambda tile: _decode_tile(tile, out_OI), tiles), maxlen=0)
            else:
                for tile in tiles:
                    _decode_tile(tile, out_OI)

    def _plain(self, ref: TensorRef) -> torch.Tensor:
        if isinstance(ref, Encoded):
            return self._decoded(ref, [self._open(source) for source in ref.sources])
        if ref.spec.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.checkpoint.where}: tensor '{ref.name}' is {ref.spec.dtype};"
                f" the model is run from {', '.join(_DTYPES)} and from W4A16 and W8A16 checkpoints"
            )
        if ref.remade:
            raise CheckpointError(f"{self.checkpoint.where}: tensor '{ref.name}' must be written before it can be run")
        if not ref.nbytes:  # which is no view of another dtype
            return torch.empty(ref.spec.shape, dtype=_DTYPES[ref.spec.dtype])
        buffer = np.empty(ref.nbytes, np.uint8)
        view = buffer.data
        done = 0
        for piece in ref.ranges:
            self._read(piece, view[done : done + piece.length])
            done += piece.length
        values = torch.from_numpy(buffer).view(_DTYPES[ref.spec.dtype]).view(ref.spec.shape)
        if not _all_finite(values):
            raise ExecutionError(
                f"{self.checkpoint.where}: tensor '{ref.name}' holds NaN or infinity; the model would give no numbers"
            )
        return values

    def _open(self, storage: Storage) -> Rows:
        with self._telling():
            return self._opener.open(storage)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Say whose weights they are that cannot be read."""
        try:
            yield
        except EOFError as e:
            raise ExecutionError(f"{self.checkpoint.where}: truncated while it was read: {e}") from e
        except ExecutionError as e:
            raise ExecutionError(f"{self.checkpoint.where}: {e}") from e

    def _fill(self, ref: TensorRef, into: NDArray[np.generic]) -> None:
        view = into.reshape(-1).view(np.uint8).data
        done = 0
        for piece in ref.ranges:
            self._source.read_into(piece, view[done : done + piece.length])
            done += piece.length

    def _read(self, piece: ByteRange, into: memoryview) -> None:
        where = f"{self.checkpoint.where}/{piece.file}"
        try:
            self._source.read_into(piece, into)
        except EOFError as e:
            raise ExecutionError(f"{where}: truncated while it was read: {e}") from e
        except OSError as e:
            raise ExecutionError(f"{where}: {e.strerror}") from e


def _decode_tile(tile: tuple[Rows, int, int, int], out_OI: torch.Tensor) -> None:
    """Rows `start`..`stop - 1` of some, whose place begins at row `at`."""
    rows, at, start, stop = tile
    place = out_OI[at : at + stop - start]
    if isinstance(rows, DecodedRows) and place.dtype == torch.float32:
        rows.into(start, stop, place.numpy())
    else:
        place.copy_(torch.from_numpy(rows.values(start, stop)))


def _merged(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Ranges in the order of their shards, those joined that touch."""
    out: list[ByteRange] = []
    for piece in sorted(dict.fromkeys(ranges), key=lambda piece: (piece.file, piece.offset)):
        if out and (out[-1].file, out[-1].end) == (piece.file, piece.offset):
            out[-1] = ByteRange(piece.file, out[-1].offset, out[-1].length + piece.length)
        else:
            out.append(piece)
    return tuple(out)


def _all_finite(values: torch.Tensor) -> bool:
    """Whether all are numbers: a sum tells at the speed of memory, unless it overflows by itself."""
    return math.isfinite(float(values.sum(dtype=torch.float32))) or bool(values.isfinite().all())


def _joined(parts: Sequence[NDArray[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))


def _expert_table(
    layout: Layout, tensors: Mapping[str, TensorRef]
) -> dict[tuple[str, int], dict[str, dict[int, TensorRef]]]:
    """(scope, layer) -> projection -> expert -> reference; a fused tensor stands under expert 0.

    Raises:
        CheckpointError: a block with some of its experts' tensors missing.

    """
    out: defaultdict[tuple[str, int], defaultdict[str, dict[int, TensorRef]]] = defaultdict(lambda: defaultdict(dict))
    for name, place in layout.places.items():
        if place.template.variant and not place.companion:
            assert place.layer is not None
            out[place.scope, place.layer][_kind(place)][place.expert or 0] = tensors[name]
    experts = layout.family.experts
    for (scope, layer), table in out.items():
        stacked = _are_stacked(table, experts)
        kinds = experts.stacks if stacked else experts.projections
        for kind in (*kinds, *(kind + _BIAS for kind in kinds if experts.bias)):
            wanted = 1 if stacked else layout.num_experts
            found = len(table[kind].keys() & range(wanted))
            if found != wanted:
                raise CheckpointError(
                    f"{scope} {layer}: {found} of {wanted} tensors of experts' {kind}; see `shardxform verify`"
                )
    return {key: dict(table) for key, table in out.items()}


def _are_stacked(table: Collection[str], experts: ExpertLayout) -> bool:
    return bool(experts.stacks) and experts.stacks[0] in table


def _kind(place: Place) -> str:
    """What of an expert a tensor is: a stack, a projection, or the bias of one, as `down_proj_bias`."""
    return place.template.name.removesuffix(".weight").replace(".bias", _BIAS).rpartition(".")[2]


# T: tokens, K: experts per token, n: tokens of one expert, H: hidden size, I: intermediate size, O: 2 * I, or I.


# -- experts -----------------------------------------------------------------------------------------------------------
# Routed experts as transformers runs them, with weights that are read when a token reaches them.
#
# Registered with transformers as an experts implementation; gate and activation are the model's own. Experts are
# visited in ascending order, as the model's plain implementation does, and only those that some token is routed to.

IMPLEMENTATION: Final = "shardxform"
_BANK: Final = "shardxform_bank"


@dataclass(frozen=True, slots=True)
class Routed:
    """What became of the tokens that a router sent to an expert.

    Attributes:
        expert: its id.
        weight_n: the router's weights.
        inner_nI: what enters its down projection.
        value_nH: what it puts out, not yet weighted.
        down_HI: its down projection.

    """

    expert: int
    weight_n: torch.Tensor
    inner_nI: torch.Tensor
    value_nH: torch.Tensor
    down_HI: torch.Tensor


Observer = Callable[[Routed], None]
"""Called with every expert that some token of a batch reaches."""


@dataclass(slots=True)
class ExpertBank:
    """The routed experts of one block: read at first use, then kept on the device until the block is done.

    Attributes:
        read: reads an expert.
        precision: what it is computed in.
        observer: sees what every expert puts out, or None.
        loaded: experts read so far.

    """

    read: Callable[[int], RoutedExpert]
    precision: Precision
    observer: Observer | None = None
    loaded: dict[int, RoutedExpert] = field(default_factory=dict)

    def dense(self, expert: int) -> ExpertValues:
        """What an expert computes with."""
        if expert not in self.loaded:
            self.loaded[expert] = self.read(expert).on(self.precision)
        return self.loaded[expert].dense(self.precision)


def experts_module(block: nn.Module) -> nn.Module | None:
    """Find the routed experts of a decoder block; None in a dense one.

    Raises:
        FamilyError: experts that this implementation does not compute.

    """
    found = [module for module in block.modules() if hasattr(module, "_is_expert_parallel")]
    if not found:
        return None
    module: Any = found[0]
    if len(found) > 1 or module.has_post_expert_norm:
        raise FamilyError(f"{type(module).__name__}: experts of two kinds or with a norm are not run")
    return found[0]


def stack_names(experts: Any) -> tuple[str, str, str, str]:  # noqa: ANN401
    """Parameters of an experts module of transformers: two stacks, and their biases, which it need not have."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    return first, "down_proj", f"{first}_bias", "down_proj_bias"


def activation(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:  # noqa: ANN401
    """What an experts module does between its two products: its gate, or its activation where there is none."""
    between: Callable[[torch.Tensor], torch.Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
    return between


def attach(module: nn.Module, bank: ExpertBank) -> None:
    """Give an experts module its weights."""
    object.__setattr__(module, _BANK, bank)


def detach(module: nn.Module) -> None:
    """Take them away again."""
    object.__delattr__(module, _BANK)


def _forward(
    self: Any,  # noqa: ANN401
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the outputs of every token's experts.

    Args:
        self: the model's experts module.
        hidden_states: [T, H].
        top_k_index: expert ids [T, K], different ones for a token.
        top_k_weights: the router's weights [T, K].

    Returns:
        [T, H].

    Raises:
        ValueError: there are not as many weights as ids: some older classes of transformers hand all of them on.

    """
    if top_k_weights.shape != top_k_index.shape:
        ids, given = list(top_k_index.shape), list(top_k_weights.shape)
        raise ValueError(
            f"experts are called with weights {given} for ids {ids}, which a newer transformers may not do"
        )
    bank: ExpertBank = getattr(self, _BANK)
    between = activation(self)
    out_TH = torch.zeros_like(hidden_states)
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        pairs = order[start : start + count]
        start += count
        token_n = pairs // top_k_index.shape[1]
        weight_n = top_k_weights.flatten()[pairs]
        values = bank.dense(expert)
        pre_nO = nn.functional.linear(hidden_states[token_n], values.gate_up_OH, values.gate_up_bias_O)
        inner_nI = between(pre_nO)
        value_nH = nn.functional.linear(inner_nI, values.down_HI, values.down_bias_H)
        if bank.observer is not None:
            bank.observer(Routed(expert, weight_n, inner_nI, value_nH, values.down_HI))
        # A token meets an expert once, so nothing is added twice and the order of the sums is fixed.
        out_TH[token_n] += (value_nH * weight_n[:, None]).to(out_TH.dtype)
    return out_TH


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
