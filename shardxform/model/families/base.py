"""What a family is: one architecture as data.

A family lists its tensors as templates: a name with placeholders, a symbolic shape, a role. The same list answers
both questions that are ever asked: "what is this tensor?" (`layout.Layout`) and "which tensors must be there?"
(`expected.expected`). Names only; no bytes, no files. Adding a family is one entry: see docs/adding-a-family.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

__all__ = [
    "ATTENTION",
    "COUNT_KEYS",
    "EMBEDDINGS",
    "GROUPED_ATTENTION",
    "HARMLESS",
    "HEADS",
    "LINEAR_ROLES",
    "NORMS",
    "QK_NORMS",
    "TYPES",
    "Condition",
    "Config",
    "Decoder",
    "ExpertLayout",
    "Family",
    "Gate",
    "Mtp",
    "Role",
    "Scope",
    "Slicing",
    "Symbol",
    "Template",
    "Wrapper",
    "conditions",
    "experts",
    "head_dim",
    "is_sparse",
    "linear",
    "listed_as_sparse",
    "merged",
    "mlp",
    "normed",
    "size",
    "tied",
    "types",
    "untied",
]

Config = Mapping[str, Any]
Condition = Callable[[Config, int], bool]
Symbol = str | Callable[[Config], int]

Role = Literal[
    "routed experts",
    "router",
    "shared experts",
    "attention",
    "indexer",
    "linear attention",
    "dense mlp",
    "norms",
    "embeddings",
    "lm head",
    "vision",
    "mtp",
]
LINEAR_ROLES: Final = frozenset({"routed experts", "shared experts", "attention", "linear attention", "dense mlp"})
"""Roles whose 2-D weights are linear layers that clients can run quantized."""

Scope = Literal["root", "block", "mtp", "vision"]
Gate = Literal["concatenated", "interleaved", "separate", "none"]

COUNT_KEYS: Final = frozenset(
    {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"}
)
"""Every config key known to count routed experts; one that a family does not name is refused, never left stale."""

HARMLESS: Final = (
    "*rotary_emb.cos_cached",
    "*rotary_emb.inv_freq",
    "*rotary_emb.original_inv_freq",
    "*rotary_emb.sin_cached",
    "*rotary_pos_emb.inv_freq",
)
"""What old versions of many models saved though it follows from the config: every client passes over it in silence."""


@dataclass(frozen=True, slots=True)
class Slicing:
    """Where a tensor counts routed experts, so that pruning takes positions out of it.

    Attributes:
        axis: the dimension that counts them.
        several: every expert has as many positions there, one after another, as in `E*I`; else one, as in `E`.
        others: after those of experts there are positions that belong to no expert and stay, as in `E+Z`.

    """

    axis: int
    several: bool = False
    others: bool = False

    def positions(self, size: int, experts: int, keep: Sequence[int]) -> list[int]:
        """Positions that stay of `size`, where `keep` of so many experts stay.

        Raises:
            ValueError: `size` cannot be of so many experts.

        """
        each = self.per_expert(size, experts)
        stays = range(experts * each, size)
        return [expert * each + at for expert in keep for at in range(each)] + list(stays)

    def per_expert(self, size: int, experts: int) -> int:
        """Positions that each expert has.

        Raises:
            ValueError: `size` cannot be of so many experts.

        """
        each = size // experts if self.several else 1
        if size < experts * each or (not self.others and size != experts * each):
            raise ValueError(f"{size} positions are not those of {experts} experts")
        return each


@functools.lru_cache(maxsize=4096)
def _slicing_of(shape: str) -> Slicing | None:
    """Where `E` stands in the dimensions of a shape.

    Raises:
        ValueError: in more than one place, or not in front of what each expert has or of what stays.

    """
    found = [(axis, terms) for axis, terms in enumerate(each.split("+") for each in shape.split(",")) if _counts(terms)]
    if not found:
        return None
    axis, (first, *others) = found[0]
    experts, *each = first.split("*")
    if len(found) > 1 or experts != "E" or "E" in each or _counts(others):
        raise ValueError(f"shape {shape}: expected E once, as in E, E*I or E+Z")
    return Slicing(axis, bool(each), bool(others))


def _counts(terms: Iterable[str]) -> bool:
    return any("E" in term.split("*") for term in terms)


@dataclass(frozen=True, slots=True)
class Template:
    """One tensor of a family.

    Attributes:
        name: relative to its scope's prefix; `{e}` stands for an expert id, `{b}` for a vision block. In the root scope
            `{l}` stands for a decoder block.
        shape: dimensions separated by commas, each a sum of products of symbols and integers, as in `E,2*I,H`.
            The dimension with an `E` counts experts, and pruning slices it: `E` alone has one position per expert,
            `E*I` has I of each, one after another, and `E+Z` has Z more that stay. `?` leaves the shape unchecked.
        role: what its size is counted under.
        when: name of the family's condition on (config, layer) under which the tensor exists; empty for always.
        variant: `fused` or `per-expert` for experts; one of the two is present in a block.
        optional: accepted when present, never missed.
        ids: its values are ids of experts, [rows, ids of each], which pruning renumbers; see `formats.remaking`.
        instead: name of the tensor that it is, where transformers saves a release again under this name.
        sets: of a family with several sets of experts, those that it counts: `E` is of the one, or there is a row `E`
            for each. Empty for tensors of all, as of one expert.

    """

    name: str
    shape: str
    role: Role
    when: str = ""
    variant: str = ""
    optional: bool = False
    ids: bool = False
    instead: str = ""
    sets: tuple[int, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether there is one tensor per routed expert."""
        return "{e}" in self.name

    @property
    def is_expert_weight(self) -> bool:
        """Whether it is a weight of routed experts, one by one or stacked, rather than a bias of theirs."""
        return bool(self.variant) and not self.name.endswith("bias")

    @property
    def slicing(self) -> Slicing | None:
        """Where it counts routed experts, or None."""
        return _slicing_of(self.shape)

    @property
    def sliced(self) -> bool:
        """Whether it counts routed experts."""
        return self.slicing is not None

    @property
    def pruned(self) -> bool:
        """Whether pruning changes it: it counts routed experts, is of one, or holds their ids."""
        return self.numbered or self.ids or self.sliced


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How routed experts lie in a checkpoint: as stacks of all, as one matrix each, or in either way.

    The flags are those of transformers' own classes (`is_transposed`, `is_concatenated`, `has_gate`, `has_bias`); a
    test compares.

    Attributes:
        home: name of the module that holds them, within its block.
        stacks: names under `home` of the stacked gate and up projection, and of the stacked down projection; empty
            where no checkpoint stacks them.
        stack_home: name of the module that holds stacks instead of `home`, whose tensors are called `<stack>.weight`.
        projections: names of the gate, up and down projection of one expert; of the last two where there is no gate.
        transposed: a stack holds matrices [I, O] instead of [O, I].
        gate: gate and up projection are the halves of the stacked one, every second of its rows, or `separate`: stacks
            of their own, of which `stacks` has the names: gate, up, down; or `none`: there is an up projection alone,
            and an activation of its outputs.
        bias: there are biases, `<stack>_bias` [E, O] beside stacks, and `<projection>.bias` [O] beside matrices.
        width: symbol of the channels that an expert takes and gives.
        weighs_inputs: the router's weight multiplies what an expert takes, instead of what it gives.

    """

    home: str = "mlp.experts"
    stacks: tuple[str, ...] = ("gate_up_proj", "down_proj")
    stack_home: str = ""
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    transposed: bool = False
    gate: Gate = "concatenated"
    bias: bool = False
    width: str = "H"
    weighs_inputs: bool = False

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection beside the up projection."""
        return self.gate != "none"

    @property
    def inner(self) -> tuple[str, ...]:
        """Projections into the intermediate size, in the order of a stack's halves: gate and up, or up alone."""
        return self.projections[:-1]

    def held(self, stack: str) -> tuple[str, ...]:
        """Projections that a stack holds of each expert."""
        if self.gate == "separate":
            return (self.projections[self.stacks.index(stack)],)
        return self.inner if stack == self.stacks[0] else self.projections[-1:]

    def stacked(self, stack: str) -> str:
        """Name of a stack within its block."""
        return f"{self.stack_home}.{stack}.weight" if self.stack_home else f"{self.home}.{stack}"


