"""What an entry says, found from the models of a type: templates, symbols, conditions, how experts lie."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from shardxform.drafting.conditions import Condition, flag_condition, joined, layer_conditions
from shardxform.drafting.names import renames
from shardxform.drafting.probe import EXPERTS, LAYERS, Flag, Probe, Sample, Shape
from shardxform.drafting.shapes import solve
from shardxform.errors import FamilyError
from shardxform.model.families.base import Decoder, ExpertLayout, Role

__all__ = ["EntryFacts", "Row", "entry_facts"]

_SYMBOLS: Final[Mapping[str, str]] = {
    "hidden_size": "H",
    "head_dim": "D",
    "intermediate_size": "F",
    "moe_intermediate_size": "I",
    "num_attention_heads": "Q",
    "num_key_value_heads": "KV",
    "vocab_size": "V",
    "shared_expert_intermediate_size": "S",
    "shared_experts_intermediate_size": "S",
    "shared_intermediate_size": "S",
    "n_shared_experts": "NS",
    "num_shared_experts": "NS",
    "moe_num_shared_experts": "NS",
    "kv_lora_rank": "KA",
    "q_lora_rank": "QA",
    "qk_nope_head_dim": "N",
    "qk_rope_head_dim": "R",
    "v_head_dim": "VD",
    "linear_conv_kernel_dim": "C",
    "short_conv_kernel_size": "C",
    "linear_key_head_dim": "DK",
    "linear_value_head_dim": "DV",
    "linear_num_key_heads": "LK",
    "linear_num_value_heads": "LV",
    "index_n_heads": "IQ",
    "index_head_dim": "ID",
}
_FIRST: Final = ("E", "NS", "Q", "LK", "LV", "KV", "IQ")  # in products, as Q*D and NS*I
_FLAGS: Final = {"transposed": "is_transposed", "bias": "has_bias"}
_NORMS: Final = (  # those before the experts, by what they are called where there are several
    *("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight"),
    *("pre_ff_layernorm.weight", "ffn_norm.weight"),
)
_GATED: Final = ("gate_proj", "up_proj", "down_proj")


@dataclass(slots=True)
class Row:
    """A template in the making; `when` are the conditions that must all hold."""

    name: str
    shape: str
    role: Role
    when: Condition | None = None
    optional: bool = False


@dataclass(slots=True)
class EntryFacts:
    """All that an entry says.

    Attributes:
        probe: what it was found from.
        prefix: of decoder names.
        root, block: templates, those of routed experts left out.
        moe: the condition under which a block has experts; None for always.
        layout: arguments of `ExpertLayout` that are not the usual ones.
        stacked: whether releases hold experts stacked.
        decoder: arguments of `Decoder` that are not the usual ones.
        norm: the norm before the experts.
        symbols: symbol -> key of the config, or the name of a function in `helpers`.
        helpers: functions that symbols are, by name.
        renames: see `Family.renames`.
        joined: see `Family.joined`.
        decide: what a person must decide, one sentence each.

    """

    probe: Probe
    prefix: str = ""
    root: list[Row] = field(default_factory=list)
    block: list[Row] = field(default_factory=list)
    moe: Condition | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    stacked: bool = False
    decoder: dict[str, Any] = field(default_factory=dict)
    norm: str = ""
    symbols: dict[str, str] = field(default_factory=dict)
    helpers: dict[str, str] = field(default_factory=dict)
    renames: list[tuple[str, str]] = field(default_factory=list)
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    decide: list[str] = field(default_factory=list)


def entry_facts(model_type: str) -> EntryFacts:
    """Find out what the entry of a model type says.

    Raises:
        FamilyError: see `Probe`; or no module of it looks like routed experts.

    """
    probe = Probe(model_type)
    facts = _Finder(probe).facts
    if probe.heeds_head_dim and any("?" in row.shape for row in facts.block):
        return _Finder(Probe(model_type, heed_head_dim=False)).facts  # it does so in some places only
    return facts


class _Finder:
    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.facts = EntryFacts(probe)
        self._decide = self.facts.decide
        self._by_layer = layer_conditions(probe)
        self._letters = _symbols_of(probe.sizes)
        self._homes: list[tuple[str, str]] = []  # of experts, in releases and in modules
        self._parts_of: dict[str, list[str]] = {}
        self._names = self._released_names()
        name = next((name for name in self._names if ".layers.{l}." in name), "")
        if not name:
            raise FamilyError(f"model_type '{probe.model_type}': its class holds no decoder blocks called layers")
        self.facts.prefix = self._names[name].partition("layers.{l}.")[0] or name.partition("layers.{l}.")[0]
        self._experts = self._find_experts()
        self._rows()
        self._open_lists()
        self._decoder()
        self._norm()
        self._symbols()
        self._renames()

    # -- names --------------------------------------------------------------------------------------------------

    def _released_names(self) -> dict[str, str]:
        """What releases call the tensors of modules, with `{l}` for the layer; empty for what they have in parts."""
        out: dict[str, str] = {}
        for sample in (self._probe.base, *(flag.samples[0] for flag in self._probe.flags)):
            for name, shape in sample.tensors.items():
                if (general := _general(name)) not in out:
                    found = list(self._probe.released(name, torch.empty(shape, device="meta")))
                    out[general] = _general(found[0]) if len(found) == 1 else ""
                    self._parts_of[general] = [_general(each) for each in found]
        return out

    def _renames(self) -> None:
        inner = {_inner(theirs): _inner(ours) for ours, theirs in self._names.items() if ".{l}." in theirs}
        inner |= dict(self._homes)
        modules = {(ours.rpartition("."), theirs.rpartition(".")) for ours, theirs in inner.items()}
        stems = {ours[0]: theirs[0] for ours, theirs in modules if ours[2] == theirs[2] in ("weight", "bias")}
        found = renames(inner | stems)  # modules are asked for by their names too
        if found is None:
            found = renames(inner)
        if found is None:
            changed = ", ".join(f"{ours} is {theirs}" for ours, theirs in inner.items() if ours != theirs)
            self._decide.append(f"renames, of which no pairs of parts were found: {changed}")
        self.facts.renames = found or []

    # -- experts ------------------------------------------------------------------------------------------------

    def _find_experts(self) -> set[str]:
        """How routed experts lie; gives the names of their parameters."""
        found = [
            (name, module)
            for name, module in self._probe.model.named_modules()
            if ".layers." in name and _holds_experts(module)
        ]
        if not found:
            raise FamilyError(f"model_type '{self._probe.model_type}': no module of it looks like routed experts")
        last = [name for name, _ in found if name.startswith(found[-1][0].rpartition(".layers.")[0])]
        if len({_inner(_general(name)) for name in last}) > 1:
            names = ", ".join(sorted({_inner(_general(name)) for name in last}))
            self._decide.append(f"experts: blocks have several modules of them: {names}")
        name, module = found[-1]
        released = {
            parameter: self._parts(f"{name}.{parameter}", value.shape)
            for parameter, value in module.named_parameters(recurse=False)
        }
        self.facts.stacked = not any("{e}" in part for parts in released.values() for part in parts)
        layout = self._stacks(name, released) if self.facts.stacked else self._projections(name, released)
        layout |= {key: getattr(module, flag, False) for key, flag in _FLAGS.items()}
        layout["gate"] = "concatenated" if getattr(module, "is_concatenated", True) else "interleaved"
        if not getattr(module, "has_gate", True):
            layout["gate"] = "none"
        usual = ExpertLayout()
        self.facts.layout = {key: value for key, value in layout.items() if value != getattr(usual, key)}
        self._moe_layers(found)
        return {_general(f"{each}.{parameter}") for each, _ in found for parameter in released}

    def _parts(self, name: str, shape: Sequence[int]) -> list[str]:
        """Names in a release of a parameter of experts, within the block: first what holds its first rows."""
        value = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        found = self._probe.released(name, value)
        ranked = sorted(found, key=lambda each: float(found[each].flatten()[0]))
        return list(dict.fromkeys(_numbered(_inner(_general(each))) for each in ranked))

    def _stacks(self, name: str, released: Mapping[str, list[str]]) -> dict[str, Any]:
        weights = [parts[0] for parameter, parts in released.items() if not parameter.endswith("bias")]
        theirs = [parameter for parameter in released if not parameter.endswith("bias")]
        local = _inner(_general(name))
        if all(each == f"{local}.{parameter}" for each, parameter in zip(weights, theirs, strict=True)):
            stacks = tuple(theirs)
            layout: dict[str, Any] = {"home": local, "stacks": stacks}
        else:
            stacks = tuple(each.removesuffix(".weight").rpartition(".")[2] for each in weights)
            homes = {each.removesuffix(".weight").rpartition(".")[0] for each in weights}
            layout = {"home": local, "stacks": stacks, "stack_home": min(homes)}
            if len(homes) > 1 or not all(each.endswith(".weight") for each in weights):
                self._decide.append(f"experts: stacks are called {', '.join(weights)}; see ExpertLayout")
        if len(stacks) != 2:
            self._decide.append(f"experts: stacks of {', '.join(stacks)}; see ExpertLayout")
        return layout

    def _projections(self, name: str, released: Mapping[str, list[str]]) -> dict[str, Any]:
        parts = [part for group in released.values() for part in group if part.endswith(".weight")]
        home = parts[0].partition(".{e}.")[0]
        self._homes.append((home, _inner(_general(name))))
        projections = tuple(part.partition(".{e}.")[2].removesuffix(".weight") for part in parts)
        if projections == _GATED[1:]:
            return {"home": home, "projections": projections, "stacks": ("up_proj", "down_proj")}
        if len(projections) != 3:
            self._decide.append(f"experts: an expert has the weights {', '.join(projections)}; see ExpertLayout")
            return {"home": home, "stacks": ()}
        usual = projections == _GATED and home == _inner(_general(name))
        return {"home": home, "projections": projections, **({} if usual else {"stacks": ()})}

    def _moe_layers(self, found: Iterable[tuple[str, object]]) -> None:
        layers = frozenset(layer for name, _ in found if (layer := _layer(name + ".")) is not None)
        self.facts.moe = self._in_layers(layers, self._probe.base, "which layers have experts")

    # -- templates ----------------------------------------------------------------------------------------------

    def _rows(self) -> None:
        known: set[str] = set()
        for flag in (None, *self._probe.flags):
            samples = flag.samples if flag else self._probe.samples
            names = {_general(name) for name in samples[0].tensors}
            for general in (name for name in dict.fromkeys(map(_general, samples[0].tensors)) if name not in known):
                if general not in self._experts and self._names[general]:
                    self._template(general, flag, samples)
                elif general not in self._experts:
                    for part in self._parts_of[general]:
                        self._template(general, flag, samples, part)
                    self.facts.joined[_inner(general)] = tuple(map(_inner, self._parts_of[general]))
            known |= names

    def _template(self, general: str, flag: Flag | None, samples: Sequence[Sample], part: str = "") -> None:
        """Add the templates of one name, or of one part of it: several where its shape differs by layer."""
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        for name, found in samples[0].tensors.items():
            if _general(name) == general:
                layer = _layer(name)
                by_shape[found].append(-1 if layer is None else layer)
        released = part or self._names[general]
        for layers in by_shape.values():
            name = general.replace("{l}", str(layers[0]))
            shape = self._shape(name, samples, part)
            if layers[0] < 0:
                row = Row(released, shape, _role(released, shape), self._flags_of(name, flag))
                self.facts.root.append(row)
                continue
            inner = _inner(released)
            where = self._in_layers(frozenset(layers), samples[0], f"which layers have {inner} of shape {shape}")
            when = tuple(each for each in (where, self._flags_of(name, flag)) if each)
            row = Row(inner, shape, _role(inner, shape), joined(when) if when else None)
            self.facts.block.append(row)

    def _in_layers(self, layers: frozenset[int], sample: Sample, what: str) -> Condition | None:
        """The condition that holds for these layers; None for all, or where none was found."""
        if len(layers) == LAYERS:
            return None
        for condition in self._by_layer:
            try:
                configs = (sample.config,) if condition.whole else (sample.config, sample.given)
                if all(condition.layers(config) == layers for config in configs):
                    return condition
            except (LookupError, TypeError):
                continue
        self._decide.append(f"{what}: in models of {LAYERS} it is {sorted(layers)}")
        return None

    def _flags_of(self, name: str, made_by: Flag | None) -> Condition | None:
        """The keys that take a tensor away, or the one that makes it."""
        if made_by:
            return flag_condition(self._probe, made_by, set_as_usual=False)
        found = [flag for flag in self._probe.flags if name not in flag.samples[0].tensors]
        conditions = [flag_condition(self._probe, flag, set_as_usual=True) for flag in found]
        unique = {each.name: each for each in conditions if each.body}
        return joined(tuple(unique.values())) if unique else None

    def _shape(self, name: str, samples: Sequence[Sample], part: str) -> str:
        there = [sample for sample in samples if name in sample.tensors]
        shapes = [self._shape_of(name, sample.tensors[name], part) for sample in there]
        out = []
        for at in range(len(shapes[0])):
            values = tuple(shape[at] for shape in shapes)
            out.append(solve(values, [self._variables(sample) for sample in there]))
        if None in out:
            listed = " and ".join(str(list(shape)) for shape in shapes[:2])
            self._decide.append(f"shape of {part or self._names[_general(name)]}: in small models {listed}")
            return "?"
        return ",".join(each or "?" for each in out)

    def _shape_of(self, name: str, shape: Shape, part: str) -> Shape:
        """The shape in releases, of a part if there are several."""
        found = self._probe.released(name, torch.empty(shape, device="meta"))
        return next(tuple(value.shape) for each, value in found.items() if part in ("", _general(each)))

    def _variables(self, sample: Sample) -> dict[str, int]:
        out = {"E": int(sample.given[self._probe.count_key])}
        for key in self._probe.sizes:
            if sample.given.get(key) is not None:
                out[self._letters[key]] = int(sample.given[key])
        if "head_dim" not in self._probe.sizes and {"H", "Q"} <= set(out):
            out["D"] = out["H"] // out["Q"]
        return dict(sorted(out.items(), key=lambda item: item[0] not in _FIRST))

    def _decoder(self) -> None:
        """What embeddings and the final norm are called."""
        model, usual = self._probe.model, Decoder()
        table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        norm = next((row.name for row in self.facts.root if row.role == "norms"), "")
        roles = {"embeddings": self._names[f"{table}.weight"], "norm": norm}
        theirs = {
            "embeddings": table.rpartition(".")[2],
            "norm": next((n for n, m in self._names.items() if m == norm), ""),
        }
        theirs["norm"] = theirs["norm"].removesuffix(".weight").rpartition(".")[2]
        found = {role: name.removeprefix(self.facts.prefix).removesuffix(".weight") for role, name in roles.items()}
        attributes = tuple((found[role], theirs[role]) for role in roles if found[role] != theirs[role])
        self.facts.decoder = {role: name for role, name in found.items() if name != getattr(usual, role)}
        self.facts.decoder |= {"attributes": attributes} if attributes else {}

    def _norm(self) -> None:
        """The norm before the experts."""
        norms = [
            row.name for row in self.facts.block if row.role == "norms" and "." not in row.name.removesuffix(".weight")
        ]
        found = next((name for name in _NORMS if name in norms), norms[0] if len(set(norms)) == 1 else "")
        if not found:
            self._decide.append(f"experts_norm: which of {', '.join(dict.fromkeys(norms))} is before the experts")
        self.facts.norm = found

    # -- symbols ------------------------------------------------------------------------------------------------

    def _symbols(self) -> None:
        rows = (*self.facts.root, *self.facts.block)
        used = {symbol for row in rows for symbol in re.findall("[A-Z]+", row.shape)} | {"H", "I", "V"}
        for key in self._probe.sizes:
            if (symbol := self._letters[key]) in used:
                self.facts.symbols[symbol] = self._value(key)
        if "D" in used and "D" not in self.facts.symbols:
            self.facts.symbols["D"] = self._function("_head_dim", _HEAD_DIM)
        for key in self._probe.sizes:
            found, stored = self._probe.base.config.get(self._probe.stored(key)), self._probe.stored(key)
            if self._letters[key] in used and found not in (None, self._probe.base.given[key]):
                self._decide.append(
                    f"{stored}: transformers overwrites it, so that what it saves is not what releases say"
                )
        if missing := used - {"E", *self.facts.symbols}:
            self._decide.append(f"symbols without a key: {', '.join(sorted(missing))}")

    def _value(self, key: str) -> str:
        stored = self._probe.stored(key)
        if key == "head_dim" and self._probe.fields.get(key) is None:
            return self._function("_head_dim", _OWN_HEAD_DIM)
        if self._probe.nullable(key) and self._probe.declared.get(key) is None and (other := self._instead(key)):
            text = _INSTEAD.format(name=f"_{key}", key=stored, other=self._probe.stored(other))
            return self._function(f"_{key}", text)
        return f'"{stored}"'

    def _instead(self, key: str) -> str | None:
        """The key whose value is taken where `key` is null."""
        without = self._probe.sample(**{key: None})
        if without is None:
            return None
        for other in self._probe.sizes:
            like = self._probe.sample(**{key: self._probe.base.given[other]}) if other != key else None
            if like and like.tensors == without.tensors:
                return other
        return None

    def _function(self, name: str, text: str) -> str:
        self.facts.helpers[name] = text
        return name

    def _open_lists(self) -> None:
        """Leave shapes open that follow a list of the config layer by layer, which no symbol can be."""
        base = self._probe.base
        for key, value in self._probe.base.config.items():
            if isinstance(value, list) and len(value) == LAYERS and all(type(each) is int for each in value):
                other = self._probe.sample(**{key: [*value[:-1], 2 * value[-1]]})
                if other is None or other.tensors.keys() != base.tensors.keys():
                    continue
                differ = {
                    _inner(self._names[_general(name)])
                    for name in base.tensors
                    if base.tensors[name] != other.tensors[name]
                }
                if differ:
                    self._decide.append(
                        f"{key}: shapes follow it layer by layer, and are left open: {', '.join(sorted(differ))}"
                    )
                for row in self.facts.block:
                    row.shape = (
                        "?" if row.name in differ or row.name.replace(".bias", ".weight") in differ else row.shape
                    )


_HEAD_DIM: Final = """\
def _head_dim(config: Config) -> int:
    return size(config, "hidden_size") // size(config, "num_attention_heads")
