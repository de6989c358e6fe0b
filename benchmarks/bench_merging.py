"""Whether kept experts are better when pruned ones are merged into them: KL from the unpruned model, plain or healed.

    python benchmarks/bench_merging.py [--keep 8 4] [--seeds 3] [--heal 0] [--ways NAME ...] [--work DIR]

Experts of examples/small-moe are chosen by `reap-sum`, as benchmarks/bench_criteria.py does. Then block after block, on
2,048 tokens that went through the blocks merged so far: every pruned expert joins the group of a kept one, its channels
are put in the order of the kept one's by assignment, and weights are averaged by the sum of g|e|. Router rows of pruned
experts go. After REAM (arXiv 2604.04356): likeness is the mean of the cosine of outputs and of the closeness of router
logits, channels are matched by gate, up and down weights and by activations. Ways:

- prune: nothing is merged
- option: `prune --merge`, as ream, but each block only as far as held-out windows say
- ream: the most salient kept expert takes up to 15 that are most like it, then the next
- nearest: every pruned expert joins the kept one that is most like it
- logits: nearest by router logits alone, averaged by frequency, channels matched by weights: M-SMoE (arXiv 2310.01334)
- assigned: all groups are equally large, by assignment
- nearest-90, nearest-97: as nearest, but the kept expert has 90 or 97 % of the mean
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from bench_criteria import SMALL_MOE, TYPE, Distance, Figures, chosen, distance, measured, pruned, run, text, told
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch.nn.functional import linear, normalize, silu
from transformers import AutoModelForCausalLM

from shardxform.calibration.options import DataOptions
from shardxform.calibration.windows import load_windows
from shardxform.forward.skeleton import Skeleton

TOKENS: Final = 2048
LARGEST: Final = 16
"""Experts of one group of REAM."""

CRITERION: Final = "reap-sum"


@dataclass(frozen=True)
class Way:
    """How experts are merged by this script.

    Attributes:
        groups: "ream", "nearest" or "assigned".
        own: share of the kept expert in the mean; None for its saliency.
        msmoe: likeness by router logits, weights by frequency, channels by weights alone.

    """

    groups: str
    own: float | None = None
    msmoe: bool = False


OPTION: Final = "option"
WAYS: Final[Mapping[str, Way | None]] = {
    "prune": None,
    OPTION: None,
    "ream": Way("ream"),
    "nearest": Way("nearest"),
    "logits": Way("nearest", msmoe=True),
    "assigned": Way("assigned"),
    "nearest-90": Way("nearest", own=0.9),
    "nearest-97": Way("nearest", own=0.97),
}


@dataclass(frozen=True)
class Seen:
    """What the experts of a block do on some tokens.

    Attributes:
        alike_EE: likeness of experts, from 0 to 1.
        worth_E: what experts are averaged by.
        inner_ETI: what enters their down projections.

    """

    alike_EE: torch.Tensor
    worth_E: torch.Tensor
    inner_ETI: torch.Tensor


def look(block: Any, entering_TH: torch.Tensor, top: int, way: Way) -> Seen:  # noqa: ANN401
    """Run all experts of an unpruned block on the same tokens."""
    logits_TE = linear(entering_TH, block.gate.weight)
    best_TK, ids_TK = logits_TE.softmax(-1).topk(top)
    g_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, best_TK / best_TK.sum(-1, keepdim=True))
    inner, outputs = [], []
    for gate_up_OH, down_HI in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
        gate_TI, up_TI = linear(entering_TH, gate_up_OH).chunk(2, -1)
        inner.append(silu(gate_TI) * up_TI)
        outputs.append(linear(inner[-1], down_HI))
    value_ETH = torch.stack(outputs)
    unit_ETH = normalize(value_ETH, dim=-1)
    outputs_EE = (1 + torch.einsum("eth,fth->ef", unit_ETH, unit_ETH) / len(entering_TH)) / 2
    unit_ET = normalize(logits_TE.T, dim=-1)
    apart_EE = torch.cdist(unit_ET, unit_ET)
    logits_EE = 1 - apart_EE / apart_EE.max()
    if way.msmoe:
        return Seen(logits_EE, (g_TE > 0).sum(0).float(), torch.stack(inner))
    return Seen((outputs_EE + logits_EE) / 2, (g_TE.T * value_ETH.norm(dim=-1)).sum(1), torch.stack(inner))


def groups_of(seen: Seen, keep: Sequence[int], way: Way) -> dict[int, list[int]]:
    """Kept expert -> the pruned ones that are merged into it."""
    groups: dict[int, list[int]] = {kept: [] for kept in keep}
    gone = [e for e in range(len(seen.worth_E)) if e not in groups]
    if way.groups == "nearest":
        for e in gone:
            groups[max(keep, key=lambda kept: float(seen.alike_EE[kept, e]))].append(e)
    elif way.groups == "ream":
        for kept in sorted(keep, key=lambda kept: -float(seen.worth_E[kept])):
            near = sorted(gone, key=lambda e: -float(seen.alike_EE[kept, e]))[: LARGEST - 1]
            groups[kept] = near
            gone = [e for e in gone if e not in near]
    else:
        places = [kept for kept in keep for _ in range(-(-len(gone) // len(keep)))]
        for row, column in zip(*linear_sum_assignment(-seen.alike_EE[gone][:, places].numpy()), strict=True):
            groups[places[column]].append(gone[row])
    return groups


def channels(experts: Any, e: int) -> torch.Tensor:  # noqa: ANN401
    """Weights of every channel of an expert: its rows of gate and up projection, its column of the down projection."""
    gate_IH, up_IH = experts.gate_up_proj[e].chunk(2)
    return torch.cat([gate_IH, up_IH, experts.down_proj[e].T], 1)


def merged(experts: Any, kept: int, group: list[int], seen: Seen, way: Way) -> torch.Tensor:  # noqa: ANN401
    """Channels [I, 3H] of a kept expert and those that are merged into it."""
    worth = seen.worth_E[[kept, *group]]
    share = worth / worth.sum()
    if way.own is not None:
        others = worth[1:] / worth[1:].sum() * (1 - way.own)
        share = torch.cat([torch.tensor([way.own]), others])
    target_IW = channels(experts, kept)
    mean_IW = share[0] * target_IW
    for part, e in zip(share[1:], group, strict=True):
        source_IW = channels(experts, e)
        cost_II = torch.cdist(normalize(target_IW), normalize(source_IW))
        if not way.msmoe:
            cost_II += torch.cdist(normalize(seen.inner_ETI[kept].T), normalize(seen.inner_ETI[e].T))
        mean_IW = mean_IW + part * source_IW[linear_sum_assignment(cost_II.numpy())[1]]
    return mean_IW


@torch.no_grad()
def merge(source: Path, manifest: Path, way: Way, seed: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> gate_up_proj [K, 2I, H] and down_proj [K, H, I] of the kept experts, merged."""
    options = DataOptions(data=str(source / "text" / "calib.jsonl"), samples=4, seqlen=512, pack=False, seed=seed)
    ids_NT = torch.from_numpy(load_windows(source, options).ids_NT).long()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)  # as from_pretrained has it, in eval
    top, out = model.config.num_experts_per_tok, {}
    for layer, keep in json.loads(manifest.read_text())["keep"].items():
        block = model.model.layers[int(layer)].mlp
        entering: list[torch.Tensor] = []
        hook = block.register_forward_pre_hook(lambda _, given, entering=entering: entering.append(given[0]))
        model(ids_NT)
        hook.remove()
        seen = look(block, entering[0].reshape(TOKENS, -1), top, way)
        experts = block.experts
        stacks = [merged(experts, kept, group, seen, way) for kept, group in groups_of(seen, keep, way).items()]
        gate, up, down = torch.stack(stacks).chunk(3, -1)
        out[int(layer)] = torch.cat([gate, up], 1).contiguous(), down.mT.contiguous()
        experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(stack) for stack in out[int(layer)])
        block.gate.weight = torch.nn.Parameter(block.gate.weight[keep])
        experts.num_experts = block.gate.num_experts = len(keep)
    return out


