"""Every tensor of a GGUF file, as a function of a checkpoint's table: its name, its shape, and what it is made of.

Names come from the `gguf` package's own map of release names. What a family says beside it is a `Kind`: how its names
are spelled there, which tensors are made of parts of one, and which keys describe the model.
"""

# E: experts, O: output channels, I: input channels.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Final, Literal

from shardxform.base.tensors import ByteRange, TensorRef
from shardxform.errors import SchemeError
from shardxform.formats.encoding import Cut, Opener, Rows, Storage
from shardxform.formats.matrices import Matrix, matrices_of, single_biases, turns
from shardxform.formats.plain import storages_of
from shardxform.model.expected import expected
from shardxform.model.layout import Layout, Place, is_shape, variants_found
from shardxform.model.tied_head import is_tied
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.transforms import Order, Transform

__all__ = ["EXPERTS", "Architecture", "Kind", "Named", "Part", "Piece", "stacks", "vocabulary"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor of GGUF: a stored matrix or vector, and what is done to it.

    Attributes:
        matrix: name of the module as `matrices_of` names it; of what is no matrix, name of the tensor.
        storage: where it lies, [O, I]; a vector is a matrix of one column.
        transform: None where it is taken as it is.

    """

    matrix: str
    storage: Storage
    transform: Transform | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of what it gives."""
        rows, columns = self.storage.shape
        return self.transform.shape(rows, columns) if self.transform else (rows, columns)

    @property
    def keeps_codes(self) -> bool:
        """Whether integers stay as they are: see `Transform.keeps_codes`."""
        return self.transform is None or self.transform.keeps_codes()

    @property
    def is_part(self) -> bool:
        """Whether it has some rows of the matrix only, picked one by one; others have all, or one run of them."""
        rows = self.transform.rows if self.transform else None
        return rows is not None and rows.count != self.storage.shape[0]

    @property
    def held(self) -> int:
        """Bytes in memory while it is open."""
        return self.storage.held + (self.transform.held(*self.storage.shape) if self.transform else 0)

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The bytes that it is made of."""
        return self.storage.reads

    def open(self, opener: Opener) -> Rows:
        """Its rows; raises like `Opener.open`."""
        return self.of(opener.open(self.storage))

    def of(self, rows: Rows) -> Rows:
        """What comes of rows that stand for the stored ones."""
        return self.transform.of(rows, self.storage.shape[1]) if self.transform else rows


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of a GGUF file.

    Attributes:
        name: as llama.cpp calls it.
        shape: the slowest dimension first, as of a checkpoint's tensors; GGUF itself lists them the other way round.
        pieces: what it is made of, one below the other; all dimensions but the last count their rows, and those of a
            vector the one that it has.
        wide: it is F32 whatever the file's type.
        values: of a tensor that is made of nothing stored.

    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    wide: bool
    values: tuple[float, ...] = ()

    @property
    def keeps_codes(self) -> bool:
        """Whether integers stay as they are in all of it."""
        return all(piece.keeps_codes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a stored one becomes.

    Attributes:
        released: its name in the spelling of the `gguf` package's map.
        transform: what is done to it, or to each of its cuts.
        cuts: rows of it, each a piece; all of it where empty.
        leading: dimensions before its own two, where rows are of several matrices.
        seen: the matrix that it is seen as, where it is stored as a vector.

    """

    released: str
    transform: Transform | None = None
    cuts: tuple[Cut, ...] = ()
    leading: tuple[int, ...] = ()
    seen: tuple[int, int] | None = None


Stacks = tuple[tuple[str, tuple[int, ...]], ...]
"""Tensors of routed experts, and the projections that each is made of."""


def stacks(names: str, **held: int | tuple[int, ...]) -> Stacks:
    """Name tensors of routed experts, in the converter's order.

    Args:
        names: in the map's spelling; `{l}` stands for the block's number, `{}` for what each is called.
        held: what each is called, and the number of the projection that it holds, or of several.

    """
    return tuple(
        (names.replace("{}", name), each if isinstance(each, tuple) else (each,)) for name, each in held.items()
    )


EXPERTS: Final = stacks("model.layers.{l}.mlp.experts.{}_proj", down=2, gate=0, up=1)
"""Of most families: gate 0, up 1, down 2."""


def _alone(_: Architecture, released: str) -> tuple[Part, ...]:
    return (Part(released),)


def _nothing(_: Architecture) -> Iterator[Named]:
    yield from ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kind:
    """One of llama.cpp's architectures, and how a family becomes it.

    Attributes:
        name: in `general.architecture`, and before its keys.
        maps: architectures of the `gguf` package whose maps have its names, asked in order.
        decoder: what names of the decoder begin with in the map.
        spelled: last parts of names, and how the map spells them.
        experts: tensors of routed experts; see `EXPERTS`.
        parts: what a tensor becomes, by its name in the map's spelling.
        made: tensors that are made of nothing stored.
        leads_dense: its first blocks may have no experts.
        scattered: any of its blocks may have none, as others are of attention or states alone.
        mtp: MTP layers are blocks after the others, or left out, since llama.cpp does not run them.
        check: refuses what llama.cpp would run in another way.
        notes: what llama.cpp runs in another way, by next to nothing.
        keys: records the keys that describe the model.
        specials: kinds of special tokens, and the tokens that they are where the tokenizer's files do not say.
        adds_bos: every text begins with the token of beginnings, whatever the tokenizer's files say.
        splits: names of pre-tokenizers, and the one that splits text likewise and means this family's special tokens.
        tokenizer: llama.cpp's name of the kind of tokenizer: `gpt2` merges bytes, the others characters.

    """

    name: str
    maps: tuple[str, ...]
    decoder: str = "model."
    spelled: Mapping[str, str] = field(default_factory=dict)
    experts: Stacks = EXPERTS
    parts: Callable[[Architecture, str], Sequence[Part]] = _alone
    made: Callable[[Architecture], Iterator[Named]] = _nothing
    leads_dense: bool = False
    scattered: bool = False
    mtp: Literal["nextn", "dropped"] = "dropped"
    check: Callable[[Architecture], None] = lambda _: None
    notes: Callable[[Architecture], Iterable[str]] = lambda _: ()
    keys: Callable[[Architecture, Recorder], None]
    specials: Mapping[str, str] = field(default_factory=dict)
    adds_bos: bool = False
    splits: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Literal["gpt2", "llama", "gemma4"] = "gpt2"


_NEXTN: Final = {
    "mtp.fc.weight": "eh_proj.weight",
    "mtp.norm.weight": "shared_head.norm.weight",
    "mtp.pre_fc_norm_embedding.weight": "enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "hnorm.weight",
}
"""What families with one MTP layer in the root call its own tensors, and what they are called within its block."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A checkpoint as llama.cpp sees it."""

    kind: Kind
    layout: Layout

    @property
    def name(self) -> str:
        """What llama.cpp calls it."""
        return self.kind.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The text config."""
        return self.layout.text

    @property
    def nextn(self) -> int:
        """Blocks of MTP layers in the file."""
        return self.layout.mtp_layers if self.kind.mtp == "nextn" and self.layout.has_mtp else 0

    @property
    def blocks(self) -> int:
        """Blocks in the file, those of MTP layers too."""
        return self.layout.num_layers + self.nextn

    @property
    def leading_dense(self) -> int:
        """Blocks before the first that has experts."""
        return next(iter(self.layout.moe_layers), self.layout.num_layers)

    def size(self, key: str) -> int:
        """A count from the text config.

        Raises:
            SchemeError: it is missing, or is none.

        """
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SchemeError(f"config.json: {key} is {value!r}; GGUF needs a count")
        return value

    def sized(self, symbol: str) -> int:
        """Return a size that the family works out of several keys."""
        found = self.layout.family.symbols[symbol]
        assert callable(found)
        return found(self.config)

    def which(self, condition: str) -> list[bool]:
        """Tell of which blocks a condition of the family holds."""
        holds = self.layout.family.holds
        return [holds(condition, self.config, layer) for layer in range(self.layout.num_layers)]

    def place(self, name: str) -> Place | None:
        """Where a tensor belongs that is written; None for one that llama.cpp's text models do without.

        Raises:
            SchemeError: it is a part of the model that is not known, or of a quantized weight.

        """
        place = self.layout.places.get(name)
        if place is None:
            if name in self.layout.harmless:
                return None
            raise SchemeError(f"tensor '{name}': unknown to family {self.layout.family.name}, so to llama.cpp as well")
        if place.companion:
            raise SchemeError(f"tensor '{name}' is a part of a quantized weight; GGUF is written of weights")
        dropped = place.scope == "mtp" and not self.nextn
        if dropped or place.scope == "vision" or place.template.name.endswith("inv_freq"):
            return None
        return None if place.template.role == "lm head" and is_tied(self.layout) and place.scope == "root" else place

    def block(self, place: Place) -> int | None:
        """Number of a tensor's block in the file; None in the root."""
        if place.layer is None:
            return self.layout.num_layers if place.scope == "mtp" else None
        return place.layer + (self.layout.num_layers if place.scope == "mtp" else 0)

    def released(self, place: Place) -> str:
        """Name of a tensor in the spelling of the package's map."""
        block, name = self.block(place), place.template.name
        if block is None:
            name = name.replace("{decoder}", self.kind.decoder).replace("{head}", "lm_head")
        else:
            name = f"{self.kind.decoder}layers.{block}.{_NEXTN.get(name, name)}"
        for ending, spelled in self.kind.spelled.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + spelled
        return name

    def tensors(self, tensors: Mapping[str, TensorRef]) -> Iterator[Named]:
        """List every tensor of the file, in the order of llama.cpp's converter, which is that of the table.

        Args:
            tensors: of a view, decoded: weights as they are, or as `Encoded`.

        Raises:
            SchemeError: a tensor is missing, or llama.cpp has no place for one.

        """
        self._refuse_scattered()
        self._refuse_unloadable(tensors)
        yield from self.kind.made(self)
        names, matrices = _Names(self), _by_tensor(self.layout, tensors)
        stacks: dict[int, _Stack] = {}
        left = self._expert_tensors(tensors)
        for name, ref in tensors.items():
            place = self.place(name)
            if place is None:
                continue
            if ref.remade is not None:
                raise SchemeError(f"tensor '{name}': pruning picks its columns, which cannot be written as GGUF yet")
            block = self.block(place)
            if not place.template.variant or block is None:
                yield from self._single(names, ref, place)
                continue
            stack = stacks.setdefault(block, _Stack(self))
            stack.add(ref, matrices.get(name, ()), place)
            left[block] -= 1
            if not left[block]:
                yield from stack.tensors(names, block)

    def _refuse_scattered(self) -> None:
        first, sparse = self.leading_dense, self.layout.moe_layers
        if self.kind.scattered:
            return
        if sparse != tuple(range(first, self.layout.num_layers)) or (first and not self.kind.leads_dense):
            which = "from one on" if self.kind.leads_dense else "all"
            raise SchemeError(f"layers {list(sparse)} have experts; llama.cpp's {self.name} has them in {which}")

    def _refuse_unloadable(self, tensors: Mapping[str, TensorRef]) -> None:
        """Refuse tensors that are missing, hold nothing, or have other shapes than llama.cpp works out of the keys."""
        for name, item in expected(self.layout, variants_found(self.layout)):
            if item.place.scope == "vision" or (item.place.scope == "mtp" and not self.nextn):
                continue
            ref = tensors.get(name)
            if ref is None and not item.optional:
                raise SchemeError(f"tensor '{name}' is missing; llama.cpp loads no file without it")
            if ref is not None and not (is_shape(ref.spec, item.shape) and all(ref.spec.shape)):
                found, shape = list(ref.spec.shape), list(item.shape or ())
                raise SchemeError(
                    f"tensor '{name}' is {found}, by config.json it would be {shape}; llama.cpp loads no such file"
                )

    def _expert_tensors(self, tensors: Mapping[str, TensorRef]) -> dict[int, int]:
        """How many tensors hold the routed experts of each block."""
        out: dict[int, int] = {}
        for name in tensors:
            place = self.place(name)
            block = self.block(place) if place and place.template.variant else None
            if block is not None:
                out[block] = out.get(block, 0) + 1
        return out

    def _single(self, names: _Names, ref: TensorRef, place: Place) -> Iterator[Named]:
        """What a tensor becomes that holds no routed experts: as a rule one, under another name."""
        module = ref.name.removesuffix(".weight") if len(ref.spec.shape) == 2 else ref.name
        if len(ref.spec.shape) == 3:  # a convolution of each channel by itself, [C, 1, K]
            rows, between, columns = ref.spec.shape
            ref = ref.reshaped((rows, between * columns))
        for part in self.kind.parts(self, self.released(place)):
            name, wide = names.of(part.released)
            storages = storages_of(ref.reshaped(part.seen) if part.seen else ref)
            if len(storages) > 1 and (part.transform or part.cuts):
                raise SchemeError(f"tensor '{ref.name}' is stored in {len(storages)} parts; expected one")
            found = [each.part(cut) for each in storages for cut in part.cuts] if part.cuts else storages
            pieces = tuple(Piece(module, each, part.transform) for each in found)
            rows, columns = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
            if len(ref.spec.shape) == 1 and not part.seen:
                yield Named(name, (rows,), pieces, wide=True)
                continue
            yield Named(name, (*part.leading, rows // prod(part.leading), columns), pieces, wide)


def _by_tensor(layout: Layout, tensors: Mapping[str, TensorRef]) -> dict[str, list[Matrix]]:
    """Matrices of routed experts by the tensor that holds them."""
    out: dict[str, list[Matrix]] = {}
    for matrix in matrices_of(layout, tensors):
        if matrix.expert is not None:
            out.setdefault(matrix.sources[0], []).append(matrix)
    return out


def vocabulary() -> Any:  # noqa: ANN401
    """The `gguf` package.

    Raises:
        SchemeError: it is not installed.

    """
    try:
        import gguf
    except ImportError as e:
        raise SchemeError("GGUF needs the package gguf: pip install 'shardxform[gguf]'") from e
    return gguf


_WIDE: Final = frozenset(
    (
        *("FFN_GATE_INP", "FFN_GATE_INP_SHEXP", "INDEXER_PROJ", "SHORTCONV_CONV"),
        *("SSM_CONV1D", "SSM_CONV1D_K", "SSM_CONV1D_Q", "SSM_CONV1D_V"),
    )
)
"""Tensors that llama.cpp's converter writes in F32 though they are matrices, beside norms and all that is no weight."""

_MTP_MAP: Final = "GLM4_MOE"
"""An architecture of the package whose map has the tensors of MTP layers, for those whose maps have not."""


_Experts = dict[int, dict[int, list[Piece]]]
"""By projection, and by expert: pieces one below the other."""


class _Names:
    """Names of GGUF for names of releases."""

    def __init__(self, architecture: Architecture) -> None:
        gguf = vocabulary()
        self._name = architecture.name
        maps = dict.fromkeys((*architecture.kind.maps, _MTP_MAP))
        self._maps = [gguf.get_tensor_name_map(gguf.MODEL_ARCH[each], architecture.blocks) for each in maps]

    def of(self, released: str) -> tuple[str, bool]:
        """Name, and whether it is a tensor in F32 whatever its shape.

        Raises:
            SchemeError: llama.cpp has none.

        """
        for names in self._maps:
            found = names.get_type_and_name(released, (".weight", ".bias", ".scale"))
            if found is not None:
                kind, name = found
                wide = kind.name in _WIDE or not name.endswith(".weight") or name.endswith("_norm.weight")
                return name, wide
        raise SchemeError(f"tensor '{released}': llama.cpp's {self._name} has no place for it")


class _Stack:
    """Routed experts of a block, as they are met: pieces of weights and of biases, by projection and id."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._weights: _Experts = {}
        self._biases: _Experts = {}

    def add(self, ref: TensorRef, matrices: Sequence[Matrix], place: Place) -> None:
        """Take in the experts of one tensor: all of them, or one, or the biases of all, or of one."""
        for matrix in matrices:
            assert matrix.expert is not None
            self._pieces(self._weights, matrix.name, matrix.expert).extend(
                Piece(matrix.name, each) for each in matrix.stored
            )
        if matrices:
            return
        if not ref.name.endswith("bias"):
            raise SchemeError(f"tensor '{ref.name}': such experts are not written as GGUF")
        layout, stack = self._architecture.layout, ref.name.removesuffix("_bias")
        alone = [ref] if place.expert is not None else list(single_biases(layout, {ref.name: ref}, stack))
        for bias in alone:
            module = bias.name.removesuffix(".bias")
            pieces = self._pieces(self._biases, module, int(module.split(".")[-2]))
            pieces.extend(Piece(bias.name, each) for each in storages_of(bias))

    def _pieces(self, found: _Experts, module: str, expert: int) -> list[Piece]:
        projection = self._architecture.layout.family.experts.projections.index(module.rpartition(".")[2])
        return found.setdefault(projection, {}).setdefault(expert, [])

    def tensors(self, names: _Names, block: int) -> Iterator[Named]:
        """Weights of all experts, one tensor for each projection, or for several; then biases."""
        weights, biases = self._weights, self._biases
        if self._architecture.layout.family.experts.gate == "interleaved":
            weights, biases = _parted(weights), _parted(biases)
        for released, projections in self._architecture.kind.experts:
            name, wide = names.of(released.replace("{l}", str(block)) + ".weight")
            yield self._stacked(name, weights, projections, wide)
        for released, projections in self._architecture.kind.experts if biases else ():
            name, _ = names.of(released.replace("{l}", str(block)) + ".bias")
            bias = self._stacked(name, biases, projections, wide=True)
            yield replace(bias, shape=bias.shape[:2])

    def _stacked(self, name: str, found: _Experts, projections: tuple[int, ...], wide: bool) -> Named:
        """One tensor [E, O, I] of the experts in order.

        Raises:
            SchemeError: experts are missing, or differ in shape.

        """
        count = self._architecture.layout.num_experts
        for projection in projections:
            there = found.get(projection, {})
            if sorted(there) != list(range(count)):
                raise SchemeError(f"{name}: expected experts 0 to {count - 1}, found {len(there)}")
        experts = [[p for each in projections for p in found[each][expert]] for expert in range(count)]
        shapes = {(sum(piece.shape[0] for piece in each), piece.shape[1]) for each in experts for piece in each}
        if len(shapes) > 1:
            raise SchemeError(f"{name}: experts have shapes {sorted(shapes)}; expected one")
        ((rows, columns),) = shapes
        return Named(name, (count, rows, columns), tuple(piece for each in experts for piece in each), wide)


def _parted(found: _Experts) -> _Experts:
    """Gate and up projection, with the rows that they have in a stack where they take turns.

    What is called so until now are its halves (see `matrices.stack_cuts`): each has every second row of both.
    """
    out = {projection: dict(experts) for projection, experts in found.items() if projection > 1}
    halves = found.get(0, {}), found.get(1, {})
    for expert in sorted(halves[0].keys() & halves[1].keys()):
        pieces = (*halves[0][expert], *halves[1][expert])
        for projection in (0, 1):
            own = out.setdefault(projection, {}).setdefault(expert, [])
            for piece, cut in zip(pieces, turns([each.shape[0] for each in pieces], projection), strict=True):
                order = Order.every(cut.step, cut.first, cut.count)
                own.append(Piece(piece.matrix, piece.storage, Transform(rows=order)))
    return out