@dataclass(frozen=True, slots=True)
class Decoder:
    """What the parts of a decoder are called.

    Attributes:
        embeddings, norm: the token embeddings and the final norm in checkpoints, under the wrapper's prefix.
        blocks: what holds the decoder blocks, likewise.
        attributes: (ours, theirs) of those that transformers' class calls otherwise.

    """

    embeddings: str = "embed_tokens"
    blocks: str = "layers"
    norm: str = "norm"
    attributes: tuple[tuple[str, str], ...] = ()

    def attribute(self, name: str) -> str:
        """What transformers' class calls the part that checkpoints call `name`."""
        return dict(self.attributes).get(name, name)


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One class under which the family's checkpoints are published.

    Attributes:
        architecture: as in config.json's `architectures`.
        model_type: at the top level of config.json.
        text_key: key of the nested text config, with dots where it is nested deeper, or None when the top level is the
            text config.
        prefix: what decoder names begin with, such as `model.language_model.`.
        vision: whether the class has a vision tower.
        head: name of the output head, in full.

    """

    architecture: str
    model_type: str
    text_key: str | None
    prefix: str
    vision: bool = False
    head: str = "lm_head"

    def full(self, name: str) -> str:
        """Put this class's names in the place of `{decoder}` and `{head}`."""
        return name.replace("{decoder}", self.prefix).replace("{head}", self.head)


