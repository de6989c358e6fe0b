"""Healing one block of a checkpoint: its weights found, moved, rounded to what they are written in, and given out.

The block is loaded from the pruned view anew for every trial; weights that healing leaves alone keep the source's
bytes. What is written in small floats is rounded to them when the block stops moving, so that the samples judge what is
written. Where pruned experts were merged into those that stay, a block begins as far on the way to these as is better.
"""

# E: experts, O: output rows of one, I: input columns.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch

from shardxform.ask.recipe import Heal
from shardxform.base.constants import MERGED_SHARES
from shardxform.errors import ExecutionError
from shardxform.formats.encoding import Encoded, Nearest, Role, Storage, round_to
from shardxform.formats.packing import bf16_bits_of, float32_of
from shardxform.formats.plain import Plain
from shardxform.forward.weights import activation, stack_names
from shardxform.plan.steps import KeptItem, healed_names
from shardxform.tuning.heal import HealedStack, HealResult, MovingBlock, Wide, heal_block, judge_start, pace_of_block
from shardxform.tuning.modules import ExpertBiases, TunedExperts
from shardxform.tuning.samples import NonFiniteLoss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardxform.forward.skeleton import Block, Skeleton
    from shardxform.tuning.merging import MergedExperts
    from shardxform.tuning.samples import Forward, Loss, Samples
    from shardxform.tuning.schedule import BlockPace
    from shardxform.tuning.workers import Workers

__all__ = ["BlockHealer"]

_FINITE_TILE: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Spot:
    """Where a matrix that is stored by itself is in a block, `turned` there."""

    holder: Wide | HealedStack
    rows: slice
    turned: bool

    def read(self) -> NDArray[np.float32]:
        """The values [O, I] in memory of their own."""
        value = self.holder.values(self.rows)
        return np.array((value.T if self.turned else value).cpu().numpy(), order="C")

    def write(self, values_OI: NDArray[np.float32]) -> None:
        """Put other values there."""
        value = torch.from_numpy(values_OI)
        self.holder.put(self.rows, value.T if self.turned else value)


def _finite(value: torch.Tensor) -> bool:
    """Whether all is; a few megabytes at a time, since stacked experts are a gigabyte."""
    return all(bool(torch.isfinite(part).all()) for part in torch.split(value.flatten(), _FINITE_TILE))


