"""Merging pruned experts into those that stay: the start of healing, or all that is done to a block.

After REAM (arXiv 2604.04356): on a sample of tokens the most salient expert that stays takes those of the pruned ones
that are most like it, then the next one does. Experts are alike by their outputs and by the router's logits. Channels
of an expert have no order of their own, so those of a pruned one are first put in the order of the other's, by
assignment; then weights are averaged by saliency, the sum of the router's weight times the size of the output. Biases
stay those of the expert that stays.

Experts are read one at a time, and what comes of them goes to the disk. Work is cut the same way whatever the number of
threads, so the results are the same.

    WORK/mergedup-0003.hidden, mergeddown-0003.hidden    experts of block 3 that stay, [K, 2J, H] and [K, H, J]
"""

# E: experts of the source, K: those that stay, G: pruned ones, R: tokens as experts are given them, T: as the router
# is, t: of a tile, H: hidden size, J, I: intermediate sizes, O: rows of `gate_up`, W: weights of a channel, X: t * H.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch.nn.functional import linear, normalize

from shardxform.base.constants import LARGEST_GROUP, MERGE_TILE, MERGE_TOKENS, MERGED_AT_ONCE
from shardxform.errors import ExecutionError
from shardxform.forward.runtime import give_back
from shardxform.forward.weights import ExpertValues, Precision, RoutedExpert, activation
from shardxform.forward.work import HiddenFile
from shardxform.tuning.workers import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardxform.base.file_system import FileSystem
    from shardxform.forward.skeleton import Block, Skeleton
    from shardxform.tuning.workers import Workers

__all__ = ["MergedExperts", "Merger", "Running", "aligned", "groups_of"]

_CALLED_WITH: Final = ("hidden_states", "top_k_index", "top_k_weights")
_ENTERING: Final = ("hidden_states",)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedExperts:
    """The experts of a block that stay, with pruned ones merged into them, on the disk: [K, 2J, H] and [K, H, J]."""

    gate_up: HiddenFile
    down: HiddenFile

    def into(self, gate_up_KOH: torch.Tensor, down_KHJ: torch.Tensor, share: float) -> None:
        """Move those that stay a part of the way to them, in place, one at a time."""
        for file, stack in ((self.gate_up, gate_up_KOH), (self.down, down_KHJ)):
            with file.reading() as reader:
                for expert in range(len(stack)):
                    mean = reader.rows(expert, expert + 1)[0].to(stack.device, torch.float32)
                    stack[expert] = torch.lerp(stack[expert].float(), mean, share)

    def remove(self) -> None:
        """Remove the files."""
        self.gate_up.remove()
        self.down.remove()


