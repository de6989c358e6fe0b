"""What the stages have to compute and to move, as amounts of a few kinds of work, and the time that these take.

Arithmetic alone: a stage is a row of amounts, a machine a row of seconds for one of each, and time their product.
`timing` measures a machine. `usual` stands for one that was not measured: only its ratios matter, to weigh stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from shardxform.ask.recipe import held_out
from shardxform.base.constants import BATCH_TOKENS, JUDGED_AT
from shardxform.compress.request import CARD, EVALUATE, QUANTIZE, SCORE, SELECT, VERIFY, Request
from shardxform.model.layout import layout_of

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.checkpoint.table import Checkpoint

__all__ = ["Amounts", "Costs", "Shape", "amounts", "reached", "seconds", "shape_of", "usual"]

_FLOPS: Final = 80e9  # of one thread
_MOVED: Final = 1e9  # bytes a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the work of a model depends on.

    Attributes:
        blocks: decoder blocks, and MTP layers that are scored.
        moe_blocks: those of them that have routed experts.
        experts, kept, top_k: routed experts of such a block, those that stay, and those of a token.
        around: weights of a block beside the routed experts, in the mean.
        expert: weights of one routed expert.
        head: weights of the output head.
        nbytes: of all blocks.

    """

    blocks: int
    moe_blocks: int
    experts: int
    kept: int
    top_k: int
    around: int
    expert: int
    head: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How much there is to do of each kind of work.

    Attributes:
        tokens: tokens through what surrounds the experts of a block.
        calls, pairs: experts made ready for a batch, and tokens through an expert.
        step_tokens, step_calls, step_pairs: the same in steps of tuning, forward and backward.
        decoded: quantized weights turned into numbers.
        started: weights whose scales are searched, and which are made ready to be tuned.
        headed: tokens through the output head.
        rounded: weights rounded to nearest.
        moved: bytes read from the disk, or written to it.
        fixed: stages that take about a second whatever the model.

    """

    tokens: float = 0.0
    calls: float = 0.0
    pairs: float = 0.0
    step_tokens: float = 0.0
    step_calls: float = 0.0
    step_pairs: float = 0.0
    decoded: float = 0.0
    started: float = 0.0
    headed: float = 0.0
    rounded: float = 0.0
    moved: float = 0.0
    fixed: float = 0.0


class Costs(Amounts):
    """Seconds for one of each."""


def seconds(work: Amounts, costs: Costs) -> float:
    """Time that work takes on a machine."""
    return math.fsum(amount * cost for amount, cost in zip(_values(work), _values(costs), strict=True))


def usual(shape: Shape) -> Costs:
    """Costs of a machine as they usually are to each other."""
    flop = 1 / _FLOPS
    return Costs(
        tokens=4.5 * shape.around * flop + 60e-6,
        calls=0.5e-9 * shape.expert + 100e-6,
        pairs=2 * shape.expert * flop,
        step_tokens=10 * shape.around * flop + 150e-6,
        step_calls=2e-9 * shape.expert + 400e-6,
        step_pairs=8 * shape.expert * flop,
        decoded=2e-9,
        started=10e-9,
        headed=2 * shape.head * flop,
        rounded=1e-9,
        moved=1 / _MOVED,
        fixed=0.1,
    )


def reached(experts: int, top_k: int, tokens: float) -> float:
    """How many experts a batch of tokens reaches, if the router likes them alike."""
    missed: float = (1 - min(1.0, top_k / max(experts, 1))) ** tokens
    return experts * (1 - missed)


def shape_of(source: Checkpoint, kept: int) -> Shape:
    """Look at the headers; a multi-token-prediction layer counts as a block."""
    layout = layout_of(source.config, source.tensors, source.where)
    around = expert = head = nbytes = 0
    for name, place in layout.places.items():
        ref = source.tensors[name]
        size = math.prod(ref.spec.shape)
        if place.scope in ("block", "mtp"):
            routed = place.template.role == "routed experts"
            expert, around, nbytes = expert + size * routed, around + size * (not routed), nbytes + ref.nbytes
        elif place.role in ("lm head", "embeddings"):
            head = size
    mtp = layout.mtp_layers if layout.has_mtp else 0
    blocks, moe_blocks = layout.num_layers + mtp, len(layout.moe_layers) + mtp
    return Shape(
        blocks=blocks,
        moe_blocks=moe_blocks,
        experts=layout.num_experts,
        kept=kept,
        top_k=layout.top_k,
        around=around // max(blocks, 1),
        expert=expert // max(moe_blocks * layout.num_experts, 1),
        head=head,
        nbytes=nbytes,
    )


def amounts(request: Request, shape: Shape, written: int, *, full_verify: bool = False) -> dict[str, Amounts]:
    """Work of every stage; `written` are the output's bytes."""
    moved = request.source.nbytes + written
    out = {stage: Amounts(fixed=1) for stage in (SELECT, VERIFY, CARD)}
    if request.score_windows is not None:
        out[SCORE] = _plus(_forward(shape, shape.experts, request.score_windows), Amounts(moved=shape.nbytes))
    if request.eval_windows is not None:
        out[EVALUATE] = _evaluating(shape, request.eval_windows, moved)
    weights = shape.blocks * shape.around + shape.moe_blocks * shape.kept * shape.expert
    plain = Amounts(rounded=weights, moved=moved)
    tuned = request.recipe is not None and request.tune_windows is not None
    out[QUANTIZE] = _tuning(request, shape, weights, moved) if tuned else plain
    if full_verify:  # rounded again, or held to the bound of tuned rounding
        out[VERIFY] = plain
    return out


