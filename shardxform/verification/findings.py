"""What verification finds: problems and warnings as values, and many of one kind put into few words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from shardxform.errors import PlanError
from shardxform.model.families.base import Scope
from shardxform.model.layout import Place

__all__ = ["Findings", "Item", "Problem", "Rounding", "VerifyReport", "WeightError", "collapse", "place_of", "spans"]

_SCOPES: Final[dict[Scope, str]] = {"root": "outside the layers", "block": "layer", "mtp": "MTP layer"}
_SCOPES["vision"] = "vision block"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: its kind, the place (a tensor, a file, layers and experts), and a sentence."""

    code: str
    where: str
    message: str


@dataclass(slots=True)
class Findings:
    """Gathers what is found, in the order in which it is found.

    Attributes:
        problems: what makes a checkpoint unsound.
        warnings: what a person should look at.
        named: tensors that some problem with names or shapes covers already.

    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def problem(self, code: str, where: str, message: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(code, _printable(where), _printable(message)))

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning."""
        self.warnings.append(Problem(code, _printable(where), _printable(message)))

    def refuse(self, source: object, but: Collection[str] = ()) -> None:
        """Refuse to write what would have these problems, those of codes in `but` apart; `source` shows them too.

        Raises:
            PlanError: says the first of them, and how many more there are.

        """
        if found := [problem for problem in self.problems if problem.code not in but]:
            first, more = found[0], len(found) - 1
            others = f" (and {more} more)" if more else ""
            raise PlanError(
                f"{source}: its output would not be sound: {first.where}: {first.message}{others};"
                f" see `shardxform verify {source}`"
            )

    def items(self, items: Collection[Item], num_experts: int, code: str = "") -> None:
        """Add one problem for every group of `items` that one line can tell; `code` replaces the items' own."""
        self.named.update(item.name for item in items)
        for group in collapse(items, num_experts):
            self.problem(code or group.code, group.where, group.message)

    def warn_items(self, items: Collection[Item], num_experts: int) -> None:
        """Add one warning for every group of `items` that one line can tell."""
        for group in collapse(items, num_experts):
            self.warn(group.code, group.where, group.message)


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor that something is said of."""

    code: str
    name: str
    place: Place
    detail: str

    @property
    def number(self) -> int | None:
        """Layer, or block of the vision tower; None outside both."""
        if self.place.scope != "vision":
            return self.place.layer
        return next((int(part) for part in self.name.split(".") if part.isdecimal()), None)

    @property
    def label(self) -> str:
        """The name as it is in every layer and expert."""
        if self.number is None:
            return self.name
        name = self.place.template.name
        return name.removesuffix("weight") + self.place.companion if self.place.companion else name


def collapse(items: Iterable[Item], num_experts: int) -> Iterator[Problem]:
    """Join what is said of one expert, then experts of which the same is said, then layers."""
    labels: dict[tuple[str, str, Scope, int | None, int], dict[str, str]] = {}
    rank: dict[str, int] = {}  # one order of labels for all places: tables of several shards have several
    for item in items:
        rank.setdefault(item.label, len(rank))
        expert = -1 if item.place.expert is None else item.place.expert
        labels.setdefault((item.code, item.detail, item.place.scope, item.number, expert), {})[item.label] = item.name
    experts: dict[tuple[str, str, Scope, int | None, tuple[str, ...]], list[int]] = {}
    for (code, detail, scope, number, expert), names in labels.items():
        what = tuple(sorted(names, key=rank.__getitem__))
        experts.setdefault((code, detail, scope, number, what), []).append(expert)
    layers: dict[tuple[str, str, Scope, tuple[int, ...], tuple[str, ...]], list[int]] = {}
    for (code, detail, scope, number, what), ids in experts.items():
        numbers = layers.setdefault((code, detail, scope, tuple(sorted(ids)), what), [])
        numbers.extend([] if number is None else [number])
    for (code, detail, scope, which, what), numbers in layers.items():
        count = len(which) * max(len(numbers), 1) * len(what)
        if count == 1:
            name = labels[code, detail, scope, numbers[0] if numbers else None, which[0]][what[0]]
            yield Problem(code, name, detail)
            continue
        where = place_of(scope, sorted(numbers))
        if which != (-1,):
            every = len(which) == num_experts > 1
            where += ", all experts" if every else f", expert{_s(which)} {spans(which)}"
        yield Problem(code, where, f"{detail}: {_braces(what)} ({count} tensors)")


def place_of(scope: Scope, numbers: Collection[int]) -> str:
    """Name layers: `layer 3`, `layers 0..39`."""
    return f"{_SCOPES[scope]}{_s(numbers)} {spans(numbers)}" if numbers else _SCOPES["root"]


def spans(numbers: Iterable[int], limit: int = 8) -> str:
    """Ascending numbers as `0..39` or `3, 7, 9..12`, cut short after `limit` spans."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in islice(found, limit))
    return text + (", ..." if len(found) > limit else "")


