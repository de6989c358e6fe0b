"""The steps by which an output came about, as its record tells of them: what each pruned, healed and rounded.

Everything is read as a stranger's: of what has not the type that it must have, nothing is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from shardxform.ask.manifest import Manifest, chosen_by
from shardxform.base.strict_json import Fields
from shardxform.calibration.options import is_source
from shardxform.checkpoint.history import HISTORY, steps_of
from shardxform.checkpoint.record import Record
from shardxform.publish.card.facts import (
    BlockError,
    Change,
    Data,
    HealedBlock,
    HealingFacts,
    PruningFacts,
    QuantizationFacts,
    StepFacts,
)

__all__ = [
    "NOT_TOLD",
    "data_of",
    "dequantized_by",
    "gather_steps",
    "is_pruned_by",
    "read_steps",
    "rounded_by",
    "summed_up",
    "words_of",
]

_PARTS: Final = {"MTP layers": "MTP layers", "vision tower": "the vision tower"}
_FLOATS: Final = {"bf16": "bfloat16", "fp16": "float16"}
_NUMBERS: Final = ("samples", "seqlen", "iters", "batch_size", "seed")
_TEXTS: Final = ("inputs", "device", "dtype")
_WORD: Final = re.compile(r"[a-z0-9-]{1,32}")
_VERSION: Final = re.compile(r"[\w.+ -]{1,64}", re.ASCII)
_MADE_BY: Final = ("shardxform", "torch", "transformers", "instructions", "device")


NOT_TOLD: Final = QuantizationFacts(bits=0, group_size=0, format="", expert_names="split", modules=0, recipe={})
"""Of weights that a source had quantized before any step."""


def gather_steps(record: Record, nbytes: int, experts: int, manifest: Manifest | None) -> tuple[StepFacts, ...]:
    """Read all steps of a record, from the first source on; the last is the output's own.

    Args:
        record: of the output.
        nbytes: of its tensors.
        experts: routed experts per layer that it has.
        manifest: what one of the steps pruned by, for the reasons that it gives.

    Raises:
        RecordError: the record tells of steps that are none, or of too many.

    """
    found = read_steps(steps_of(record), nbytes, experts, manifest)
    if "origin" in record.inputs:  # of an earlier version
        found = (*(replace(step, place="inputs.origin") for step in found[:-1]), found[-1])
    return found


def read_steps(
    told: Sequence[Fields], nbytes: int, experts: int | None = None, manifest: Manifest | None = None
) -> tuple[StepFacts, ...]:
    """The same of steps as records carry them; experts that are left by their own word, where nobody counts them."""
    places = [*(f"inputs.{HISTORY}.steps[{number}]" for number in range(len(told) - 1)), "inputs"]
    summaries = [step.section("summary") for step in told]
    sizes = [*(summary.whole("bytes_before") for summary in summaries), nbytes]
    left = summaries[-1].whole("experts_after") if experts is None else experts
    counts = [*(summary.whole("experts_before") for summary in summaries), left]
    if counts[0] is None and manifest is not None:
        counts[0] = Fields(manifest.model).whole("num_experts")
    return tuple(
        _step(step, place, _change(size), _change(count), manifest)
        for step, place, size, count in zip(told, places, pairwise(sizes), pairwise(counts), strict=True)
    )


def is_pruned_by(step: Fields, manifest: Manifest) -> bool:
    """Whether a step kept the experts of a manifest."""
    recorded = step.section("manifest", "keep")
    same = all(recorded.get(str(layer)) == list(ids) for layer, ids in manifest.keep.items())
    return same and len(recorded) == len(manifest.keep)


def summed_up(steps: Sequence[StepFacts]) -> tuple[PruningFacts | None, HealingFacts | None]:
    """What all steps together did: the last pruning, with the channels of the first source, and the last healing."""
    pruned = [step.pruning for step in steps if step.pruning]
    healed = [step.healing for step in steps if step.healing]
    widths = [each.channels for each in pruned if each.channels]
    channels = Change(widths[0].before, widths[-1].after) if widths else None
    return replace(pruned[-1], channels=channels) if pruned else None, healed[-1] if healed else None


def rounded_by(steps: Sequence[StepFacts]) -> QuantizationFacts | None:
    """How the weights came about that an output holds quantized; None where no step tells."""
    found = next((step for step in reversed(steps) if step.quantization or step.target in _FLOATS), None)
    return found.quantization if found else None


def dequantized_by(steps: Sequence[StepFacts]) -> str:
    """The type that quantized weights were turned back into, if none were rounded since; else nothing."""
    told = [_FLOATS.get(step.target, "") for step in steps if step.quantization or step.target]
    return told[-1] if told else ""


def words_of(step: StepFacts) -> str:
    """What a step did, in a few words that mean the same on a terminal and in Markdown."""
    done = [*_words(step)]
    if step.dropped:
        done.append(f"{' and '.join(step.dropped)} dropped")
    return "; ".join(done) or "tensors copied"


def _words(step: StepFacts) -> Iterator[str]:
    if step.pruning:
        experts, width = step.experts, step.pruning.channels
        if experts and experts.before != experts.after:
            yield f"{experts.after} of {experts.before} routed experts kept in every MoE layer"
        elif not width:
            yield "routed experts taken out"
        if width:
            yield f"{width.after} of {width.before} channels of each expert kept"
    if step.healing:
        yield from _healed(step.healing)
    if made := step.quantization:
        to = f" to {made.bits} bits" if made.bits else ""
        kind = f" in the {made.format} format" if made.format else ""
        yield f"weights rounded{to}{kind}{', tuned' if made.method == 'auto-round' else ''}"
    if step.command == "convert":
        to = _FLOATS.get(step.target, step.target)
        yield f"written as {to}" if to else "written in another format"


def _healed(made: HealingFacts) -> Iterator[str]:
    """What healing did, in how many blocks where that is not all of them; nothing where it changed none."""
    blocks = len(made.blocks)
    changed = sum(bool(block.what) for block in made.blocks)
    for asked, words, count in (
        (made.merge, "pruned experts merged into those that stay", made.merged),
        (not made.only_merged, "healed", changed),
    ):
        if asked and (count or not blocks):
            yield words if count == blocks else f"{words} in {count} of {blocks} blocks"


# -- one step ----------------------------------------------------------------------------------------------------------


def _change(pair: tuple[int | None, int | None]) -> Change | None:
    before, after = pair
    return None if after is None else Change(before, after)


def _step(
    told: Fields, place: str, nbytes: Change | None, experts: Change | None, manifest: Manifest | None
) -> StepFacts:
    dropped, target = told.section("summary", "dropped"), told.section("target").text("format")
    return StepFacts(
        command=told.text("command"),
        place=place,
        nbytes=nbytes,
        experts=experts,
        pruning=_pruning(told, experts, manifest),
        healing=_healing(told),
        quantization=_rounding(told) if told.text("command") == "quantize" else None,
        target=target if _WORD.fullmatch(target) else "",
        dropped=tuple(words for key, words in _PARTS.items() if dropped.whole(key)),
        made_by=tuple(_made_by(told.section("made_by"))),
    )


def _made_by(told: Fields) -> Iterator[str]:
    for key in _MADE_BY:
        version = told.text(key)
        if _VERSION.fullmatch(version):
            yield version if key in ("instructions", "device") else f"{key} {version}"


def _pruning(told: Fields, experts: Change | None, manifest: Manifest | None) -> PruningFacts | None:
    """What was taken out, and why, as far as a manifest says; None where everything stayed."""
    width = _width(told)
    stayed = experts is not None and experts.before in (None, experts.after)
    if not told.section("manifest", "keep") or (stayed and not width):
        return None
    given = manifest is not None and is_pruned_by(told, manifest)
    chosen = Fields(chosen_by(manifest).get("chosen")) if given else told.section("summary", "chosen")
    layers = chosen.section("layers")
    return PruningFacts(
        criterion=chosen.text("criterion"),
        tokens=chosen.whole("tokens"),
        data=tuple(found for run in chosen.sections("runs") if (found := data_of(run))),
        saliency_kept=_shares(layers.get("saliency_kept")),
        never_reached_kept=_sum(layers.get("never_reached_kept")),
        channels=width,
    )


def _width(told: Fields) -> Change | None:
    """Channels of every routed expert, before and after; None where all stayed."""
    width = told.section("manifest", "width")
    before, after = width.whole("of"), width.whole("channels")
    return Change(before, after) if before and after else None


def _shares(values: object) -> tuple[float, ...]:
    """One share per layer; none when one of them is not known."""
    listed = values if isinstance(values, list) else []
    return tuple(listed) if all(isinstance(share, float | int) and 0 <= share <= 1 for share in listed) else ()


def _sum(values: object) -> int | None:
    known = isinstance(values, list) and values and all(type(count) is int for count in values)
    return sum(values) if known and isinstance(values, list) else None


def _healing(told: Fields) -> HealingFacts | None:
    """How pruned blocks were healed."""
    recipe = told.section("recipe")
    heal = recipe.section("heal")
    if not heal:
        return None
    return HealingFacts(
        what=heal.text("what"),
        iters=heal.whole("iters"),
        seconds=heal.whole("seconds") or 0,
        batch_size=heal.whole("batch_size"),
        data=data_of(recipe.section("data")),
        encoding=heal.text("encoding"),
        extra=heal.whole("extra") or 0,
        merge=heal.flag("merge"),
        blocks=_healed_blocks(told.section("facts")),
    )


def _rounding(told: Fields) -> QuantizationFacts:
    """How weights were rounded, as it was asked for."""
    scheme, facts = told.section("scheme"), told.section("facts")
    grid, tuned = scheme.section("grid"), scheme.text("method") == "auto-round"
    recipe = told.section("recipe") if tuned else Fields(None)
    numbers = {key: number for key in _NUMBERS if (number := recipe.whole(key)) is not None}
    texts = {key: text for key in _TEXTS if (text := recipe.text(key))}
    size, format_ = grid.get("group_size"), scheme.text("format")
    return QuantizationFacts(
        bits=grid.whole("bits") or 0,
        group_size=size if type(size) is int else 0,
        format=format_ if _WORD.fullmatch(format_) else "",
        expert_names="split",
        modules=0,
        method=scheme.text("method"),
        search=scheme.section("grid").flag("search"),
        data=data_of(recipe.section("data")),
        recipe={**numbers, **texts},
        blocks=_block_errors(facts),
        judged_apart=_judged_apart(facts),
    )


# -- tuned and healed blocks -------------------------------------------------------------------------------------------


def data_of(value: Fields) -> Data | None:
    """Provenance of token windows; None when it names no data."""
    name = value.text("data")
    if not name:
        return None
    return Data(
        name=name,
        samples=value.whole("samples"),
        seqlen=value.whole("seqlen"),
        tokens=value.whole("tokens"),
        content=value.text("revision") or value.text("sha256"),
        sources=tuple(filter(is_source, value.texts("sources"))),
    )


def _block_errors(facts: Fields) -> tuple[BlockError, ...]:
    """What tuning the rounding recorded of every block, in the order of the blocks."""
    out: dict[int, BlockError] = {}
    for layer, found in _blocks(facts):
        if "rtn_error" not in found and "rounded_to_nearest" not in found:
            continue  # it was healed only
        unreached = found.get("experts_never_reached")
        out[layer] = BlockError(
            layer=layer,
            rounded=found.number("rtn_error"),
            tuned=found.number("tuned_error"),
            ratio_error=found.number("ratio_standard_error"),
            never_reached=len(unreached) if isinstance(unreached, list) else 0,
        )
    return tuple(out[layer] for layer in sorted(out))


def _judged_apart(facts: Fields) -> bool | None:
    """Whether errors of tuned blocks are those on text that was not tuned on; None where one of them does not say."""
    found = [block.section("judged_on").get("held_out") for _, block in _blocks(facts) if "tuned_error" in block]
    return all(found) if found and all(isinstance(each, bool) for each in found) else None


def _healed_blocks(facts: Fields) -> tuple[HealedBlock, ...]:
    """What healing recorded of every block, in the order of the blocks."""
    out: dict[int, HealedBlock] = {}
    for layer, found in _blocks(facts):
        if healed := found.section("healed"):
            before, after = healed.number("pruned_error"), healed.number("healed_error")
            error = healed.number("ratio_standard_error")
            out[layer] = HealedBlock(
                layer=layer,
                pruned=before,
                healed=after,
                what=healed.text("what"),
                ratio_error=error,
                iters=healed.whole("iters"),
                merged=healed.number("merged") or 0.0,
            )
    return tuple(out[layer] for layer in sorted(out))


def _blocks(facts: Fields) -> Iterator[tuple[int, Fields]]:
    for block in facts.sections("blocks"):
        layer = block.whole("layer")
        if layer is not None:
            yield layer, block
