"""Names of modules in quantization configs, carried along when tensors are renamed, renumbered or dropped.

Every dialect says in its own way which modules it means: full names, parts of names, globs, regular expressions under
`re.match`, `re.search` or `re.fullmatch`, as elements of lists, keys of objects or plain values. Whatever the dialect,
what is written must say of every module that stays, under its new name, what was said of it under its old one. That is
held for each reading of a string that a client has, on all modules; what cannot be rewritten so is refused.

Readings, from the clients' sources: transformers' `should_convert_module`, compressed-tensors' `match_name`,
auto-round's `get_layer_config`, the `dynamic` of GPTQModel, and vLLM's `is_layer_skipped` with and without substrings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any, Final, NamedTuple

from shardxform.errors import PlanError, SchemeError
from shardxform.model.layout import COMPANIONS, Layout

__all__ = [
    "ASYMMETRIC",
    "DECLARATIONS",
    "QUANTIZATION",
    "Changes",
    "declarations",
    "declared_in",
    "declares",
    "is_mlx",
    "method_of",
    "modules_moved",
    "tells_experts_apart",
    "undeclared",
    "with_declared",
    "with_renamed",
    "without_empty",
]

DECLARATIONS: Final = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json under which a quantization is declared, at any depth; the last one is MLX's."""

QUANTIZATION: Final = "quantization"
"""The key of config.json that mlx-lm reads; it writes `quantization_config` beside it, the same."""

ASYMMETRIC: Final = "asymmetric"
"""What a config of MLX is marked with as it is read, where headers tell that biases are no multiples of scales."""

Reading = Callable[[str], bool]

_PLAIN: Final = re.compile(r"[\w-]+(\.[\w-]+)*")
_NUMBERLESS: Final = re.compile(r"(re:|-:|\+:)?(?:[A-Za-z_-]|\\\.|\.\*|\.(?=[A-Za-z_])|[()|^$])*")
"""Patterns that take a number for any other. Numbers are parts of names by themselves, and only `.*` can match them: a
single character that a letter follows can not."""
_LAYER: Final = re.compile(r"layers\W{1,4}[0-9]+")
_WORD: Final = re.compile(r"[A-Za-z]\w*([:/-][A-Za-z]\w*)*|[0-9.]+")
"""`e4m3`, or a version: what has no number after a dot and a letter elsewhere means no expert by its number."""
_SIGNED: Final = ("-:", "+:")
_SIGNS: Final = (*"*[(|?+^$\\.", "re:", *_SIGNED)
_BOUNDARY: Final = r"(?:(?<=\.)|(?=\.|$))"  # after which transformers lets a pattern end
_SELECTS: Final = frozenset(
    {"block_name_to_quantize", "modules_in_block_to_quantize", "quant_block_list", "to_quant_block_names"}
)
"""Keys whose names are what is quantized: left empty, they would mean everything."""


class _Entry(NamedTuple):
    """A string before and after, None when it is dropped.

    `says` is what it says of the modules that it matches; `selects` whether it may match any.
    """

    old: str
    new: str | None
    says: object
    selects: bool


@dataclass(frozen=True)
class Changes:
    """What becomes of every module.

    Attributes:
        modules: old name -> new name, empty for a module that is dropped. Modules that hold others are among them, and
            names that a module has only in clients, such as those of merged and of un-fused ones.
        prefix: what decoder names begin with, before and after.

    """

    modules: Mapping[str, str]
    prefix: tuple[str, str]

    @cached_property
    def kept(self) -> list[tuple[str, str]]:
        """Old and new name of every module that stays."""
        return [(old, new) for old, new in self.modules.items() if new]

    @cached_property
    def moved(self) -> list[tuple[str, str]]:
        """Those whose name changes."""
        return [(old, new) for old, new in self.kept if old != new]

    @cached_property
    def dropped(self) -> list[str]:
        """Names of modules that are dropped, but for the pruned experts of a layer that keeps others."""
        at = ".experts."
        return [
            old for old, new in self.modules.items() if not (new or self.modules.get(old.partition(at)[0] + at[:-1]))
        ]

    @cached_property
    def words(self) -> frozenset[str]:
        """Every part of a name that is no number."""
        parts: set[str] = set()
        for name in self.modules:
            above, _, last = name.rpartition(".")
            parts.add(last)
            if above not in self.modules:  # as a rule what holds a module is one too
                parts.update(above.split("."))
        return frozenset(part for part in parts if not part.isdigit())

    @property
    def renumbers_only(self) -> bool:
        """Whether no name changes but in its numbers."""
        return self.prefix[0] == self.prefix[1]