def _s(numbers: Collection[object]) -> str:
    return "s" if len(numbers) > 1 else ""


def _braces(labels: Sequence[str], limit: int = 4) -> str:
    """Names that differ in few parts as `mlp.{gate_proj,up_proj}.weight`; others as a list, cut short."""
    parts = [label.split(".") for label in labels]
    choices = [list(dict.fromkeys(part)) for part in zip(*parts, strict=False)]
    alike = len({len(part) for part in parts}) == 1
    if alike and math.prod(map(len, choices)) == len(labels) and max(map(len, choices)) <= limit:
        return ".".join(c[0] if len(c) == 1 else "{" + ",".join(c) + "}" for c in choices)
    return ", ".join(labels[:limit]) + (f" and {len(labels) - limit} more" if len(labels) > limit else "")


def _printable(text: str) -> str:
    """Show what a terminal must not be sent: names in a checkpoint are a stranger's."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -- report ------------------------------------------------------------------------------------------------------------
# What verification says in the end, as values.


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """How far one quantized weight is from the source's.

    Attributes:
        name: of the module, in the current spelling.
        relative_error: norm of the difference over the norm of the weight.
        clipped: weights beyond the range of their codes by more than half a step.
        moved: weights that are not at the nearest code, though near enough.

    """

    name: str
    relative_error: float
    clipped: int
    moved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Quantized weights held against the source's.

    Attributes:
        modules, differing: weights compared, and those among them that are no rounding of the source's.
        exact: whether all were rounded again from the source and are equal bit for bit, words and scales; otherwise
            they are within the bound of `verification.rounding`.
        repacked: whether the source is quantized, and it is its integers and scales that were compared; no errors then.
        taken_over: weights of which that is so, where `quantize` rounded others.
        weights, clipped, moved: elements in all of them; see `WeightError`.
        relative_error: as `WeightError` has it, over all of them.
        by_weight: one entry each, the worst first.

    """

    modules: int
    differing: int
    exact: bool
    repacked: bool
    weights: int
    clipped: int
    moved: int
    relative_error: float
    by_weight: tuple[WeightError, ...]
    taken_over: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What verification found.

    Attributes:
        problems: everything that is wrong; empty when the checkpoint is sound.
        warnings: what a person should look at.
        tensors, experts: how many there are, routed experts over all layers.
        unfinished: whether it is the output of a run that was stopped; nothing else was looked at then.
        bytes_scanned: of float tensors and parts of quantized weights that were looked through.
        bytes_compared, tensors_compared, tensors_differing: against the source, byte for byte.
        tensors_derived: those among them that hold no bytes of the source, but what its packed weights dequantize to,
            or its weights rounded again and dequantized.
        tensors_digested: tensors that are, by their digests, the very bytes that shardxform wrote.
        rounding: quantized weights against the source; None when there were none to compare.
        values_compared: tensors of OUT whose values were held against the source in any of these ways, all parts of
            quantized weights counted.
        values_left: how many others there are, by the reason: `healed`, as shardxform.json says; `tuned`, rounded with
            calibration text and dequantized; `unknown` otherwise. Only that they are finite was looked at, but for
            `values_near`. Empty without a source.
        values_near: how many of the healed ones are no farther from the source's than the recorded steps of healing can
            have moved them.
        rederived: weights that were derived from the source a second time and compared, by independent code; None where
            that was not asked for.

    """

    out: Path
    source: str | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    tensors: int
    experts: int
    unfinished: bool
    bytes_scanned: int
    bytes_compared: int
    tensors_compared: int
    tensors_differing: int
    tensors_derived: int
    tensors_digested: int
    rounding: Rounding | None
    values_compared: int
    values_left: Mapping[str, int]
    values_near: int = 0
    seconds: float
    peak_rss_bytes: int
    rederived: int | None = None

    @property
    def sound(self) -> bool:
        """Whether there is no problem; warnings do not count."""
        return not self.problems

    @property
    def tensors_healed(self) -> int:
        """Tensors that shardxform.json says were healed."""
        return self.values_left.get("healed", 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        paths = {"out": str(self.out), "source": self.source}
        return {"sound": self.sound, **asdict(self), "tensors_healed": self.tensors_healed, **paths}
