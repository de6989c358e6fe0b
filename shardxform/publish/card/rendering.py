"""A card as Markdown: front matter, tables of figures, how to load, limits, and how to make it again.

A function of the facts alone, the same text every time. A section without facts is not there. What is said of vLLM and
SGLang was read in their code; see docs/quantization.md. Text from strangers is put so that it can only be text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Final

from shardxform.base.tensors import show_size
from shardxform.publish.card.facts import (
    BlockError,
    CardFacts,
    Change,
    Data,
    EvaluationFacts,
    HealedBlock,
    HealingFacts,
    PruningFacts,
    QuantizationFacts,
    TaskFacts,
)
from shardxform.publish.card.writing import MARK

__all__ = ["code", "fence", "front_matter", "render"]

_KEEP: Final = (
    "<!-- `shardxform card --write` replaces this file; to keep changes of your own, remove the line above -->"
)
_HEALED: Final = {  # names of `recipe.HEALED`, and what they stand for
    "auto": "all of the block, or routers and shared experts where held-out windows were no better for that",
    "router": "routers",
    "shared": "routers, shared experts and the norms before them",
    "experts": "routed experts",
    "moe": "routers, shared and routed experts and the norms before them",
    "all": "all of the block",
}
_WRITTEN: Final = {"source": "rounded to what weights are stored as in the source", "16bit": "in 16 bits"}
_HARMLESS: Final = re.compile(r"[\w.+ -]+", re.ASCII)
_MAX_CONTEXT: Final = 32768  # of the examples: a longer one is a matter of the reader's memory
_ASSERTS_MTP: Final = "qwen3_5_moe"  # the family whose converter in llama.cpp takes MTP layers for granted
_NEEDS: Final = {"auto-round": "auto-round", "gptq": "auto-round", "compressed-tensors": "compressed-tensors"}
_BARE: Final = re.compile(r"[A-Za-z][\w./+-]*", re.ASCII)
_NOT_TEXT: Final = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


def render(facts: CardFacts) -> str:
    """Word the facts; ends with a newline."""
    blocks = [front_matter(facts), f"{MARK}\n{_KEEP}", f"# {_title(facts.name)}", _opening(facts)]
    blocks += _figures(facts)
    for heading, section in (
        ("Pruning", _pruning(facts)),
        ("Merging" if facts.healing and facts.healing.only_merged else "Healing", _healing(facts)),
        ("Quantization", _quantization(facts)),
        ("Evaluation", _evaluation(facts)),
        ("Loading", _loading(facts)),
        ("Limitations", _limitations(facts)),
        ("Making it again", _again(facts)),
    ):
        text = [block for block in section if block]
        blocks += [f"## {heading}", *text] if text else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def _title(name: str) -> str:
    return name if _HARMLESS.fullmatch(name) and not re.search(r"__|_\b|\b_", name) else code(name)


def _opening(facts: CardFacts) -> str:
    base = facts.origin.base_model
    article = "An" if facts.architecture[:1] in "AEIO" else "A"
    what = code(base) if base else f"{article} {code(facts.architecture)} checkpoint"
    done = [part for part in (_kept(facts), _stored(facts)) if part]
    how = f" with {' and '.join(done)}" if done else ""
    without = f", without {' and '.join(facts.dropped)}" if facts.dropped else ""
    before, after = _sizes(facts.nbytes)
    size = f"{before} of tensors became {after}" if before else f"Its tensors have {after}"
    return f"{what}{how}{without}. {size}. Made with shardxform."


def _kept(facts: CardFacts) -> str:
    if not facts.pruning:
        return ""
    experts, channels = facts.experts, facts.pruning.channels
    of = f" of {experts.before}" if experts.before else ""
    kept = f"{experts.after}{of} routed experts kept in every MoE layer"
    if channels is None:
        return kept
    narrowed = f"{channels.after} of {channels.before} channels kept in"
    same = experts.before == experts.after
    return f"{narrowed} every routed expert" if same else f"{kept}, {narrowed} each of them"


def _stored(facts: CardFacts) -> str:
    made = facts.quantization
    if made:
        return f"weights of {made.bits} bits in the {made.format} format"
    if facts.encodings:
        return f"weights in {' and '.join(facts.encodings)}, as the source has them"
    return f"quantized weights turned back into {facts.dequantized}" if facts.dequantized else ""


def _figures(facts: CardFacts) -> Iterator[str]:
    """What changed in size, and what did not."""
    yield _table(
        ("", "before", "after"),
        [
            ("size of the tensors", *_sizes(facts.nbytes)),
            ("routed experts per MoE layer", *_counts(facts.experts)),
            *_channels(facts.pruning),
            *_parameters("parameters", facts.parameters),
            *_parameters("parameters used per token", facts.active),
        ],
    )
    dense = f", {facts.layers - facts.moe_layers} of them dense" if facts.layers != facts.moe_layers else ""
    counted = (
        " Parameters are those of the decoder with embeddings and output head, without MTP layers and vision tower."
    )
    yield (
        f"{facts.layers} decoder layers{dense}; the router picks {facts.top_k} experts per token."
        f"{counted if facts.parameters else ''}"
    )


def _channels(pruned: PruningFacts | None) -> Iterator[tuple[str, str, str]]:
    """A line for the width of experts, where it changed."""
    if pruned and pruned.channels:
        yield ("channels of each of them", *_counts(pruned.channels))


def _counts(change: Change) -> tuple[str, str]:
    return ("" if change.before is None else str(change.before), str(change.after))


def _parameters(label: str, change: Change | None) -> Iterator[tuple[str, str, str]]:
    """A line for a count, where it is known."""
    if change:
        yield (label, "" if change.before is None else _count(change.before), _count(change.after))


# -- how it was made --------------------------------------------------------------------------------------------------


def _pruning(facts: CardFacts) -> Iterator[str]:
    pruned = facts.pruning
    if pruned is None:
        return
    yield _listing(_pruning_lines(pruned))
    channels = ", and which of their channels," if pruned.channels else ""
    yield f"Which experts every layer kept{channels} is in `shardxform.json`, under `inputs.manifest`."


def _pruning_lines(pruned: PruningFacts) -> Iterator[tuple[str, str]]:
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


def _healing(facts: CardFacts) -> Iterator[str]:
    made = facts.healing
    if made is None:
        return
    if made.merge:
        yield "Pruned experts were merged into those that stay (REAM, arXiv 2604.04356), as far as that is better."
    if not made.only_merged:
        yield "The weights that stayed were tuned, block by block, so that a block puts out what it did before pruning."
    yield _listing(_healing_lines(made))
    if made.blocks:
        yield (
            "Squared error of each block's output, relative to every token's own size, on windows of the calibration"
            f" text that {'only say how far to go' if made.only_merged else 'were not tuned on'}:"
        )
        columns = ("block", "pruned", "healed", "ratio", "tuned", "steps")[: 5 if made.iters else 6]
        if made.only_merged:
            columns = ("block", "pruned", "merged", "ratio", "how far")
        yield _folded(_table(columns, [_healed_block(block)[: len(columns)] for block in made.blocks]))


def _healing_lines(made: HealingFacts) -> Iterator[tuple[str, str]]:
    yield "weights", _HEALED.get("experts" if made.only_merged else made.what, "")
    yield "calibration text", _data(made.data) if made.data else ""
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
    done = ", ".join(each for each in (f"merged {block.merged:.3g}" * (block.merged > 0), block.what) if each)
    if not done or before is None or after is None:
        return (str(block.layer), "" if before is None else f"{before:.3e}", "left as pruned", "", "", steps)
    ratio = _figure(after / before, block.ratio_error, ".1%") if before else ""
    return (str(block.layer), f"{before:.3e}", f"{after:.3e}", ratio, done, steps)


def _quantization(facts: CardFacts) -> Iterator[str]:
    made = facts.quantization
    if made is None:
        return
    yield _listing(_quantization_lines(made))
    tuned = [block for block in made.blocks if block.rounded is not None and block.tuned is not None]
    if tuned:
        judged = made.judged_apart
        where = ", on windows of the calibration text that were not tuned on" if judged else ""
        flatters = ", on a window that was tuned on as well, which flatters" if judged is False else ""
        yield f"Squared error of each block's output, relative to every token's own size{where}{flatters}:"
        columns = ("block", "rounded", "tuned", "ratio", "experts never reached")
        yield _folded(_table(columns, [_block(block) for block in made.blocks]))


def _quantization_lines(made: QuantizationFacts) -> Iterator[tuple[str, str]]:
    groups = "one scale per row" if made.group_size == -1 else f"groups of {made.group_size} share a scale"
    yield "scheme", f"W{made.bits}A16, symmetric, {groups}"
    yield "format", f"{made.format}, blocks of {' and '.join(made.types)}" if made.types else made.format
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


def _method(made: QuantizationFacts) -> str:
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


def _evaluation(facts: CardFacts) -> Iterator[str]:
    if facts.evaluations:
        yield from _of_text(facts)
    if facts.tasks:
        yield from _of_tasks(facts)
    for name in facts.plots:
        yield f"![{name.removesuffix('.png')}]({name})"


def _of_tasks(facts: CardFacts) -> Iterator[str]:
    columns = [column for column in _TASK_COLUMNS if any(column[1](found) for found in facts.tasks)]
    yield _table([name for name, _ in columns], [[cell(found) for _, cell in columns] for found in facts.tasks])
    told = ", ".join(dict.fromkeys(found.harness for found in facts.tasks))
    part = " Of each task only the first documents were asked." if any(found.limited for found in facts.tasks) else ""
    yield f"Tasks are those of {told}; ± is a standard error over documents.{part}"
    compared = [found for found in facts.tasks if found.reference is not None]
    if compared:
        of_it = "that this one was made from" if all(found.of_source for found in compared) else "it was held against"
        yield f"The reference is the checkpoint {of_it}; differences are taken document by document."


def _of_text(facts: CardFacts) -> Iterator[str]:
    lines = [each for found in facts.evaluations for each in (*found.sources, found)]
    columns = [column for column in _COLUMNS if any(column[1](found) for found in lines)]
    yield _table([name for name, _ in columns], [[cell(found) for _, cell in columns] for found in lines])
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
            yield _folded(_table(("block", "error"), [(str(n), "" if e is None else f"{e:.2%}") for n, e in known]))


def _divergence(found: EvaluationFacts) -> str:
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


def _difference(found: TaskFacts) -> str:
    if found.reference is None:
        return ""
    return _figure(found.value - found.reference, found.difference_error, "+.4f").replace("± +", "± ")


_TASK_COLUMNS = (
    ("task", lambda found: code(found.task)),
    ("shots", lambda found: "" if found.shots is None else f"{found.shots}"),
    ("documents", lambda found: "" if found.documents is None else f"{found.documents:,}"),
    ("metric", lambda found: code(found.metric)),
    ("value", lambda found: _figure(found.value, found.error, ".4f")),
    ("reference", lambda found: "" if found.reference is None else f"{found.reference:.4f}"),
    ("difference", _difference),
)


def _limitations(facts: CardFacts) -> Iterator[str]:
    yield "\n".join(f"- {line}" for line in _limits(facts))


def _limits(facts: CardFacts) -> Iterator[str]:
    if facts.tasks:
        yield "Only the figures above were measured."
    elif facts.evaluations:
        yield "Only the figures above were measured. It was not benchmarked on tasks."
    else:
        yield "Nothing was measured for this card, neither perplexity nor tasks."
    if facts.pruning:
        what = "experts and channels" if facts.pruning.channels else "experts"
        rest = ", but for what of it was merged into others" if facts.healing and facts.healing.merged else ""
        yield (
            f"What pruned {what} knew is lost{rest}. They were chosen for what they did on some text; on other"
            " languages and subjects the loss can be far greater."
        )
    tuned = facts.quantization is not None and facts.quantization.data is not None
    if facts.healing and not facts.healing.only_merged:
        yield "It was healed on calibration text, and fits text like it best."
    elif facts.healing and facts.healing.merged:
        yield "Experts were merged by calibration text, and fit text like it best."
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


def _calibration(facts: CardFacts) -> Iterator[Data]:
    if facts.pruning:
        yield from facts.pruning.data
    yield from _tuned_on(facts)


def _tuned_on(facts: CardFacts) -> Iterator[Data]:
    if facts.healing and facts.healing.data:
        yield facts.healing.data
    if facts.quantization and facts.quantization.data:
        yield facts.quantization.data


def _is_shared(one: Data, other: Data) -> bool:
    """Whether two texts are the same, or documents of a source in both."""
    same = bool(one.content) and (one.name, one.content) == (other.name, other.content)
    return same and (not one.sources or not other.sources or not {*one.sources}.isdisjoint(other.sources))


def _again(facts: CardFacts) -> Iterator[str]:
    if not facts.commands:
        return
    yield fence("\n".join(_shell(args) for args in facts.commands), "sh")
    yield "\n".join(f"- {what}: {told}" for what, told in _ingredients(facts))
    yield "From these, the same bytes come of it."


def _ingredients(facts: CardFacts) -> Iterator[tuple[str, str]]:
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


# -- loading -----------------------------------------------------------------------------------------------------------


def _loading(facts: CardFacts) -> Iterator[str]:
    """Paragraphs and blocks of code, one client after the other."""
    if facts.gguf:
        yield from _gguf(facts)
        return
    old_names = facts.quantization is not None and facts.quantization.expert_names == "fused-indexed"
    if old_names:
        yield (
            "The experts are named as auto-round did before 0.12. Current versions of transformers, vLLM and SGLang do"
            " not load them; `shardxform convert --expert-names split` writes names that they do."
        )
        return
    if facts.quantization and facts.quantization.format == "mlx":
        yield from _mlx_alone(facts)
        return
    if facts.bfloat16_only:
        yield "Load it in bfloat16: float16 overflows in the gated delta-net layers of this family, and gives NaN."
    yield from _transformers(facts)
    yield from _served(facts)
    if others := [*_llama_cpp(facts), *_mlx(facts)]:
        yield "### llama.cpp and MLX"
        yield "\n".join(f"- {line}" for line in others)


def _mlx_alone(facts: CardFacts) -> Iterator[str]:
    """How to run what only mlx-lm reads."""
    yield "### MLX"
    yield "Needs `pip install mlx-lm`."
    yield fence(_shell(("mlx_lm.generate", "--model", facts.name, "--prompt", "Hello", "--max-tokens", "100")), "sh")
    told = ""
    if facts.model_type == "qwen3_5_moe_text":
        told = " Its model_type is `qwen3_5_moe`, since mlx-lm does not know that of the text alone."
    yield (
        f"It loads as it is, with the codes and scales of the quantized weights.{told} transformers, vLLM, SGLang and"
        " llama.cpp do not read this format: `shardxform convert --to auto-round`, or another, writes what they read,"
        " with the same codes and scales."
    )


def _gguf(facts: CardFacts) -> Iterator[str]:
    """Programs that run a GGUF file, by its name or that of the first of several."""
    first = facts.gguf[0]
    context = str(min(facts.max_positions or _MAX_CONTEXT, _MAX_CONTEXT))
    yield "### llama.cpp"
    lines = [("llama-server", "-m", first, "-c", context), ("llama-cli", "-m", first, "-p", "Hello")]
    yield fence("\n".join(map(_shell, lines)), "sh")
    yield "### Ollama"
    if len(facts.gguf) > 1:
        joined = f"{facts.name}.gguf"
        yield "Ollama reads one file: join these first."
        yield fence(_shell(("llama-gguf-split", "--merge", first, joined)), "sh")
        first = joined
    name = re.sub(r"[^a-z0-9._-]+", "-", facts.name.lower()).strip("-") or "model"
    yield fence(f"printf 'FROM ./%s\\n' {shlex.quote(first)} > Modelfile\nollama create {name} -f Modelfile", "sh")


def _transformers(facts: CardFacts) -> Iterator[str]:
    yield "### transformers"
    needs = _NEEDS.get(facts.quantization.format if facts.quantization else facts.method)
    if needs:
        yield f"Needs `pip install {needs}`."
    yield fence("\n".join(_python(facts)), "python")


def _python(facts: CardFacts) -> Iterator[str]:
    model = "AutoModelForImageTextToText" if facts.vision else "AutoModelForCausalLM"
    inputs = "AutoProcessor" if facts.vision else "AutoTokenizer"
    gptq = facts.quantization is not None and facts.quantization.format == "gptq"
    backend = ', quantization_config=AutoRoundConfig(backend="torch")' if gptq else ""
    names = sorted([model, inputs, *(["AutoRoundConfig"] if gptq else [])])
    yield "import torch"
    yield f"from transformers import {', '.join(names)}"
    yield ""
    yield f"path = {json.dumps(facts.name)}  # this directory, or its name on the hub"
    yield f"{'processor' if facts.vision else 'tokenizer'} = {inputs}.from_pretrained(path)"
    yield f"model = {model}.from_pretrained(path, dtype=torch.{facts.dtype}{backend})"


def _llama_cpp(facts: CardFacts) -> Iterator[str]:
    """What the converter has to be told, of formats that it reads."""
    made = facts.quantization
    read = made is None or made.format == "compressed-tensors" or (made.format == "gptq" and made.g_idx)
    if read and facts.family == _ASSERTS_MTP and not facts.has_mtp:
        yield "llama.cpp: `convert_hf_to_gguf.py` needs `--no-mtp`; without MTP layers it stops at an assertion."


def _mlx(facts: CardFacts) -> Iterator[str]:
    """What mlx-lm has to be told, or must not be given; no spelling of config.json suits it and the others."""
    made = facts.quantization
    if made is None and facts.model_type == "qwen3_5_moe_text":
        told = json.dumps({"model_type": "qwen3_5_moe"})
        yield (
            f"mlx-lm does not know model_type `{facts.model_type}`: load it with `mlx_lm.load(path,"
            f" model_config={told})`, or write that model_type into the config.json of a copy for mlx-lm alone."
        )
    if made and (facts.family, made.format, made.bits) == ("deepseek_v3", "compressed-tensors", 8):
        yield (
            "mlx-lm loads this and computes garbage, since it takes all packed weights for 4 bits: give it what"
            " `shardxform convert --to bf16` makes of this."
        )


def _served(facts: CardFacts) -> Iterator[str]:
    """Servers that read the format, as far as their code says."""
    context = str(min(facts.max_positions or _MAX_CONTEXT, _MAX_CONTEXT))
    yield "### vLLM"
    yield fence(_shell(("vllm", "serve", facts.name, "--dtype", facts.dtype, "--max-model-len", context)), "sh")
    if facts.quantization is None or facts.quantization.format == "auto-round":
        yield "### SGLang"
        launch = ("python", "-m", "sglang.launch_server", "--model-path", facts.name)
        yield fence(_shell((*launch, "--dtype", facts.dtype, "--context-length", context)), "sh")
        yield "That these servers read this was found in their code (vLLM 0.32, SGLang 0.5.23), not by running them."
    else:
        yield "That vLLM reads this format was found in its code (0.32), not by running it."


# -- front matter ------------------------------------------------------------------------------------------------------


def front_matter(facts: CardFacts) -> str:
    """Lines from `---` to `---`."""
    lines = ["---"]
    for key, value in _entries(facts):
        if isinstance(value, str):
            lines.append(f"{key}: {_yaml(value)}")
        else:
            lines += [f"{key}:", *(f"- {_yaml(item)}" for item in value)]
    return "\n".join([*lines, "---"])


def _entries(facts: CardFacts) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Keys that have something to say, in the order in which hubs show them."""
    origin = facts.origin
    entries: Mapping[str, str | tuple[str, ...]] = {
        "language": origin.languages,
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
        "base_model": origin.base_model,
        "base_model_relation": "quantized" if origin.base_model and facts.quantization else "",
        "library_name": _library(facts),
        "pipeline_tag": "image-text-to-text" if facts.vision else "text-generation",
        "tags": tuple(_tags(facts)),
    }
    yield from ((key, value) for key, value in entries.items() if value)


