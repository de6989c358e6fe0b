"""A card as Markdown: front matter, tables of figures, how to load, limits, and how to make it again.

A function of the facts alone, the same text every time. A section without facts is not there. What is said of vLLM and
SGLang was read in their code; see docs/quantization.md. Text from strangers is put so that it can only be text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from shardxform.publish.card import making
from shardxform.publish.card.facts import CardFacts, Change, Data, EvaluationFacts, PruningFacts, TaskFacts
from shardxform.publish.card.making import text_name
from shardxform.publish.card.markdown import code, fence, figure, folded, pipe_table, shell, short_count, sizes
from shardxform.publish.card.writing import MARK

__all__ = ["front_matter", "render"]

_KEEP: Final = (
    "<!-- `shardxform card --write` replaces this file; to keep changes of your own, remove the line above -->"
)
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
    healed = [step.healing for step in facts.steps if step.healing]
    for heading, section in (
        ("Steps", making.steps(facts)),
        ("Pruning", making.pruning(facts)),
        ("Merging" if healed and all(each.only_merged for each in healed) else "Healing", making.healing(facts)),
        ("Quantization", making.quantization(facts)),
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
    before, after = sizes(facts.nbytes)
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
    yield pipe_table(
        ("", "before", "after"),
        [
            ("size of the tensors", *sizes(facts.nbytes)),
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
        yield (label, "" if change.before is None else short_count(change.before), short_count(change.after))


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
    yield pipe_table([name for name, _ in columns], [[cell(found) for _, cell in columns] for found in facts.tasks])
    told = ", ".join(dict.fromkeys(found.harness for found in facts.tasks))
    part = " Of each task only the first documents were asked." if any(found.limited for found in facts.tasks) else ""
    yield f"Tasks are those of {told}; ± is a standard error over documents.{part}"
    compared = [found for found in facts.tasks if found.reference is not None]
    if compared:
        of_it = _reference(facts, compared) or "the checkpoint it was held against"
        yield f"The reference is {of_it}; differences are taken document by document."


def _reference(facts: CardFacts, compared: Sequence[EvaluationFacts] | Sequence[TaskFacts]) -> str:
    """What figures are compared with; empty where that is not known of all."""
    before = {found.steps_before for found in compared}
    if not all(found.of_source for found in compared):
        return ""
    if len(facts.steps) < 2 or len(before) > 1:
        return "the checkpoint that this one was made from"
    (number,) = before
    return f"what step {number} gave" if number else "the checkpoint that the first step began with"


def _of_text(facts: CardFacts) -> Iterator[str]:
    lines = [each for found in facts.evaluations for each in (*found.sources, found)]
    columns = [column for column in _COLUMNS if any(column[1](found) for found in lines)]
    yield pipe_table([name for name, _ in columns], [[cell(found) for _, cell in columns] for found in lines])
    compared = [found for found in facts.evaluations if found.reference is not None]
    if compared:
        unknown = "the checkpoint that this one was held against, whether or not that is its source"
        yield (
            f"The reference is {_reference(facts, compared) or unknown}, on the same windows. KL divergence is"
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
            yield folded(pipe_table(("block", "error"), [(str(n), "" if e is None else f"{e:.2%}") for n, e in known]))


def _divergence(found: EvaluationFacts) -> str:
    return "" if found.kl is None else figure(found.kl, found.kl_error, ".4f")


_COLUMNS = (
    ("text", lambda found: text_name(found.data)),
    ("source", lambda found: code(found.source) if found.source else ""),
    ("tokens", lambda found: f"{found.tokens:,}"),
    ("windows", lambda found: f"{found.windows:,}"),
    ("perplexity", lambda found: figure(found.perplexity, found.perplexity_error, ".3f")),
    ("reference", lambda found: "" if found.reference is None else f"{found.reference:.3f}"),
    ("ratio", lambda found: figure(found.ratio, found.ratio_error, ".4f")),
    ("KL divergence", _divergence),
    ("same choice", lambda found: figure(found.top1, found.top1_error, ".1%")),
)


def _difference(found: TaskFacts) -> str:
    if found.reference is None:
        return ""
    return figure(found.value - found.reference, found.difference_error, "+.4f").replace("± +", "± ")


_TASK_COLUMNS = (
    ("task", lambda found: code(found.task)),
    ("shots", lambda found: "" if found.shots is None else f"{found.shots}"),
    ("documents", lambda found: "" if found.documents is None else f"{found.documents:,}"),
    ("metric", lambda found: code(found.metric)),
    ("value", lambda found: figure(found.value, found.error, ".4f")),
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
    healed = [step.healing for step in facts.steps if step.healing]
    if facts.pruning:
        what = "experts and channels" if facts.pruning.channels else "experts"
        rest = ", but for what of it was merged into others" if any(each.merged for each in healed) else ""
        yield (
            f"What pruned {what} knew is lost{rest}. They were chosen for what they did on some text; on other"
            " languages and subjects the loss can be far greater."
        )
    if any(not each.only_merged for each in healed):
        yield "It was healed on calibration text, and fits text like it best."
    elif any(each.merged for each in healed):
        yield "Experts were merged by calibration text, and fit text like it best."
    elif any(step.quantization and step.quantization.data for step in facts.steps):
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
    for step in facts.steps:
        if step.pruning:
            yield from step.pruning.data
    yield from _tuned_on(facts)


def _tuned_on(facts: CardFacts) -> Iterator[Data]:
    for step in facts.steps:
        if step.healing and step.healing.data:
            yield step.healing.data
        if step.quantization and step.quantization.data:
            yield step.quantization.data


def _is_shared(one: Data, other: Data) -> bool:
    """Whether two texts are the same, or documents of a source in both."""
    same = bool(one.content) and (one.name, one.content) == (other.name, other.content)
    return same and (not one.sources or not other.sources or not {*one.sources}.isdisjoint(other.sources))


def _again(facts: CardFacts) -> Iterator[str]:
    if not facts.commands:
        return
    yield fence("\n".join(shell(args) for args in facts.commands), "sh")
    yield "\n".join(f"- {what}: {told}" for what, told in _ingredients(facts))
    yield "From these, the same bytes come of it."


def _ingredients(facts: CardFacts) -> Iterator[tuple[str, str]]:
    """What the commands name, and where a stranger finds it."""
    words = {word for args in facts.commands for word in args}
    place = facts.steps[0].place
    if facts.source in words:
        yield (
            code(facts.source),
            "the checkpoint that this one was made from; sizes of its shards and digests of their headers are in"
            f" `shardxform.json`, under `{place}.source`",
        )
    else:  # an earlier version did not record all of the way
        yield "`SRC`", "what the first of these was made from; the record does not say how that came about"
    if "shardxform.json" in words:
        yield "`shardxform.json`", "the file beside this card; the experts that stay are listed in it"
    texts = {(data.name, data.content): data for data in _tuned_on(facts) if data.name in words}
    for data in texts.values():
        yield code(data.name), "the calibration text" + (f", {_content(data)}" if data.content else "")
    for made_by in dict.fromkeys(step.made_by for step in facts.steps if step.made_by):
        numbers = [str(number) for number, step in enumerate(facts.steps, 1) if step.made_by == made_by]
        of = f" in step{'s' * (len(numbers) > 1)} {' and '.join(numbers)}" if len(facts.steps) > 1 else ""
        yield "made with", f"{', '.join(made_by)}{of}"


def _content(data: Data) -> str:
    """Which text it is, whatever it is called."""
    return f"whose {'SHA-256' if len(data.content) == 64 else 'revision'} is {code(data.content)}"


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
    yield fence(shell(("mlx_lm.generate", "--model", facts.name, "--prompt", "Hello", "--max-tokens", "100")), "sh")
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
    yield fence("\n".join(map(shell, lines)), "sh")
    yield "### Ollama"
    if len(facts.gguf) > 1:
        joined = f"{facts.name}.gguf"
        yield "Ollama reads one file: join these first."
        yield fence(shell(("llama-gguf-split", "--merge", first, joined)), "sh")
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
    yield fence(shell(("vllm", "serve", facts.name, "--dtype", facts.dtype, "--max-model-len", context)), "sh")
    if facts.quantization is None or facts.quantization.format == "auto-round":
        yield "### SGLang"
        launch = ("python", "-m", "sglang.launch_server", "--model-path", facts.name)
        yield fence(shell((*launch, "--dtype", facts.dtype, "--context-length", context)), "sh")
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