class BlockHealer:
    """Heals one block that `Skeleton.tunable` loaded without its experts."""

    def __init__(
        self,
        skeleton: Skeleton,
        block: Block,
        layer: int,
        forward: Forward,
        workers: Workers,
        kept: Sequence[KeptItem] = (),
    ) -> None:
        """Look at the block; `kept` is what is to be written of it as it is healed."""
        self._skeleton, self._layer, self._forward, self._workers = skeleton, layer, forward, workers
        self._weights, self._prefix = skeleton.weights, skeleton.prefix(layer)
        self._module: Any = block.module
        self._experts_name = skeleton.experts_name(layer)
        self._experts: Any = self._module.get_submodule(self._experts_name)
        inside = {id(parameter) for parameter in self._experts.parameters()}
        named = self._module.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if id(parameter) not in inside}
        self._moved: set[str] = set()
        self._healing: MovingBlock | None = None
        self._biases: ExpertBiases | None = None
        small = [item for item in kept if not isinstance(item.target, Plain)]
        self._small = {item.tensor.name.removeprefix(self._prefix): item for item in small}
        self._coded: dict[str, list[dict[Role, NDArray[Any]]]] = {}
        self._merged: MergedExperts | None = None
        self._share = 0.0  # of the way to them
        self._losses: tuple[Loss, float] | None = None  # as it was pruned, and merged

    def begin_merged(
        self, merged: MergedExperts, samples: Samples, heal: Heal, seed: int, on_judged: Callable[[], None]
    ) -> None:
        """Begin on the way to merged experts, as far as held-out samples say: nowhere, if nothing else is better.

        `on_judged` is called whenever they have judged the block: as it was pruned, and each share of the way.
        """
        dtype, tried = self._weights.precision.dtype, dict[float, float]()
        pruned, self._merged = judge_start(self._load, samples, heal, seed, dtype), merged
        on_judged()
        for self._share in MERGED_SHARES:
            try:
                tried[self._share] = judge_start(self._load, samples, heal, seed, dtype).mean
            except NonFiniteLoss:
                tried[self._share] = math.inf
            on_judged()
        best = min(tried, key=lambda share: tried[share])
        self._share = best if tried[best] < pruned.mean else 0.0
        self._losses = (pruned, tried[best])

    def heal(self, samples: Samples, heal: Heal, seed: int) -> HealResult:
        """Heal the block, or leave it as it was pruned, or merged, if held-out samples tell that this is better."""
        dtype = self._weights.precision.dtype
        pruned, merged_loss = self._losses or (None, None)
        result, self._healing = heal_block(self._load, samples, heal, seed, dtype, pruned)
        return replace(result, merged_loss=merged_loss, merged=self._share)

    def pace(self, samples: Samples, heal: Heal, seed: int) -> BlockPace:
        """What a few steps take and give; the block is loaded anew for what comes next."""
        return pace_of_block(self._load, samples, heal, seed, self._weights.precision.dtype)

    def stored(self, local: str) -> torch.Tensor:
        """A tensor of the block as it will be stored, by its name in the checkpoint less the block's prefix."""
        assert self._healing is not None
        name = self._skeleton.module_name(local)
        if name in self._healing.wide:
            return self._healing.wide[name].stored
        if not name.startswith(f"{self._experts_name}."):
            return self._weights.at_rest(self._prefix + local)
        return self._of_experts(name.removeprefix(f"{self._experts_name}."), self._healing.stacks)

    def values_of(self, name: str) -> NDArray[np.uint8]:
        """Bytes of a tensor after healing, in the type that it moves in.

        Raises:
            ExecutionError: a value is not finite.

        """
        value = self.stored(name.removeprefix(self._prefix))
        if not _finite(value):
            raise ExecutionError(f"tensor '{name}': not finite after healing")
        return value.cpu().contiguous().view(torch.uint8).reshape(-1).numpy()

    def parts(self, item: KeptItem) -> Iterator[NDArray[np.uint8]]:
        """Bytes of each part of what is healed, as it will be stored.

        Raises:
            ExecutionError: values that are not finite.

        """
        local = item.tensor.name.removeprefix(self._prefix)
        if local not in self._small:
            yield self.values_of(item.tensor.name)
            return
        assert isinstance(item.tensor, Encoded)
        coded = self._coded.get(local) or [self._weights.stored(source)[0] for source in item.tensor.sources]
        for role, _ in item.parts:
            yield np.concatenate([part[role].reshape(-1).view(np.uint8) for part in coded])

    def _round(self, moving: MovingBlock) -> None:
        """Round what moved to what it is written in; what no token came to keeps its codes."""
        for local, item in self._small.items():
            coded = []
            for spot, source in self._spots(item, local, moving):
                stored, before_OI = self._weights.stored(source)
                values_OI = spot.read()
                if not np.isfinite(values_OI).all():
                    return  # the trial has failed, and nothing of it is written
                if not np.array_equal(values_OI, float32_of(bf16_bits_of(before_OI), "BF16")):
                    whole = stored["whole"].view(np.float32).reshape(()) if "whole" in stored else None
                    stored = round_to(cast(Nearest, item.target), values_OI, whole)
                    spot.write(values_OI)
                coded.append(stored)
            self._coded[local] = coded

    def _spots(self, item: KeptItem, local: str, moving: MovingBlock) -> Iterator[tuple[_Spot, Storage]]:
        """Where the stored matrices of a tensor are in the block; none for one that does not move."""
        assert isinstance(item.tensor, Encoded)
        name, sources = self._skeleton.module_name(local), item.tensor.sources
        turned = bool(sources[0].cut and sources[0].cut.transposed)
        if name in moving.wide:
            yield _Spot(moving.wide[name], slice(None), turned), sources[0]
        changed = self._share > 0 or all(stack.moves for stack in moving.stacks)
        if not name.startswith(f"{self._experts_name}.") or not changed:
            return
        layout = self._skeleton.layout.family.experts
        stack, expert, rows = self._held(name.removeprefix(f"{self._experts_name}."), moving.stacks)
        for number, source in enumerate(sources):
            first = stack.shape[1] * (number if expert is None else expert)
            run = slice(first + rows.start, first + rows.stop)
            yield _Spot(stack, run, turned != (layout.transposed and expert is None)), source

    def _of_experts(self, name: str, healed: tuple[HealedStack, ...]) -> torch.Tensor:
        """A stack or one expert's matrix, as the family's checkpoints have it."""
        stack, expert, rows = self._held(name, healed)
        if expert is not None:
            return stack.stored(expert)[rows]
        whole = stack.stored(slice(None))
        return whole.mT if self._skeleton.layout.family.experts.transposed else whole

    def _held(self, name: str, healed: tuple[HealedStack, ...]) -> tuple[HealedStack, int | None, slice]:
        """The stack that holds what checkpoints call `name`, the expert whose it is or None for all, and its rows."""
        (gate_up, down), layout = healed, self._skeleton.layout.family.experts
        stacks = dict(zip(stack_names(self._experts), healed, strict=False))
        if name in stacks:
            return stacks[name], None, slice(0, stacks[name].shape[1])
        expert, projection = name.removesuffix(".weight").split(".")
        if projection == layout.projections[-1]:
            return down, int(expert), slice(0, down.shape[1])
        share = gate_up.shape[1] // len(layout.inner)
        first = layout.inner.index(projection) * share
        return gate_up, int(expert), slice(first, first + share)

    def make_ready(self, names: Sequence[str]) -> None:
        """Put the weights of modules in place as they will be stored, for what is to be done with them next."""
        assert self._healing is not None
        for name in names:
            if name == self._experts_name:
                ready = [stack.stored(slice(None)) for stack in self._healing.stacks]
                ready += [*astuple(self._biases)] if self._biases else []
                for key, value in zip(stack_names(self._experts), ready, strict=False):
                    self._experts._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
                self._put_experts(self._experts)
            else:
                linear: Any = self._module.get_submodule(name)
                linear.weight.data = self.stored(self._skeleton.stored_name(f"{name}.weight", self._prefix))

    def _load(self, what: str | None) -> MovingBlock:
        """The block as it was pruned, with some of its weights ready to move."""
        self._healing = None
        self._coded = {}
        self._put_experts(self._experts)  # lets go of the stacks of the trial before
        names = self._names(what)
        wide: dict[str, Wide] = {}
        for local in sorted(self._moved | (names & self._parameters.keys())):
            name = self._prefix + self._skeleton.stored_name(local, self._prefix)
            parameter, stored = self._parameters[local], self._weights.at_rest(name)
            parameter.requires_grad_(False).copy_(stored)
            if local in names:
                wide[local] = Wide(parameter, stored)
                self._moved.add(local)
        moves = any(name.startswith(f"{self._experts_name}.") for name in names)
        tensors = self._skeleton.stacked(self._layer)
        if self._merged and self._share:
            gate_up, down = (tensors[key] for key in stack_names(self._experts)[:2])
            self._merged.into(gate_up, down, self._share)
            del gate_up, down  # the dictionary alone holds them
        first, second = stack_names(self._experts)[:2]
        stacks = HealedStack(tensors.pop(first), moves=moves), HealedStack(tensors.pop(second), moves=moves)
        self._biases = ExpertBiases(*tensors.values()) if tensors else None
        experts = TunedExperts(*stacks, activation(self._experts), self._workers, self._biases)
        self._put_experts(experts)
        rounded = self._round if self._small else None
        reach = (lambda: experts.reach) if moves else (lambda: 1.0)
        return MovingBlock(forward=self._forward, wide=wide, stacks=stacks, reach=reach, rounded=rounded)

    def _names(self, what: str | None) -> set[str]:
        """Local names of the tensors that move."""
        if what is None:
            return set()
        layout = self._skeleton.layout
        found = healed_names(layout, layout.places, what)
        local = (name.removeprefix(self._prefix) for name in found if layout.places[name].layer == self._layer)
        return {self._skeleton.module_name(name) for name in local}

    def _put_experts(self, experts: torch.nn.Module) -> None:
        parent, _, own = self._experts_name.rpartition(".")
        setattr(self._module.get_submodule(parent), own, experts)