def put(pruned: Path, stacks: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put merged experts in the place of those of a pruned checkpoint."""
    for shard in pruned.glob("*.safetensors"):
        tensors = load_file(shard)
        for layer, pair in stacks.items():
            for name, value in zip(("gate_up_proj", "down_proj"), pair, strict=True):
                tensors[f"model.layers.{layer}.mlp.experts.{name}"] = value.to(torch.bfloat16)
        save_file(tensors, shard, {"format": "pt"})


def started(stacks: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:  # noqa: ANN401
    """Healing that begins with merged experts: blocks of the pruned model are given them when they are loaded."""
    count, given = len(stacks[0][0]), Skeleton.stacked

    def stacked(self: Skeleton, layer: int) -> dict[str, torch.Tensor]:
        found = given(self, layer)
        if self.layout.num_experts == count:
            for name, value in zip(found, stacks[layer], strict=True):
                found[name] = value.to(found[name].dtype)
        return found

    return patch.object(Skeleton, "stacked", stacked)


def by_option(scratch: Path, manifest: Path, heal: int, seed: int) -> Path:
    """What `prune --merge` makes, healed if asked for as `bench_criteria.pruned` heals."""
    out = scratch / "pruned"
    shutil.rmtree(out, ignore_errors=True)
    steps = ["--heal=all", "--heal-iters", heal, "--heal-lr", 0.016, "--batch-size", 4] if heal else []
    run("prune", SMALL_MOE, out, "-m", manifest, "-q", "--merge", *steps, *TYPE, *text(SMALL_MOE, seed))
    return out


def of(scratch: Path, name: str, keep: int, heal: int, seed: int) -> Distance:
    """How far one choice, merged in a way, is from the source."""
    manifest, way = chosen(SMALL_MOE, scratch, CRITERION, keep, seed), WAYS[name]
    if name == OPTION:
        return measured(SMALL_MOE, scratch, by_option(scratch, manifest, heal, seed))
    if way is None:
        return distance(SMALL_MOE, scratch, manifest, heal, seed)
    stacks = merge(SMALL_MOE, manifest, way, seed)
    if heal:
        with started(stacks):
            out = pruned(SMALL_MOE, scratch, manifest, heal, seed)
    else:
        out = pruned(SMALL_MOE, scratch, manifest, 0, seed)
        put(out, stacks)
    return measured(SMALL_MOE, scratch, out)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heal", type=int, default=0, help="steps; 0 for none")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--work", type=Path, help="a folder for what was measured")
    asked = parser.parse_args()
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = asked.work or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        figures = Figures(scratch / "merging.jsonl")
        for name in asked.ways:
            cells: list[str] = []
            for keep in asked.keep:
                found = [
                    figures.once(
                        f"{name} {keep} {asked.heal} {seed}",
                        partial(of, scratch, name, keep, asked.heal, seed),
                    )
                    for seed in range(asked.seeds)
                ]
                cells.append(told([one.kl for one in found], 4))
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    print("| way | " + " | ".join(f"{keep} kept" for keep in asked.keep) + " |")
    print("|---|" + "---:|" * len(asked.keep), *rows, sep="\n")


if __name__ == "__main__":
    main()
