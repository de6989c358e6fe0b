"""One decoder block whose quantized weights are being tuned: modules put in place, and what they became.

Works on transformers' own layer module, whatever its attention: a linear layer is replaced by a `TunedLinear`, a fused
experts module by a `TunedExperts`. Weights are taken from the modules, not copied; other parameters stay as they are
and get no gradients. Loads and writes nothing.
"""

# E: experts, J: intermediate size, H: hidden size, O: output rows, I: input columns.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from shardxform.errors import SchemeError
from shardxform.forward.experts import STACKS
from shardxform.tuning.experts import TunedExperts
from shardxform.tuning.linear import TunedLinear
from shardxform.tuning.routing import ExpertBiases
from shardxform.tuning.stacked import Codes, StackedWeight, stacked_weight

if TYPE_CHECKING:
    from shardxform.formats.grid import Grid
    from shardxform.tuning.elementwise import Pace
    from shardxform.tuning.workers import Workers

__all__ = ["RoundedModule", "TunedBlock", "gate_and_up", "install"]

_KEEP_ROWS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedModule:
    """One module as it will be stored.

    Attributes:
        module: name within the layer, such as "self_attn.q_proj" or "mlp.experts.3.up_proj".
        expert: number of the routed expert, or None.
        codes: codes [O, I] and scales [O, G].
    """

    module: str
    expert: int | None
    codes: Codes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TunedBlock:
    """A layer with tuned modules in it.

    Attributes:
        layer: the layer, its modules replaced.
        modules: by local name, in the order given.
        grid: what the weights are rounded to.
        workers: the threads that all modules share.
    """

    layer: torch.nn.Module
    modules: dict[str, TunedLinear | TunedExperts]
    grid: Grid
    workers: Workers

    @property
    def weights(self) -> Iterator[StackedWeight]:
        """All weights being tuned."""
        for module in self.modules.values():
            tuned = (module.tuned,) if isinstance(module, TunedLinear) else (module.gate_up, module.down)
            for weight in tuned:
                assert isinstance(weight, StackedWeight)
                yield weight

    @property
    def nbytes(self) -> int:
        """Bytes held beside the 16-bit weights, scratch memory apart."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def unreached(self) -> dict[str, list[int]]:
        """By local name, the experts that no token has reached yet."""
        experts = {name: module for name, module in self.modules.items() if isinstance(module, TunedExperts)}
        return {name: [e for e, hit in enumerate(m.reached_E) if not hit] for name, m in experts.items()}

    def set_pace(self, pace: Pace) -> None:
        """Say how far every weight moves from now on."""
        for weight in self.weights:
            weight.pace = pace

    def keep(self) -> None:
        """Remember the present state as the best."""
        for weight in self.weights:
            rows = weight.shape[0] * weight.shape[1]
            runs = [(first, min(first + _KEEP_ROWS, rows)) for first in range(0, rows, _KEEP_ROWS)]
            self.workers.each(lambda run, weight=weight: weight.keep(*run), runs)  # type: ignore[misc]

    def restart(self) -> None:
        """Go back to the start: plain rounding, with the searched scales if the grid asks for them."""
        for weight in self.weights:
            weight.restart()

    def settle(self) -> None:
        """From now on multiply with what was kept, which is what `stored` gives."""
        for weight in self.weights:
            weight.settled = True

    def stored(self, projections: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[RoundedModule]:
        """What was kept, one module at a time: linear layers, and each expert's `projections`."""
        for name, module in self.modules.items():
            if isinstance(module, TunedLinear):
                yield _rounded(name, None, module.tuned, slice(None))
                continue
            gate, up, down = projections
            gate_rows, up_rows = gate_and_up(module.gate_up.shape[1], interleaved=module.interleaved)
            for expert in range(module.gate_up.shape[0]):
                yield _rounded(f"{name}.{expert}.{gate}", expert, module.gate_up, gate_rows)
                yield _rounded(f"{name}.{expert}.{up}", expert, module.gate_up, up_rows)
                yield _rounded(f"{name}.{expert}.{down}", expert, module.down, slice(None))


def install(
    layer: torch.nn.Module, names: Sequence[str], grid: Grid, workers: Workers, *, recompute: bool = True
) -> TunedBlock:
    """Replace modules of a layer by tuned ones, in place.

    Args:
        layer: a decoder layer. Its other parameters no longer require gradients. Convert their type afterwards if you
            like: the weights taken here no longer belong to the layer.
        names: local names of linear layers, and of fused experts modules as a whole.
        grid: what to round to.
        workers: threads, for the search of scales now and for everything later.
        recompute: forget what is inside children without routed experts (the attention) until the backward pass.

    Raises:
        SchemeError: a name is no linear layer or experts module of the layer, or its shape cannot be packed.
        ExecutionError: a weight has no representation on the grid.

    """
    layer.requires_grad_(False)
    modules: dict[str, TunedLinear | TunedExperts] = {}
    for name in names:
        modules[name] = _tuned(_find(layer, name), name, grid, workers)
        parent, _, own = name.rpartition(".")
        setattr(layer.get_submodule(parent), own, modules[name])
    if recompute:
        for child in layer.children():
            inside = {type(module) for module in child.modules()}
            if TunedLinear in inside and TunedExperts not in inside:
                child.forward = partial(_recomputed, child.forward)
    return TunedBlock(layer=layer, modules=modules, grid=replace(grid), workers=workers)


def _find(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError as e:
        raise SchemeError(f"module '{name}': expected one of the layer's modules, found none of that name") from e


def _tuned(module: torch.nn.Module, name: str, grid: Grid, workers: Workers) -> TunedLinear | TunedExperts:
    if isinstance(module, torch.nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        return TunedLinear(stacked_weight(module.weight[None], grid, workers, name), workers, bias)
    parameters = dict(module.named_parameters(recurse=False))
    if not _are_experts(module, parameters):
        found = f"{type(module).__name__} with {[f'{key} {list(p.shape)}' for key, p in parameters.items()]}"
        raise SchemeError(f"module '{name}': expected a linear layer or stacks of experts [E, O, I], found {found}")
    gate_up, down = (stacked_weight(parameters[p], grid, workers, f"{name}.{p}") for p in STACKS[:2])
    biases = [parameters[p].detach() for p in STACKS[2:] if p in parameters]
    gate: Any = module._apply_gate
    return TunedExperts(
        gate_up,
        down,
        gate,
        workers,
        ExpertBiases(gate_up_EO=biases[0], down_EH=biases[1]) if biases else None,
        interleaved=not getattr(module, "is_concatenated", True),
    )


def _are_experts(module: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is a gated experts module whose stacks stand as `Skeleton.stacked` gives them."""
    if parameters.keys() not in ({*STACKS[:2]}, {*STACKS}) or not hasattr(module, "_apply_gate"):
        return False
    gate_up, down = (parameters[p].shape for p in STACKS[:2])
    return (gate_up[0], gate_up[1], gate_up[2]) == (down[0], 2 * down[2], down[1])


def gate_and_up(rows: int, *, interleaved: bool) -> tuple[slice, slice]:
    """Which of the `rows` of a gate and up projection are the gate's, and which the up projection's."""
    if interleaved:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(0, rows // 2), slice(rows // 2, None)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _rounded(module: str, expert: int | None, weight: Any, rows: slice) -> RoundedModule:  # noqa: ANN401
    return RoundedModule(module=module, expert=expert, codes=weight.codes(expert or 0, rows))
