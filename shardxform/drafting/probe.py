"""Models of one type on the meta device, for configs that differ: in their sizes, or in one key.

No class is read as text. Which config key a dimension is shows when sizes change, and which key a tensor hangs on
shows when that key is flipped.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from shardxform.errors import FamilyError
from shardxform.model.families.base import COUNT_KEYS

__all__ = ["EXPERTS", "LAYERS", "Flag", "Probe", "Sample", "Shape"]

LAYERS: Final = 8
EXPERTS: Final = 6
_SAMPLES: Final = 5
_FEWEST: Final = 3
_TOP_KS: Final = (*("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k"),)
_GROUPS: Final = ("n_group", "num_expert_group")
_CORE: Final[Mapping[str, tuple[int, ...]]] = {  # sizes that must divide each other, or are counts
    "num_attention_heads": (4, 6, 8, 10, 12),
    "num_key_value_heads": (2, 3, 2, 5, 4),
    "hidden_size": (240, 264, 304, 520, 336),
    "linear_num_key_heads": (3, 2, 5, 4, 2),
    "linear_num_value_heads": (6, 8, 10, 12, 6),
    "shared_experts": (3, 2, 5, 4, 3),
    "vocab_size": (518, 614, 702, 822, 906),
}
_SIZES: Final = range(18, 402, 2)
_NO_SIZE: Final = re.compile(
    r"_token_id$|^max_|^model_max|window|layers|first_k|_step$|interval|_index$|pattern|freq|pretraining_tp|topk|top_k"
    r"|per_tok|group|moe_k$|_id$|period|offset|^mtp"
)
_STIRRED: Final[Mapping[str, Any]] = {  # so that there are dense layers to be seen, wherever a type can have them
    "first_k_dense_replace": 2,
    "num_dense_layers": 2,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense"] * 2 + ["sparse"] * (LAYERS - 2),
}
_COMMON: Final = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """The model of one config.

    Attributes:
        given: keys that were set, as config.json may hold them.
        config: all that transformers makes of them.
        tensors: names of modules' tensors, and their shapes.

    """

    given: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Flag:
    """A key whose other value takes tensors away, or brings others."""

    key: str
    value: object
    samples: tuple[Sample, ...]


class Probe:
    """Makes models of one type.

    Attributes:
        model_type, architecture: as in config.json.
        fields: keys that the config class declares, and what they are by default.
        declared: the same before the class completes them.
        hints: the types of those keys.
        aliases: other names of keys, and those under which transformers stores them.
        count_key, top_k_key, group_key: fields that count experts, experts per token, router groups, or empty.
        sizes: keys that may be dimensions.
        samples: models that differ in all sizes.
        flags: keys that decide what tensors there are.

    """

    def __init__(self, model_type: str, *, heed_head_dim: bool = True) -> None:
        """Make the models, with `head_dim` even if a class does not declare it and heeds it all the same.

        Raises:
            FamilyError: transformers has no such type, no text-only class of it, or it has no experts.

        """
        vars(logging)["set_verbosity_error"]()
        self.model_type = model_type
        self._kind, self._class = _classes(model_type)
        self.architecture = str(self._class.__name__)
        self.aliases: Mapping[str, str] = dict(self._kind.attribute_map)
        made = self._kind()
        own = [field for field in dataclasses.fields(self._kind) if field.name not in _COMMON]
        self.hints = {field.name: field.type for field in own}
        self.declared = {field.name: field.default for field in own}
        self.fields = {name: made.__dict__.get(self.stored(name)) for name in self.hints}
        self.count_key = next((name for name in self.fields if name in COUNT_KEYS), "")
        if not self.count_key:
            raise FamilyError(f"model_type '{model_type}': no config key of it counts routed experts")
        self.top_k_key = next((name for name in self.fields if name in _TOP_KS), "num_experts_per_tok")
        self.group_key = next((name for name in self.fields if name in _GROUPS), "")
        self._settings = self._settled(made.__dict__)
        self.sizes = [name for name in self.fields if self._is_size(name)]
        self.sizes = self._accepted()
        self.heeds_head_dim = heed_head_dim and self._heeds_head_dim()
        self.sizes += ["head_dim"] if self.heeds_head_dim else []
        self.samples = tuple(self._sampled({}))
        if len(self.samples) < _FEWEST:
            raise FamilyError(f"model_type '{model_type}': transformers makes no model of small configs: {self._error}")
        self.flags = tuple(self._flagged())

    # -- what is asked of it ------------------------------------------------------------------------------------

    @property
    def base(self) -> Sample:
        """The first sample."""
        return self.samples[0]

    @functools.cached_property
    def model(self) -> Any:  # noqa: ANN401
        """The model of `base`."""
        return self._model(dict(self.base.given))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensors of further layers that transformers passes over in silence."""
        patterns = sorted(self._class._keys_to_ignore_on_load_unexpected or ())
        return tuple(each for each in patterns if re.search("layers|mtp", each))

    def stored(self, key: str) -> str:
        """Under which name transformers stores a key."""
        return self.aliases.get(key, key)

    def nullable(self, key: str) -> bool:
        """Whether the class takes null for a key."""
        return type(None) in typing.get_args(self.hints.get(key))

    def sample(self, **over: Any) -> Sample | None:  # noqa: ANN401
        """The first sample with other values; None where transformers refuses them."""
        return self._sample({**self._values(0), **over})

    def config(self, layers: int = LAYERS, without: Collection[str] = (), **over: Any) -> Mapping[str, Any]:  # noqa: ANN401
        """What transformers makes of the config of the first sample with other values; nothing where it refuses."""
        given = {**self._values(0), "num_hidden_layers": layers}
        given = {key: value for key, value in given.items() if key not in without} | over
        try:
            return dict(self._kind(**given).to_dict())
        except Exception:  # of transformers, which differ by type
            return {}

    def released(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a release calls a tensor of a module, or its parts."""
        return dict(revert_weight_conversion(self.model, {name: value}))

    # -- samples ------------------------------------------------------------------------------------------------

    def _values(self, number: int) -> dict[str, Any]:
        """Keys of a sample."""
        others = random.Random(number).sample(_SIZES, len(self.fields) + 1)  # noqa: S311 - no secret
        out: dict[str, Any] = dict(self._settings)
        for at, key in enumerate(self.fields):
            if key in self.sizes:
                out[key] = self._value(key, number, others[at])
        if "head_dim" in self.sizes and "head_dim" not in self.fields:
            out["head_dim"] = others[-1]
        out[self.count_key] = EXPERTS + 2 * number
        return out

    def _value(self, key: str, number: int, other: int) -> int:
        if key.endswith("shared_experts"):
            return _CORE["shared_experts"][number]
        if key in _CORE:
            return _CORE[key][number]
        if key.endswith("key_value_heads"):
            return _CORE["num_key_value_heads"][number]
        if key.endswith("attention_heads"):
            return _CORE["num_attention_heads"][number] + _CORE["num_key_value_heads"][number]
        return other

    def _sampled(self, over: Mapping[str, object]) -> Iterator[Sample]:
        for number in range(_SAMPLES):
            if found := self._sample({**self._values(number), **over}):
                yield found

    def _sample(self, given: dict[str, object]) -> Sample | None:
        model = self._model(given)
        if model is None:
            return None
        return Sample(given, model.config.to_dict(), {name: tuple(v.shape) for name, v in model.state_dict().items()})

    def _model(self, given: Mapping[str, object]) -> Any:  # noqa: ANN401
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sizes are odd
                return self._class._from_config(self._kind(**given))
        except Exception as e:  # of transformers, which differ by type
            self._error = " ".join(str(e).split())[:200] or type(e).__name__
            return None

    # -- keys ---------------------------------------------------------------------------------------------------

    def _settled(self, whole: Mapping[str, object]) -> dict[str, Any]:
        """Keys that all samples share."""
        out: dict[str, Any] = {"num_hidden_layers": LAYERS, self.top_k_key: 2}
        out |= {key: 1 for key in (*_GROUPS, "topk_group") if key in self.fields}
        out |= {key: value for key, value in _STIRRED.items() if key in self.fields}
        out |= {key: None for key in ("pad_token_id",) if self.nullable(key)}
        layers = whole.get("num_hidden_layers")
        for key, value in self.fields.items():
            if isinstance(value, list) and len(value) == layers and key not in out and self.declared[key] is not None:
                out[key] = _shortened(value)
        return out

    def _is_size(self, key: str) -> bool:
        value = self.fields[key]
        if key in (self.count_key, *self._settings) or _NO_SIZE.search(key) or isinstance(value, bool):
            return False
        return isinstance(value, int) or (value is None and int in typing.get_args(self.hints[key]))

    def _accepted(self) -> list[str]:
        """Sizes that transformers takes together."""
        wanted = self.sizes
        if self.sample() is None:
            self.sizes = []
            self._settings = self._taken(self._settings)
            for key in sorted(wanted, key=lambda key: key not in _CORE):
                self.sizes.append(key)
                if self.sample() is None:
                    self.sizes.pop()
        return self.sizes

    def _taken(self, settings: Mapping[str, object]) -> dict[str, Any]:
        """Those of the keys that all samples share that transformers takes together."""
        taken = {"num_hidden_layers": settings["num_hidden_layers"]}
        for key, value in settings.items():
            self._settings = {**taken, key: value}
            if self.sample() is not None:
                taken[key] = value
        return taken

    def _heeds_head_dim(self) -> bool:
        if "head_dim" in self.fields or "head_dim" in self.aliases:
            return False
        found, other = self.sample(), self.sample(head_dim=98)
        return bool(found and other and other.tensors != found.tensors)

    def _flagged(self) -> Iterator[Flag]:
        base = self.base.tensors.keys()
        for key, value in self.fields.items():
            for other in self._others(key, value):
                found = self.sample(**{key: other})
                if found and found.tensors.keys() != base and key != "tie_word_embeddings":
                    yield Flag(key, other, tuple(self._sampled({key: other})))

    def _others(self, key: str, value: object) -> Iterator[object]:
        if isinstance(value, bool):
            yield not value
        elif key in self.sizes:
            if self.nullable(key):
                yield None
            if "shared" in key:
                yield 0


def _classes(model_type: str) -> tuple[Any, Any]:
    if model_type not in CONFIG_MAPPING:
        raise FamilyError(f"model_type '{model_type}': transformers does not know it either")
    kind: Any = CONFIG_MAPPING[model_type]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        text = getattr(kind, "sub_configs", {}).get("text_config")
        hint = f"; its text config is '{text.model_type}'" if text else ""
        raise FamilyError(f"model_type '{model_type}': transformers has no text-only class of it{hint}")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return kind, found[0] if isinstance(found, tuple) else found


def _shortened(values: list[object]) -> list[Any]:
    """A list with one entry a layer, of fewer layers and as many kinds as fit."""
    if not all(isinstance(each, (str, int)) for each in values):
        return values[:LAYERS]
    others = [each for each in dict.fromkeys(values) if each != values[0]]
    return (values[:1] + others + [values[-1]] * LAYERS)[:LAYERS]