def method_of(config: Mapping[str, object]) -> object:
    """What a `quantization_config` calls its method: `quant_method`, or `mlx` of one that has a mode in its place."""
    method = config.get("quant_method")
    return "mlx" if method is None and "mode" in config else method


def is_mlx(config: Mapping[str, object]) -> bool:
    """Whether a config is that of a quantized checkpoint of MLX, as `mlx.single` gives it."""
    declared = config.get("quantization_config")
    return isinstance(declared, Mapping) and method_of(declared) == "mlx" and QUANTIZATION not in config


def declarations(config: Mapping[str, object], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """List the declarations of a quantization in a config, at any depth, with their paths; null and {} declare none."""
    for key, value in config.items():
        if key in DECLARATIONS:
            if value:
                yield (*path, key), value
        elif isinstance(value, Mapping):
            yield from declarations(value, (*path, key))


def declares(config: Mapping[str, object]) -> bool:
    """Whether a config says of weights that they are quantized, at its top level or in the config of the decoder."""
    return any(path[-1] == DECLARATIONS[0] for path, _ in declarations(config))


def declared_in(config: Mapping[str, object]) -> Any:  # noqa: ANN401
    """What a config says of its quantized weights, at its top level or in the config of the decoder; None for nothing.

    Raises:
        SchemeError: it says two things.

    """
    found = [(path, value) for path, value in declarations(config) if path[-1] == DECLARATIONS[0]]
    for path, value in found[1:]:
        if value != found[0][1]:
            raise SchemeError(f"{'.'.join(path)} and {'.'.join(found[0][0])} differ; expected one")
    return found[0][1] if found else None


def tells_experts_apart(config: Mapping[str, object]) -> bool:
    """Whether a declaration of a quantization may say of one routed expert what it does not say of another.

    Only what is made of words, layers' numbers and `.*` is known not to; see `_is_numberless`.
    """
    texts = {_LAYER.sub("layers", text) for _, value in declarations(config) for text in _strings(value)}
    return not all(_is_numberless(text) or _WORD.fullmatch(text) for text in texts)


def _strings(value: object) -> Iterator[str]:
    """Every string in what JSON holds, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _strings(each)


def undeclared(config: Mapping[str, object]) -> dict[str, Any]:
    """The config of the same weights in 16 bits."""
    return {
        key: undeclared(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != DECLARATIONS[0]
    }


def with_declared(config: Mapping[str, object], declared: Mapping[str, object]) -> dict[str, Any]:
    """Say at the top level, and nowhere else, how weights are quantized."""
    kept = {
        key: undeclared(value) if isinstance(value, Mapping) and key != DECLARATIONS[0] else value
        for key, value in config.items()
    }
    return {**kept, DECLARATIONS[0]: declared}


def without_empty(config: Mapping[str, object]) -> dict[str, Any]:
    """Leave out declarations that are `{}`: they declare nothing, and transformers refuses to load what has one."""
    return {
        key: without_empty(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in DECLARATIONS or value != {}
    }


def with_renamed(config: Mapping[str, object], changes: Changes) -> dict[str, Any]:
    """Give the config with every name of a module in its declarations of quantization as the module is now called.

    Raises:
        PlanError: a string would say of some module, once renamed, what it did not say before, and cannot be rewritten.

    """
    return _renamed_below(config, _Renamer(changes), "")


def _renamed_below(config: Mapping[str, object], renamer: _Renamer, home: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in DECLARATIONS and value:
            out[key] = renamer.value(value, home + key)
        elif isinstance(value, Mapping):
            out[key] = _renamed_below(value, renamer, f"{home}{key}.")
        else:
            out[key] = value
    return out


# -- modules ------------------------------------------------------------------------------------------------------


def modules_moved(
    layout: Layout, tensors: Mapping[str, str], keeps: Mapping[tuple[str, int], Sequence[int]]
) -> dict[str, str]:
    """What becomes of every module of a checkpoint, from what becomes of its tensors.

    Args:
        layout: of the checkpoint.
        tensors: old name -> new name of every tensor, empty when it is dropped.
        keeps: ids of the experts that stay, by scope and layer, where some do not.

    """
    out: dict[str, str] = {}
    gone: dict[str, None] = {}
    for old, new in tensors.items():
        place = layout.places.get(old)
        if place and place.template.variant == "fused" and place.layer is not None:
            out[old] = new
            if not new:
                gone[old] = None
            ids = keeps.get((place.scope, place.layer), range(layout.num_experts))
            out.update(_unfused(old, new, layout, ids))
        elif not (place and place.expert is not None) and not old.endswith((".weight", ".bias")):
            out[old] = new
        inner, outer = old.rpartition(".")[0], new.rpartition(".")[0]
        while not new and inner and inner not in gone:  # what holds one that is gone is among them too
            gone[inner] = None
            inner = inner.rpartition(".")[0]
        while new and inner and out.get(inner, "") != outer:
            if outer:
                out[inner] = outer
            else:
                out.setdefault(inner, inner)  # it holds what stays, though not below a name of its own
            inner, outer = inner.rpartition(".")[0], outer.rpartition(".")[0]
    for name in gone:
        out.setdefault(name, "")
    out.update(_merged(layout, out))
    return out


def _unfused(old: str, new: str, layout: Layout, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Names that clients give the experts of a fused tensor."""
    home, stack = layout.family.experts.home, layout.places[old].template.name
    stem, now = old.removesuffix(stack) + home, new.removesuffix(stack) + home
    places = {expert: at for at, expert in enumerate(ids)} if new else {}
    for expert in range(layout.num_experts):
        to = f"{now}.{places[expert]}" if expert in places else ""
        yield f"{stem}.{expert}", to
        for part in layout.family.experts.projections:
            yield f"{stem}.{expert}.{part}", to and f"{to}.{part}"


def _merged(layout: Layout, modules: Mapping[str, str]) -> dict[str, str]:
    """Names that clients give the modules that they merge."""
    out: dict[str, str] = {}
    firsts = {members[0]: merged for merged, members in layout.family.merged.items()}
    ends = tuple("." + first for first in firsts)
    for old, new in modules.items():
        for first, merged in firsts.items() if old.endswith(ends) else ():
            if old.endswith("." + first):
                out[old.removesuffix(first) + merged] = new and new.removesuffix(first) + merged
    return out


# -- strings ------------------------------------------------------------------------------------------------------


class _Renamer:
    """Rewrites the strings of one declaration."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def value(self, value: object, path: str) -> Any:  # noqa: ANN401
        """Rewrite whatever JSON holds at `path`."""
        if isinstance(value, Mapping):
            return self._object(value, path)
        if isinstance(value, list):
            return self._list(value, path)
        return self._text(value, path) if isinstance(value, str) else value

    def _object(self, value: Mapping[str, object], path: str) -> dict[str, Any]:
        entries = [self._entry(key, (key.startswith("-:"), repr(item)), by_part=False) for key, item in value.items()]
        self._check(entries, path)
        out: dict[str, Any] = {}
        for entry in entries:
            if entry.new is None:
                continue
            item = self.value(value[entry.old], f"{path}.{entry.old}")
            if out.setdefault(entry.new, item) != item:
                raise PlanError(
                    f"config.json: {path}: {entry.old!r} and another key would both be called {entry.new!r}"
                )
        return out

    def _list(self, value: Sequence[object], path: str) -> list[Any]:
        entries = [self._entry(item) for item in value if isinstance(item, str)]
        self._check(entries, path)
        names = iter(entries)
        out: list[Any] = []
        for item in value:
            if not isinstance(item, str):
                out.append(self.value(item, path))
                continue
            entry = next(names)
            if entry.new is not None and (entry.new == entry.old or entry.new not in out):
                out.append(entry.new)
        if not out and value and path.rpartition(".")[2] in _SELECTS:
            raise PlanError(f"config.json: {path} names only what is dropped; nothing that is kept is quantized")
        return out

    def _text(self, value: str, path: str) -> str:
        """Rewrite a plain value, or names that are joined by commas."""
        parts = value.split(",") if all(_PLAIN.fullmatch(part.strip()) for part in value.split(",")) else [value]
        entries = [self._entry(part, by_part=False) for part in parts]
        self._check(entries, path)
        kept = list(dict.fromkeys(entry.new for entry in entries if entry.new is not None))
        if not kept:
            raise PlanError(f"config.json: {path}: {value!r} names only what is dropped")
        return ",".join(kept) if [entry.new for entry in entries] != parts else value

    def _entry(self, text: str, says: object = True, *, by_part: bool = True) -> _Entry:
        """Rewrite a string, unproven yet.

        Without `by_part`, pieces of words select nothing, and single words drop nothing: most keys and plain values
        mean no module at all.
        """
        selects = self._selects(text, by_part)
        return _Entry(text, self._renamed(text, by_part) if selects else text, says, selects)

    def _renamed(self, text: str, by_part: bool) -> str | None:
        """What `text` is in the output, None when it names only what is dropped."""
        if (full := self._full(text)) is not None:
            return full or None
        tried = [text, *self._under_new_prefix(text)]
        if len(tried) > 1 and (text.startswith(self._changes.prefix[0]) or not self._matches(text)):
            tried = [*tried[1:], text]
        found = next((each for each in tried if self._differs(text, each) is None), tried[0])
        whole = by_part or "." in text or not _PLAIN.fullmatch(text)
        return None if found == text and whole and self._names_only_dropped(text) else found

    def _full(self, text: str) -> str | None:
        """What the full name of a module, or of a tensor of it, becomes, empty when dropped; None of other strings."""
        above, _, last = text.rpartition(".")
        is_tensor = text not in self._changes.modules and (last in COMPANIONS or last in ("weight", "bias"))
        bare = above if is_tensor else text
        new = self._changes.modules.get(bare)
        return new and new + text.removeprefix(bare)

    def _selects(self, text: str, by_part: bool) -> bool:
        """Whether a string may select modules: it is a pattern, or has a word in common with their names."""
        if not _PLAIN.fullmatch(text):
            return any(sign in text for sign in _SIGNS)
        words = re.findall(r"[^\W\d][\w-]*", text)
        if by_part:
            return any(word in whole for word in words for whole in self._changes.words)
        return any(word in self._changes.words for word in words)

    def _under_new_prefix(self, text: str) -> list[str]:
        """Ways to write a string for another decoder prefix, the likeliest first."""
        old, new = self._changes.prefix
        more = old.removeprefix(new)
        name = more.removesuffix(".")
        ways = [(old, new), (more, ""), (f".{name}", ""), (name, "")]
        found = []
        for before, after in ways if old != new and old.startswith(new) else ():
            for one, other in ((before, after), (re.escape(before), re.escape(after))):
                if one in text:
                    found.append(text.replace(one, other))
        return list(dict.fromkeys(found))

    # -- proof ----------------------------------------------------------------------------------------------------

    def _check(self, entries: Sequence[_Entry], path: str) -> None:
        """Hold what the strings of one list or object say of each module before and after.

        Raises:
            PlanError: names the string, and a module of which it would say something else.

        """
        selecting = [entry for entry in entries if entry.selects]
        odd = next((entry for entry in selecting if self._is_unfaithful(entry)), None)
        if odd and (other := self._changes_together(selecting)):
            old, new = other
            moved = f"{old} becomes {new}" if old != new else f"such as {old}"
            raise PlanError(
                f"config.json: {path}: {odd.old!r} would not mean the same modules in the output: {moved};"
                " write out their full names there, which are renamed with them"
            )

    def _is_unfaithful(self, entry: _Entry) -> bool:
        if self._full(entry.old) == (entry.new or "") and not entry.old.rpartition(".")[2].isdigit():
            return False  # a full name, and no beginning of others: no reading takes it for anything else
        if entry.new is None:
            return any(reading(old) for reading in _readings(entry.old) for old, _ in self._changes.kept)
        return self._differs(entry.old, entry.new) is not None

    def _differs(self, old: str, new: str) -> tuple[str, str] | None:
        """The first module of which `new` does not say, by its new name, what `old` says; None when there is none."""
        if old == new and self._changes.renumbers_only and _is_numberless(old):
            return None  # the same text between other numbers
        pairs = self._changes.moved if old == new else self._changes.kept
        for before, after in zip(_readings(old), _readings(new), strict=True):
            said = {one: before(one) for one, _ in pairs}
            for one, other in pairs:
                known = said.get(other) if old == new else None
                if said[one] != (after(other) if known is None else known):
                    return one, other
        return None

    def _changes_together(self, entries: Sequence[_Entry]) -> tuple[str, str] | None:
        """The first module of which all strings together say something else than before; None when there is none.

        Strings may make up for each other, such as one for either prefix. What they say of a module is the list of what
        each one says that matches it, in order, without repetitions.
        """
        count = max(len(_readings(entry.old)) for entry in entries)
        before = [(_padded(_readings(entry.old), count), entry.says) for entry in entries]
        after = [(_padded(_readings(entry.new), count), entry.says) for entry in entries if entry.new is not None]
        for reading in range(count):
            for old, new in self._changes.kept:
                said = dict.fromkeys(says for readings, says in before if readings[reading](old))
                if said != dict.fromkeys(says for readings, says in after if readings[reading](new)):
                    return old, new
        return None

    def _matches(self, text: str) -> bool:
        return any(reading(name) for reading in _readings(text) for name in self._changes.modules)

    def _names_only_dropped(self, text: str) -> bool:
        readings = _readings(text)
        if not any(reading(name) for reading in readings for name in self._changes.dropped):
            return False
        return not any(reading(old) for reading in readings for old, _ in self._changes.kept)


# -- how clients read a string ------------------------------------------------------------------------------------


def _readings(text: str) -> tuple[Reading, ...]:
    """Every way in which a client may take a string for a selection of modules; as many for strings of one kind."""
    if text.startswith("re:"):
        return (_pattern(text[3:], "match"),)
    if text.startswith(_SIGNED):
        return _pattern(text[2:], "match"), _pattern(text[2:], "search")
    if _PLAIN.fullmatch(text):  # of which a regular expression selects the same
        whole = text + "."
        return (
            lambda name: name == text or name.startswith(whole),
            lambda name: name.startswith(text),
            lambda name: name.endswith(text),
            lambda name: text in name,
        )
    ends = _pattern(f"(?:{text}){_BOUNDARY}", "match")
    anywhere = _pattern(text, "match" if _begins_anywhere(text) else "search")
    return (
        lambda name: name.endswith(text) or ends(name),
        lambda name: text in name or anywhere(name),
        _pattern(text, "fullmatch"),
        _pattern(translate(text), "match"),
    )


def _is_numberless(text: str) -> bool:
    """Whether a string means the same of names that differ in nothing but their numbers, in whatever way it is read."""
    return bool(_NUMBERLESS.fullmatch(text) or (_PLAIN.fullmatch(text) and not re.search(r"\d", text)))


def _begins_anywhere(text: str) -> bool:
    """Whether a pattern begins with `.*` in each of its alternatives, so that a match is what a search finds."""
    bare, before = re.sub(r"\\.|\[[^\]]*\]", "", text), ""
    while bare != before:
        bare, before = re.sub(r"\([^()]*\)", "", bare), bare
    return text.startswith(".*") and "|" not in bare


def _padded(readings: tuple[Reading, ...], count: int) -> tuple[Reading, ...]:
    """As many readings as the other strings of a list have, whose one reading holds whatever theirs is."""
    return (readings * count)[:count]


def _pattern(text: str, how: str) -> Reading:
    try:
        match = getattr(re.compile(text), how)
    except (re.error, RecursionError, OverflowError):
        return lambda _name: False  # no client can read it so
    return lambda name: match(name) is not None
