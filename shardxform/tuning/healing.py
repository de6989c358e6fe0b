"""A decoder block being healed: loaded from the pruned view anew for every trial, and written as it became.

Connects `heal`, which knows no files, with the block's tensors: which parameters move, what they are stored as, and
where each goes. Weights that healing leaves alone keep the source's bytes.
"""

# E: experts, O: output rows, I: input columns, J: intermediate size.

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from shardxform.ask.recipe import Heal
from shardxform.plan.heal import healed_names
from shardxform.tuning.experts import TunedExperts
from shardxform.tuning.heal import Healing, HealResult, Wide, heal_block
from shardxform.tuning.healed import HealedStack

if TYPE_CHECKING:
    from shardxform.forward.skeleton import Block, Skeleton
    from shardxform.tuning.samples import Forward, Samples
    from shardxform.tuning.workers import Workers

__all__ = ["BlockHealer"]

_SPLIT: Final = re.compile(r"(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


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

    def heal(self, samples: Samples, heal: Heal, seed: int) -> HealResult:
        """Heal the block, or leave it as it was pruned if that is better on held-out samples."""
        result, self._healing = heal_block(self._load, samples, heal, seed, self._weights.precision.dtype)
        return result

    def stored(self, local: str) -> torch.Tensor:
        """A tensor of the block as it will be stored, by its name in the checkpoint less the block's prefix."""
        assert self._healing is not None
        if local in self._healing.wide:
            return self._healing.wide[local].stored
        if not local.startswith(f"{self._experts_name}."):
            return self._weights.at_rest(self._prefix + local)
        gate_up, down = self._healing.stacks
        inner = local.removeprefix(f"{self._experts_name}.")
        if inner in ("gate_up_proj", "down_proj"):
            return (gate_up if inner == "gate_up_proj" else down).stored(slice(None))
        found = _SPLIT.fullmatch(inner)
        assert found is not None, local
        expert, kind = int(found[1]), found[2]
        if kind == "down_proj":
            return down.stored(expert)
        half = gate_up.shape[1] // 2
        return gate_up.stored(expert)[slice(0, half) if kind == "gate_proj" else slice(half, None)]

    def make_ready(self, names: Sequence[str]) -> None:
        """Put the weights of modules in place as they will be stored, for what is to be done with them next."""
        assert self._healing is not None
        for name in names:
            if name == self._experts_name:
                stacks = dict(zip(("gate_up_proj", "down_proj"), self._healing.stacks, strict=True))
                for key, stack in stacks.items():
                    value = stack.stored(slice(None))
                    self._experts._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
                self._put_experts(self._experts)
            else:
                linear: Any = self._module.get_submodule(name)
                linear.weight.data = self.stored(f"{name}.weight")

    def _load(self, what: str | None) -> Healing:
        """The block as it was pruned, with some of its weights ready to move."""
        self._healing = None
        self._put_experts(self._experts)  # lets go of the stacks of the trial before
        names = self._names(what)
        wide: dict[str, Wide] = {}
        for local in sorted(self._moved | (names & self._parameters.keys())):
            parameter, stored = self._parameters[local], self._weights.at_rest(self._prefix + local)
            parameter.requires_grad_(False).copy_(stored)
            if local in names:
                wide[local] = Wide(parameter, stored)
                self._moved.add(local)
        moves = any(name.startswith(f"{self._experts_name}.") for name in names)
        tensors = self._skeleton.stacked(self._layer)
        gate_up, down = (HealedStack(tensors.pop(key), moves=moves) for key in ("gate_up_proj", "down_proj"))
        stacks = (gate_up, down)
        self._put_experts(TunedExperts(*stacks, self._experts._apply_gate, self._workers))
        return Healing(forward=self._forward, wide=wide, stacks=stacks)

    def _names(self, what: str | None) -> set[str]:
        """Local names of the tensors that move."""
        if what is None:
            return set()
        layout = self._skeleton.layout
        found = healed_names(layout, layout.places, what)
        return {name.removeprefix(self._prefix) for name in found if layout.places[name].layer == self._layer}

    def _put_experts(self, experts: torch.nn.Module) -> None:
        parent, _, own = self._experts_name.rpartition(".")
        setattr(self._module.get_submodule(parent), own, experts)