"""
_OWN_HEAD_DIM: Final = """\
def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    return size(config, "hidden_size") // size(config, "num_attention_heads")
"""
_INSTEAD: Final = """\
def {name}(config: Config) -> int:
    key = "{key}"
    return size(config, key if config.get(key) is not None else "{other}")
"""


def _symbols_of(keys: Sequence[str]) -> dict[str, str]:
    """A symbol of its own for every key."""
    out: dict[str, str] = {}
    for key in sorted(keys, key=lambda key: key not in _SYMBOLS):
        symbol = _SYMBOLS.get(key) or "".join(re.findall("(?:^|_)([a-z])", key)).upper()
        if key == "intermediate_size" and "moe_intermediate_size" not in keys:
            symbol = "I"
        while symbol in ("E", *out.values()):
            symbol += "X"
        out[key] = symbol
    return out


def _holds_experts(module: Any) -> bool:  # noqa: ANN401
    """Whether a module holds stacks of routed experts."""
    own = list(module.parameters(recurse=False))
    return hasattr(module, "num_experts") and any(each.ndim == 3 and each.shape[0] == EXPERTS for each in own)


def _role(name: str, shape: str) -> Role:
    """What a tensor's size is counted under, by what names say in all models."""
    if "E" in re.findall("[A-Z]+", shape) or "router" in name:
        return "router"
    if "norm" in name:
        return "norms"
    words: tuple[tuple[str, Role], ...] = (
        ("embed", "embeddings"),
        ("lm_head", "lm head"),
        ("shared", "shared experts"),
        ("linear_attn", "linear attention"),
        ("attn|attention", "attention"),
        ("mlp|feed_forward|ffn", "dense mlp"),
    )
    return next((role for pattern, role in words if re.search(pattern, name)), "norms")


def _general(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.{l}.", name, count=1)


def _numbered(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{e}.", name, count=1)


def _inner(name: str) -> str:
    """A name within its block."""
    return name.partition(".layers.{l}.")[2] if ".layers.{l}." in name else re.sub(r"^.*?\.layers\.\d+\.", "", name)


def _layer(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None
