"""Which modules a scheme quantizes, and why the others stay as they are: decided once, by names and shapes.

What config.json will say and what the shards will hold are both made from the one `Selection`, so they cannot differ.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardxform.base.tensors import FLOATS, TensorRef
from shardxform.errors import SchemeError
from shardxform.formats.matrices import Matrix, matrices_of
from shardxform.formats.scheme import Scheme
from shardxform.model.families.base import LINEAR_ROLES
from shardxform.model.layout import Layout
from shardxform.model.tied_head import is_tied

__all__ = ["Selection", "refuse_unread", "select"]

_BY_DEFAULT = "16-bit by default"
_ROUNDED = FLOATS - {"F64"}


@dataclass(frozen=True, slots=True)
class Selection:
    """Modules in table order, split into those to quantize and those that stay, with the reason.

    Attributes:
        quantized: modules to quantize.
        kept: module name -> reason it stays in its own dtype.
        kept_modules: the same modules.
        misfits: the ones among them that were wanted but whose shape does not fit, for the plan's report.

    """

    quantized: tuple[Matrix, ...]
    kept: Mapping[str, str]
    misfits: Mapping[str, str]
    kept_modules: tuple[Matrix, ...] = ()


def select(layout: Layout, tensors: Mapping[str, TensorRef], scheme: Scheme) -> Selection:
    """Decide for every module of a checkpoint or view.

    A shape that does not fit takes the modules that clients merge with it along, so that a merged module is never
    split between two schemes; a pattern of the user's that would split one is refused.

    Raises:
        SchemeError: patterns that split a merged module or match nothing; a module that is quantized already; nothing
            left to quantize.

    """
    modules = list(matrices_of(layout, tensors, scheme.expert_names))
    _refuse_idle_patterns(scheme, modules)
    reasons = {module.name: _reason(module, layout, scheme) for module in modules}
    misfit = functools.cache(scheme.encoding.misfit)  # of one shape, as a rule, for ten thousand experts
    misfits = {m.name: why for m in modules if not reasons[m.name] and (why := misfit(*m.shape))}
    groups = _merged(layout, modules)
    for members in groups:
        blocked = [name for name in members if name in misfits]
        for name in members if blocked else ():
            if not reasons[name]:
                misfits.setdefault(name, f"merged with {blocked[0]}")
    reasons.update(misfits)
    _refuse_split(groups, reasons)
    quantized = tuple(module for module in modules if not reasons[module.name])
    if not quantized:
        raise SchemeError("nothing to quantize: no module is selected and fits")
    kept = {name: why for name, why in reasons.items() if why}
    return Selection(quantized, kept, misfits, tuple(module for module in modules if module.name in kept))


def refuse_unread(layout: Layout, scheme: Scheme) -> None:
    """Refuse a format in which no client finds the experts of a family.

    Raises:
        SchemeError: names the formats that are left.

    """
    family = layout.family
    if scheme.format not in family.formats:
        raise SchemeError(
            f"`format` {scheme.format}: its loaders do not find experts of family {family.name}; they are read in"
            f" {' or '.join(family.formats)}"
        )


def _reason(module: Matrix, layout: Layout, scheme: Scheme) -> str:
    """Why a module stays as it is; empty when it is to be quantized. Shapes are judged later."""
    if module.weight.spec.dtype not in _ROUNDED:
        return f"dtype {module.weight.spec.dtype}"
    if any(fnmatchcase(module.name, pattern) for pattern in scheme.quantize):
        _refuse_unrunnable(module, scheme, layout)
        return ""
    if any(fnmatchcase(module.name, pattern) for pattern in scheme.keep_16bit):
        return "on request"
    if module.place.scope != "block" or module.place.template.role not in LINEAR_ROLES:
        return _BY_DEFAULT
    return _BY_DEFAULT if _is_kept(module.local, layout.family.keep_16bit) else ""


@functools.lru_cache(maxsize=1024)
def _is_kept(local: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(local, pattern) for pattern in patterns)


def _refuse_unrunnable(module: Matrix, scheme: Scheme, layout: Layout) -> None:
    """Refuse to quantize what clients would load as garbage or not at all."""
    role = "mtp" if module.place.scope == "mtp" else module.place.template.role
    if role in ("router", "embeddings", "vision", "mtp"):
        raise SchemeError(f"`quantize` selects {module.name}, but no client runs {role} weights as integers")
    if role == "lm head" and is_tied(layout):
        raise SchemeError(
            f"`quantize` selects {module.name}, but config.json ties it to the embeddings (tie_word_embeddings),"
            " which no client runs as integers"
        )
    if role == "lm head" and scheme.format == "compressed-tensors":
        raise SchemeError(f"`quantize` selects {module.name}, which vLLM cannot run in format compressed-tensors")


def _merged(layout: Layout, modules: Iterable[Matrix]) -> list[list[str]]:
    """Names of modules that clients merge: the family's groups per block, and all routed experts of a layer."""
    groups: defaultdict[tuple[str, int | None, str], list[str]] = defaultdict(list)
    for module in modules:
        place = module.place
        if module.expert is not None:
            groups[(place.scope, place.layer, "experts")].append(module.name)
            continue
        for merged, members in layout.family.merged.items():
            if module.local in members:
                groups[(place.scope, place.layer, merged)].append(module.name)
    return list(groups.values())


def _refuse_split(groups: Iterable[list[str]], reasons: Mapping[str, str]) -> None:
    for members in groups:
        kept = [name for name in members if reasons[name]]
        if kept and len(kept) != len(members):
            other = next(name for name in members if not reasons[name])
            raise SchemeError(
                f"clients merge {kept[0]} with {other}, so both need one scheme,"
                f" but the first stays 16-bit ({reasons[kept[0]]})"
            )


def _refuse_idle_patterns(scheme: Scheme, modules: Iterable[Matrix]) -> None:
    """A pattern that matches nothing is a typing error that would surface as a wrong checkpoint."""
    names = [module.name for module in modules]
    for field, patterns in (("keep_16bit", scheme.keep_16bit), ("quantize", scheme.quantize)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SchemeError(f"`{field}` {pattern!r} matches no module, such as {names[0]}")


def reasons_summary(selection: Selection) -> dict[str, int]:
    """Count kept modules by reason, for the plan."""
    return dict(Counter(selection.kept.values()))
