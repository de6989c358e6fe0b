"""The command lines that make an output again, rebuilt from what its record says was asked for.

Options at their defaults are left out. The experts to keep are read from the record itself, which is published with
the output. Given the same source and data, the commands end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from shardxform.ask.recipe import BATCH_SIZE, HEAL_ITERS, ITERS
from shardxform.base.constants import CLIP_STEP
from shardxform.base.strict_json import Fields
from shardxform.checkpoint.history import steps_of
from shardxform.checkpoint.record import PROVENANCE, Record
from shardxform.formats.scheme import usual_group_size
from shardxform.plan.view import DEFAULT_GGUF_BYTES, DEFAULT_SHARD_BYTES

__all__ = ["commands"]

Args = tuple[str, ...]
_VERBS: Final = ("prune", "quantize", "convert")
_SAMPLES: Final = 128
_SEQLEN: Final = 2048
_SEED: Final = 42


def commands(record: Record, source: str, out: str) -> tuple[Args, ...]:
    """Command lines in the order in which to run them; none where the record does not say enough.

    Args:
        record: of the output.
        source: name of the first source.
        out: name of the output; what comes between is named after it and its step.

    Raises:
        RecordError: see `steps_of`.

    """
    steps = steps_of(record)
    known = [step.text("command") in _VERBS and not _is_untold(step) for step in steps]
    if not known[-1]:
        return ()
    first = len(known) - known[::-1].index(False) if False in known else 0
    pruned = [number for number, step in enumerate(steps, 1) if step.section("manifest", "keep")]
    lines: list[Args] = []
    before = "SRC" if first else source
    for number, step in list(enumerate(steps, 1))[first:]:
        after = out if number == len(steps) else f"{out}-step-{number}"
        keep = PROVENANCE
        if number in pruned and len(pruned) > 1:
            keep = f"keep-{number}.json"
            lines.append(("shardxform", "manifest", "convert", PROVENANCE, keep, "--step", str(number)))
        lines.append(_line(step, (before, after), keep))
        before = after
    return tuple(lines)


def _is_untold(step: Fields) -> bool:
    """Whether weights were tuned, and the record does not say how: converted outputs of earlier versions do not."""
    tuned = step.section("scheme").text("method") == "auto-round"
    return step.text("command") == "quantize" and tuned and not step.section("recipe")


def _line(step: Fields, places: tuple[str, str], keep: str) -> Args:
    command = step.text("command")
    if command == "convert":
        return ("shardxform", command, *places, *_target(step), *_family(step))
    manifest = ("--manifest", keep) if step.section("manifest", "keep") else ()
    asked = (*manifest, *_scheme(step), *_recipe(step, _healing_steps(step.section("facts"))))
    return ("shardxform", command, *places, *asked, *_view(step), *_family(step))


def _family(step: Fields) -> Iterator[str]:
    """A family from a file; one from a package is found when that is installed."""
    for origin, _ in step.section("family").items():
        if origin.endswith(".py") and origin.isprintable():
            yield from ("--family", origin)


def _view(inputs: Fields) -> Iterator[str]:
    options = inputs.section("options")
    if options.flag("text_only"):
        yield "--text-only"
    yield from _unless("--mtp", options.text("mtp"), "auto")
    yield from _file(inputs)


def _file(inputs: Fields) -> Iterator[str]:
    """How large shards are, and how a GGUF file is written."""
    options = inputs.section("options")
    told = options.section("gguf")
    usual = DEFAULT_GGUF_BYTES if told else DEFAULT_SHARD_BYTES
    if told and inputs.text("command") == "prune":
        yield from ("--format", "gguf")
    yield from _unless("--gguf-type", told.text("kind"), "")
    yield from _unless("--pre-tokenizer", told.text("pre_tokenizer"), "")
    yield from _unless("--max-shard-size", options.whole("max_shard_bytes"), usual)


def _scheme(inputs: Fields) -> Iterator[str]:
    scheme = inputs.section("scheme")
    grid = scheme.section("grid")
    tuned = scheme.text("method") == "auto-round"
    yield from _unless("--scheme", f"W{grid.whole('bits') or 4}A16", "W4A16")
    yield from _unless("--group-size", grid.get("group_size"), usual_group_size(scheme.text("format")))
    yield from _unless("--method", scheme.text("method"), "rtn")
    if scheme and grid.flag("search") != tuned:
        yield "--search" if grid.flag("search") else "--no-search"
    yield from _unless("--scale-grid", grid.text("scale_grid"), "bf16")
    if scheme.flag("requantize"):
        yield "--requantize"
    yield from _names(scheme)
    for option, key in (("--keep-16bit", "keep_16bit"), ("--also-quantize", "quantize")):
        for pattern in scheme.texts(key):
            yield from (option, pattern)


def _names(scheme: Fields) -> Iterator[str]:
    """How the parts of a module are spelled."""
    yield from _unless("--format", scheme.text("format"), "auto-round")
    yield from _spelling(scheme)


def _spelling(value: Fields) -> Iterator[str]:
    yield from _unless("--expert-names", value.text("expert_names"), "split")
    if value.flag("g_idx"):
        yield "--g-idx"


def _healing_steps(facts: Fields) -> list[int]:
    """Steps that each block was healed by, in their order."""
    found = {block.whole("layer"): block.section("healed").whole("iters") for block in facts.sections("blocks")}
    return [steps for _, steps in sorted((at, steps) for at, steps in found.items() if at is not None and steps)]


def _recipe(inputs: Fields, steps: Sequence[int]) -> Iterator[str]:
    recipe = inputs.section("recipe")
    data = recipe.section("data")
    yield from _unless("--data", data.text("data"), "")
    yield from _unless("--samples", data.whole("samples_asked"), _SAMPLES)
    yield from _unless("--seqlen", recipe.whole("seqlen"), _SEQLEN)
    if data.get("pack") is False:
        yield "--no-pack"
    if data.flag("chat_template"):
        yield "--chat-template"
    yield from _unless("--text-key", data.text("text_key"), "text")
    yield from _unless("--text-sources", ",".join(data.texts("sources")), "")
    yield from _heal(recipe.section("heal"), steps)
    yield from _unless("--iters", recipe.whole("iters") or ITERS, ITERS)  # 0 where it was healed only
    yield from _unless("--lr", recipe.number("lr"), None)
    yield from _minmax_lr(recipe)
    yield from _unless("--batch-size", recipe.whole("batch_size"), BATCH_SIZE)
    yield from _unless("--seed", recipe.whole("seed"), _SEED)
    yield from _unless("--inputs", recipe.text("inputs"), "quantized")
    yield from _unless("--device", recipe.text("device"), "cpu")
    yield from _unless("--dtype", recipe.text("dtype"), "")  # what `auto` means depends on the machine


def _minmax_lr(recipe: Fields) -> Iterator[str]:
    """The first step of the scales; where a record has none, they moved as far as offsets."""
    if iters := recipe.whole("iters"):
        lr = recipe.number("lr") or 1 / iters
        yield from _unless("--minmax-lr", recipe.number("minmax_lr") or lr, CLIP_STEP * lr)


def _heal(heal: Fields, steps: Sequence[int]) -> Iterator[str]:
    """How blocks were healed: where time or a schedule decided the steps, those that each block had."""
    if heal.flag("merge"):
        yield "--merge"
    if heal.whole("iters") == 0:
        yield from _unless("--heal-encoding", heal.text("encoding"), "source")
        return
    yield from _unless("--heal", heal.text("what"), "")
    each = ",".join(map(str, steps)) if heal and heal.whole("iters") is None else ""
    yield from _unless("--heal-iters", each or heal.whole("iters"), HEAL_ITERS)
    yield from _unless("--heal-lr", heal.number("lr"), None)
    yield from _unless("--heal-extra", heal.whole("extra") or 0, 0)
    yield from _unless("--heal-encoding", heal.text("encoding"), "source")


def _target(inputs: Fields) -> Iterator[str]:
    target = inputs.section("target")
    yield from ("--to", target.text("format"))
    yield from _spelling(target)
    yield from _file(inputs)


def _unless(option: str, value: object, default: object) -> Iterator[str]:
    """An option and its value, unless it is the default or was not recorded."""
    if value not in (None, "", default):
        yield from (option, str(value))
