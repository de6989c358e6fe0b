"""A card as Markdown: front matter, tables of figures, how to load, limits, and how to make it again.

A function of the facts alone, the same text every time. A section without facts is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import fmean
from typing import Final

from shardxform.publish.card.facts import (
    BlockError,
    Change,
    Data,
    Evaluation,
    Facts,
    HealedBlock,
    Healing,
    Pruning,
    Quantization,
)
from shardxform.publish.card.frontmatter import front_matter
from shardxform.publish.card.loading import loading
from shardxform.publish.card.markdown import code, fence, listing, parameters, shell, sizes, table
from shardxform.publish.card.writing import MARK

__all__ = ["render"]

_KEEP: Final = (
    "<!-- `shardxform card --write` replaces this file; to keep changes of your own, remove the line above -->"
)
_HEALED: Final = {  # names of `recipe.HEALED`, and what they stand for
    "auto": "the whole block or the shared experts and routers, whichever held-out windows chose",
    "router": "routers",
    "shared": "routers, shared experts and the norms before them",
    "moe": "routers, shared and routed experts and the norms before them",
    "all": "all of the block",
}
_HARMLESS: Final = re.compile(r"[\w.+ -]+", re.ASCII)


def render(facts: Facts) -> str:
    """Word the facts; ends with a newline."""
    blocks = [front_matter(facts), f"{MARK}\n{_KEEP}", f"# {_title(facts.name)}", _opening(facts)]
    blocks += _figures(facts)
    for heading, section in (
        ("Pruning", _pruning(facts)),
        ("Healing", _healing(facts)),
        ("Quantization", _quantization(facts)),
        ("Evaluation", _evaluation(facts)),
        ("Loading", loading(facts)),
        ("Limitations", _limitations(facts)),
        ("Making it again", _again(facts)),
    ):
        text = [block for block in section if block]
        blocks += [f"## {heading}", *text] if text else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def _title(name: str) -> str:
    return name if _HARMLESS.fullmatch(name) and not re.search(r"__|_\b|\b_", name) else code(name)


def _opening(facts: Facts) -> str:
    base = facts.origin.base_model
    what = code(base) if base else f"A {code(facts.architecture)} checkpoint"
    done = [part for part in (_kept(facts), _stored(facts)) if part]
    how = f" with {' and '.join(done)}" if done else ""
    without = f", without {' and '.join(facts.dropped)}" if facts.dropped else ""
    before, after = sizes(facts.nbytes)
    size = f"{before} of tensors became {after}" if before else f"Its tensors have {after}"
    return f"{what}{how}{without}. {size}. Made with shardxform."


def _kept(facts: Facts) -> str:
    of = f" of {facts.experts.before}" if facts.experts.before else ""
    return f"{facts.experts.after}{of} routed experts kept in every MoE layer" if facts.pruning else ""


def _stored(facts: Facts) -> str:
    made = facts.quantization
    if made:
        return f"weights of {made.bits} bits in the {made.format} format"
    return f"quantized weights turned back into {facts.dequantized}" if facts.dequantized else ""


def _figures(facts: Facts) -> Iterator[str]:
    """What changed in size, and what did not."""
    yield table(
        ("", "before", "after"),
        [
            ("size of the tensors", *sizes(facts.nbytes)),
            ("routed experts per MoE layer", *_counts(facts.experts)),
            ("parameters", *_parameters(facts.parameters)),
            ("parameters used per token", *_parameters(facts.active)),
        ],
    )
    dense = f", {facts.layers - facts.moe_layers} of them dense" if facts.layers != facts.moe_layers else ""
    yield (
        f"{facts.layers} decoder layers{dense}; the router picks {facts.top_k} experts per token. Parameters are those"
        " of the decoder with embeddings and output head, without MTP layers and vision tower."
    )


def _counts(change: Change) -> tuple[str, str]:
    return ("" if change.before is None else str(change.before), str(change.after))


def _parameters(change: Change) -> tuple[str, str]:
    return ("" if change.before is None else parameters(change.before), parameters(change.after))


# -- how it was made --------------------------------------------------------------------------------------------------


def _pruning(facts: Facts) -> Iterator[str]:
    pruned = facts.pruning
    if pruned is None:
        return
    yield listing(_pruning_lines(pruned))
    yield "Which experts every layer kept is in `shardxform.json`, under `inputs.manifest`."


def _pruning_lines(pruned: Pruning) -> Iterator[tuple[str, str]]:
    yield "experts ranked by", code(pruned.criterion) if pruned.criterion else ""
    yield "calibration text", "; ".join(map(_data, pruned.data))
    yield "tokens that the model was run on", "" if pruned.tokens is None else f"{pruned.tokens:,}"
    if pruned.saliency_kept:
        shares = pruned.saliency_kept
        yield "share of the ranking kept", f"{fmean(shares):.1%} in the mean, {min(shares):.1%} in the worst layer"
    unreached = pruned.never_reached_kept
    yield (
        "kept, though no token reached them",
        "" if unreached is None else f"{unreached} expert{'s' * (unreached != 1)}",
    )


def _healing(facts: Facts) -> Iterator[str]:
    made = facts.healing
    if made is None:
        return
    yield "The weights that stayed were tuned, block by block, so that a block puts out what it did before pruning."
    yield listing(_healing_lines(made))
    if made.blocks:
        yield (
            "Squared error of each block's output, relative to every token's own size, on windows of the calibration"
            " text that were not tuned on:"
        )
        yield _folded(table(("block", "pruned", "healed", "ratio", "tuned"), map(_healed_block, made.blocks)))


def _healing_lines(made: Healing) -> Iterator[tuple[str, str]]:
    yield "weights", _HEALED.get(made.what, "")
    yield "calibration text", _data(made.data) if made.data else ""
    yield "steps per block", _steps(made.iters, made.batch_size)


def _healed_block(block: HealedBlock) -> tuple[str, ...]:
    before, after = block.pruned, block.healed
    if not block.what or before is None or after is None:
        return (str(block.layer), "" if before is None else f"{before:.3e}", "left as pruned", "", "")
    ratio = _figure(after / before, block.ratio_error, ".1%") if before else ""
    return (str(block.layer), f"{before:.3e}", f"{after:.3e}", ratio, block.what)


def _quantization(facts: Facts) -> Iterator[str]:
    made = facts.quantization
    if made is None:
        return
    yield listing(_quantization_lines(made))
    tuned = [block for block in made.blocks if block.rounded is not None and block.tuned is not None]
    if tuned:
        judged = made.judged_apart
        where = ", on windows of the calibration text that were not tuned on" if judged else ""
        flatters = ", on a window that was tuned on as well, which flatters" if judged is False else ""
        yield f"Squared error of each block's output, relative to every token's own size{where}{flatters}:"
        yield _folded(
            table(
                ("block", "rounded", "tuned", "ratio", "experts never reached"),
                [_block(block) for block in made.blocks],
            )
        )


def _quantization_lines(made: Quantization) -> Iterator[tuple[str, str]]:
    groups = "one scale per row" if made.group_size == -1 else f"groups of {made.group_size} share a scale"
    yield "scheme", f"W{made.bits}A16, symmetric, {groups}"
    yield "format", made.format
    yield "modules", f"{made.modules:,}"
    yield "rounding", _method(made)
    recipe = made.recipe
    yield "calibration text", _data(made.data) if made.data else ""
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


def _method(made: Quantization) -> str:
    if made.method == "auto-round":
        return "tuned by signed gradient descent, block by block (AutoRound)"
    if made.method == "rtn":
        return "to nearest" + (", scales searched for the least squared weight error" if made.search else "")
    return ""


def _block(block: BlockError) -> tuple[str, ...]:
    if block.rounded is None or block.tuned is None:
        return (str(block.layer), "", "rounded to nearest", "", "")
    ratio = _figure(block.tuned / block.rounded, block.ratio_error, ".1%") if block.rounded else ""
    return (str(block.layer), f"{block.rounded:.3e}", f"{block.tuned:.3e}", ratio, str(block.never_reached))


# -- what it is worth -------------------------------------------------------------------------------------------------


def _evaluation(facts: Facts) -> Iterator[str]:
    lines = [each for found in facts.evaluations for each in (*found.sources, found)]
    columns = [column for column in _COLUMNS if any(column[1](found) for found in lines)]
    yield table([name for name, _ in columns], [[cell(found) for _, cell in columns] for found in lines])
    compared = [found for found in facts.evaluations if found.reference is not None]
    if compared:
        from_it = all(found.of_source for found in compared)
        what = "made from" if from_it else "held against, whether or not that is its source"
        yield (
            f"The reference is the checkpoint that this one was {what}, on the same windows. KL divergence is"
            " KL(reference ‖ this) of the next token's distribution, in nats; ratio is that of the perplexities; same"
            " choice is the share of positions where both find the same token likeliest."
        )
    if any(found.perplexity_error is not None for found in lines):
        yield (
            "± is a standard error over windows, of a comparison from differences window by window: how far a figure"
            " might be off on other text of the same kind."
        )
    for dtype in dict.fromkeys(found.dtype for found in facts.evaluations):
        if dtype not in ("", "float32"):
            yield f"These were computed in {dtype}, whose own rounding is in the figures."
    if any(found.sources for found in facts.evaluations):
        yield "A source of text is measured on windows of its documents alone; the line without one is of all windows."
    for found in facts.evaluations:
        if found.block_errors:
            yield f"Relative error of each block's output on {code(found.data.name)}, each model on its own chain:"
            known = enumerate(found.block_errors)
            yield _folded(table(("block", "error"), [(str(n), "" if e is None else f"{e:.2%}") for n, e in known]))
    for name in facts.plots:
        yield f"![{name.removesuffix('.png')}]({name})"


def _divergence(found: Evaluation) -> str:
    return "" if found.kl is None else _figure(found.kl, found.kl_error, ".4f")


def _figure(value: float | None, error: float | None, form: str) -> str:
    """A figure and its standard error, as far as they are known."""
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


_COLUMNS = (
    ("text", lambda found: _text(found.data)),
    ("source", lambda found: code(found.source) if found.source else ""),
    ("tokens", lambda found: f"{found.tokens:,}"),
    ("windows", lambda found: f"{found.windows:,}"),
    ("perplexity", lambda found: _figure(found.perplexity, found.perplexity_error, ".3f")),
    ("reference", lambda found: "" if found.reference is None else f"{found.reference:.3f}"),
    ("ratio", lambda found: _figure(found.ratio, found.ratio_error, ".4f")),
    ("KL divergence", _divergence),
    ("same choice", lambda found: _figure(found.top1, found.top1_error, ".1%")),
)


def _limitations(facts: Facts) -> Iterator[str]:
    yield "\n".join(f"- {line}" for line in _limits(facts))


def _limits(facts: Facts) -> Iterator[str]:
    if facts.evaluations:
        yield "Only the figures above were measured. It was not benchmarked on tasks."
    else:
        yield "Nothing was measured for this card, neither perplexity nor tasks."
    if facts.pruning:
        yield (
            "What pruned experts knew is lost. They were chosen for what they did on some text; on other languages and"
            " subjects the loss can be far greater."
        )
    tuned = facts.quantization is not None and facts.quantization.data is not None
    if facts.healing:
        yield "It was healed on calibration text, and fits text like it best."
    elif tuned:
        yield "Rounding was tuned on calibration text, and fits text like it best."
    seen = [*_calibration(facts)]
    for found in facts.evaluations:
        if any(_is_shared(found.data, data) for data in seen):
            yield f"{code(found.data.name)} is both calibration and evaluation text: its figures flatter."
    made = facts.quantization
    plain = [block.layer for block in made.blocks if block.tuned is None] if made else []
    if plain:
        yield f"Blocks that could not be tuned and are rounded to nearest: {', '.join(map(str, plain))}."
    if "MTP layers" in facts.dropped:
        yield "Its multi-token-prediction layers were dropped: no speculative decoding with them."


def _calibration(facts: Facts) -> Iterator[Data]:
    if facts.pruning:
        yield from facts.pruning.data
    yield from _tuned_on(facts)


def _tuned_on(facts: Facts) -> Iterator[Data]:
    if facts.healing and facts.healing.data:
        yield facts.healing.data
    if facts.quantization and facts.quantization.data:
        yield facts.quantization.data


def _is_shared(one: Data, other: Data) -> bool:
    """Whether two texts are the same, or documents of a source in both."""
    same = bool(one.content) and (one.name, one.content) == (other.name, other.content)
    return same and (not one.sources or not other.sources or not {*one.sources}.isdisjoint(other.sources))


def _again(facts: Facts) -> Iterator[str]:
    if not facts.commands:
        return
    yield fence("\n".join(shell(args) for args in facts.commands), "sh")
    yield "\n".join(f"- {what}: {told}" for what, told in _ingredients(facts))
    yield "From these, the same bytes come of it."


def _ingredients(facts: Facts) -> Iterator[tuple[str, str]]:
    """What the commands name, and where a stranger finds it."""
    words = {word for args in facts.commands for word in args}
    yield (
        code(facts.origin.base_model or "SRC"),
        "the checkpoint that this one was made from; sizes of its shards and digests of their headers are in"
        " `shardxform.json`, under `inputs`",
    )
    if "--manifest" in words:
        yield "`shardxform.json`", "the file beside this card; the experts that stay are listed in it"
    for name, data in {data.name: data for data in _tuned_on(facts) if data.name in words}.items():
        yield code(name), "the calibration text" + (f", {_content(data)}" if data.content else "")


def _data(data: Data) -> str:
    size = _product(data.samples, data.seqlen)
    return _text(data) + (f", {size}" if size else "")


def _text(data: Data) -> str:
    """What a text is called, and of which sources it is where not of all."""
    of = ", ".join(map(code, data.sources))
    return code(data.name) + (f" (source{'s' * (len(data.sources) != 1)} {of})" if of else "")


def _content(data: Data) -> str:
    """Which text it is, whatever it is called."""
    return f"whose {'SHA-256' if len(data.content) == 64 else 'revision'} is {code(data.content)}"


def _folded(text: str) -> str:
    """A long table under a line that opens it."""
    return f"<details>\n<summary>per block</summary>\n\n{text}\n\n</details>" if text else ""