def _library(facts: CardFacts) -> str:
    """What loads it, in the hub's words."""
    if facts.gguf:
        return "llama.cpp"
    return "mlx" if facts.quantization and facts.quantization.format == "mlx" else "transformers"


def _tags(facts: CardFacts) -> Iterator[str]:
    yield "moe"
    if facts.pruning:
        yield "pruned"
        if re.fullmatch(r"[a-z0-9-]{1,32}", facts.pruning.criterion):
            yield facts.pruning.criterion
    if facts.quantization:
        yield f"int{facts.quantization.bits}"
        yield facts.quantization.format
    elif facts.gguf:
        yield "gguf"
    yield "shardxform"


def _yaml(text: str) -> str:
    """A text as YAML has it: bare where that can mean nothing else, else as JSON."""
    bare = _BARE.fullmatch(text) and text.lower() not in _NOT_TEXT
    return text if bare else json.dumps(text, ensure_ascii=False)


# -- pieces of Markdown ------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    """A name as code: one line, and nothing in it that ends a code span or a cell of a table."""
    folded = " ".join(text.split())
    return "`" + re.sub(r"[`|]", "'", folded[:200]) + "`"


def fence(text: str, language: str) -> str:
    """A block of code, whatever back ticks are in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _shell(args: Sequence[str]) -> str:
    """A command line, broken before options where it is long."""
    words = [shlex.quote(arg) for arg in args]
    lines, line = [], words[0]
    for at, word in enumerate(words[1:], 1):
        ahead = word + (f" {words[at + 1]}" if at + 1 < len(words) and word.startswith("--") else "")
        if len(line) + 1 + len(ahead) > 100 and word.startswith("--"):
            lines.append(line + " \\")
            line = f"    {word}"
        else:
            line += f" {word}"
    return "\n".join([*lines, line])


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of figures, the first column to the left, the others to the right; empty without lines."""
    listed = [*lines]
    if not listed:
        return ""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *listed))


def _listing(pairs: Iterable[tuple[str, str]]) -> str:
    """What is told, and what of it; pairs without a value are left out."""
    return "\n".join(f"- {label}: {value}" for label, value in pairs if value)


def _count(count: int) -> str:
    """A count of parameters as people say it: `34.66 B`, `4.41 M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def _sizes(change: Change) -> tuple[str, str]:
    """Sizes before and after."""
    return (show_size(change.before) if change.before is not None else "", show_size(change.after))