def _forward(shape: Shape, experts: int, windows: Windows, *, quantized: bool = False) -> Amounts:
    """One pass over all blocks, a batch at a time."""
    count, length = windows.ids_NT.shape
    tokens = windows.ids_NT.size
    batches = math.ceil(count / max(1, BATCH_TOKENS // length))
    calls = batches * shape.moe_blocks * reached(experts, shape.top_k, tokens / batches)
    pairs = tokens * shape.top_k * shape.moe_blocks
    decoded = (calls * shape.expert + shape.blocks * shape.around) * quantized
    return Amounts(tokens=tokens * shape.blocks, calls=calls, pairs=pairs, decoded=decoded)


def _evaluating(shape: Shape, windows: Windows, moved: int) -> Amounts:
    """Source and output side by side, and the head of both."""
    both = _plus(_forward(shape, shape.experts, windows), _forward(shape, shape.kept, windows, quantized=True))
    return _plus(both, Amounts(headed=2 * windows.ids_NT.size, moved=moved))


def _tuning(request: Request, shape: Shape, weights: int, moved: int) -> Amounts:
    """Both chains of hidden states, and on every block all steps, forward and backward."""
    recipe, windows = request.recipe, request.tune_windows
    assert recipe is not None
    assert windows is not None
    chains = 1 if recipe.inputs == "fp" else 2
    length = windows.ids_NT.shape[1]
    judged = (1 + len(JUDGED_AT)) * max(1, held_out(len(windows.ids_NT))) * length  # at the start, and later
    tokens = recipe.block_tokens - chains * recipe.samples * recipe.seqlen
    batch = min(recipe.batch_size, recipe.learned) * length
    calls = tokens / batch * shape.moe_blocks * reached(shape.kept, shape.top_k, batch)
    once = _forward(shape, shape.kept, windows)
    steps = Amounts(
        tokens=judged * shape.blocks,
        step_tokens=tokens * shape.blocks,
        step_calls=calls,
        step_pairs=tokens * shape.top_k * shape.moe_blocks,
        pairs=judged * shape.top_k * shape.moe_blocks,
        started=weights,
        moved=moved,
    )
    return _plus(steps, *[once] * chains)


def _plus(*parts: Amounts) -> Amounts:
    names = [each.name for each in fields(Amounts)]
    return Amounts(**dict(zip(names, map(math.fsum, zip(*map(_values, parts), strict=True)), strict=True)))


def _values(row: Amounts) -> tuple[float, ...]:
    return tuple(float(getattr(row, each.name)) for each in fields(Amounts))
