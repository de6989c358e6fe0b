"""Which layers have a tensor: ways in which configs say so, as text of an entry, each tried before it is believed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardxform.drafting.probe import LAYERS, Flag, Probe
from shardxform.model.families.base import Config, size

__all__ = ["Condition", "flag_condition", "joined", "layer_conditions"]

_INTERVALS: Final = (
    *("full_attention_interval", "sliding_window_pattern", "global_attn_every_n_layers", "layer_group_size"),
    *("attn_type_interval", "attention_interval"),
)
_MORE: Final = 13  # layers on which a rule is tried again
_DENSE_OR_NOT: Final = {"dense", "sparse"}
_MOE: Final = "_is_moe(config, layer)"


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition of an entry.

    Attributes:
        name: in the entry.
        body: an expression of `config` and `layer`.
        helpers: functions that it calls, by name.
        whole: it holds only for configs with all lists of layers, since nothing says what is meant without them.

    """

    name: str
    body: str
    helpers: Mapping[str, str]
    whole: bool = False

    @property
    def layered(self) -> bool:
        """Whether layers differ by it."""
        return "layer)" in self.body

    @property
    def text(self) -> str:
        """What stands in the entry's `conditions`."""
        if self.body == _MOE:
            return "_is_moe"
        return f"lambda config, {'' if self.layered else '_'}layer: {self.body}"

    def layers(self, config: Config) -> frozenset[int]:
        """Where it holds.

        Raises:
            LookupError, TypeError: a key that it reads is not there.

        """
        names: dict[str, Any] = {"Config": Config, "size": size}
        exec("from __future__ import annotations\n" + "\n".join(self.helpers.values()), names)  # noqa: S102 - made here
        test: Callable[[Config, int], bool] = eval(f"lambda config, layer: {self.body}", names)  # noqa: S307
        return frozenset(layer for layer in range(LAYERS) if test(config, layer))


def joined(conditions: tuple[Condition, ...]) -> Condition:
    """All of several."""
    if len(conditions) == 1:
        return conditions[0]
    helpers = {name: text for each in conditions for name, text in each.helpers.items()}
    bodies = [f"({each.body})" if " or " in each.body else each.body for each in conditions]
    names = ", ".join(each.name for each in conditions)
    return Condition(names, " and ".join(bodies), helpers, any(each.whole for each in conditions))


def flag_condition(probe: Probe, flag: Flag, *, set_as_usual: bool) -> Condition:
    """The condition that a key is as it is in the samples, or as `flag` has it."""
    key = probe.stored(flag.key)
    words = key.removeprefix("use_").removeprefix("num_").replace("_", " ")
    if isinstance(flag.value, bool):
        default = probe.fields[flag.key]
        found = f'config.get("{key}", {default})' if default else f'config.get("{key}")'
        wanted = flag.value is not set_as_usual
        return Condition(words, f"bool({found})", {}) if wanted else Condition(f"no {words}", f"not {found}", {})
    if key == "q_lora_rank":
        words, other = "query rank", "full query"
    else:
        words, other = words, f"no {words}"
    if flag.value is None:
        test = "is not None" if set_as_usual else "is None"
        return Condition(words if set_as_usual else other, f'config.get("{key}") {test}', {})
    body = f'bool(config.get("{key}"))' if set_as_usual else f'not config.get("{key}")'
    return Condition(words if set_as_usual else other, body, {})


# -- layers ------------------------------------------------------------------------------------------------------------


def layer_conditions(probe: Probe) -> list[Condition]:
    """Conditions by layer that configs of this type can express, single ones first, then pairs."""
    single = [*_moe_conditions(probe)]
    kinds = []
    for key, listed in probe.base.config.items():
        if _lists_kinds(listed) and set(listed) != _DENSE_OR_NOT:
            kinds += list(_kind_conditions(probe, key, listed))
    pairs = [joined(pair) for pair in itertools.product(kinds, single)]
    either = [
        Condition(f"{a.name} or {b.name}", f"{a.body} or {b.body}", a.helpers, a.whole)
        for a, b in itertools.combinations(kinds, 2)
        if len(kinds) > 2
    ]
    return [*single, *kinds, *either, *pairs]


def _lists_kinds(listed: object) -> bool:
    return (
        isinstance(listed, list)
        and len(listed) == LAYERS
        and all(isinstance(each, str) for each in listed)
        and len(set(listed)) > 1
    )