class _Seen(NamedTuple):
    """What came to the experts of a block: inputs, the router's weights for each of them, its logits or None."""

    entering_RH: torch.Tensor
    weight_RE: torch.Tensor
    logit_TE: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How the work is done, which changes no result.

    Attributes:
        workers: threads, on a CPU.
        at_once: experts that they may have in float32 at once, at most.
        on_work: called with the share of the work that is done, ever more, up to 1.
        stopped: raises when the run is to stop.

    """

    workers: Workers
    at_once: int
    on_work: Callable[[float], None]
    stopped: Callable[[], None]


class Merger:
    """Merges the pruned experts of one block into those that stay."""

    def __init__(
        self,
        original: Skeleton,
        view: Skeleton,
        layer: int,
        keep: Sequence[int],
        running: Running,
    ) -> None:
        """Look at the block; nothing is read yet.

        Args:
            original: the model before pruning.
            view: the same pruned, whose expert k is `keep[k]` of the original.
            layer: of the block.
            keep: experts that stay, ascending.
            running: how the work is done.

        """
        self._original, self._view, self._layer, self._running = original, view, layer, running
        self._keep, count = tuple(keep), original.layout.num_experts
        self._gone = tuple(expert for expert in range(count) if expert not in set(keep))
        self._precision = Precision(original.weights.precision.device, torch.float32)
        self._experts: Any = original.module(layer).get_submodule(original.experts_name(layer))
        self._between = activation(self._experts)

    @torch.no_grad()
    def merge(self, block: Block, entering: Iterable[torch.Tensor], work: Path, fs: FileSystem) -> MergedExperts:
        """Merge, by a sample of tokens, and write what comes of it.

        Args:
            block: the original's, loaded.
            entering: hidden states [B, T, H] that enter it where the blocks before are done; `MERGE_TOKENS` are taken.
            work: where the files go.
            fs: effects.

        Raises:
            ExecutionError: the outputs of an expert are not finite.

        """
        with one_thread():
            seen = self._see(block, entering)
            self._rows, self._rows_of_all = 0, len(seen.entering_RH)
            block.bank.loaded.clear()
            give_back()
            alike_KG, worth_E = self._alike(seen)
            groups = groups_of(alike_KG, worth_E, self._keep, self._gone, self._original.layout.in_set)
            return self._write(seen, groups, worth_E, work, fs)

    # -- what experts do ----------------------------------------------------------------------------------------

    def _see(self, block: Block, entering: Iterable[torch.Tensor]) -> _Seen:
        """Run the block, and note with what its experts and its router are called."""
        calls: list[Mapping[str, torch.Tensor]] = []
        routed: list[torch.Tensor] = []
        taken = 0
        hooks = [_on_call(self._experts, _CALLED_WITH, calls.append)]
        if router := self._router():
            hooks.append(_on_call(router[0], _ENTERING, lambda given: routed.append(given["hidden_states"])))
        try:
            for hidden_BTH in entering:
                self._running.stopped()
                block(hidden_BTH)
                taken += hidden_BTH.shape[0] * hidden_BTH.shape[1]
                if taken >= MERGE_TOKENS:
                    break
        finally:
            for hook in hooks:
                hook.remove()
        index_RK, weight_RK = (torch.cat([call[name] for call in calls]) for name in _CALLED_WITH[1:])
        count = self._original.layout.num_experts
        weight_RE = torch.zeros(len(index_RK), count + 1, device=index_RK.device)  # one more, for what goes to none
        weight_RE.scatter_add_(1, index_RK.clamp(max=count), weight_RK.float())
        entering_RH = torch.cat([call[_CALLED_WITH[0]].reshape(-1, call[_CALLED_WITH[0]].shape[-1]) for call in calls])
        return _Seen(
            entering_RH[:MERGE_TOKENS], weight_RE[:MERGE_TOKENS, :count], _logits(routed, router[1] if router else None)
        )

    def _router(self) -> tuple[torch.nn.Module, torch.Tensor] | None:
        """The module of the block that has the router's weight [E, H], and that; None where tables route."""
        original, prefix = self._original, self._original.prefix(self._layer)
        for name, place in original.layout.places.items():
            shape = place.template.shape.split(",")
            if place.layer != self._layer or place.scope != "block" or place.template.ids:
                continue
            if place.template.role == "router" and len(shape) == 2 and shape[0] == "E":
                local = original.module_name(name.removeprefix(prefix))
                module = original.module(self._layer).get_submodule(local.rpartition(".")[0])
                return module, original.weights.tensor(name, torch.float32)
        return None

    def _alike(self, seen: _Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeness of experts that stay and pruned ones [K, G], from 0 to 1, and the saliency of all [E]."""
        alike_KG = torch.zeros(len(self._keep), len(self._gone), dtype=torch.float64)
        worth_E = torch.zeros(self._original.layout.num_experts, dtype=torch.float64)
        rows, width = seen.entering_RH.shape
        step = max(1, MERGE_TILE // (4 * width * len(self._keep)))
        for first in range(0, rows, step):
            x_tH, g_tE = (each[first : first + step] for each in (seen.entering_RH.float(), seen.weight_RE))
            kept_KX = x_tH.new_empty(len(self._keep), x_tH.numel())
            for place_X, unit_tH in zip(kept_KX, self._units(x_tH, g_tE, self._keep, worth_E), strict=True):
                place_X.copy_(unit_tH.flatten())
            for at in range(0, len(self._gone), MERGED_AT_ONCE):
                gone = self._gone[at : at + MERGED_AT_ONCE]
                gone_gX = torch.stack([unit.flatten() for unit in self._units(x_tH, g_tE, gone, worth_E)])
                alike_KG[:, at : at + len(gone)] += (kept_KX @ gone_gX.T).cpu()
        alike_KG = (1 + alike_KG / rows) / 2
        if seen.logit_TE is not None:
            logit_ET = seen.logit_TE.T.double().cpu()
            apart_KG = _distances(logit_ET[list(self._keep)], logit_ET[list(self._gone)])
            alike_KG = (alike_KG + 1 - apart_KG / apart_KG.max().clamp(min=torch.finfo(torch.float32).tiny)) / 2
        return alike_KG, worth_E

    def _units(
        self, x_tH: torch.Tensor, g_tE: torch.Tensor, experts: Sequence[int], worth_E: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Outputs of experts [t, H], each token's of length 1; adds to their saliency."""

        def run(item: tuple[int, RoutedExpert]) -> tuple[int, float, torch.Tensor]:
            expert, resting = item
            values = resting.dense(self._precision)
            out_tH = linear(self._inner(values, x_tH), values.down_HI, values.down_bias_H)
            size_t = out_tH.norm(dim=-1)
            return expert, float(g_tE[:, expert].double() @ size_t.double()), normalize(out_tH, dim=-1)

        for expert, worth, unit_tH in self._each(run, ((expert, self._read(expert)) for expert in experts)):
            if not worth < float("inf"):
                raise ExecutionError(f"block {self._layer}: the outputs of expert {expert} are not finite")
            worth_E[expert] += worth
            self._tell(len(x_tH))
            yield unit_tH

    def _inner(self, values: ExpertValues, x_RH: torch.Tensor) -> torch.Tensor:
        """What enters the down projection [R, J]."""
        return self._between(linear(x_RH, values.gate_up_OH, values.gate_up_bias_O))

    def _tell(self, rows: int) -> None:
        """Say how far the work is, when an expert was run on some more rows: all are run, and pruned ones once more."""
        self._rows += rows
        self._running.on_work(self._rows / ((len(self._keep) + 2 * len(self._gone)) * self._rows_of_all))

    def _read(self, expert: int) -> RoutedExpert:
        self._running.stopped()
        return self._original.weights.expert("block", self._layer, expert)

    def _each(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in order, from threads on a CPU."""
        if self._precision.device.type != "cpu":
            return map(function, items)
        return self._running.workers.ordered(function, items, self._running.at_once)

    # -- what becomes of them -----------------------------------------------------------------------------------

    def _write(
        self, seen: _Seen, groups: Mapping[int, Sequence[int]], worth_E: torch.Tensor, work: Path, fs: FileSystem
    ) -> MergedExperts:
        first = self._view.weights.expert("block", self._layer, 0).at_rest()
        files = []
        for chain, like in (("mergedup", first.gate_up_OH), ("mergeddown", first.down_HI)):
            shape = (len(self._keep), like.shape[0], like.shape[1])
            files.append(HiddenFile(work / f"{chain}-{self._layer:04d}.hidden", shape, like.dtype, fs))
        with files[0].writing() as up, files[1].writing() as down:
            for at, expert in enumerate(self._keep):
                values = self._merged(seen, at, groups[expert], worth_E)
                up.put(at, values[0][None])
                down.put(at, values[1][None])
        return MergedExperts(gate_up=files[0], down=files[1])

    def _merged(
        self, seen: _Seen, at: int, group: Sequence[int], worth_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert that stays, the mean of itself and its group: [O, H] and [H, J]."""
        expert = self._view.weights.expert("block", self._layer, at)
        worths = [float(worth_E[each]) for each in (self._keep[at], *group)]
        if not group or sum(worths[1:]) == 0:
            return expert.at_rest()[:2]
        x_RH = seen.entering_RH.float()
        resting = expert.at_rest()
        values = expert.dense(self._precision)
        target_JW, inner_RJ = self._channels(values), self._inner(values, x_RH)

        def align(other: RoutedExpert) -> torch.Tensor:
            theirs = other.dense(self._precision)
            source_JW = self._channels(theirs)
            return source_JW[aligned(target_JW, inner_RJ, source_JW, self._inner(theirs, x_RH))]

        mean_JW = target_JW * (worths[0] / sum(worths))
        for worth, channels_JW in zip(worths[1:], self._each(align, map(self._read, group)), strict=True):
            mean_JW += channels_JW * (worth / sum(worths))
            self._tell(len(x_RH))
        return self._of_channels(mean_JW, resting)

    def _channels(self, values: ExpertValues) -> torch.Tensor:
        """Weights of every channel [J, W]: its rows of gate and up projection, its column of the down projection."""
        gate_up_OH, down_HJ = values.gate_up_OH, values.down_HI
        channels, width = down_HJ.shape[1], gate_up_OH.shape[1]
        if self._experts.has_gate and self._experts.is_concatenated:
            gate_up_OH = gate_up_OH.reshape(2, channels, width).transpose(0, 1)
        return torch.cat([gate_up_OH.reshape(channels, -1), down_HJ.T], 1)

    def _of_channels(self, mean_JW: torch.Tensor, like: ExpertValues) -> tuple[torch.Tensor, torch.Tensor]:
        """The opposite, in the type that the expert is stored in."""
        channels, width = like.down_HI.shape[1], like.gate_up_OH.shape[1]
        gate_up = mean_JW[:, : like.gate_up_OH.shape[0] // channels * width].reshape(channels, -1, width)
        if self._experts.has_gate and self._experts.is_concatenated:
            gate_up = gate_up.transpose(0, 1)
        down_HJ = mean_JW[:, -like.down_HI.shape[0] :].T
        return gate_up.reshape(like.gate_up_OH.shape).to(like.gate_up_OH.dtype), down_HJ.to(like.down_HI.dtype)


def groups_of(
    alike_KG: torch.Tensor, worth_E: torch.Tensor, keep: Sequence[int], gone: Sequence[int], in_set: int
) -> dict[int, list[int]]:
    """Say which pruned experts are merged into each that stays.

    The most salient takes up to `LARGEST_GROUP` less itself of those that are most like it and of its own set, then the
    next does, with what is left (REAM's pseudo-pruning). Ties go to the lower id.

    Args:
        alike_KG: likeness.
        worth_E: saliency of all experts.
        keep: experts that stay, ascending.
        gone: those that do not, ascending.
        in_set: experts of a set.

    """
    left, groups = list(range(len(gone))), dict[int, list[int]]()
    for at in sorted(range(len(keep)), key=lambda at: -float(worth_E[keep[at]])):
        own = [g for g in left if gone[g] // in_set == keep[at] // in_set]
        taken = sorted(own, key=lambda g: -float(alike_KG[at, g]))[: LARGEST_GROUP - 1]
        groups[keep[at]] = sorted(gone[g] for g in taken)
        left = [g for g in left if g not in taken]
    return groups


def aligned(
    target_JW: torch.Tensor, inner_RJ: torch.Tensor, source_IW: torch.Tensor, inner_RI: torch.Tensor
) -> torch.Tensor:
    """Say which channel of another expert is most like each channel [J] of one, no channel twice.

    Args:
        target_JW: weights of the channels.
        inner_RJ: their activations on a sample.
        source_IW: weights of the other's, of which there may be more.
        inner_RI: their activations.

    """
    cost_JI = _distances(target_JW, source_IW) + _distances(inner_RJ.T, inner_RI.T)
    return torch.from_numpy(linear_sum_assignment(cost_JI.cpu().numpy())[1]).to(target_JW.device)


def _distances(a_JX: torch.Tensor, b_IX: torch.Tensor) -> torch.Tensor:
    """Distances of the directions of rows."""
    cosine_JI = normalize(a_JX, dim=-1) @ normalize(b_IX, dim=-1).T
    return (2 - 2 * cosine_JI).clamp_(min=0).sqrt_()


def _on_call(
    module: torch.nn.Module, names: Sequence[str], tell: Callable[[dict[str, torch.Tensor]], object]
) -> torch.utils.hooks.RemovableHandle:
    """Tell what a module is called with."""

    def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> None:
        tell({**given, **dict(zip(names, args, strict=False))})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _logits(routed: Sequence[torch.Tensor], weight_EH: torch.Tensor | None) -> torch.Tensor | None:
    """The router's logits [T, E], less a bias and what the model makes of them; None where they are not known."""
    if weight_EH is None or not routed or routed[0].shape[-1] != weight_EH.shape[-1]:
        return None
    entering_TH = torch.cat([each.reshape(-1, each.shape[-1]) for each in routed])[:MERGE_TOKENS]
    return linear(entering_TH.float(), weight_EH)
