"""The text of an entry, formatted as those of this package are."""

from __future__ import annotations

import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from transformers.configuration_utils import PreTrainedConfig

from shardxform.drafting.conditions import Condition
from shardxform.drafting.facts import EntryFacts, Row
from shardxform.drafting.probe import Probe
from shardxform.model.families.base import COUNT_KEYS, EMBEDDINGS, NORMS, TYPES

__all__ = ["entry_text", "notes"]

_WIDTH: Final = 120
_WORDS: Final = {int: "int", float: "float", bool: "bool", str: "str", dict: "object", list: "list", type(None): "null"}
_ORDER: Final = ("norms", "attention", "linear attention", "router", "shared experts", "dense mlp")
_UNQUANTIZED: Final = ("in_proj_a", "in_proj_b", "in_proj_ba", "kv_b_proj")
_MERGED: Final[Mapping[str, tuple[str, ...]]] = {  # by vLLM, where a block has all of them side by side
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


_PARTS: Final = (
    *("EMBEDDINGS", "NORMS", "TYPES", "Config", "Decoder", "ExpertLayout", "Family", "Template", "Wrapper"),
    *("experts", "mlp", "size", "tied", "untied"),
)
"""What entries import, in the order in which imports are sorted."""


def entry_text(facts: EntryFacts) -> str:
    """The whole file."""
    block = list(_block(facts))
    body = [line for field in _fields(facts, block) for line in field]
    helpers = _helpers(facts)
    layout = ""
    if facts.layout:
        layout = _call("_EXPERTS: Final = ExpertLayout", [f"{k}={_value(v)}" for k, v in facts.layout.items()]) + "\n"
    text = "\n".join((*helpers, layout, *body))
    out = [f"# decide: {line}" if first else f"#   {line}" for note in notes(facts) for first, line in _wrapped(note)]
    out += [f'"""{_summary(facts)}', "", f"Names and shapes from transformers' `{facts.probe.model_type}`.", '"""', ""]
    out += ["from __future__ import annotations", "", "from typing import Final", ""]
    out += ["from shardxform.model.families.base import (", *(f"    {name}," for name in _imports(text)), ")", ""]
    out += ['__all__ = ["FAMILY"]', ""]
    out += [layout] if layout else []
    for helper in helpers:
        out += ["", *helper.splitlines(), ""]
    out += [""] if helpers else []
    out += ["FAMILY: Final = Family(", *body, ")"]
    return "\n".join(out) + "\n"


def notes(facts: EntryFacts) -> Iterator[str]:
    """What a person must decide, one sentence each."""
    yield from dict.fromkeys(facts.decide)
    if facts.probe.ignored:
        patterns = ", ".join(facts.probe.ignored)
        numbered = any("layers" in pattern for pattern in facts.probe.ignored)
        like = "numbered on after the blocks, as in deepseek_v3.py" if numbered else "apart, as in qwen3_5_moe.py"
        yield f"mtp: transformers passes over {patterns}: layers of multi-token prediction as a rule, {like}"
    yield "formats: load what each of them writes (tests/test_every_family.py), and leave out what does not load"


# -- fields ------------------------------------------------------------------------------------------------------------


def _fields(facts: EntryFacts, block: Sequence[str]) -> Iterator[list[str]]:
    """The fields of the entry, in the order of `Family`, each as lines."""
    probe = facts.probe
    yield [f'    name="{probe.model_type}",']
    wrapper = f'Wrapper("{probe.architecture}", "{probe.model_type}", None, "{facts.prefix}")'
    yield [f"    wrappers=({wrapper},),"]
    yield list(_counts(probe))
    yield list(_root(facts))
    yield ["    block=(", *block, "    ),"]
    yield list(_names(facts))
    yield ["    symbols={", *(f'        "{key}": {value},' for key, value in sorted(facts.symbols.items())), "    },"]
    yield ["    types={", *_types(probe), "    },"]
    yield ["    conditions={", *_conditions(facts), "    },"]
    if facts.moe:
        yield [f'    moe="{facts.moe.name}",']
    yield list(_of_quantizing(facts))
    if probe.fields.get("tie_word_embeddings"):
        yield ["    tied_by_default=True,"]
    if facts.norm not in ("", "post_attention_layernorm.weight"):
        yield [f'    experts_norm="{facts.norm}",']
    if facts.stacked:
        yield ["    fused_release=True,"]


def _counts(probe: Probe) -> Iterator[str]:
    """Which keys count what."""
    yield f"    count_keys={_value(tuple(_count_keys(probe)))},"
    if (top_k := probe.stored(probe.top_k_key)) != "num_experts_per_tok":
        yield f'    top_k_key="{top_k}",'
    if "list of int" in (*_words(probe.hints[probe.count_key]), *_words(probe.hints.get(probe.top_k_key))):
        yield "    listed_counts=True,"
    if probe.group_key:
        yield f'    group_key="{probe.stored(probe.group_key)}",'


def _names(facts: EntryFacts) -> Iterator[str]:
    """What has other names than usual, and in transformers' modules than in releases."""
    if facts.decoder:
        yield _call("    decoder=Decoder", [f"{key}={_value(value)}" for key, value in facts.decoder.items()], ",")
    if facts.layout:
        yield "    experts=_EXPERTS,"
    if facts.renames:
        yield _call("    renames=", [_value(pair) for pair in facts.renames], ",", single=True)
    if facts.joined:
        yield "    joined={"
        for key, names in facts.joined.items():
            yield _call(f'        "{key}": ', [f'"{name}"' for name in names], ",")
        yield "    },"


def _of_quantizing(facts: EntryFacts) -> Iterator[str]:
    """What clients cannot run quantized, and what they merge."""
    yield _call("    keep_16bit=", [f'"{name}"' for name in _kept(facts)], ",", single=True)
    if "projections" in facts.layout:
        yield '    formats=("compressed-tensors",),'
    merged = [_call(f'        "{key}": ', [f'"{module}"' for module in value], ",") for key, value in _merged(facts)]
    if merged:
        yield from ("    merged={", *merged, "    },")


def _count_keys(probe: Probe) -> Iterator[str]:
    names = (
        probe.count_key,
        probe.stored(probe.count_key),
        *(a for a, b in probe.aliases.items() if b == probe.count_key),
    )
    yield from (name for name in dict.fromkeys(names) if name in COUNT_KEYS)


def _root(facts: EntryFacts) -> Iterator[str]:
    known = {(template.name.format(decoder=facts.prefix, head="lm_head"), template.shape) for template in EMBEDDINGS}
    if known == {(row.name, row.shape) for row in facts.root}:
        yield "    root=EMBEDDINGS,"
        return
    yield "    root=("
    rows = facts.root
    if known <= {(row.name, row.shape) for row in rows}:
        yield "        *EMBEDDINGS,"
        rows = [row for row in rows if (row.name, row.shape) not in known]
    for row in rows:
        inside = row.name.startswith(facts.prefix)
        named = replace(row, name="{decoder}" + row.name.removeprefix(facts.prefix)) if inside else row
        if row.name == "lm_head.weight":
            yield '        Template("{head}.weight", "V,H", "lm head", "untied"),'
            yield '        Template("{head}.weight", "V,H", "lm head", "tied", optional=True),'
            continue
        yield f"        {_template(named)},"
    yield "    ),"


def _block(facts: EntryFacts) -> Iterator[str]:
    """Lines of templates, in the order in which entries have them; what entries share by name."""
    rows = sorted(facts.block, key=lambda row: _ORDER.index(row.role) if row.role in _ORDER else len(_ORDER))
    norms = {(template.name, template.shape) for template in NORMS}
    if norms <= {(row.name, row.shape) for row in rows if not row.when}:
        yield "        *NORMS,"
        rows = [row for row in rows if (row.name, row.shape) not in norms]
    arguments = [f'"{facts.moe.name}"'] if facts.moe else []
    arguments += ["layout=_EXPERTS"] if facts.layout else []
    experts, done = f"        *experts({', '.join(arguments)}),", False
    left = list(rows)
    while left:
        row = left[0]
        if not done and _ORDER.index("router") < _place(row):
            yield experts
            done = True
        if trio := _gated(row, left):
            stem, width = row.name.removesuffix(".gate_proj.weight"), row.shape.partition(",")[0]
            yield f'        *mlp("{stem}", "{width}", "{row.role}"{_when(row)}),'
            left = [each for each in left if each not in trio]
        else:
            yield f"        {_template(row)},"
            left.pop(0)
    if not done:
        yield experts


def _place(row: Row) -> int:
    return _ORDER.index(row.role) if row.role in _ORDER else len(_ORDER)


def _gated(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The three projections of a gated MLP, if a row is the first of such."""
    stem = row.name.removesuffix(".gate_proj.weight")
    width = row.shape.partition(",")[0]
    wanted = {
        f"{stem}.gate_proj.weight": f"{width},H",
        f"{stem}.up_proj.weight": f"{width},H",
        f"{stem}.down_proj.weight": f"H,{width}",
    }
    found = [each for each in rows if wanted.get(each.name) == each.shape and each.when == row.when]
    return found if row in found and len(found) == len(wanted) else []


def _types(probe: Probe) -> Iterator[str]:
    """What transformers takes as values, in the words of entries; see `base.TYPES`."""
    own: dict[str, list[str]] = {}
    for key, hint in probe.hints.items():
        name = key if key in COUNT_KEYS else probe.stored(key)
        own[name] = sorted(dict.fromkeys(_words(hint)), key=lambda word: word == "null")
    gone = sorted(key for key in TYPES if key not in own)
    shared = dict(TYPES)
    test = f'key != "{gone[0]}"' if len(gone) == 1 else f"key not in {_value(tuple(gone))}"
    line = f"        **{{key: value for key, value in TYPES.items() if {test}}},"
    if not gone:
        yield "        **TYPES,"
    elif len(line) <= _WIDTH:
        yield line
    elif len(f"            if {test}") <= _WIDTH:
        lines = ("key: value", "for key, value in TYPES.items()", f"if {test}")
        yield from ("        **{", *(f"            {each}" for each in lines), "        },")
    else:
        shared = {}  # too little of it is the same
    for key, words in sorted(own.items()):
        if set(words) != set(shared.get(key, "").split(" or ")):
            yield f'        "{key}": "{" or ".join(words)}",'


def _conditions(facts: EntryFacts) -> Iterator[str]:
    found = {row.when.name: row.when.text for row in (*facts.root, *facts.block) if row.when}
    if facts.moe:
        found[facts.moe.name] = facts.moe.text
    for name, text in sorted({**found, "tied": "tied", "untied": "untied"}.items()):
        line = f'        "{name}": {text},'
        if len(line) <= _WIDTH:
            yield line
        else:
            start, _, body = text.partition(": ")
            yield from (f'        "{name}": {start}: (', f"            {body}", "        ),")


def _kept(facts: EntryFacts) -> list[str]:
    """Modules that clients do not run quantized."""
    found = [
        row.name.removesuffix(".weight")
        for row in facts.block
        if row.name.endswith(".weight")
        and row.shape.count(",") == 1
        and (
            row.role == "router"
            or row.shape.startswith("1,")
            or row.name.endswith(tuple(f".{n}.weight" for n in _UNQUANTIZED))
        )
    ]
    return sorted(dict.fromkeys(found))


def _merged(facts: EntryFacts) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that read the same, and that clients merge."""
    inputs = {
        row.name.removesuffix(".weight"): row.shape.partition(",")[2]
        for row in facts.block
        if row.name.endswith(".weight")
    }
    stems = dict.fromkeys(module.rpartition(".")[0] for module in inputs)
    for stem in stems:
        for merged, parts in _MERGED.items():
            modules = tuple(f"{stem}.{part}" for part in parts)
            if all(module in inputs for module in modules) and len({inputs[module] for module in modules}) == 1:
                yield f"{stem}.{merged}", modules


# -- text --------------------------------------------------------------------------------------------------------------


def _summary(facts: EntryFacts) -> str:
    """What kind of model it is, as the first line of an entry says it."""
    roles = {row.role for row in facts.block}
    symbols = {symbol for row in facts.block for symbol in re.findall("[A-Z]+", row.shape)}
    words = ["latent attention" if "KA" in symbols else "grouped-query attention" if "attention" in roles else ""]
    words += ["linear attention"] if "linear attention" in roles else []
    words += ["stacked experts" if facts.stacked else "one tensor per expert"]
    words += ["a shared expert"] if "shared experts" in roles else []
    words += ["dense layers"] if "dense mlp" in roles else []
    name = facts.probe.architecture.removesuffix("ForCausalLM")
    return f"{name}: {', '.join(filter(None, words))}."


def _helpers(facts: EntryFacts) -> list[str]:
    used = [row.when for row in (*facts.root, *facts.block) if row.when] + ([facts.moe] if facts.moe else [])
    found: dict[str, str] = dict(facts.helpers)
    for condition in used:
        found |= _called(condition)
    return [text for _, text in sorted(found.items())]


def _called(condition: Condition) -> dict[str, str]:
    return {name: text for name, text in condition.helpers.items() if f"{name}(" in condition.body}


def _imports(text: str) -> list[str]:
    code = re.sub(r'"[^"]*"', "", text)
    return [name for name in _PARTS if name == "Family" or re.search(rf"\b{name}\b(?!=)", code)]


def _template(row: Row) -> str:
    optional = ", optional=True" if row.optional else ""
    return f'Template("{row.name}", "{row.shape}", "{row.role}"{_when(row)}{optional})'


def _when(row: Row) -> str:
    return f', "{row.when.name}"' if row.when else ""


def _value(value: object) -> str:
    if isinstance(value, tuple):
        inside = ", ".join(map(_value, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _call(start: str, arguments: Sequence[str], end: str = "", *, single: bool = False) -> str:
    """Arguments in parentheses: on one line if they fit, else one a line; `single` for a tuple."""
    comma = "," if single and len(arguments) == 1 else ""
    line = f"{start}({', '.join(arguments)}{comma}){end}"
    if len(line) <= _WIDTH:
        return line
    indent = " " * (len(start) - len(start.lstrip()))
    return "\n".join((f"{start}(", *(f"{indent}    {each}," for each in arguments), f"{indent}){end}"))


def _wrapped(note: str) -> Iterable[tuple[bool, str]]:
    lines = textwrap.wrap(note, _WIDTH - len("# decide: "), break_long_words=False, break_on_hyphens=False)
    return [(at == 0, line) for at, line in enumerate(lines)]


def _words(hint: object) -> list[str]:
    """A type in the words of entries."""
    if hint in _WORDS:
        return [_WORDS[hint]]
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return [f"list of {word}" for word in _words(inside[0])]
    if origin is tuple or (isinstance(hint, type) and issubclass(hint, PreTrainedConfig)):
        return []
    return [word for each in inside for word in _words(each)] if inside else ["object"]