def _moe_conditions(probe: Probe) -> Iterator[Condition]:
    listed = probe.base.config.get("mlp_layer_types")
    whole = False
    if isinstance(listed, list) and set(listed) == _DENSE_OR_NOT:
        rule = _rule(probe, "mlp_layer_types", "sparse")
        whole = rule is None
        helper = 'def _is_moe(config: Config, layer: int) -> bool:\n    kinds = config.get("mlp_layer_types")\n'
        if rule:
            helper += f"    if kinds is None:\n        return {f'bool({rule})' if '%' in rule else rule}\n"
        else:
            helper = helper.replace('.get("mlp_layer_types")', '["mlp_layer_types"]')
        helper += '    return bool(kinds[layer] == "sparse")\n'
    elif (found := _counted(probe)) is not None:
        helper = "def _is_moe(config: Config, layer: int) -> bool:\n" + found
    else:
        return
    yield Condition("moe", _MOE, {"_is_moe": helper}, whole)
    yield Condition("dense", f"not {_MOE}", {"_is_moe": helper}, whole)


def _counted(probe: Probe) -> str | None:
    """The body of a function that tells MoE layers by counts in the config."""
    fields = probe.fields
    if "first_k_dense_replace" in fields:
        return f'    return layer >= int(config.get("first_k_dense_replace", {fields["first_k_dense_replace"]}))\n'
    if "num_dense_layers" in fields:
        return f'    return layer >= int(config.get("num_dense_layers", {fields["num_dense_layers"]}))\n'
    if "moe_layer_start_index" in fields:
        start, step = fields["moe_layer_start_index"], fields.get("moe_layer_interval", 1)
        return (
            '    end = config.get("moe_layer_end_index", -1)\n'
            '    last = size(config, "num_hidden_layers") - 1 if end == -1 else end\n'
            f'    first = config.get("moe_layer_start_index", {start})\n'
            f'    return bool((layer + 1) % config.get("moe_layer_interval", {step}) == 0 and first <= layer <= last)\n'
        )
    if "mlp_only_layers" in fields:
        body = '    step = int(config.get("decoder_sparse_step", 1))\n' if "decoder_sparse_step" in fields else ""
        tail = " and (layer + 1) % step == 0" if body else ""
        if usual := probe.config(without=("mlp_only_layers",)).get("mlp_only_layers"):
            body += '    dense = config.get("mlp_only_layers")\n'
            return body + f"    return layer not in ({usual} if dense is None else dense){tail}\n"
        return body + f'    return layer not in (config.get("mlp_only_layers") or ()){tail}\n'
    if "expert_layer_period" in fields:
        return (
            f'    period, offset = config.get("expert_layer_period", {fields["expert_layer_period"]}),'
            f' config.get("expert_layer_offset", {fields.get("expert_layer_offset", 0)})\n'
            "    return bool(layer % period == offset)\n"
        )
    return None


def _kind_conditions(probe: Probe, key: str, listed: list[str]) -> Iterator[Condition]:
    """A condition for every kind that a list of layers names."""
    function = "_kind" if key == "layer_types" else f"_{key.removesuffix('_types').removesuffix('_type')}_kind"
    common = max(sorted(set(listed)), key=listed.count)
    rule = None
    others = sorted(set(listed) - {common})
    if len(others) == 1:
        rule = _rule(probe, key, common)
    helper = f"def {function}(config: Config, layer: int) -> str:\n"
    if rule:
        helper += f'    types = config.get("{key}")\n    if types is None:\n'
        helper += f'        return "{common}" if {rule} else "{others[0]}"\n    return str(types[layer])\n'
    else:
        helper += f'    return str(config["{key}"][layer])\n'
    for kind in sorted(set(listed)):
        body = f'{function}(config, layer) == "{kind}"'
        yield Condition(kind.replace("_", " "), body, {function: helper}, rule is None)


def _rule(probe: Probe, key: str, value: str) -> str | None:
    """Where a list has `value` in a config that lacks it: an expression that transformers agrees with."""
    gone = (key, "first_k_dense_replace")
    usual = probe.config(without=gone).get(key)
    if not isinstance(usual, list) or not usual:
        return None
    holds = [each == value for each in usual]
    start = holds.index(True) if True in holds else len(holds)
    rules: list[tuple[str, dict[str, Any]]] = [
        (f'layer >= int(config.get("first_k_dense_replace", {start}))', {"first_k_dense_replace": start + 1}),
        (f"layer >= {start}", {}),
    ]
    if False in holds:
        step = holds.index(False) + 1
        rules += [
            (f'(layer + 1) % int(config.get("{name}", {step}))', {name: step + 1})
            for name in _INTERVALS
            if probe.config(without=gone, **{name: step + 1}).get(key) != usual
        ]
        rules.append((f"(layer + 1) % {step}", {}))
    for rule, over in rules:
        if all(_agrees(probe, key, value, rule, layers, {**more}) for layers in (LAYERS, _MORE) for more in ({}, over)):
            return rule
    return None


def _agrees(probe: Probe, key: str, value: str, rule: str, layers: int, over: dict[str, object]) -> bool:
    listed = probe.config(layers, without=(key, "first_k_dense_replace"), **over).get(key)
    found = [bool(eval(rule, {"config": over, "layer": layer})) for layer in range(layers)]  # noqa: S307 - made here
    return isinstance(listed, list) and [each == value for each in listed] == found