@dataclass(frozen=True, slots=True)
class Mtp:
    """Multi-token-prediction layers.

    Attributes:
        count_key: config key that counts them; 0 means none, and so does its absence, unless `uncounted`.
        prefix: of the layer, with `{l}` for the layer and `{decoder}` for the wrapper's decoder prefix.
        inner: what names of its decoder block begin with, after `prefix`.
        follows_blocks: `{l}` counts on after the last decoder block (DeepSeek) instead of from 0.
        like: the decoder block that an MTP layer is built like, whose conditions therefore hold for it.
        inputs: the tensors that make its input, in full, with `{l}` and `{decoder}` as in `prefix`: norm of the next
            token's embedding, norm of the hidden state, projection of the two side by side, norm of its output;
            `{last}` stands for the number of its last block.
        layer: templates beyond a decoder block's own ones, relative to `prefix`.
        root: templates outside the layer's prefix, with full names: of each layer where there is an `{l}`, else once.
        uncounted: releases have them without the key in their configs: there are as many as there are tensors of.
        blocks: how many blocks an MTP layer is made of, where there are several: these are what `{l}` counts, and one
            of them has experts. Block b of each is like decoder block `like` + b.

    """

    count_key: str
    prefix: str
    follows_blocks: bool
    like: Callable[[Config], int]
    inputs: tuple[str, str, str, str]
    inner: str = ""
    layer: tuple[Template, ...] = ()
    root: tuple[Template, ...] = ()
    uncounted: bool = False
    blocks: Callable[[Config], int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """One architecture; equal to itself alone, so that what is made of it can be looked up by it.

    Attributes:
        name: what `inspect` prints; the release's model_type.
        wrappers: classes it is published under; the first text-only one is what a text-only view becomes.
        count_keys: config keys (in the text config) that count routed experts; those present must agree. A key may lead
            into objects, as `ffn_config.moe_num_experts` does.
        other_counts: keys, in full, that count experts of other parts, which stay; refused where not named.
        top_k_key: config key of experts per token.
        other_top_k_keys: what the same is called where that key is not there.
        layers: config key that counts decoder blocks, or a function of the text config.
        group_key: config key of router groups whose members sit side by side, or empty.
        sets: names of its sets of experts where it has several, each with a router: as many experts in each, numbered
            on from one set to the next. Configs count those of one.
        listed_counts: configs may give the counts of experts, and of those per token, as lists of one entry per layer,
            which must be the same in all.
        root: templates outside the decoder blocks, with full names, `{decoder}` for the decoder prefix, `{head}` for
            the output head.
        decoder: what embeddings, blocks and final norm are called.
        block: templates of one decoder block, relative to its prefix.
        experts: how its routed experts lie; `parts.experts` makes their templates from it.
        renames: parts of names in checkpoints, and what they are in transformers' modules, tried in order.
        joined: parameters of a block of transformers' class, and the tensors of checkpoints that each is made of, one
            below the other.
        split: linear modules of transformers' class that hold several of the checkpoint's, of the same size, one above
            the other, by their last name; they are run as these, under the module's name.
        aliases: config keys under which transformers saves a config again, and what releases call them.
        vision: templates of the vision tower, with full names.
        vision_prefix: what every name of the vision tower begins with; several where it and what joins it to the
            decoder have names apart.
        vision_depth_key: key in `vision_config` that counts vision blocks; of several, the first that is there.
        towers: parts beside the decoder that are copied without being understood: encoders, projectors. Their names
            are patterns, matched with `fnmatch`.
        layer_kinds: what lists with an entry per block may name, by key, where that is not what all families may.
        pads_lists: such lists may go on for MTP layers.
        vision_sidecars: files that only a multimodal class needs; left out with it.
        symbols: what the symbols in shapes mean: a key of the text config, or a function of it.
        layer_symbols: the same where layers differ: functions of (text config, layer).
        set_symbols: the same where sets of experts differ: functions of (text config, number of the set).
        vision_symbols: the same, of `vision_config`.
        types: what clients take as values of the keys of the text config, in the words of `config_values`.
        vision_types: the same, of `vision_config`.
        wrapper_types: the same, of the top level of a config that nests its text config.
        conditions: named predicates on (text config, layer); layer is -1 in the root scope.
        moe: name of the condition that makes a block a MoE block, or empty when all are.
        keep_16bit: patterns of modules in a block that clients cannot run quantized, matched with `fnmatch`.
        formats: quantized formats whose loaders find its experts, the usual one first, maybe none; loaders of others
            leave them at random values, or refuse.
        unread: why none is read, where `formats` is empty.
        merged: modules of a block that clients merge, which must share one quantization scheme, by the name of the
            merged module in vLLM.
        tied_by_default: the output head is the embeddings where the config does not say.
        experts_norm: the norm before the experts, within a block; healing moves it with them.
        harmless: patterns of whole names, matched with `fnmatch`, of tensors that are no part of the model and that no
            client minds; copied without a word.
        selection_key: config key of how many positions a token attends to at most, chosen by an indexer, or empty where
            it attends to all. Blocks are run over windows of so many tokens, where the choice is all of them.
        shares_selection: a block of transformers' class gives its choice to the next, as a second value.
        not_run: why its blocks cannot be run one at a time, such as what they hand on beside hidden states.
        run_from: the first transformers, as (5, 15), whose class computes what the model is; empty for any.
        fused_release: its releases hold the experts fused; so does a checkpoint that is dequantized.
        bfloat16_only: float16 overflows in this family (gated delta-net layers).

    """

    name: str
    wrappers: tuple[Wrapper, ...]
    count_keys: tuple[str, ...]
    other_counts: tuple[str, ...] = ()
    top_k_key: str = "num_experts_per_tok"
    other_top_k_keys: tuple[str, ...] = ()
    layers: Symbol = "num_hidden_layers"
    group_key: str = ""
    sets: tuple[str, ...] = ()
    listed_counts: bool = False
    root: tuple[Template, ...]
    block: tuple[Template, ...]
    decoder: Decoder = field(default_factory=Decoder)
    experts: ExpertLayout = field(default_factory=ExpertLayout)
    renames: tuple[tuple[str, str], ...] = ()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    mtp: Mtp | None = None
    vision: tuple[Template, ...] = ()
    vision_prefix: str | tuple[str, ...] = ""
    vision_depth_key: str | tuple[str, ...] = "depth"
    towers: tuple[Template, ...] = ()
    layer_kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    pads_lists: bool = False
    vision_sidecars: tuple[str, ...] = ()
    symbols: Mapping[str, Symbol]
    layer_symbols: Mapping[str, Callable[[Config, int], int]] = field(default_factory=dict)
    set_symbols: Mapping[str, Callable[[Config, int], int]] = field(default_factory=dict)
    vision_symbols: Mapping[str, Symbol] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    vision_types: Mapping[str, str] = field(default_factory=dict)
    wrapper_types: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    moe: str = ""
    keep_16bit: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("auto-round", "gptq", "compressed-tensors")
    unread: str = ""
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied_by_default: bool = False
    experts_norm: str = "post_attention_layernorm.weight"
    harmless: tuple[str, ...] = HARMLESS
    selection_key: str = ""
    shares_selection: bool = False
    not_run: str = ""
    run_from: tuple[int, ...] = ()
    fused_release: bool = False
    bfloat16_only: bool = False

    @property
    def spelling(self) -> str:
        """How experts are spelled where nothing tells: `fused` in families that have stacks, else `per-expert`."""
        return "fused" if self.experts.stacks else "per-expert"

    @property
    def holders(self) -> tuple[str, ...]:
        """What holds the decoder blocks under each class, such as `model.layers`."""
        return tuple(f"{wrapper.prefix}{self.decoder.blocks}" for wrapper in self.wrappers)

    @property
    def numbered_home(self) -> str:
        """What precedes an expert's number in names of tensors of one expert each; empty where there are none."""
        homes = (template.name.partition("{e}")[0] for template in self.block if template.numbered)
        return next(filter(None, homes), "")

    def module_name(self, name: str) -> str:
        """What transformers calls a module or parameter of a block that is called `name` in checkpoints."""
        return next((name.replace(ours, theirs, 1) for ours, theirs in self.renames if ours in name), name)

    def holds(self, when: str, config: Config, layer: int) -> bool:
        """Whether condition `when` holds for `layer`; the empty condition always does."""
        return not when or self.conditions[when](config, layer)


# -- parts -------------------------------------------------------------------------------------------------------------
# Groups of templates that many families share. Shapes as in `base.Template`.


def mlp(prefix: str, width: str, role: Role, when: str = "") -> tuple[Template, ...]:
    """Gate, up and down projection of a gated MLP under `prefix`; `width` is its intermediate size."""
    return (
        Template(f"{prefix}.gate_proj.weight", f"{width},H", role, when),
        Template(f"{prefix}.up_proj.weight", f"{width},H", role, when),
        Template(f"{prefix}.down_proj.weight", f"H,{width}", role, when),
    )


def experts(when: str = "", layout: ExpertLayout | None = None) -> tuple[Template, ...]:
    """Routed experts as `layout` has them: stacked under its home, `[E, 2I, H]` and `[E, H, I]`, and one by one."""
    layout = layout or ExpertLayout()
    role: Role = "routed experts"
    rows, width = ("2*I" if layout.gated else "I"), layout.width
    shapes = [f"E,{width},{rows}", f"E,I,{width}"] if layout.transposed else [f"E,{rows},{width}", f"E,{width},I"]
    if layout.gate == "separate":
        shapes[:1] = [f"E,I,{width}"] * 2
    out = [
        Template(layout.stacked(stack), shape, role, when, "fused")
        for stack, shape in zip(layout.stacks, shapes, strict=False)
    ]
    if layout.bias:
        biases = zip(layout.stacks, (f"E,{rows}", f"E,{width}"), strict=False)
        out += [Template(f"{layout.home}.{stack}_bias", shape, role, when, "fused") for stack, shape in biases]
    for projection in layout.projections:
        name, inner = f"{layout.home}.{{e}}.{projection}", projection in layout.inner
        out.append(Template(f"{name}.weight", f"I,{width}" if inner else f"{width},I", role, when, "per-expert"))
        if layout.bias:
            out.append(Template(f"{name}.bias", "I" if inner else width, role, when, "per-expert"))
    return tuple(out)


def linear(module: str, shape: str, role: Role = "vision") -> tuple[Template, ...]:
    """Weight and bias of a linear module."""
    return Template(f"{module}.weight", shape, role), Template(f"{module}.bias", shape.split(",")[0], role)


def normed(module: str, width: str, role: Role = "vision") -> tuple[Template, ...]:
    """Weight and bias of a layer norm."""
    return Template(f"{module}.weight", width, role), Template(f"{module}.bias", width, role)


def size(config: Config, key: str) -> int:
    """Read a size that a symbol is computed from.

    Raises:
        ValueError: it is no plain integer.

    """
    value = config[key]
    if type(value) is not int:  # bool is an int, and 8.7 would be cut to 8
        raise ValueError(f"{key}: expected a size, found {value!r}")
    return value


def head_dim(config: Config) -> int:
    """Channels of an attention head: as the config says, or what there is for each of the query heads."""
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    return size(config, "hidden_size") // size(config, "num_attention_heads")


def listed_as_sparse(config: Config, layer: int, dense: int) -> bool:
    """Whether `mlp_layer_types` makes a block a MoE block; where there is no list, all but the first `dense` are.

    Layers of multi-token prediction, which are numbered on, are in no list, and have experts.
    """
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return layer >= dense
    if not isinstance(kinds, list) or not {"dense", "sparse"}.issuperset(kinds):
        raise ValueError("mlp_layer_types: expected a list of dense or sparse")
    return layer >= len(kinds) or bool(layer >= 0 and kinds[layer] == "sparse")


def untied(config: Config, _layer: int) -> bool:
    """The output head is a tensor of its own."""
    return not config.get("tie_word_embeddings", False)


def tied(config: Config, layer: int) -> bool:
    """The output head is the embeddings."""
    return not untied(config, layer)


def attention_bias(config: Config, _layer: int) -> bool:
    """The linear layers of attention have biases."""
    return bool(config.get("attention_bias"))


def conditions(moe: Condition | None = None, **more: Condition) -> dict[str, Condition]:
    """Name what many families ask of a block; with `moe`, also whether it is a MoE block or a dense one."""
    usual: dict[str, Condition] = {"attention bias": attention_bias, "tied": tied, "untied": untied, **more}
    return usual if moe is None else {**usual, "moe": moe, "dense": lambda config, layer: not moe(config, layer)}


def is_sparse(config: Config, layer: int, dense_key: str = "first_k_dense_replace", dense: int = 0) -> bool:
    """Tell a MoE block by `mlp_layer_types`, or where there is none by its number, dense ones coming first."""
    return listed_as_sparse(config, layer, int(config.get(dense_key, dense) or 0))


def _key_heads(config: Config) -> int:
    return size(config, "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads")


HEADS: Final[Mapping[str, Symbol]] = {
    "D": head_dim,
    "H": "hidden_size",
    "KV": _key_heads,
    "Q": "num_attention_heads",
    "V": "vocab_size",
}
"""What the symbols of `ATTENTION` and `EMBEDDINGS` mean in most families."""


def merged(*mlps: str) -> dict[str, tuple[str, ...]]:
    """What vLLM merges in most families: the projections that attention begins with, and those of gated MLPs."""
    attention = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    return attention | {f"{each}.gate_up_proj": (f"{each}.gate_proj", f"{each}.up_proj") for each in mlps}


def types(*without: str, **more: str) -> dict[str, str]:
    """Values that transformers takes: the usual ones of `TYPES`, but for some keys, and `more`."""
    return {**{key: words for key, words in TYPES.items() if key not in without}, **more}


TYPES: Final = {
    "attention_bias": "bool",
    "attention_dropout": "float or int",
    "bos_token_id": "int or null",
    "eos_token_id": "int or list of int or null",
    "hidden_act": "str",
    "hidden_size": "int",
    "initializer_range": "float",
    "max_position_embeddings": "int",
    "moe_intermediate_size": "int",
    "num_attention_heads": "int",
    "num_experts_per_tok": "int",
    "num_hidden_layers": "int",
    "num_key_value_heads": "int",
    "output_router_logits": "bool",
    "pad_token_id": "int or null",
    "rms_norm_eps": "float",
    "rope_parameters": "object or null",
    "tie_word_embeddings": "bool",
    "use_cache": "bool",
    "vocab_size": "int",
}
"""Values that transformers takes in every family here; a test compares."""


EMBEDDINGS: Final = (
    Template("{decoder}embed_tokens.weight", "V,H", "embeddings"),
    Template("{decoder}norm.weight", "H", "norms"),
    Template("{head}.weight", "V,H", "lm head", "untied"),
    Template("{head}.weight", "V,H", "lm head", "tied", optional=True),  # stored all the same: harmless, and common
)

NORMS: Final = (
    Template("input_layernorm.weight", "H", "norms"),
    Template("post_attention_layernorm.weight", "H", "norms"),
)

ATTENTION: Final = (
    Template("self_attn.q_proj.weight", "Q*D,H", "attention"),
    Template("self_attn.k_proj.weight", "KV*D,H", "attention"),
    Template("self_attn.v_proj.weight", "KV*D,H", "attention"),
    Template("self_attn.o_proj.weight", "H,Q*D", "attention"),
    Template("self_attn.q_proj.bias", "Q*D", "attention", "attention bias"),
    Template("self_attn.k_proj.bias", "KV*D", "attention", "attention bias"),
    Template("self_attn.v_proj.bias", "KV*D", "attention", "attention bias"),
    Template("self_attn.o_proj.bias", "H", "attention", "attention bias"),
)

QK_NORMS: Final = (
    Template("self_attn.q_norm.weight", "D", "norms"),
    Template("self_attn.k_norm.weight", "D", "norms"),
)

GROUPED_ATTENTION: Final = (
    Template("self_attn.k_proj.weight", "KV*D,H", "attention", "attention"),
    Template("self_attn.v_proj.weight", "KV*D,H", "attention", "attention"),
    Template("self_attn.o_proj.weight", "H,Q*D", "attention", "attention"),
    Template("self_attn.q_norm.weight", "D", "norms", "attention"),
    Template("self_attn.k_norm.weight", "D", "norms", "attention"),
    Template("self_attn.q_proj.bias", "?", "attention", "attention bias"),
    Template("self_attn.k_proj.bias", "KV*D", "attention", "attention bias"),
    Template("self_attn.v_proj.bias", "KV*D", "attention", "attention bias"),
    Template("self_attn.o_proj.bias", "H", "attention", "attention bias"),
)
