"""How an output was made, in words: its steps, and for each what was pruned, healed and rounded, and by which text."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Final

from shardxform.publish.card.facts import (
    BlockError,
    CardFacts,
    Data,
    HealedBlock,
    HealingFacts,
    PruningFacts,
    QuantizationFacts,
    StepFacts,
)
from shardxform.publish.card.markdown import code, figure, folded, listing, pipe_table, sizes
from shardxform.publish.card.steps import words_of

__all__ = ["data_text", "healing", "pruning", "quantization", "steps", "text_name"]

_HEALED: Final = {  # names of `recipe.HEALED`, and what they stand for
    "auto": "all of the block, or routers and shared experts where held-out windows were worse for that",
    "router": "routers",
    "shared": "routers, shared experts and the norms before them",
    "experts": "routed experts",
    "moe": "routers, shared and routed experts and the norms before them",
    "all": "all of the block",
}
_WRITTEN: Final = {"source": "rounded to what weights are stored as in the source", "16bit": "in 16 bits"}


def steps(facts: CardFacts) -> Iterator[str]:
    """What was done, one after the other, where that is more than one thing."""
    if len(facts.steps) > 1:
        yield "\n".join(f"{number}. {_done(step)}" for number, step in enumerate(facts.steps, 1))


def _done(step: StepFacts) -> str:
    before, after = sizes(step.nbytes) if step.nbytes else ("", "")
    size = f"; {before} of tensors became {after}" if before and after else ""
    return f"{code(step.command)}: {words_of(step)}{size}"


def _named(facts: CardFacts, number: int) -> Iterator[str]:
    """Which step is spoken of, where there are several."""
    if len(facts.steps) > 1:
        yield f"Step {number}, {code(facts.steps[number - 1].command)}:"


def pruning(facts: CardFacts) -> Iterator[str]:
    """What was taken out, and why."""
    for number, step in enumerate(facts.steps, 1):
        if step.pruning:
            yield from _named(facts, number)
            yield listing(_pruning_lines(step.pruning))
            channels = ", and which of their channels," if step.pruning.channels else ""
            yield f"Which experts every layer kept{channels} is in `shardxform.json`, under `{step.place}.manifest`."


def healing(facts: CardFacts) -> Iterator[str]:
    """How the weights that stayed were tuned."""
    for number, step in enumerate(facts.steps, 1):
        if step.healing:
            yield from _named(facts, number)
            yield from _healed(step.healing)


def _healed(made: HealingFacts) -> Iterator[str]:
    if made.merge:
        yield "Pruned experts were merged into those that stay (REAM, arXiv 2604.04356), as far as that is better."
    if not made.only_merged:
        yield "The weights that stayed were tuned, block by block, so that a block puts out what it did before pruning."
    yield listing(_healing_lines(made))
    if any(block.pruned is not None for block in made.blocks):
        yield (
            "Squared error of each block's output, relative to every token's own size, on windows of the calibration"
            f" text that {'only say how far to go' if made.only_merged else 'were not tuned on'}:"
        )
    if made.blocks:
        columns = ("block", "pruned", "healed", "ratio", "tuned", "steps")[: 5 if made.iters else 6]
        if made.only_merged:
            columns = ("block", "pruned", "merged", "ratio", "how far")
        yield folded(pipe_table(columns, [_healed_block(block)[: len(columns)] for block in made.blocks]))


def quantization(facts: CardFacts) -> Iterator[str]:
    """How weights came about that are quantized, or were on the way."""
    rounded = [number for number, step in enumerate(facts.steps, 1) if step.quantization]
    if facts.quantization and not rounded:  # before the first step
        yield from _rounded(facts.quantization)
    for number in rounded:
        made = facts.steps[number - 1].quantization
        assert made is not None
        yield from _named(facts, number)
        yield from _rounded(facts.quantization if facts.quantization and number == rounded[-1] else made)
    if rounded and facts.dequantized:
        yield f"Quantized weights were turned back into {facts.dequantized} after that."


def _rounded(made: QuantizationFacts) -> Iterator[str]:
    yield listing(_quantization_lines(made))
    tuned = [block for block in made.blocks if block.rounded is not None and block.tuned is not None]
    if tuned:
        judged = made.judged_apart
        where = ", on windows of the calibration text that were not tuned on" if judged else ""
        flatters = ", on a window that was tuned on as well, which flatters" if judged is False else ""
        yield f"Squared error of each block's output, relative to every token's own size{where}{flatters}:"
        columns = ("block", "rounded", "tuned", "ratio", "experts never reached")
        yield folded(pipe_table(columns, [_block(block) for block in made.blocks]))


def _pruning_lines(pruned: PruningFacts) -> Iterator[tuple[str, str]]:
    yield "experts ranked by", code(pruned.criterion) if pruned.criterion else ""
    yield "calibration text", "; ".join(map(data_text, pruned.data))
    yield "tokens that the model was run on", "" if pruned.tokens is None else f"{pruned.tokens:,}"
    if pruned.saliency_kept:
        shares = pruned.saliency_kept
        yield "share of the ranking kept", f"{fmean(shares):.1%} in the mean, {min(shares):.1%} in the worst layer"
    unreached = pruned.never_reached_kept
    yield (
        "kept, though no token reached them",
        "" if unreached is None else f"{unreached} expert{'s' * (unreached != 1)}",
    )


def _healing_lines(made: HealingFacts) -> Iterator[tuple[str, str]]:
    yield "weights", _HEALED.get("experts" if made.only_merged else made.what, "")
    yield "calibration text", data_text(made.data) if made.data else ""
    yield "made of its pieces", f"{made.extra} windows more" if made.extra else ""
    yield "steps per block", _healing_steps(made)
    yield "merged in", f"{made.merged} of {len(made.blocks)} blocks" if made.merge and made.blocks else ""
    yield "written", _WRITTEN.get(made.encoding, "")


def _healing_steps(made: HealingFacts) -> str:
    """How many: of every block, or from the fewest to the most."""
    each = [block.iters for block in made.blocks if block.iters]
    if made.iters or not each:
        return _steps(made.iters, made.batch_size)
    text = _steps(f"{min(each)} to {max(each)}", made.batch_size)
    return f"{text}, as {made.seconds:,} s allowed" if made.seconds else text


def _healed_block(block: HealedBlock) -> tuple[str, ...]:
    before, after, steps = block.pruned, block.healed, str(block.iters or "")
    what = block.what if block.what in _HEALED or not block.what else code(block.what)
    done = ", ".join(each for each in (f"merged {block.merged:.3g}" * (block.merged > 0), what) if each)
    shown = "" if before is None else f"{before:.3e}"
    if not done:
        return (str(block.layer), shown, "left as pruned", "", "", steps)
    if before is None or after is None:  # as records of outputs that earlier versions converted have it
        return (str(block.layer), shown, "", "", done, steps)
    ratio = figure(after / before, block.ratio_error, ".1%") if before else ""
    return (str(block.layer), f"{before:.3e}", f"{after:.3e}", ratio, done, steps)


def _quantization_lines(made: QuantizationFacts) -> Iterator[tuple[str, str]]:
    groups = "one scale per row" if made.group_size == -1 else f"groups of {made.group_size} share a scale"
    yield "scheme", f"W{made.bits}A16, symmetric, {groups}" if made.bits and made.group_size else ""
    yield "format", f"{made.format}, blocks of {' and '.join(made.types)}" if made.types else made.format
    yield "modules", f"{made.modules:,}" if made.modules else ""
    yield "rounding", _method(made)
    recipe = made.recipe
    yield "calibration text", data_text(made.data) if made.data else ""
    if made.recipe:
        yield "steps per block", _steps(recipe.get("iters"), recipe.get("batch_size"))
        inputs = {
            "quantized": "what the quantized blocks before put out",
            "fp": "what the 16-bit blocks before put out",
        }
        yield "inputs of a block", inputs.get(str(recipe.get("inputs")), "")


def _steps(steps: object, batch: object) -> str:
    return f"{steps}, each of {batch} window{'s' * (batch != 1)}" if steps and batch else ""


def _product(samples: object, seqlen: object) -> str:
    return f"{samples} windows of {seqlen} tokens" if samples and seqlen else ""


def _method(made: QuantizationFacts) -> str:
    if made.method == "auto-round":
        return "tuned by signed gradient descent, block by block (AutoRound)"
    if made.method == "rtn":
        return "to nearest" + (", scales searched for the least squared weight error" if made.search else "")
    return ""


def _block(block: BlockError) -> tuple[str, ...]:
    if block.rounded is None or block.tuned is None:
        return (str(block.layer), "", "rounded to nearest", "", "")
    ratio = figure(block.tuned / block.rounded, block.ratio_error, ".1%") if block.rounded else ""
    return (str(block.layer), f"{block.rounded:.3e}", f"{block.tuned:.3e}", ratio, str(block.never_reached))


def data_text(data: Data) -> str:
    """What a text is called, and how much of it there was."""
    size = _product(data.samples, data.seqlen)
    return text_name(data) + (f", {size}" if size else "")


def text_name(data: Data) -> str:
    """What a text is called, and of which sources it is where not of all."""
    of = ", ".join(map(code, data.sources))
    return code(data.name) + (f" (source{'s' * (len(data.sources) != 1)} {of})" if of else "")
