"""Linear modules of a checkpoint or view: names, weights and what they belong to, experts un-fused.

Fused experts `[E, 2I, H]` and `[E, H, I]` are seen as one module per expert and matrix, as references to bytes of the
fused tensors; per-expert tensors as they are. This is the list from which quantization selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from shardxform.base.tensors import TensorRef
from shardxform.errors import SchemeError
from shardxform.model.layout import Layout, Place

__all__ = ["LINEAR_ROLES", "ExpertNames", "Module", "modules_of"]

ExpertNames = Literal["split", "fused-indexed"]

LINEAR_ROLES: Final = frozenset({"routed experts", "shared experts", "attention", "linear attention", "dense mlp"})
"""Roles whose 2-D weights are linear layers that clients can run quantized."""


@dataclass(frozen=True, slots=True)
class Module:
    """A linear module.

    Attributes:
        name: without `.weight`, as it is written.
        weight: its 2-D weight [O, I], as bytes of the source.
        sources: names of the tensors that hold it.
        place: of the first of them.
        expert: id of the routed expert, or None.

    """

    name: str
    weight: TensorRef
    sources: tuple[str, ...]
    place: Place
    expert: int | None = None

    @property
    def local(self) -> str:
        """Name within its block, expert ids left out: `mlp.experts.gate_proj`, `self_attn.q_proj`."""
        template = self.place.template.name
        if self.expert is None:
            return template.removesuffix(".weight")
        return "mlp.experts." + next(part for part in self.name.split(".")[::-1] if not part.isdigit())


def modules_of(
    layout: Layout, tensors: Mapping[str, TensorRef], expert_names: ExpertNames = "split"
) -> Iterator[Module]:
    """List every module with a 2-D weight, in table order; experts in the spelling asked for.

    Norms, biases, convolutions and vectors are no modules here. Embeddings and heads are.
    """
    for name, ref in tensors.items():
        place = layout.places.get(name)
        if place is None or place.companion:
            continue
        if place.template.variant == "fused":
            yield from _unfused(name, ref, place, expert_names)
        elif place.expert is not None:
            yield from _per_expert(name, ref, place, expert_names, tensors)
        elif name.endswith(".weight") and len(ref.spec.shape) == 2:
            yield Module(name.removesuffix(".weight"), ref, (name,), place)


def _unfused(name: str, ref: TensorRef, place: Place, expert_names: ExpertNames) -> Iterator[Module]:
    """Modules of one fused tensor; rows 0..I-1 of `gate_up_proj` are the gate, I..2I-1 the up projection."""
    stem, projection = name.rsplit(".", 1)
    for expert in range(ref.spec.shape[0]):
        weight = ref.index(expert)
        if expert_names == "fused-indexed":
            yield Module(f"{name}.{expert}", weight, (name,), place, expert)
        elif projection == "gate_up_proj":
            half = weight.spec.shape[0] // 2
            yield Module(f"{stem}.{expert}.gate_proj", weight.rows(0, half), (name,), place, expert)
            yield Module(f"{stem}.{expert}.up_proj", weight.rows(half, 2 * half), (name,), place, expert)
        else:
            yield Module(f"{stem}.{expert}.{projection}", weight, (name,), place, expert)


def _per_expert(
    name: str, ref: TensorRef, place: Place, expert_names: ExpertNames, tensors: Mapping[str, TensorRef]
) -> Iterator[Module]:
    """The module of a per-expert tensor; joined with its sibling where the older spelling wants gate and up as one."""
    module = name.removesuffix(".weight")
    stem, expert, projection = module.rsplit(".", 2)
    if expert_names == "split":
        yield Module(module, ref, (name,), place, place.expert)
    elif projection == "down_proj":
        yield Module(f"{stem}.down_proj.{expert}", ref, (name,), place, place.expert)
    elif projection == "gate_proj":
        up = tensors[f"{stem}.{expert}.up_proj.weight"]
        if up.spec.shape != ref.spec.shape or up.spec.dtype != ref.spec.dtype:
            what = f"{up.spec.dtype} {list(up.spec.shape)}, but '{name}' is {ref.spec.dtype} {list(ref.spec.shape)}"
            raise SchemeError(f"tensor '{up.name}' is {what}; cannot write them as one weight")
        rows, columns = ref.spec.shape
        both = TensorRef(replace(ref.spec, shape=(2 * rows, columns)), ref.ranges + up.ranges)
        yield Module(f"{stem}.gate_up_proj.{expert}", both, (name, up.name), place, place.expert)
