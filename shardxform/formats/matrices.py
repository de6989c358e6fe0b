"""Linear weights of a checkpoint or view as matrices [O, I]: names, where they lie, what they belong to.

However a family stores its experts (`families.base.ExpertLayout`), there is one matrix per expert and projection: a
reference to bytes, and a `Cut` that leads from these to the matrix. This is the list from which quantization selects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from shardxform.base.tensors import TensorRef
from shardxform.errors import SchemeError
from shardxform.formats.encoding import Cut, Encoded, Encoding, Storage
from shardxform.formats.plain import storages_of
from shardxform.formats.scheme import ExpertNames
from shardxform.model.families.base import ExpertLayout
from shardxform.model.layout import Layout, Place

__all__ = ["Matrix", "matrices_of", "single_biases", "stack_cuts", "turns"]


class Matrix(NamedTuple):
    """A linear weight.

    Attributes:
        name: of its module, as it is written.
        weight: what of the source holds it, two dimensions; the matrix itself unless there is a `cut`.
        sources: names of the tensors that hold it.
        place: of the first of them.
        home: name of the module of all experts within its block, where it is one expert's.
        expert: id of the routed expert, or None.
        cut: what of `weight` it is, where that is not all of it.

    """

    name: str
    weight: TensorRef
    sources: tuple[str, ...]
    place: Place
    home: str = ""
    expert: int | None = None
    cut: Cut | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        rows, columns = self.weight.spec.shape
        return self.cut.shape((rows, columns)) if self.cut else (rows, columns)

    @property
    def nbytes(self) -> int:
        """Size of its values as they are stored, in bytes."""
        if not self.cut:
            return self.weight.nbytes
        whole = self.weight.spec.shape[0] * self.weight.spec.shape[1]
        return self.weight.nbytes * self.shape[0] * self.shape[1] // whole if whole else 0

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """Of what is stored for it; none where its values are bytes of the source."""
        if not isinstance(self.weight, Encoded):
            return ()
        if len(self.weight.sources) == 1:  # as most are
            return (self.weight.sources[0].encoding,)
        return tuple(each.encoding for each in self.weight.sources)

    @property
    def stored(self) -> tuple[Storage, ...]:
        """What is stored for its rows, one below the other."""
        return storages_of(self.weight, self.cut)

    @property
    def local(self) -> str:
        """Name within its block, expert ids left out: `mlp.experts.gate_proj`, `self_attn.q_proj`."""
        if self.expert is None:
            return self.place.template.name.removesuffix(".weight")
        _, before, last = self.name.rsplit(".", 2)
        return f"{self.home}.{before if last.isdigit() else last}"


def matrices_of(
    layout: Layout, tensors: Mapping[str, TensorRef], expert_names: ExpertNames = "split"
) -> Iterator[Matrix]:
    """List every matrix, in table order; experts in the spelling asked for.

    Norms, biases, convolutions and vectors are no matrices. Embeddings and heads are.

    Raises:
        SchemeError: experts that cannot be spelled so.

    """
    experts = layout.family.experts
    if expert_names == "fused-indexed" and experts != ExpertLayout():
        raise SchemeError(f"family {layout.family.name} has no experts in the fused-indexed spelling")
    for name, ref in tensors.items():
        place = layout.places.get(name)
        if place is None or place.companion:
            continue
        if place.template.variant == "fused":
            yield from _unstacked(name, ref, place, experts, expert_names)
        elif place.expert is not None and name.endswith(".weight"):
            yield from _per_expert(name, ref, place, expert_names, tensors, experts.home)
        elif place.expert is None and name.endswith(".weight") and len(ref.spec.shape) == 2:
            yield Matrix(name.removesuffix(".weight"), ref, (name,), place)


def single_biases(layout: Layout, tensors: Mapping[str, TensorRef], stack: str) -> Iterator[TensorRef]:
    """List the biases that stand beside the matrices of a stack when these are written one by one; as a rule none."""
    experts = layout.family.experts
    ref = tensors.get(f"{stack}_bias")
    if ref is None or not experts.bias:
        return
    home, _, name = stack.rpartition(".")
    for expert in range(ref.spec.shape[0]):
        row = ref.index(expert)
        for projection, cut in stack_cuts(experts, name, ref.spec.shape[1]):
            part = row.rows(cut.first, cut.first + cut.count)
            yield part.renamed(f"{home}.{expert}.{projection}.bias")


def stack_cuts(experts: ExpertLayout, stack: str, rows: int) -> Iterator[tuple[str, Cut]]:
    """Names of the projections in a stack of the family, and what each is of the `rows` that an expert has there.

    They are the halves of the first stack even where gate and up projection take turns in it: so auto-round's loader
    reads them on transformers 5, which puts the halves one below the other again, and has the model take them apart.
    """
    names = experts.held(stack)
    share = rows // len(names)
    for at, name in enumerate(names):
        yield name, Cut(at * share, share, experts.transposed)


def turns(counts: Iterable[int], projection: int) -> Iterator[Cut]:
    """Which rows of each run a projection has, where gate (0) and up projection (1) take turns in all of them.

    Args:
        counts: rows of the runs, such as the halves of a stack, one below the other.
        projection: the one that is asked for.

    """
    before = 0
    for count in counts:
        first = (projection - before) % 2
        yield Cut(first, (count - first + 1) // 2, step=2)
        before += count


def _unstacked(
    name: str, ref: TensorRef, place: Place, experts: ExpertLayout, expert_names: ExpertNames
) -> Iterator[Matrix]:
    """Matrices of one stack."""
    kinds = {experts.stacked(stack): stack for stack in experts.stacks}
    if place.template.name not in kinds or len(ref.spec.shape) != 3:
        return
    stack, stem = kinds[place.template.name], name.removesuffix(place.template.name) + experts.home
    sources, home = (name,), experts.home
    if expert_names == "fused-indexed":
        for expert, weight in enumerate(ref.slabs()):
            yield Matrix(f"{name}.{expert}", weight, sources, place, home, expert)
        return
    cuts = tuple(stack_cuts(experts, stack, ref.spec.shape[2 if experts.transposed else 1]))
    if all(cut.is_run for _, cut in cuts):
        for number, weight in enumerate(ref.slabs(len(cuts))):
            expert, part = divmod(number, len(cuts))
            yield Matrix(f"{stem}.{expert}.{cuts[part][0]}", weight, sources, place, home, expert)
        return
    for expert, weight in enumerate(ref.slabs()):
        for projection, cut in cuts:
            yield Matrix(f"{stem}.{expert}.{projection}", weight, sources, place, home, expert, cut)


def _per_expert(
    name: str, ref: TensorRef, place: Place, expert_names: ExpertNames, tensors: Mapping[str, TensorRef], home: str
) -> Iterator[Matrix]:
    """The matrix of a per-expert tensor; joined with its sibling where the older spelling wants gate and up as one."""
    module = name.removesuffix(".weight")
    stem, expert, projection = module.rsplit(".", 2)
    if expert_names == "split":
        yield Matrix(module, ref, (name,), place, home, place.expert)
    elif projection == "down_proj":
        yield Matrix(f"{stem}.down_proj.{expert}", ref, (name,), place, home, place.expert)
    elif projection == "gate_proj":
        up = tensors[f"{stem}.{expert}.up_proj.weight"]
        if up.spec.shape != ref.spec.shape or up.spec.dtype != ref.spec.dtype:
            what = f"{up.spec.dtype} {list(up.spec.shape)}, but '{name}' is {ref.spec.dtype} {list(ref.spec.shape)}"
            raise SchemeError(f"tensor '{up.name}' is {what}; cannot write them as one weight")
        yield Matrix(f"{stem}.gate_up_proj.{expert}", _joined(ref, up), (name, up.name), place, home, place.expert)


def _joined(gate: TensorRef, up: TensorRef) -> TensorRef:
    """One matrix of two of the same shape, the second below the first."""
    rows, columns = gate.spec.shape
    spec = gate.spec.of_shape((2 * rows, columns))
    if isinstance(gate, Encoded) or isinstance(up, Encoded):
        return Encoded(spec, (), storages_of(gate) + storages_of(up))
    return TensorRef(spec, gate.ranges + up.ranges)
