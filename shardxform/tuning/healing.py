"""A decoder block being healed: loaded from the pruned view anew for every trial, and written as it became.

Connects `heal`, which knows no files, with the block's tensors: which parameters move, what they are stored as, and
where each goes. Weights that healing leaves alone keep the source's bytes.
"""

# E: experts, O: output rows, I: input columns, J: intermediate size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch

from shardxform.ask.recipe import Heal
from shardxform.forward.experts import STACKS
from shardxform.plan.heal import healed_names
from shardxform.tuning.block import gate_and_up
from shardxform.tuning.experts import TunedExperts
from shardxform.tuning.heal import Healing, HealResult, Wide, heal_block
from shardxform.tuning.healed import HealedStack
from shardxform.tuning.routing import ExpertBiases

if TYPE_CHECKING:
    from shardxform.forward.skeleton import Block, Skeleton
    from shardxform.tuning.samples import Forward, Samples
    from shardxform.tuning.workers import Workers

__all__ = ["BlockHealer"]


class BlockHealer:
    """Heals one block that `Skeleton.tunable` loaded without its experts."""

    def __init__(self, skeleton: Skeleton, block: Block, layer: int, forward: Forward, workers: Workers) -> None:
        self._skeleton, self._layer, self._forward, self._workers = skeleton, layer, forward, workers
        self._weights, self._prefix = skeleton.weights, skeleton.prefix(layer)
        self._module: Any = block.module
        self._experts_name = skeleton.experts_name(layer)
        self._experts: Any = self._module.get_submodule(self._experts_name)
        inside = {id(parameter) for parameter in self._experts.parameters()}
        named = self._module.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if id(parameter) not in inside}
        self._moved: set[str] = set()
        self._healing: Healing | None = None
        self._biases: ExpertBiases | None = None

    def heal(self, samples: Samples, heal: Heal, seed: int) -> HealResult:
        """Heal the block, or leave it as it was pruned if that is better on held-out samples."""
        result, self._healing = heal_block(self._load, samples, heal, seed, self._weights.precision.dtype)
        return result

    def stored(self, local: str) -> torch.Tensor:
        """A tensor of the block as it will be stored, by its name in the checkpoint less the block's prefix."""
        assert self._healing is not None
        name = self._skeleton.module_name(local)
        if name in self._healing.wide:
            return self._healing.wide[name].stored
        if not name.startswith(f"{self._experts_name}."):
            return self._weights.at_rest(self._prefix + local)
        return self._of_experts(name.removeprefix(f"{self._experts_name}."), self._healing.stacks)

    def _of_experts(self, name: str, healed: tuple[HealedStack, ...]) -> torch.Tensor:
        """A stack or one expert's matrix, as the family's checkpoints have it."""
        (gate_up, down), layout = healed, self._skeleton.layout.family.experts
        if name in layout.stacks:
            stack = (gate_up if name == layout.stacks[0] else down).stored(slice(None))
            return stack.mT if layout.transposed else stack
        expert, projection = name.removesuffix(".weight").split(".")
        if projection == layout.projections[2]:
            return down.stored(int(expert))
        rows = gate_and_up(gate_up.shape[1], interleaved=layout.gate == "interleaved")
        return gate_up.stored(int(expert))[rows[layout.projections.index(projection)]]

    def make_ready(self, names: Sequence[str]) -> None:
        """Put the weights of modules in place as they will be stored, for what is to be done with them next."""
        assert self._healing is not None
        for name in names:
            if name == self._experts_name:
                ready = [stack.stored(slice(None)) for stack in self._healing.stacks]
                ready += [*astuple(self._biases)] if self._biases else []
                for key, value in zip(STACKS, ready, strict=False):
                    self._experts._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
                self._put_experts(self._experts)
            else:
                linear: Any = self._module.get_submodule(name)
                linear.weight.data = self.stored(self._skeleton.stored_name(f"{name}.weight"))

    def _load(self, what: str | None) -> Healing:
        """The block as it was pruned, with some of its weights ready to move."""
        self._healing = None
        self._put_experts(self._experts)  # lets go of the stacks of the trial before
        names = self._names(what)
        wide: dict[str, Wide] = {}
        for local in sorted(self._moved | (names & self._parameters.keys())):
            name = self._prefix + self._skeleton.stored_name(local)
            parameter, stored = self._parameters[local], self._weights.at_rest(name)
            parameter.requires_grad_(False).copy_(stored)
            if local in names:
                wide[local] = Wide(parameter, stored)
                self._moved.add(local)
        moves = any(name.startswith(f"{self._experts_name}.") for name in names)
        tensors = self._skeleton.stacked(self._layer)
        gate_up, down = (HealedStack(tensors.pop(key), moves=moves) for key in STACKS[:2])
        stacks = (gate_up, down)
        self._biases = ExpertBiases(*tensors.values()) if tensors else None
        self._put_experts(TunedExperts(*stacks, self._experts._apply_gate, self._workers, self._biases))
        return Healing(forward=self._forward, wide=wide, stacks=stacks)

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
